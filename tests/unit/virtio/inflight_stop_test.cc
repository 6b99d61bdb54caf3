// What a stop finds in flight, told exactly: the cases that have names (the STOP thread's overwritten avail
// slot, fresh regions of running rings, the conventions of the ring base), with the numbers of the
// specification's examples.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <vector>

#include "agent/virtio/blk_in_flight.h"
#include "agent/virtio/inflight.h"
#include "agent/virtio/inflight_tracker.h"
#include "tests/unit/virtio/fake_memory.h"

namespace baton::virtio {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// Bytes aligned as a mapping is.
struct StopPart {
  StopPart(RingFormat format, uint16_t n) : words((InflightPartBytes(format, n) + 7) / 8) {}
  std::span<uint8_t> bytes() { return {reinterpret_cast<uint8_t*>(words.data()), words.size() * 8}; }
  InflightSplitHeader& split() { return *reinterpret_cast<InflightSplitHeader*>(words.data()); }
  InflightSplitDesc& split_desc(size_t i) {
    return reinterpret_cast<InflightSplitDesc*>(words.data() + 2)[i];
  }
  InflightPackedHeader& packed() { return *reinterpret_cast<InflightPackedHeader*>(words.data()); }
  InflightPackedDesc& packed_desc(size_t i) {
    return reinterpret_cast<InflightPackedDesc*>(words.data() + 4)[i];
  }
  std::vector<uint64_t> words;
};

// The example of the STOP thread: of four requests 1, 2 and 3 were completed, the driver adds 1 again, and
// its entry overwrites the one that held 0, which is in flight.
class OverwrittenAvailSlot : public testing::Test {
 protected:
  OverwrittenAvailSlot() : part_(RingFormat::kSplit, 4) {
    EXPECT_TRUE(tracker_.Attach(RingFormat::kSplit, part_.bytes(), 4).ok());
    EXPECT_TRUE(tracker_.RecoverSplit(0).ok());
    for (uint16_t head : {0, 1, 2, 3}) {
      ring_.Submit(head);
      EXPECT_TRUE(tracker_.OnFetch(head).ok());
    }
    for (uint16_t head : {1, 2, 3}) {
      EXPECT_TRUE(tracker_.BeforePublish(std::span<const uint16_t>(&head, 1)).ok());
      ring_.Complete(head);
      tracker_.AfterPublish();
    }
    ring_.Submit(1);
  }
  FakeSplitRing ring_{4};
  StopPart part_;
  InflightTracker<> tracker_;
};

TEST_F(OverwrittenAvailSlot, TheRegionTellsInFlightFromAvailable) {
  auto indices = ReadSplitIndices(ring_.memory, ring_.ring);
  ASSERT_TRUE(indices.ok());
  auto set = ReadInflightSplit(part_.bytes(), 4, indices->used);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(0));
  EXPECT_EQ(set->last_avail(), 4);
  // Available: entry 4, which is head 1.
  EXPECT_EQ(indices->avail - set->last_avail(), 1);
  EXPECT_TRUE(VerifyInflightSplit(ring_.memory, ring_.ring, *indices, *set).ok());
}

TEST_F(OverwrittenAvailSlot, TheRingAloneDoesNotName0AndIsNotGuessedFrom) {
  // Entry 3 % 4 of the avail ring, U, holds 3, which was completed; nothing holds 0.
  EXPECT_EQ(ReasonOf(RecoverSplit(ring_.memory, ring_.ring, /*allow_window=*/false).status()),
            v1::INFLIGHT_UNKNOWN);
  auto taken_for_in_order = InflightFromInOrderSplit(ring_.memory, ring_.ring, 4);
  ASSERT_TRUE(taken_for_in_order.ok());
  EXPECT_THAT(taken_for_in_order->Ids(), ElementsAre(3)) << "which is why only IN_ORDER allows it";
}

TEST_F(OverwrittenAvailSlot, IsNotRewound) {
  auto set = ReadInflightSplit(part_.bytes(), 4, 3);
  ASSERT_TRUE(set.ok());
  auto rewound = RewindSplit(ring_.memory, ring_.ring, *set, /*in_order=*/false, /*rewindable=*/true);
  EXPECT_THAT(Message(rewound.status()), HasSubstr("may have been overwritten"));
  // Nor if the device claims IN_ORDER: the entries do not name what is in flight.
  rewound = RewindSplit(ring_.memory, ring_.ring, *set, /*in_order=*/true, /*rewindable=*/true);
  EXPECT_THAT(Message(rewound.status()), HasSubstr("are not the requests in flight"));
}

