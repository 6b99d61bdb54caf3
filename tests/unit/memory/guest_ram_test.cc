#include "agent/memory/guest_ram.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cstring>
#include <random>

namespace baton::memory {
namespace {

RamBlock MemfdBlock(const std::string& id, uint64_t size) {
  UniqueFd fd(::memfd_create(id.c_str(), MFD_CLOEXEC));
  EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(size)), 0);
  auto block = RamBlock::FromFd(id, std::move(fd));
  EXPECT_TRUE(block.ok()) << block.status();
  return std::move(block).value();
}

std::vector<RamBlock> Blocks(std::initializer_list<uint64_t> sizes) {
  std::vector<RamBlock> blocks;
  for (uint64_t size : sizes) blocks.push_back(MemfdBlock("b", size));
  return blocks;
}

TEST(RamBlock, Populated_SkipsHoles) {
  RamBlock block = MemfdBlock("ram", 64 * kPageSize);
  block.base()[5 * kPageSize] = 1;
  block.base()[63 * kPageSize + 4095] = 1;
  auto populated = block.Populated();
  ASSERT_TRUE(populated.ok());
  EXPECT_EQ(populated->Count(), 2u);
  EXPECT_TRUE(populated->Test(5));
  EXPECT_TRUE(populated->Test(63));
}

TEST(RamBlock, Create_ClearsOldContentAndIsPrivate) {
  std::string path = "/dev/shm/baton-guest-ram-test-" + std::to_string(::getpid());
  {
    auto block = RamBlock::Create("ram", path, 8 * kPageSize);
    ASSERT_TRUE(block.ok()) << block.status();
    block->base()[0] = 42;
  }
  auto reopened = RamBlock::Open("ram", path);
  ASSERT_TRUE(reopened.ok());
  EXPECT_EQ(reopened->base()[0], 42);
  auto again = RamBlock::Create("ram", path, 4 * kPageSize);
  struct stat st;
  ASSERT_EQ(::stat(path.c_str(), &st), 0);
  ::unlink(path.c_str());
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->base()[0], 0);
  EXPECT_EQ(again->size(), 4 * kPageSize);
  EXPECT_EQ(st.st_mode & 0777, 0600u);
  EXPECT_EQ(again->inode(), st.st_ino);
  EXPECT_EQ(again->device(), st.st_dev);
}

TEST(RamBlock, BadFiles_AreRefusedWithTheirName) {
  auto missing = RamBlock::Open("ram", "/dev/shm/baton-does-not-exist");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_NE(Message(missing.status()).find("/dev/shm/baton-does-not-exist"), std::string::npos);
  EXPECT_EQ(RamBlock::Create("ram", "/dev/shm/x", 100).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(RamBlock::Open("ram", "/dev/null").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(GuestRam, SetLayout_RejectsBadRanges) {
  GuestRam ram(Blocks({16 * kPageSize, 4 * kPageSize}));
  const uint64_t p = kPageSize;
  EXPECT_TRUE(ram.SetLayout({{0, 8 * p, 0, 0}, {1 << 20, 8 * p, 0, 8 * p}, {8 * p, 4 * p, 1, 0}}).ok());
  EXPECT_FALSE(ram.SetLayout({{0, 8 * p, 0, 0}, {7 * p, p, 1, 0}}).ok()) << "overlap";
  EXPECT_FALSE(ram.SetLayout({{1, p, 0, 0}}).ok()) << "unaligned";
  EXPECT_FALSE(ram.SetLayout({{0, p, 2, 0}}).ok()) << "no such block";
  EXPECT_FALSE(ram.SetLayout({{0, 5 * p, 1, 0}}).ok()) << "too long";
  EXPECT_FALSE(ram.SetLayout({{0, p, 1, ~uint64_t{0} - p + 1}}).ok()) << "offset wraps";
  EXPECT_FALSE(ram.SetLayout({{~uint64_t{0} - p + 1, 2 * p, 0, 0}}).ok()) << "address wraps";
  EXPECT_FALSE(ram.SetLayout({{0, 0, 0, 0}}).ok()) << "empty";
  EXPECT_EQ(ram.layout().size(), 3u) << "a refused layout changes nothing";
}

TEST(GuestRam, FindAndAt) {
  GuestRam ram(Blocks({16 * kPageSize}));
  const uint64_t p = kPageSize;
  ASSERT_TRUE(ram.SetLayout({{0, 8 * p, 0, 0}, {1 << 20, 8 * p, 0, 8 * p}}).ok());
  auto place = ram.Find((1 << 20) + 5);
  ASSERT_TRUE(place.has_value());
  EXPECT_EQ(place->offset, 8 * p + 5);
  EXPECT_EQ(place->contiguous, 8 * p - 5);
  EXPECT_FALSE(ram.Find(8 * p).has_value());
  EXPECT_FALSE(ram.Find((1 << 20) + 8 * p).has_value());
  EXPECT_EQ(ram.At(p, 7 * p), ram.blocks()[0].base() + p);
  EXPECT_EQ(ram.At(p, 7 * p + 1), nullptr);
  EXPECT_EQ(ram.At(p, ~uint64_t{0}), nullptr);
}

// A log is merged to the right pages, whatever the alignment of the ranges to words of the log.
TEST(GuestRam, MergeGpaLog_MatchesPageByPage) {
  std::mt19937_64 random(11);
  GuestRam ram(Blocks({300 * kPageSize, 100 * kPageSize}));
  const uint64_t p = kPageSize;
  ASSERT_TRUE(
      ram.SetLayout({{3 * p, 101 * p, 0, 7 * p}, {130 * p, 90 * p, 1, 2 * p}, {300 * p, 64 * p, 0, 200 * p}})
          .ok());
  for (int round = 0; round < 50; ++round) {
    std::vector<uint64_t> log(1 + random() % 8);
    for (auto& word : log) word = random() & random() & random();
    PageSets out = ram.MakeSets();
    ram.MergeGpaLog(log.data(), log.size(), out);
    PageSets expected = ram.MakeSets();
    for (uint64_t page = 0; page < log.size() * 64; ++page) {
      if (!(log[page / 64] >> (page % 64) & 1)) continue;
      if (auto place = ram.Find(page * p)) expected[place->block].Set(place->offset / p);
    }
    for (size_t b = 0; b < out.size(); ++b) EXPECT_EQ(out[b].words(), expected[b].words());
  }
}

}  // namespace
}  // namespace baton::memory
