#include "agent/virtio/split_ring.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/unit/virtio/fake_memory.h"

namespace baton::virtio {
namespace {

using testing::HasSubstr;

TEST(SplitGeometry, SizesAndAlignments) {
  EXPECT_TRUE(CheckSplitGeometry({128, 0x1000, 0x2002, 0x3004}).ok());
  EXPECT_TRUE(CheckSplitGeometry({32768, 0, 0, 0}).ok());
  EXPECT_THAT(Message(CheckSplitGeometry({0, 0, 0, 0})), HasSubstr("power of two"));
  EXPECT_THAT(Message(CheckSplitGeometry({100, 0, 0, 0})), HasSubstr("100"));
  EXPECT_THAT(Message(CheckSplitGeometry({4, 8, 0, 0})), HasSubstr("descriptor table"));
  EXPECT_THAT(Message(CheckSplitGeometry({4, 0, 1, 0})), HasSubstr("avail"));
  EXPECT_THAT(Message(CheckSplitGeometry({4, 0, 0, 2})), HasSubstr("used"));
}

TEST(SplitInvariants, EachNamesTheValueThatBroke) {
  EXPECT_TRUE(CheckSplitInvariants(4, 5, {7, 3}).ok());
  EXPECT_THAT(Message(CheckSplitInvariants(4, 5, {9, 4})), HasSubstr("avail->idx 9"));
  EXPECT_THAT(Message(CheckSplitInvariants(4, 10, {8, 4})), HasSubstr("next entry to fetch, 10"));
  EXPECT_THAT(Message(CheckSplitInvariants(4, 3, {4, 4})), HasSubstr("next entry to fetch, 3"));
  EXPECT_EQ(ReasonOf(CheckSplitInvariants(4, 5, {9, 4})), v1::STATE_MISMATCH);
}

TEST(SplitInvariants, HoldAcrossTheWrapOf65536) {
  EXPECT_TRUE(CheckSplitInvariants(4, 1, {2, 65535}).ok());
  EXPECT_TRUE(CheckSplitDrained(4, 65535, {1, 65535}).ok());
  EXPECT_FALSE(CheckSplitDrained(4, 0, {1, 65535}).ok());
}

TEST(SplitIndices, OutsideMemoryIsAnError) {
  FakeSplitRing r(4);
  r.ring.used = 0x900000;
  EXPECT_EQ(ReadSplitIndices(r.memory, r.ring).status().code(), absl::StatusCode::kOutOfRange);
}

}  // namespace
}  // namespace baton::virtio