TEST(Rewind, OfBuffersInOrderMakesThemAvailableAgain) {
  FakeSplitRing ring(4);
  for (uint16_t head : {2, 0, 1}) ring.Submit(head);
  ring.Complete(2);
  auto set = InflightFromInOrderSplit(ring.memory, ring.ring, 3);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(0, 1));
  EXPECT_FALSE(RewindSplit(ring.memory, ring.ring, *set, true, /*rewindable=*/false).ok());
  auto rewound = RewindSplit(ring.memory, ring.ring, *set, true, true);
  ASSERT_TRUE(rewound.ok()) << rewound.status();
  EXPECT_TRUE(rewound->empty());
  EXPECT_EQ(rewound->last_avail(), 1);
}

// A region made for a ring that already ran; the first request after that is in flight when the back-end
// dies.
TEST(FreshRegion, WithTheRingsUsedIndexKeepsTheFirstRequest) {
  StopPart part(RingFormat::kSplit, 4);
  ASSERT_TRUE(InitInflightSplit(part.bytes(), 4, 5).ok());
  part.split_desc(0).inflight = 1;
  for (BatchRule rule : {BatchRule::kLinked, BatchRule::kSingle}) {
    auto set = ReadInflightSplit(part.bytes(), 4, 5, rule);
    ASSERT_TRUE(set.ok()) << set.status();
    EXPECT_THAT(set->Ids(), ElementsAre(0));
    EXPECT_EQ(set->last_avail(), 6);
  }
}

TEST(FreshRegion, WithAUsedIndexOf0IsRefusedInsteadOfLosingIt) {
  StopPart part(RingFormat::kSplit, 4);
  ASSERT_TRUE(InitInflightSplit(part.bytes(), 4, 0).ok());
  part.split_desc(0).inflight = 1;
  for (BatchRule rule : {BatchRule::kLinked, BatchRule::kSingle}) {
    EXPECT_EQ(ReasonOf(ReadInflightSplit(part.bytes(), 4, 5, rule).status()), v1::INFLIGHT_UNKNOWN);
  }
}

TEST(FreshRegion, OfAPackedRingStartsAtTheRingsPosition) {
  FakeMemory memory(0x1000, 4096);
  const PackedRing ring{8, 0x1000, 0x1100, 0x1104};
  StopPart part(RingFormat::kPacked, 8);
  ASSERT_TRUE(InitInflightPacked(part.bytes(), 8, {5, false}).ok());
  EXPECT_EQ(part.packed().old_used_idx, 5);
  EXPECT_EQ(part.packed().old_used_wrap_counter, 0);
  for (uint16_t i = 0; i < 8; ++i) EXPECT_EQ(part.packed_desc(i).next, i + 1);
  auto set = ReadInflightPacked(part.bytes(), memory, ring);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_TRUE(set->empty());
  EXPECT_EQ(set->used, (PackedPosition{5, false}));
  EXPECT_EQ(set->avail, set->used);
}

TEST(FreshRegion, ThatNobodyUsesYetTellsNothingOfAPackedRing) {
  FakeMemory memory(0x1000, 4096);
  StopPart part(RingFormat::kPacked, 8);
  EXPECT_EQ(ReasonOf(ReadInflightPacked(part.bytes(), memory, {8, 0x1000, 0x1100, 0x1104}).status()),
            v1::INFLIGHT_UNKNOWN);
}

TEST(BaseConvention, OfASplitRingIsUsedPlusInFlightOrUsed) {
  EXPECT_EQ(*NormaliseBase(6, 5, 1), 6);  // the specification, libvhost-user
  EXPECT_EQ(*NormaliseBase(5, 5, 1), 6);  // DPDK, yc-libvhost
  EXPECT_EQ(*NormaliseBase(5, 5, 0), 5);
  EXPECT_EQ(*NormaliseBase(1, 65534, 3), 1);
  EXPECT_EQ(*NormaliseBase(65534, 65534, 3), 1);
  for (uint32_t base : {4u, 7u, 0x10005u}) {
    auto normal = NormaliseBase(base, 5, 1);
    EXPECT_EQ(ReasonOf(normal.status()), v1::STATE_MISMATCH) << base;
    EXPECT_THAT(Message(normal.status()), HasSubstr("neither used->idx 5 nor 6"));
  }
}

