// What outlives a shim: found again whole, or not at all.
#include "agent/vhost/device_memo.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "tests/temp_dir.h"

namespace baton::vhost {
namespace {

namespace fs = std::filesystem;

class DeviceMemoTest : public ::testing::Test {
 protected:
  std::unique_ptr<DeviceMemo> Open(bool fresh = false) {
    auto memo = DeviceMemo::Open(dir_, "disk0", fresh);
    EXPECT_TRUE(memo.ok()) << memo.status();
    return memo.ok() ? std::move(*memo) : nullptr;
  }
  size_t Files() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()));
  }

  static constexpr InflightDescription kDescription{4160, 64, 1, 256, 0};
  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
};

TEST_F(DeviceMemoTest, IsFoundAgainWithAllThatWasNoted) {
  {
    auto memo = Open();
    EXPECT_FALSE(memo->found());
    EXPECT_FALSE(memo->ring(255).known());
    MemoDevice device;
    device.features = 0x1234;
    device.events = 7;
    memo->set_device(device);
    memo->set_ring(3, {MemoRing::kKnown | MemoRing::kRunning, 128, 1, 2, 3, 4, 5});
    // Often enough to use both copies.
    for (uint32_t i = 0; i < 5; ++i) memo->set_ring(4, {MemoRing::kKnown, i, 1, 2, 3, 4, 5});
    std::vector<uint8_t> content(100, 0x5a);
    auto region = memo->MakeRegion(kDescription, content, 4);
    ASSERT_TRUE(region.ok()) << region.status();
    EXPECT_EQ(region->description.mmap_offset, 0u);
  }
  auto memo = Open();
  EXPECT_TRUE(memo->found());
  EXPECT_EQ(memo->device().features, 0x1234u);
  EXPECT_EQ(memo->device().events, 7u);
  EXPECT_TRUE(memo->ring(3).running());
  EXPECT_EQ(memo->ring(3).base, 5u);
  EXPECT_EQ(memo->ring(4).num, 4u);
  auto region = memo->OpenRegion();
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(region->description.mmap_size, 4160u);
  EXPECT_EQ(region->description.queue_size, 256u);
  uint8_t bytes[101];
  ASSERT_EQ(::pread(region->fd.get(), bytes, sizeof bytes, 0), 101);
  EXPECT_EQ(bytes[99], 0x5a);
  EXPECT_EQ(bytes[100], 0);
  for (const auto& entry : fs::directory_iterator(dir_)) {
    EXPECT_EQ(fs::status(entry).permissions(), fs::perms::owner_read | fs::perms::owner_write);
  }
  memo->ForgetRings();
  EXPECT_FALSE(memo->ring(3).known());
  EXPECT_TRUE(memo->OpenRegion().ok());
}

TEST_F(DeviceMemoTest, ANewRegionReplacesTheOneBefore) {
  auto memo = Open();
  ASSERT_TRUE(memo->MakeRegion(kDescription, {}, 1).ok());
  ASSERT_TRUE(memo->MakeRegion({8320, 0, 2, 256, 0}, {1}, 1).ok());
  EXPECT_EQ(Files(), 2u);
  auto region = Open()->OpenRegion();
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(region->description.num_queues, 2);
  DeviceMemo::Remove(dir_, "disk0");
  EXPECT_EQ(Files(), 0u);
}

TEST_F(DeviceMemoTest, AFreshVmFindsNothingOfAnEarlierOne) {
  {
    auto memo = Open();
    memo->set_ring(0, {MemoRing::kKnown | MemoRing::kRunning, 128, 1, 2, 3, 4, 5});
    ASSERT_TRUE(memo->MakeRegion(kDescription, {}, 1).ok());
  }
  auto memo = Open(/*fresh=*/true);
  EXPECT_FALSE(memo->found());
  EXPECT_FALSE(memo->ring(0).known());
  EXPECT_TRUE(absl::IsNotFound(memo->OpenRegion().status()));
  EXPECT_EQ(Files(), 1u);
}

TEST_F(DeviceMemoTest, WithoutADirectoryNothingIsLeft) {
  auto memo = DeviceMemo::Open("", "disk0", false);
  ASSERT_TRUE(memo.ok());
  ASSERT_TRUE((*memo)->MakeRegion(kDescription, {9}, 1).ok());
  auto region = (*memo)->OpenRegion();
  ASSERT_TRUE(region.ok()) << region.status();
  uint8_t byte = 0;
  ASSERT_EQ(::pread(region->fd.get(), &byte, 1, 0), 1);
  EXPECT_EQ(byte, 9);
}

TEST_F(DeviceMemoTest, FilesThatAreNotWhatTheyWereAreNotUsed) {
  { Open()->set_ring(0, {MemoRing::kKnown, 128, 1, 2, 3, 4, 5}); }
  const std::string memo = dir_ + "/disk0.memo", region = dir_ + "/disk0.inflight-1";
  // Readable by others.
  fs::permissions(memo, fs::perms::owner_read | fs::perms::owner_write | fs::perms::group_read);
  EXPECT_FALSE(Open()->found());
  // Cut short.
  fs::resize_file(memo, 100);
  EXPECT_FALSE(Open()->found());
  // Of another version.
  {
    std::fstream file(memo, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(8);
    file.write("\x63\x00\x00\x00", 4);
  }
  EXPECT_FALSE(Open()->found());
  // A link.
  fs::rename(memo, dir_ + "/elsewhere");
  fs::create_symlink(dir_ + "/elsewhere", memo);
  EXPECT_FALSE(Open()->found());
  EXPECT_TRUE(fs::is_regular_file(fs::symlink_status(memo)));
  EXPECT_TRUE(fs::exists(dir_ + "/elsewhere"));
  EXPECT_TRUE(Open()->found());

  // The region: cut short, replaced, gone.
  ASSERT_TRUE(Open()->MakeRegion(kDescription, {}, 1).ok());
  ASSERT_TRUE(Open()->OpenRegion().ok());
  fs::resize_file(region, 64);
  EXPECT_TRUE(absl::IsDataLoss(Open()->OpenRegion().status()));
  fs::resize_file(region, 4160);
  EXPECT_TRUE(Open()->OpenRegion().ok());
  fs::copy_file(region, dir_ + "/copy");
  fs::rename(dir_ + "/copy", region);
  EXPECT_THAT(Message(Open()->OpenRegion().status()), testing::HasSubstr("another file"));
  fs::remove(region);
  EXPECT_TRUE(absl::IsDataLoss(Open()->OpenRegion().status()));
}

TEST_F(DeviceMemoTest, NamesThatWouldLeaveTheDirectoryAreRefused) {
  EXPECT_TRUE(absl::IsInvalidArgument(DeviceMemo::Open(dir_, "../disk0", false).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(DeviceMemo::Open(dir_, std::string(64, 'x'), false).status()));
}

}  // namespace
}  // namespace baton::vhost
