#include "agent/virtio/inflight_tracker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/unit/virtio/fake_memory.h"

namespace baton::virtio {
namespace {

using testing::ElementsAre;

std::vector<uint64_t> Words(RingFormat format, uint16_t n) {
  return std::vector<uint64_t>(InflightPartBytes(format, n) / 8);
}
std::span<uint8_t> AsBytes(std::vector<uint64_t>& words) {
  return {reinterpret_cast<uint8_t*>(words.data()), words.size() * 8};
}

TEST(InflightTracker, SplitRequestsAreFoundInTheOrderOfFetching) {
  auto words = Words(RingFormat::kSplit, 8);
  InflightTracker<> tracker;
  ASSERT_TRUE(tracker.Attach(RingFormat::kSplit, AsBytes(words), 8).ok());
  ASSERT_TRUE(tracker.RecoverSplit(65534).ok());
  for (uint16_t id : {5, 2, 7, 0}) ASSERT_TRUE(tracker.OnFetch(id).ok());
  const uint16_t batch[] = {7, 5};
  ASSERT_TRUE(tracker.BeforePublish(batch).ok());
  tracker.AfterPublish();
  InflightTracker<> successor;
  ASSERT_TRUE(successor.Attach(RingFormat::kSplit, AsBytes(words), 8).ok());
  auto set = successor.RecoverSplit(0);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(2, 0));
  EXPECT_EQ(set->last_avail(), 2);
}

TEST(InflightTracker, PackedRequestsAreFoundWithTheirDescriptors) {
  auto words = Words(RingFormat::kPacked, 4);
  FakeMemory memory(0x1000, 4096);
  PackedRing ring{4, 0x1000, 0x1100, 0x1104};
  InflightTracker<> tracker;
  ASSERT_TRUE(tracker.Attach(RingFormat::kPacked, AsBytes(words), 4).ok());
  ASSERT_TRUE(tracker.RecoverPacked(memory, ring, {3, true}).ok());
  const InflightDesc first[] = {{0x100, 16, 9, 0x81}, {0x200, 32, 9, 0x82}};
  const InflightDesc second[] = {{0x300, 1, 40000, 0x80}};
  ASSERT_TRUE(tracker.OnFetch(9, first).ok());
  ASSERT_TRUE(tracker.OnFetch(40000, second).ok());
  InflightTracker<> successor;
  ASSERT_TRUE(successor.Attach(RingFormat::kPacked, AsBytes(words), 4).ok());
  auto set = successor.RecoverPacked(memory, ring, {0, true});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(9, 40000));
  EXPECT_THAT(set->DescsOf(set->requests[0]), ElementsAre(first[0], first[1]));
  EXPECT_EQ(set->used, (PackedPosition{3, true}));
  EXPECT_EQ(set->avail, (PackedPosition{2, false}));
}

}  // namespace
}  // namespace baton::virtio