InflightSet PackedSet(uint16_t n, PackedPosition used, std::vector<uint16_t> lengths) {
  InflightSet set;
  set.format = RingFormat::kPacked;
  set.used = set.avail = used;
  for (uint16_t length : lengths) {
    const auto id = static_cast<uint16_t>(100 + set.size());
    set.requests.push_back({id, length, static_cast<uint32_t>(set.descs.size()), set.size() + 1});
    for (uint16_t k = 1; k <= length; ++k) {
      set.descs.push_back({0x1000u * k, k, id, static_cast<uint16_t>(k < length ? kDescNext : 0)});
    }
    set.avail = Advance(set.avail, length, n);
  }
  return set;
}

TEST(BaseConvention, OfAPackedRingHasTwoPositions) {
  // Avail 5 (wrap 1), used 3 (wrap 0), as the example of the specification.
  EXPECT_EQ(EncodePackedBase({{5, true}, {3, false}}), 0x00038005u);
  // 3 (wrap 0) and 2 descriptors in a ring of 8: 5 (wrap 0).
  const InflightSet set = PackedSet(8, {3, false}, {2});
  for (uint32_t told : {0x00030005u, 0x00030003u}) {
    auto base = NormaliseBase(told, /*only_16_bits=*/false, 8, set);
    ASSERT_TRUE(base.ok()) << base.status();
    EXPECT_EQ(base->avail, (PackedPosition{5, false}));
    EXPECT_EQ(base->used, (PackedPosition{3, false}));
  }
  EXPECT_EQ(ReasonOf(NormaliseBase(0x00030004, false, 8, set).status()), v1::STATE_MISMATCH);
  EXPECT_EQ(ReasonOf(NormaliseBase(0x00040005, false, 8, set).status()), v1::STATE_MISMATCH);
  EXPECT_EQ(ReasonOf(NormaliseBase(0x80030005, false, 8, set).status()), v1::STATE_MISMATCH);
}

TEST(BaseConvention, OfAPackedRingIn16BitsTakesTheUsedPositionFromTheRegion) {
  const InflightSet set = PackedSet(8, {3, false}, {2});
  for (uint32_t told : {0x0005u, 0x0003u}) EXPECT_EQ(NormaliseBase(told, true, 8, set)->used, set.used);
  EXPECT_FALSE(NormaliseBase(0x8005, true, 8, set).ok());
  EXPECT_FALSE(NormaliseBase(0x00030005, true, 8, set).ok());
  // Without a region it can only be right if nothing is in flight.
  EXPECT_EQ(NormaliseDrainedBase(0x8005, true, 8)->used, (PackedPosition{5, true}));
  EXPECT_FALSE(NormaliseDrainedBase(0x00038005, false, 8).ok());
  EXPECT_TRUE(NormaliseDrainedBase(0x80058005, false, 8).ok());
}

TEST(BaseConvention, IsWhatTheDestinationsKindExpects) {
  InflightSet split;
  split.requests = {{1, 0, 0, 1}};
  split.used.idx = 5;
  split.avail.idx = 6;
  EXPECT_EQ(*BaseFor(InflightKind::kSpec, 8, split), 6u);
  EXPECT_EQ(*BaseFor(InflightKind::kDpdk, 8, split), 5u);
  EXPECT_EQ(*BaseFor(InflightKind::kSpdk, 8, split), 5u);
  EXPECT_EQ(*BaseFor(InflightKind::kYc, 8, split), 5u);
  EXPECT_TRUE(BaseFor(InflightKind::kLibvhostUser, 8, split).ok()) << "ignores it";
  EXPECT_FALSE(BaseFor(InflightKind::kUnknown, 8, split).ok());
  split.requests.clear();
  split.avail = split.used;
  EXPECT_EQ(*BaseFor(InflightKind::kUnknown, 8, split), 5u);
  const InflightSet packed = PackedSet(8, {7, true}, {2});
  EXPECT_EQ(*BaseFor(InflightKind::kSpec, 8, packed), EncodePackedBase({{1, false}, {7, true}}));
  EXPECT_EQ(*BaseFor(InflightKind::kDpdk, 8, packed), EncodePackedBase({{7, true}, {7, true}}));
}

TEST(InflightRegion, StridesOfTheKindsOfBackends) {
  auto split = [](InflightKind kind, uint32_t n) { return InflightStride(kind, RingFormat::kSplit, n); };
  auto packed = [](InflightKind kind, uint32_t n) { return InflightStride(kind, RingFormat::kPacked, n); };
  EXPECT_EQ(split(InflightKind::kLibvhostUser, 128), 2112u);
  EXPECT_EQ(split(InflightKind::kDpdk, 128), 2112u);
  EXPECT_EQ(split(InflightKind::kYc, 128), 2064u);
  EXPECT_EQ(split(InflightKind::kLibvhostUser, 256), 4160u);
  EXPECT_EQ(split(InflightKind::kYc, 256), 4112u);
  EXPECT_EQ(packed(InflightKind::kDpdk, 128), 4160u);
  EXPECT_EQ(packed(InflightKind::kSpdk, 256), 8256u);
  EXPECT_EQ(packed(InflightKind::kYc, 128), 0u);
  EXPECT_EQ(packed(InflightKind::kLibvhostUser, 128), 0u);
  // 29 and 32 bytes of header round to the same.
  for (uint32_t n = 1; n <= kMaxRingSize; ++n) {
    ASSERT_GE(packed(InflightKind::kDpdk, n), InflightPartBytes(RingFormat::kPacked, n)) << n;
  }
}

