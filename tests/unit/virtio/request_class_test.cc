#include "agent/virtio/request_class.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "agent/virtio/replay_order.h"

namespace baton::virtio {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

struct Head {
  uint32_t type = 0;
  uint32_t reserved = 0;
  uint64_t sector = 0;
};
struct Segment16 {
  uint64_t sector;
  uint32_t num;
  uint32_t flags;
};

std::vector<uint8_t> Bytes(Head head, std::vector<Segment16> segments = {}) {
  std::vector<uint8_t> out(sizeof head + segments.size() * 16);
  std::memcpy(out.data(), &head, sizeof head);
  if (!segments.empty()) std::memcpy(out.data() + sizeof head, segments.data(), segments.size() * 16);
  return out;
}

BlkRequest Read(uint64_t sector, uint64_t bytes) {
  return ClassifyBlk(Bytes({kBlkIn, 0, sector}), 16, bytes + 1);
}
BlkRequest Write(uint64_t sector, uint64_t bytes) {
  return ClassifyBlk(Bytes({kBlkOut, 0, sector}), 16 + bytes, 1);
}
BlkRequest Flush() { return ClassifyBlk(Bytes({kBlkFlush}), 16, 1); }
BlkRequest Discard(std::vector<Segment16> segments) {
  auto bytes = Bytes({kBlkDiscard}, segments);
  return ClassifyBlk(bytes, bytes.size(), 1);
}

TEST(RequestClass, ReadsAndWritesHaveTheirExtents) {
  EXPECT_EQ(Read(8, 4096).cls, RequestClass::kRead);
  EXPECT_THAT(Read(8, 4096).extents, ElementsAre(Extent{8, 16}));
  EXPECT_EQ(Write(8, 513).cls, RequestClass::kIdempotentWrite);
  EXPECT_THAT(Write(8, 513).extents, ElementsAre(Extent{8, 10}));
  EXPECT_EQ(Flush().cls, RequestClass::kIdempotentWrite);
  EXPECT_THAT(Flush().extents, IsEmpty());
}

TEST(RequestClass, EverySegmentOfADiscardCounts) {
  EXPECT_THAT(Discard({{10, 5, 0}, {100, 1, 1}}).extents, ElementsAre(Extent{10, 15}, Extent{100, 101}));
}

TEST(RequestClass, MoreSegmentsThanAreLookedAt_TouchTheWholeDisk) {
  auto bytes = Bytes({kBlkDiscard}, std::vector<Segment16>(kMaxExtents + 1, {7, 1, 0}));
  bytes.resize(kBlkHeadBytes);
  const BlkRequest request = ClassifyBlk(bytes, 16 + 16 * (kMaxExtents + 1), 1);
  EXPECT_EQ(request.cls, RequestClass::kIdempotentWrite);
  EXPECT_TRUE(Conflicts(request, Write(1u << 30, 512)));
  // A copy that is shorter than what the lengths promise.
  EXPECT_TRUE(Conflicts(ClassifyBlk(std::span(bytes).first(20), 32, 1), Write(99, 512)));
}

TEST(RequestClass, HostileExtentsDoNotWrapAround) {
  EXPECT_THAT(Write(~uint64_t{0} - 1, 4096).extents, ElementsAre(Extent{~uint64_t{0} - 1, ~uint64_t{0}}));
  EXPECT_FALSE(Conflicts(Write(~uint64_t{0} - 1, 4096), Write(0, 4096)));
  EXPECT_THAT(Read(0, ~uint64_t{0} - 1).extents, ElementsAre(Extent{0, (uint64_t{1} << 55)}));
}

TEST(RequestClass, OfEachTypeOfRequest) {
  auto cls = [](uint32_t type) { return ClassifyBlk(Bytes({type}), 16, 1).cls; };
  for (uint32_t type : {kBlkIn, kBlkGetId, kBlkGetLifetime, kBlkZoneReport}) {
    EXPECT_EQ(cls(type), RequestClass::kRead) << type;
  }
  for (uint32_t type : {kBlkOut, kBlkFlush, kBlkDiscard, kBlkWriteZeroes, kBlkSecureErase}) {
    EXPECT_EQ(cls(type), RequestClass::kIdempotentWrite) << type;
  }
  for (uint32_t type : {kBlkZoneAppend, kBlkZoneOpen, kBlkZoneClose, kBlkZoneFinish, kBlkZoneReset,
                        kBlkZoneResetAll, 2u, 3u, 5u, 0x80000000u, 0xffffffffu}) {
    EXPECT_EQ(cls(type), RequestClass::kNotIdempotent) << type;
  }
  EXPECT_EQ(ClassifyBlk({}, 16, 1).cls, RequestClass::kNotIdempotent);
  EXPECT_EQ(ClassifyBlk(Bytes({kBlkIn}), 15, 1).cls, RequestClass::kNotIdempotent);
}

TEST(RequestClass, ConflictsAreOverlapsWithAWrite) {
  EXPECT_FALSE(Conflicts(Read(0, 4096), Read(0, 4096)));
  EXPECT_TRUE(Conflicts(Read(0, 4096), Write(7, 512)));
  EXPECT_FALSE(Conflicts(Read(0, 4096), Write(8, 512)));
  EXPECT_TRUE(Conflicts(Write(7, 512), Discard({{0, 1, 0}, {7, 1, 0}})));
  EXPECT_TRUE(Conflicts(ClassifyBlk(Bytes({kBlkZoneAppend}), 16, 1), Read(0, 512)));
}

TEST(RequestClass, OfOtherDevices) {
  EXPECT_TRUE(ClassesOf(v1::NET, 3).harmless);
  EXPECT_FALSE(ClassesOf(v1::NET, 3).not_idempotent);
  EXPECT_TRUE(ClassesOf(v1::DEVICE_CLASS_UNSPECIFIED, 1).not_idempotent);
  EXPECT_TRUE(ClassesOf(v1::DEVICE_CLASS_UNSPECIFIED, 0).none());
}

std::vector<size_t> Startable(ReplayOrder* order) {
  std::vector<size_t> out;
  for (size_t i; order->Next(&i);) out.push_back(i);
  return out;
}

TEST(ReplayOrder, OverlappingRequestsKeepTheirOrderTheOthersStartAtOnce) {
  ReplayOrder order({Write(0, 512), Write(100, 512), Write(0, 1024), Read(1, 512), Read(100, 512)});
  EXPECT_THAT(Startable(&order), ElementsAre(0, 1));
  order.Completed(1);
  EXPECT_THAT(Startable(&order), ElementsAre(4));
  order.Completed(0);
  EXPECT_THAT(Startable(&order), ElementsAre(2));
  order.Completed(2);
  EXPECT_THAT(Startable(&order), ElementsAre(3));
  EXPECT_FALSE(order.done());
  order.Completed(3);
  order.Completed(4);
  EXPECT_TRUE(order.done());
}

TEST(ReplayOrder, AFlushWaitsForTheWritesBeforeItAndHoldsUpNone) {
  ReplayOrder order({Write(0, 512), Read(9, 512), Flush(), Write(50, 512)});
  EXPECT_THAT(Startable(&order), ElementsAre(0, 1, 3));
  order.Completed(3);
  EXPECT_THAT(Startable(&order), IsEmpty());
  order.Completed(0);
  EXPECT_THAT(Startable(&order), ElementsAre(2));
}

TEST(ReplayOrder, NewRequestsDoNotPassWhatTheyOverlap) {
  ReplayOrder order({Write(0, 512), Read(8, 512)});
  EXPECT_FALSE(order.MayStart(Read(0, 512)));
  EXPECT_FALSE(order.MayStart(Write(8, 512)));
  EXPECT_FALSE(order.MayStart(Flush()));
  EXPECT_TRUE(order.MayStart(Read(8, 512)));
  EXPECT_TRUE(order.MayStart(Write(20, 512)));
  EXPECT_THAT(Startable(&order), ElementsAre(0, 1));
  order.Completed(0);
  EXPECT_TRUE(order.MayStart(Flush()));
  EXPECT_FALSE(order.MayStart(Write(8, 512)));
  order.Completed(1);
  EXPECT_TRUE(order.MayStart(Write(8, 512)));
}

TEST(ReplayOrder, CompletionsThatCannotBeAreIgnored) {
  ReplayOrder order({Write(0, 512), Write(0, 512)});
  order.Completed(0);
  order.Completed(7);
  EXPECT_THAT(Startable(&order), ElementsAre(0));
  order.Completed(0);
  order.Completed(0);
  EXPECT_THAT(Startable(&order), ElementsAre(1));
  EXPECT_FALSE(order.done());
}

}  // namespace
}  // namespace baton::virtio
