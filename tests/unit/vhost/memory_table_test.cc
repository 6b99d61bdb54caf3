#include "agent/vhost/memory_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

namespace baton::vhost {
namespace {

using testing::HasSubstr;

UniqueFd Memory(uint64_t size) {
  UniqueFd fd(::memfd_create("memory", MFD_CLOEXEC));
  EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(size)), 0);
  return fd;
}

std::vector<UniqueFd> One(UniqueFd fd) {
  std::vector<UniqueFd> fds;
  fds.push_back(std::move(fd));
  return fds;
}

TEST(MemoryTable, TranslatesAndReadsThroughTheFile) {
  UniqueFd fd = Memory(0x4000);
  ASSERT_EQ(::pwrite(fd.get(), "hello", 5, 0x1010), 5);
  MemoryTable table;
  ASSERT_TRUE(table.Replace({{0x100000, 0x3000, 0x7f0000000000, 0x1000}}, One(std::move(fd))).ok());
  EXPECT_EQ(table.ToGpa(0x7f0000000010, 5), 0x100010u);
  EXPECT_EQ(table.ToGpa(0x7f0000002fff, 1), 0x102fffu);
  EXPECT_EQ(table.ToGpa(0x7f0000002fff, 2), std::nullopt);
  EXPECT_EQ(table.ToGpa(0x7effffffffff, 1), std::nullopt);
  EXPECT_EQ(table.ToGpa(0x7f0000000000, ~uint64_t{0}), std::nullopt);
  char text[6] = {};
  ASSERT_TRUE(table.Read(0x100010, text, 5).ok());
  EXPECT_STREQ(text, "hello");
  EXPECT_FALSE(table.Read(0x102fff, text, 2).ok());
  EXPECT_FALSE(table.Read(0, text, 1).ok());
  EXPECT_EQ(table.last_gpa(), 0x102fffu);
}

TEST(MemoryTable, WritesAcrossPagesAtTheRegionsOffset) {
  UniqueFd fd = Memory(0x5000), mine = fd.Duplicate();
  MemoryTable table;
  ASSERT_TRUE(table.Replace({{0x100000, 0x4000, 0x7f0000000000, 0x1000}}, One(std::move(fd))).ok());
  ASSERT_TRUE(table.Write(0x100ffd, "hello", 5).ok());
  char text[8] = {};
  ASSERT_EQ(::pread(mine.get(), text, 7, 0x1ffc), 7);
  EXPECT_EQ(std::string(text, 7), std::string("\0hello\0", 7));
  EXPECT_FALSE(table.Write(0x103ffd, "hello", 5).ok());
}

TEST(MemoryTable, FileThatIsTooSmallOrNoFileIsRefusedAndTheTableStays) {
  MemoryTable table;
  ASSERT_TRUE(table.Replace({{0, 0x1000, 0, 0}}, One(Memory(0x1000))).ok());
  EXPECT_THAT(Message(table.Replace({{0, 0x2000, 0, 0}}, One(Memory(0x1000)))), HasSubstr("beyond its file"));
  EXPECT_THAT(Message(table.Replace({{0, 0x1000, 0, 0}}, One(UniqueFd(::eventfd(0, EFD_CLOEXEC))))),
              HasSubstr("not a memory file"));
  EXPECT_EQ(table.regions().size(), 1u);
}

// A mapping would end the process with SIGBUS here.
TEST(MemoryTable, FileThatIsTruncatedLaterGivesAnError) {
  UniqueFd fd = Memory(0x2000), mine = fd.Duplicate();
  MemoryTable table;
  ASSERT_TRUE(table.Replace({{0, 0x2000, 0, 0}}, One(std::move(fd))).ok());
  ASSERT_EQ(::ftruncate(mine.get(), 0), 0);
  uint64_t value = 0;
  EXPECT_THAT(Message(table.Read(0x1000, &value, sizeof value)), HasSubstr("truncated"));
  EXPECT_THAT(Message(table.Write(0x1000, &value, sizeof value)), HasSubstr("Bad address"));
}

TEST(MemoryTable, SlotsAreAddedAndRemovedByTheirNames) {
  MemoryTable table;
  MemRegion a{0, 0x1000, 0x1000000, 0}, b{0x1000, 0x1000, 0x1001000, 0};
  ASSERT_TRUE(table.Add(a, Memory(0x1000)).ok());
  ASSERT_TRUE(table.Add(b, Memory(0x1000)).ok());
  EXPECT_THAT(Message(table.Add(a, Memory(0x1000))), HasSubstr("overlap"));
  EXPECT_FALSE(table.Remove({0, 0x2000, 0x1000000, 0}).ok());
  MemRegion other_offset = a;
  other_offset.mmap_offset = 0x5000;  // does not matter
  EXPECT_TRUE(table.Remove(other_offset).ok());
  EXPECT_EQ(table.regions().size(), 1u);
}

}  // namespace
}  // namespace baton::vhost