TEST(InflightRegion, GeometryThatAPeerTellsIsChecked) {
  auto check = [](uint64_t size, uint64_t offset, uint16_t queues, uint16_t n, uint64_t file) {
    return CheckInflightGeometry(RingFormat::kSplit, size, offset, queues, n, file);
  };
  auto geometry = check(2 * 2112, 64, 2, 128, 2 * 2112 + 64);
  ASSERT_TRUE(geometry.ok()) << geometry.status();
  EXPECT_EQ(geometry->stride, 2112u);
  std::vector<uint8_t> bytes(2 * 2112);
  EXPECT_TRUE(InflightPart(*geometry, bytes, 1).ok());
  EXPECT_FALSE(InflightPart(*geometry, bytes, 2).ok());
  EXPECT_FALSE(check(2 * 2112, 64, 2, 128, 2 * 2112 + 63).ok());
  EXPECT_FALSE(check(2 * 2112, ~uint64_t{0} - 7, 2, 128, 1 << 20).ok());
  EXPECT_FALSE(check(2 * 2112, 4, 2, 128, 1 << 20).ok());
  EXPECT_FALSE(check(2112, 0, 0, 128, 1 << 20).ok());
  EXPECT_FALSE(check(2112, 0, 1, 0, 1 << 20).ok());
  EXPECT_FALSE(check(2112, 0, 1, 40000, 1 << 20).ok());
}

TEST(InflightRegion, IsProbedBeforeItsLayoutIsBelieved) {
  auto geometry = MakeInflightGeometry(InflightKind::kDpdk, RingFormat::kSplit, 2, 128);
  ASSERT_TRUE(geometry.ok());
  std::vector<uint8_t> bytes(geometry->mmap_size);
  EXPECT_TRUE(ProbeInflightRegion(*geometry, bytes).ok()) << "not used yet";
  for (uint16_t i : {0, 1}) {
    ASSERT_TRUE(InitInflightSplit(*InflightPart(*geometry, bytes, i), 128, 7).ok());
  }
  EXPECT_TRUE(ProbeInflightRegion(*geometry, bytes).ok());
  // yc's stride over DPDK's region: the second part begins elsewhere.
  InflightGeometry other = *geometry;
  other.stride = 2064;
  bytes[2064 + 8] = 9;  // within the last entries of the first
  EXPECT_EQ(ReasonOf(ProbeInflightRegion(other, bytes)), v1::INFLIGHT_UNKNOWN);
  EXPECT_FALSE(ProbeInflightRegion(*geometry, std::span(bytes).first(2112)).ok()) << "a part is missing";
}

TEST(InflightFromRing, OfAPackedRingInOrderAreTheChainsBetweenThePositions) {
  FakeMemory memory(0x1000, 4096);
  const PackedRing ring{4, 0x1000, 0x1100, 0x1104};
  auto put = [&](uint16_t at, uint16_t id, uint16_t flags) {
    memory.Put(0x1000 + 16 * at, PackedDesc{0x9000u + at, 8, id, flags});
  };
  put(3, 0, kDescAvail | kDescNext);
  put(0, 7, kDescUsed);  // the lap after: AVAIL 0, USED 1
  put(1, 8, kDescUsed);
  put(2, 9, kDescAvail | kDescUsed);  // used in the lap before
  auto set = InflightFromInOrderPacked(memory, ring, {{2, false}, {3, true}});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(7, 8));
  EXPECT_EQ(set->requests[0].num, 2);
  EXPECT_TRUE(VerifyInflightPacked(memory, ring, *set).ok());
  EXPECT_FALSE(InflightFromInOrderPacked(memory, ring, {{0, false}, {3, true}}).ok()) << "inside a chain";
  EXPECT_FALSE(InflightFromInOrderPacked(memory, ring, {{3, false}, {3, true}}).ok()) << "not available";
}

