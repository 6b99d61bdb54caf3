#include "agent/virtio/packed_ring.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

namespace baton::virtio {
namespace {

using testing::HasSubstr;

TEST(PackedBase, EncodesPositionsAndWraps) {
  EXPECT_EQ(EncodePackedBase({{5, true}, {3, false}}), 0x00038005u);
  EXPECT_EQ(EncodePackedBase({{0, true}, {0, true}}), kPackedBaseAfterReset);
}

TEST(PackedBase, EncodingRoundTrips) {
  EXPECT_TRUE(rc::check([](uint32_t raw) { RC_ASSERT(EncodePackedBase(DecodePackedBase(raw)) == raw); }));
}

TEST(PackedPosition, AdvanceAndDistanceAgree) {
  EXPECT_TRUE(rc::check([] {
    auto n = static_cast<uint16_t>(*rc::gen::inRange(1, 32769));
    auto start = static_cast<uint16_t>(*rc::gen::inRange(0, int{n}));
    auto k = static_cast<uint16_t>(*rc::gen::inRange(0, int{n}));
    PackedPosition from{start, *rc::gen::arbitrary<bool>()};
    PackedPosition to = Advance(from, k, n);
    RC_ASSERT(to.idx < n);
    RC_ASSERT(Distance(from, to, n) == k);
  }));
}

TEST(PackedInvariants, EachNamesTheValueThatBroke) {
  EXPECT_TRUE(CheckPackedInvariants(8, {{1, false}, {6, true}}).ok());
  EXPECT_THAT(Message(CheckPackedInvariants(8, {{8, true}, {0, true}})), HasSubstr("avail position 8"));
  EXPECT_THAT(Message(CheckPackedInvariants(8, {{0, true}, {9, true}})), HasSubstr("used position 9"));
  EXPECT_THAT(Message(CheckPackedInvariants(8, {{2, true}, {3, true}})), HasSubstr("lap"));
  EXPECT_THAT(Message(CheckPackedDrained(8, {{3, true}, {2, true}})),
              HasSubstr("1 descriptors are in flight"));
  EXPECT_TRUE(CheckPackedDrained(8, {{3, true}, {3, true}}).ok());
}

TEST(PackedFlags, AvailAndUsedFollowTheWrapCounter) {
  constexpr uint16_t kAvail = 1 << 7, kUsed = 1 << 15;
  EXPECT_TRUE(IsPackedAvail(kAvail, true));
  EXPECT_TRUE(IsPackedAvail(kUsed, false));
  EXPECT_FALSE(IsPackedAvail(kAvail | kUsed, true));
  EXPECT_TRUE(IsPackedUsed(kAvail | kUsed, true));
  EXPECT_TRUE(IsPackedUsed(0, false));
}

}  // namespace
}  // namespace baton::virtio