// A page that was lost on the way shows an older lap.
TEST(InflightInvariants, OfAPackedRingAreSeenInTheMemoryThatArrived) {
  FakeMemory memory(0x1000, 4096);
  const PackedRing ring{4, 0x1000, 0x1100, 0x1104};
  const InflightSet set = PackedSet(4, {1, true}, {2});
  for (uint16_t at : {1, 2}) memory.Put(0x1000 + 16 * at, PackedDesc{0, 0, 0, kDescAvail});
  EXPECT_TRUE(VerifyInflightPacked(memory, ring, set).ok());
  memory.Put(0x1000 + 16 * 3, PackedDesc{0, 0, 0, kDescAvail | kDescUsed});
  EXPECT_THAT(Message(VerifyInflightPacked(memory, ring, set)), HasSubstr("not fetched"));
  memory.Put(0x1000 + 16 * 3, PackedDesc{});
  memory.Put(0x1000 + 16 * 2, PackedDesc{});
  EXPECT_THAT(Message(VerifyInflightPacked(memory, ring, set)), HasSubstr("a page was lost"));
}

TEST(InflightInvariants, EachOfASplitRing) {
  FakeSplitRing ring(4);
  ring.SetIndices(7, 3);
  InflightSet set;
  set.requests = {{2, 0, 0, 1}, {0, 0, 0, 4}};
  set.used.idx = 3;
  set.avail.idx = 5;
  auto verify = [&](auto&& change) {
    InflightSet other = set;
    SplitIndices shipped{7, 3};
    change(other, shipped);
    return Message(VerifyInflightSplit(ring.memory, ring.ring, shipped, other));
  };
  EXPECT_EQ(verify([](auto&, auto&) {}), "");
  EXPECT_THAT(verify([](auto&, auto& i) { i.avail = 6; }), HasSubstr("avail->idx is 7"));
  EXPECT_THAT(verify([](auto&, auto& i) { i.used = 2; }), HasSubstr("used->idx is 3"));
  EXPECT_THAT(verify([](auto& s, auto&) { s.used.idx = 2; }), HasSubstr("told with used->idx 2"));
  EXPECT_THAT(verify([](auto& s, auto&) { s.avail.idx = 8; }), HasSubstr("more than the ring's 4"));
  EXPECT_THAT(verify([](auto& s, auto&) { s.avail.idx = 6; }), HasSubstr("2 heads are in flight"));
  EXPECT_THAT(verify([](auto& s, auto&) { s.requests[0].id = 4; }), HasSubstr("head 4"));
  EXPECT_THAT(verify([](auto& s, auto&) { s.requests[0].id = 0; }), HasSubstr("twice"));
  EXPECT_THAT(verify([](auto& s, auto&) { s.requests[1].counter = 1; }),
              HasSubstr("order of their counters"));
}

TEST(InflightInvariants, EachOfAPackedRing) {
  const InflightSet set = PackedSet(8, {6, true}, {1, 3});
  auto check = [&](auto&& change) {
    InflightSet other = set;
    change(other);
    return Message(CheckInflightPacked(8, other));
  };
  EXPECT_EQ(check([](auto&) {}), "");
  EXPECT_THAT(check([](auto& s) { s.avail.idx = 3; }), HasSubstr("make 5"));
  EXPECT_THAT(check([](auto& s) { s.avail = {5, true}; }), HasSubstr("not within one lap"));
  EXPECT_THAT(check([](auto& s) { s.used.idx = 8; }), HasSubstr("used position 8"));
  EXPECT_THAT(check([](auto& s) { s.requests[1].num = 2; }), HasSubstr("does not end"));
  EXPECT_THAT(check([](auto& s) { s.requests[1].num = 9; }), HasSubstr("descriptors 1 to 10 of 4"));
  EXPECT_THAT(check([](auto& s) { s.requests[1].first = 0; }), HasSubstr("out of its place"));
  EXPECT_THAT(check([](auto& s) { s.descs[1].flags = 0; }), HasSubstr("does not end"));
  EXPECT_THAT(check([](auto& s) { s.requests[0].id = 3; }), HasSubstr("bears the id 100"));
  EXPECT_THAT(check([](auto& s) { s.descs.push_back({}); }), HasSubstr("5 descriptors are saved"));
}

// What another wrote: each contradiction of a packed part by itself.
TEST(InflightPackedPart, EachContradictionIsRefusedByName) {
  FakeMemory memory(0x1000, 4096);
  const PackedRing ring{4, 0x1000, 0x1100, 0x1104};
  auto why = [&](auto&& change) {
    StopPart part(RingFormat::kPacked, 4);
    // Entries 0 and 1 in use.
    EXPECT_TRUE(WriteInflight(part.bytes(), 4, PackedSet(4, {0, true}, {2})).ok());
    change(part);
    auto set = ReadInflightPacked(part.bytes(), memory, ring);
    EXPECT_EQ(ReasonOf(set.status()), v1::INFLIGHT_UNKNOWN);
    return Message(set.status());
  };
  EXPECT_THAT(why([](auto& p) { p.packed().version = 2; }), HasSubstr("version 2"));
  EXPECT_THAT(why([](auto& p) { p.packed().desc_num = 5; }), HasSubstr("desc_num 5"));
  EXPECT_THAT(why([](auto& p) { p.packed().desc_num = 3; }), HasSubstr("desc_num 3 for a ring of 4"));
  EXPECT_THAT(why([](auto& p) { p.packed().old_used_idx = 4; }), HasSubstr("old used position 4"));
  EXPECT_THAT(why([](auto& p) { p.packed().used_wrap_counter = 2; }), HasSubstr("wrap counters 2"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(0).inflight = 2; }), HasSubstr("flag 2"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(3).next = 2; }), HasSubstr("comes back to entry 2"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(2).next = 4; }), HasSubstr("2 entries are in use and 1 free"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(0).num = 0; }), HasSubstr("has 0 descriptors"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(0).num = 5; }), HasSubstr("has 5 descriptors"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(0).num = 1; }), HasSubstr("ends elsewhere"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(0).next = 2; }), HasSubstr("not its own"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(0).last = 0; }), HasSubstr("ends at 1, not at 0"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(1).flags = kDescNext; }), HasSubstr("ends elsewhere"));
  EXPECT_THAT(why([](auto& p) { p.packed_desc(0).counter = ~uint64_t{0}; }), HasSubstr("at its end"));
  // Another batch under way than the ring can have seen: published (the slot is not available any more), but
  // the position did not move on.
  EXPECT_THAT(why([](auto& p) { p.packed().used_idx = 9; }), HasSubstr("does not follow"));
}

TEST(InflightPackedPart, RequestsOfOneAgeHaveNoOrder) {
  FakeMemory memory(0x1000, 4096);
  StopPart part(RingFormat::kPacked, 4);
  ASSERT_TRUE(WriteInflight(part.bytes(), 4, PackedSet(4, {0, true}, {1, 1})).ok());
  part.packed_desc(1).counter = part.packed_desc(0).counter;
  EXPECT_THAT(Message(ReadInflightPacked(part.bytes(), memory, {4, 0x1000, 0x1100, 0x1104}).status()),
              HasSubstr("the same counter"));
}

// DPDK settles index and wrap counter by two stores; died between them at the end of a lap.
TEST(InflightPackedPart, AHalfStoredPositionOfAnotherBackendIsCompleted) {
  FakeMemory memory(0x1000, 4096);
  StopPart part(RingFormat::kPacked, 4);
  ASSERT_TRUE(InitInflightPacked(part.bytes(), 4, {1, false}).ok());
  part.packed().old_used_wrap_counter = 1;
  auto set = ReadInflightPacked(part.bytes(), memory, {4, 0x1000, 0x1100, 0x1104});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(set->used, (PackedPosition{1, false}));
}

// Nor is a batch of the whole ring believed that was being taken back.
TEST(InflightPackedPart, AHalfTakenBackBatchOfAWholeLapIsForgotten) {
  FakeMemory memory(0x1000, 4096);
  for (uint16_t at = 0; at < 4; ++at) memory.Put(0x1000 + 16 * at, PackedDesc{0, 0, 100, kDescAvail});
  StopPart part(RingFormat::kPacked, 4);
  ASSERT_TRUE(WriteInflight(part.bytes(), 4, PackedSet(4, {0, true}, {3, 1})).ok());
  part.packed().used_wrap_counter = 0;
  auto set = ReadInflightPacked(part.bytes(), memory, {4, 0x1000, 0x1100, 0x1104});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(100, 101));
  EXPECT_EQ(set->used, (PackedPosition{0, true}));
  // The same with the batch published: then its flags are what is late.
  memory.Put(0x1000, PackedDesc{0, 0, 100, kDescAvail | kDescUsed});
  part.packed().free_head = part.packed().old_free_head = 3;
  part.packed_desc(3).next = 0;
  part.packed_desc(2).next = 4;
  set = ReadInflightPacked(part.bytes(), memory, {4, 0x1000, 0x1100, 0x1104});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_TRUE(set->empty());
  EXPECT_EQ(set->repaired, 2);
  EXPECT_EQ(set->used, (PackedPosition{0, false}));
}

// And half of the new position, before anything was published, is forgotten.
TEST(InflightPackedPart, AHalfStoredPositionOfABatchThatWasNotPublishedIsForgotten) {
  FakeMemory memory(0x1000, 4096);
  memory.Put(0x1000 + 16 * 3, PackedDesc{0, 0, 100, kDescAvail});
  StopPart part(RingFormat::kPacked, 4);
  ASSERT_TRUE(WriteInflight(part.bytes(), 4, PackedSet(4, {3, true}, {2})).ok());
  part.packed_desc(1).next = part.packed().free_head;
  part.packed().free_head = 0;
  part.packed().used_idx = 5;  // 3 + 2, not reduced yet
  auto set = ReadInflightPacked(part.bytes(), memory, {4, 0x1000, 0x1100, 0x1104});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(100));
  EXPECT_EQ(set->used, (PackedPosition{3, true}));
}

// Batches of one kind are not for a recovery of another.
TEST(InflightSplitPart, ABatchOfTwoIsMoreThanASingleRecoveryUnderstands) {
  StopPart part(RingFormat::kSplit, 4);
  ASSERT_TRUE(InitInflightSplit(part.bytes(), 4, 3).ok());
  part.split_desc(1).inflight = part.split_desc(2).inflight = 1;
  part.split_desc(2).next = 1;
  part.split().last_batch_head = 2;
  EXPECT_THAT(ReadInflightSplit(part.bytes(), 4, 5)->Ids(), IsEmpty());
  EXPECT_THAT(Message(ReadInflightSplit(part.bytes(), 4, 5, BatchRule::kSingle).status()),
              HasSubstr("one at a time"));
}

TEST(WriteInflight, KeepsOrderChainsAndPositionsForEveryKind) {
  InflightSet split;
  split.requests = {{5, 0, 0, 90}, {1, 0, 0, 91}, {3, 0, 0, 1000}};
  split.used.idx = 65535;
  split.avail.idx = 2;
  StopPart part(RingFormat::kSplit, 16);
  ASSERT_TRUE(WriteInflight(part.bytes(), 16, split).ok());
  EXPECT_EQ(part.split_desc(5).counter, 1u) << "yc takes counters of 0 for a fresh region";
  for (BatchRule rule : {BatchRule::kLinked, BatchRule::kSingle}) {
    auto set = ReadInflightSplit(part.bytes(), 8, 65535, rule);
    ASSERT_TRUE(set.ok()) << set.status();
    EXPECT_THAT(set->Ids(), ElementsAre(5, 1, 3));
    EXPECT_EQ(set->last_avail(), 2);
  }
  const InflightSet packed = PackedSet(8, {6, true}, {1, 3, 2});
  FakeMemory memory(0x1000, 4096);
  StopPart packed_part(RingFormat::kPacked, 8);
  ASSERT_TRUE(WriteInflight(packed_part.bytes(), 8, packed).ok());
  EXPECT_EQ(packed_part.packed().free_head, 6);
  auto set = ReadInflightPacked(packed_part.bytes(), memory, {8, 0x1000, 0x1100, 0x1104});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(*set, packed);
}

TEST(InflightReader, OfWhatIsExpectedNextNothingIsRead) {
  FakeMemory memory(0x1000, 4096);
  const PackedRing ring{8, 0x1000, 0x1100, 0x1104};
  InflightReader reader;
  for (const InflightSet& wanted : {PackedSet(8, {6, true}, {1, 3, 2}), PackedSet(8, {0, true}, {})}) {
    StopPart part(RingFormat::kPacked, 8);
    ASSERT_TRUE(WriteInflight(part.bytes(), 8, wanted).ok());
    // A page that is never mapped, the part itself, and nothing.
    for (const uint8_t* next :
         {reinterpret_cast<const uint8_t*>(uintptr_t{64}), static_cast<const uint8_t*>(part.bytes().data()),
          static_cast<const uint8_t*>(nullptr)}) {
      reader.ExpectNext(next);
      auto view = reader.ReadPacked(part.bytes(), memory, ring);
      ASSERT_TRUE(view.ok()) << view.status();
      EXPECT_EQ(view->size(), wanted.size());
      EXPECT_EQ(reader.Take(), wanted);
    }
  }
}

TEST(WriteInflight, RefusesWhatDoesNotFit) {
  StopPart part(RingFormat::kSplit, 4);
  InflightSet set;
  set.requests = {{4, 0, 0, 1}};
  set.avail.idx = 1;
  EXPECT_FALSE(WriteInflight(part.bytes(), 4, set).ok());
  EXPECT_FALSE(WriteInflight(part.bytes(), 5, InflightSet()).ok());
  EXPECT_FALSE(WriteInflight(part.bytes(), 0, InflightSet()).ok());
  StopPart packed_part(RingFormat::kPacked, 4);
  EXPECT_FALSE(WriteInflight(packed_part.bytes(), 4, PackedSet(8, {0, true}, {5})).ok());
  EXPECT_FALSE(InitInflightPacked(packed_part.bytes(), 4, {4, true}).ok());
}

struct DiskHeader {
  uint32_t type, reserved;
  uint64_t sector;
};

TEST(BlkInFlight, ClassesAreReadFromTheChains) {
  FakeSplitRing ring(4);
  FakeMemory& memory = ring.memory;
  const uint64_t at = 0x10000 + 512;
  memory.Put(at, DiskHeader{kBlkOut, 0, 8});
  memory.Put(at + 16, DiskHeader{kBlkZoneAppend, 0, 8});
  // 0 -> 1 -> 2: header, data, status. 3: a table of the same.
  memory.Put(ring.ring.desc, SplitDesc{at, 16, kDescNext, 1});
  memory.Put(ring.ring.desc + 16, SplitDesc{at, 512, kDescNext, 2});
  memory.Put(ring.ring.desc + 32, SplitDesc{at, 1, kDescWrite, 0});
  memory.Put(ring.ring.desc + 48, SplitDesc{at + 64, 32, kDescIndirect, 0});
  memory.Put(at + 64, SplitDesc{at + 16, 16, kDescNext, 1});
  memory.Put(at + 80, SplitDesc{at, 1, kDescWrite, 0});
  InflightSet set;
  set.requests = {{0, 0, 0, 1}, {3, 0, 0, 2}};
  auto requests = ReadBlkRequests(memory, ring.ring.desc, 4, set);
  ASSERT_EQ(requests.size(), 2u);
  EXPECT_EQ(requests[0].cls, RequestClass::kIdempotentWrite);
  EXPECT_THAT(requests[0].extents, ElementsAre(Extent{8, 9}));
  EXPECT_EQ(requests[1].type, kBlkZoneAppend);
  ClassesPresent classes = ReadClasses(memory, ring.ring.desc, 4, set, v1::BLK);
  EXPECT_TRUE(classes.writes && classes.not_idempotent && !classes.reads);
  EXPECT_TRUE(ReadClasses(memory, ring.ring.desc, 4, set, v1::NET).harmless);
}

TEST(BlkInFlight, MalformedChainsAllowNothing) {
  FakeSplitRing ring(4);
  FakeMemory& memory = ring.memory;
  InflightSet set;
  set.requests = {{0, 0, 0, 1}};
  auto cls = [&](SplitDesc first) {
    memory.Put(ring.ring.desc, first);
    return ReadBlkRequests(memory, ring.ring.desc, 4, set)[0].cls;
  };
  const uint64_t at = 0x10000 + 512;
  memory.Put(at, DiskHeader{kBlkIn, 0, 0});
  EXPECT_EQ(cls({at, 16, 0, 0}), RequestClass::kRead);
  EXPECT_EQ(cls({at, 16, kDescNext, 0}), RequestClass::kNotIdempotent) << "a loop";
  EXPECT_EQ(cls({at, 16, kDescNext, 9}), RequestClass::kNotIdempotent) << "beyond the ring";
  EXPECT_EQ(cls({1 << 30, 16, 0, 0}), RequestClass::kNotIdempotent) << "not in memory";
  EXPECT_EQ(cls({at, 17, kDescIndirect, 0}), RequestClass::kNotIdempotent) << "no table";
  EXPECT_EQ(cls({at, 0xfffffff0, kDescIndirect, 0}), RequestClass::kNotIdempotent) << "too long a table";
  EXPECT_EQ(cls({at, 16, kDescWrite, 0}), RequestClass::kNotIdempotent) << "no header";
}

TEST(BlkInFlight, SavedPackedChainsAreRead) {
  FakeMemory memory(0x10000, 4096);
  memory.Put(0x10000, DiskHeader{kBlkIn, 0, 3});
  InflightSet set;
  set.format = RingFormat::kPacked;
  set.requests = {{7, 2, 0, 1}};
  set.descs = {{0x10000, 16, 7, kDescNext}, {0x10100, 513, 7, kDescWrite}};
  auto requests = ReadBlkRequests(memory, 0, 4, set);
  EXPECT_EQ(requests[0].cls, RequestClass::kRead);
  EXPECT_THAT(requests[0].extents, ElementsAre(Extent{3, 4}));
}

}  // namespace
}  // namespace baton::virtio
