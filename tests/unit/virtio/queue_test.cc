#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "tests/unit/virtio/ring_lab.h"

namespace baton::virtio {
namespace {

// Both sides of one ring, of either kind.
class QueueTest : public testing::TestWithParam<uint64_t> {
 protected:
  void Make(uint16_t n, uint64_t features) {
    lab_.emplace(n);
    options_.features = GetParam() | features;
    driver_.emplace(DriverQueue::Create(lab_->memory, lab_->layout, options_, lab_->indirect).value());
    base_ = options_.Has(kFRingPacked) ? kPackedBaseAfterReset : 0;
    Restart();
  }
  void Restart() {
    device_.emplace(DeviceQueue::Create(lab_->memory, lab_->layout, options_, base_).value());
  }

  void Add(uint64_t token, size_t readable = 1, size_t writable = 1) {
    std::vector<Segment> in(readable, {lab_->buffers, 16});
    std::vector<Segment> out(writable, {lab_->buffers + 64, 32});
    ASSERT_TRUE(driver_->Add(in, out, token).ok());
  }
  Chain Pop() {
    Chain chain;
    auto popped = device_->Pop(&chain);
    EXPECT_TRUE(popped.ok() && *popped) << popped.status();
    return chain;
  }
  bool Empty() {
    Chain chain;
    return !device_->Pop(&chain).value();
  }
  std::vector<UsedBuffer> TakeAll() {
    std::vector<UsedBuffer> all;
    UsedBuffer used;
    for (;;) {
      auto taken = driver_->TakeUsed(&used);
      EXPECT_TRUE(taken.ok()) << taken.status();
      if (!taken.ok() || !*taken) return all;
      all.push_back(used);
    }
  }
  std::vector<uint64_t> Tokens(const std::vector<UsedBuffer>& all) {
    std::vector<uint64_t> tokens;
    for (const UsedBuffer& used : all) tokens.push_back(used.token);
    return tokens;
  }

  std::optional<RingLab> lab_;
  QueueOptions options_;
  uint32_t base_ = 0;
  std::optional<DriverQueue> driver_;
  std::optional<DeviceQueue> device_;
};

INSTANTIATE_TEST_SUITE_P(Kinds, QueueTest, testing::Values(kFVersion1, kFVersion1 | kFRingPacked),
                         [](const auto& info) { return info.param & kFRingPacked ? "Packed" : "Split"; });

TEST_P(QueueTest, CarriesBuffersThereAndBackOutOfOrder) {
  Make(8, 0);
  for (uint64_t token : {10, 11, 12}) Add(token);
  EXPECT_TRUE(Empty());
  driver_->Publish();
  EXPECT_EQ(device_->Available().value(), 3);
  Chain a = Pop(), b = Pop(), c = Pop();
  EXPECT_TRUE(Empty());
  EXPECT_EQ(a.readable_bytes, 16u);
  EXPECT_EQ(a.writable_bytes, 32u);
  EXPECT_EQ(device_->in_flight(), 3);
  ASSERT_TRUE(device_->Stage(c.id, 5).ok());
  ASSERT_TRUE(device_->Stage(a.id, 32).ok());
  EXPECT_EQ(device_->in_flight(), 3);
  EXPECT_TRUE(TakeAll().empty());
  EXPECT_EQ(device_->Publish(), 2);
  EXPECT_TRUE(device_->NeedsCall());
  EXPECT_FALSE(device_->NeedsCall());
  auto used = TakeAll();
  EXPECT_EQ(Tokens(used), (std::vector<uint64_t>{12, 10}));
  EXPECT_EQ(used[0].len, 5u);
  EXPECT_EQ(device_->in_flight(), 1);
  EXPECT_EQ(driver_->outstanding(), 1);
  ASSERT_TRUE(device_->Stage(b.id, 0).ok());
  device_->Publish();
  EXPECT_EQ(Tokens(TakeAll()), (std::vector<uint64_t>{11}));
}

TEST_P(QueueTest, InOrderReturnsABatchWithOneElement) {
  Make(8, kFInOrder);
  for (uint64_t token : {10, 11, 12}) Add(token);
  driver_->Publish();
  Chain a = Pop(), b = Pop(), c = Pop();
  ASSERT_TRUE(device_->Stage(c.id, 7).ok());
  ASSERT_TRUE(device_->Stage(b.id, 32).ok());
  EXPECT_EQ(device_->Publish(), 0);
  ASSERT_TRUE(device_->Stage(a.id, 32).ok());
  EXPECT_EQ(device_->Publish(), 3);
  auto used = TakeAll();
  EXPECT_EQ(Tokens(used), (std::vector<uint64_t>{10, 11, 12}));
  EXPECT_TRUE(used[0].skipped);
  EXPECT_TRUE(used[1].skipped);
  EXPECT_FALSE(used[2].skipped);
  EXPECT_EQ(used[2].len, 7u);
}

TEST_P(QueueTest, RestartsAtTheBaseWithRequestsInFlight) {
  Make(8, kFIndirectDesc);
  for (uint64_t token : {10, 11, 12}) Add(token, 2, 2);
  driver_->Publish();
  Chain a = Pop(), b = Pop();
  ASSERT_TRUE(device_->Stage(b.id, 1).ok());
  device_->Publish();
  base_ = device_->base();
  Restart();
  Chain again, none;
  EXPECT_FALSE(device_->Pop(&none).ok());
  ASSERT_TRUE(device_->Resubmit(a.id, a.descriptors, &again).ok());
  EXPECT_EQ(again.segments, a.segments);
  Chain c = Pop();
  ASSERT_TRUE(device_->Stage(a.id, 2).ok());
  ASSERT_TRUE(device_->Stage(c.id, 3).ok());
  device_->Publish();
  EXPECT_EQ(Tokens(TakeAll()), (std::vector<uint64_t>{11, 10, 12}));
}

TEST_P(QueueTest, InOrderEndsABatchAtABufferThatIsNotFull) {
  Make(8, kFInOrder);
  for (uint64_t token : {10, 11, 12, 13}) Add(token);
  driver_->Publish();
  std::vector<Chain> chains = {Pop(), Pop(), Pop(), Pop()};
  for (size_t i : {3, 2, 1, 0}) ASSERT_TRUE(device_->Stage(chains[i].id, i == 1 ? 4 : 32).ok());
  EXPECT_EQ(device_->staged().size(), 4u);
  device_->Publish();
  auto used = TakeAll();
  EXPECT_EQ(Tokens(used), (std::vector<uint64_t>{10, 11, 12, 13}));
  // The driver takes a skipped buffer as written completely: 11 was not, and needs an element of its own.
  EXPECT_EQ(used[1].len, 4u);
  EXPECT_EQ((std::vector<bool>{used[0].skipped, used[1].skipped, used[2].skipped, used[3].skipped}),
            (std::vector<bool>{true, false, true, false}));
}

TEST_P(QueueTest, InOrderBatchesGoOutOneByOneWhereTheRegionCannotTellABatch) {
  Make(8, kFInOrder);
  for (uint64_t token : {10, 11, 12}) Add(token);
  driver_->Publish();
  Chain a = Pop(), b = Pop(), c = Pop();
  for (uint16_t id : {c.id, b.id, a.id}) ASSERT_TRUE(device_->Stage(id, 32).ok());
  for (size_t left : {3, 2, 1}) {
    EXPECT_EQ(device_->staged().size(), left);
    EXPECT_EQ(device_->Publish(1), 1);
    auto used = TakeAll();
    ASSERT_EQ(used.size(), 1u);
    EXPECT_FALSE(used[0].skipped);
  }
}

TEST_P(QueueTest, UnpopGivesTheLastChainBackAndNoOther) {
  Make(4, 0);
  for (uint64_t token : {10, 11}) Add(token);
  driver_->Publish();
  Chain a = Pop(), b = Pop();
  EXPECT_FALSE(device_->Unpop(a));
  EXPECT_TRUE(device_->Unpop(b));
  EXPECT_TRUE(device_->Unpop(a));
  EXPECT_FALSE(device_->Unpop(a));
  EXPECT_EQ(device_->in_flight(), 0);
  EXPECT_EQ(Pop().id, a.id);
}

TEST_P(QueueTest, ARingOfOneEntryWorks) {
  Make(1, 0);
  for (uint64_t token = 0; token < 5; ++token) {
    Add(token, 1, 0);
    EXPECT_FALSE(driver_->Add({}, {}, 0).ok());
    driver_->Publish();
    Chain chain = Pop();
    EXPECT_TRUE(Empty());
    ASSERT_TRUE(device_->Stage(chain.id, 0).ok());
    device_->Publish();
    EXPECT_EQ(Tokens(TakeAll()), (std::vector<uint64_t>{token}));
  }
}

// 32768 entries, three times full: positions, wrap counters and (split) indices beyond 65535.
TEST_P(QueueTest, TheLargestRingWrapsItsIndices) {
  Make(32768, kFEventIdx);
  const Segment segment{lab_->buffers, 1};
  for (uint64_t round = 0; round < 3; ++round) {
    for (uint64_t i = 0; i < 32768; ++i) ASSERT_TRUE(driver_->Add({&segment, 1}, {}, i).ok());
    EXPECT_FALSE(driver_->Add({&segment, 1}, {}, 0).ok());
    driver_->Publish();
    EXPECT_EQ(device_->Available().value(), 32768);
    Chain chain;
    while (device_->Pop(&chain).value()) ASSERT_TRUE(device_->Stage(chain.id, 0).ok());
    EXPECT_EQ(device_->in_flight(), 32768);
    EXPECT_EQ(device_->Publish(), 32768);
    auto used = TakeAll();
    ASSERT_EQ(used.size(), 32768u);
    EXPECT_EQ(used.back().token, 32767u);
  }
}

TEST_P(QueueTest, KicksAndCallsAreAskedForByEventIndex) {
  Make(4, kFEventIdx);
  // Over several laps, so that the wrapped comparisons are met.
  for (int round = 0; round < 11; ++round) {
    ASSERT_FALSE(device_->EnableKicks().value());
    Add(1);
    driver_->Publish();
    EXPECT_TRUE(driver_->NeedsKick());
    // The device has not looked again: no second kick.
    Add(2, 1, 0);
    driver_->Publish();
    EXPECT_FALSE(driver_->NeedsKick());
    Chain a = Pop(), b = Pop();
    ASSERT_FALSE(driver_->EnableCalls().value());
    ASSERT_TRUE(device_->Stage(a.id, 0).ok());
    device_->Publish();
    EXPECT_TRUE(device_->NeedsCall());
    ASSERT_TRUE(device_->Stage(b.id, 0).ok());
    device_->Publish();
    EXPECT_FALSE(device_->NeedsCall());
    EXPECT_EQ(TakeAll().size(), 2u);
  }
}

TEST_P(QueueTest, WhatIsAddedAndNotPublishedDoesNotHideAKick) {
  Make(8, kFEventIdx);
  for (int round = 0; round < 9; ++round) {
    ASSERT_FALSE(device_->EnableKicks().value());
    Add(1, 1, 0);
    driver_->Publish();
    Add(2, 1, 0);
    EXPECT_TRUE(driver_->NeedsKick());
    driver_->Publish();
    for (const Chain& chain : {Pop(), Pop()}) ASSERT_TRUE(device_->Stage(chain.id, 0).ok());
    device_->Publish();
    EXPECT_EQ(TakeAll().size(), 2u);
  }
}

TEST_P(QueueTest, EnablingTellsWhatArrivedMeanwhile) {
  for (uint64_t features : {uint64_t{0}, kFEventIdx}) {
    Make(4, features);
    device_->DisableKicks();
    Add(1);
    driver_->Publish();
    if (!features) {
      EXPECT_FALSE(driver_->NeedsKick());
    }
    EXPECT_TRUE(device_->EnableKicks().value());
    driver_->DisableCalls();
    Chain chain = Pop();
    (void)device_->NeedsCall();
    ASSERT_TRUE(device_->Stage(chain.id, 0).ok());
    device_->Publish();
    if (!features) {
      EXPECT_FALSE(device_->NeedsCall());
    }
    EXPECT_TRUE(driver_->EnableCalls().value());
  }
}

// SPDK and other polling back-ends leave NO_NOTIFY in guest memory.
TEST_P(QueueTest, ASuccessorOfAPollingDeviceAsksForKicksAgain) {
  Make(4, 0);
  device_->DisableKicks();
  base_ = device_->base();
  Restart();
  Add(1);
  driver_->Publish();
  EXPECT_TRUE(driver_->NeedsKick());
}

TEST_P(QueueTest, TheFirstCallIsAlwaysRaised) {
  Make(4, 0);
  driver_->DisableCalls();
  EXPECT_TRUE(device_->NeedsCall());
  EXPECT_FALSE(device_->NeedsCall());
}

TEST_P(QueueTest, EverythingTheDeviceWritesIsLogged) {
  struct Log : WriteLog {
    void Wrote(uint64_t gpa, uint64_t size) override {
      for (uint64_t at = gpa; at < gpa + size; ++at) bytes.insert(at);
    }
    std::set<uint64_t> bytes;
  } log;
  options_.log = &log;
  Make(4, kFEventIdx);
  const uint64_t end = lab_->indirect.gpa;
  for (int round = 0; round < 9; ++round) {
    Add(1, 1, 1);
    Add(2, 1, 0);
    driver_->Publish();
    std::vector<uint8_t> before(end - RingLab::kBase);
    ASSERT_TRUE(lab_->memory.Read(RingLab::kBase, before.data(), before.size()).ok());
    log.bytes.clear();
    Chain a = Pop(), b = Pop();
    ASSERT_TRUE(device_->Stage(b.id, 0).ok());
    ASSERT_TRUE(device_->Stage(a.id, 7).ok());
    device_->Publish();
    ASSERT_TRUE(device_->EnableKicks().ok());
    std::vector<uint8_t> after(before.size());
    ASSERT_TRUE(lab_->memory.Read(RingLab::kBase, after.data(), after.size()).ok());
    for (size_t i = 0; i < after.size(); ++i) {
      if (after[i] != before[i]) {
        EXPECT_TRUE(log.bytes.count(RingLab::kBase + i)) << i;
      }
    }
    EXPECT_EQ(TakeAll().size(), 2u);
  }
}

TEST_P(QueueTest, ADriverSavesAndRestoresItselfAndRefusesWhatIsNotItsState) {
  Make(8, kFIndirectDesc);
  for (uint64_t token : {10, 11, 12}) Add(token, 2, 1);
  driver_->Publish();
  Chain a = Pop(), b = Pop();
  ASSERT_TRUE(device_->Stage(b.id, 1).ok());
  device_->Publish();
  std::vector<uint8_t> state = driver_->Save();
  lab_->Move();
  driver_.emplace(DriverQueue::Restore(lab_->memory, lab_->layout, options_, lab_->indirect, state).value());
  ASSERT_TRUE(device_->Remap(lab_->memory).ok());
  EXPECT_EQ(Tokens(TakeAll()), (std::vector<uint64_t>{11}));
  Add(13);
  driver_->Publish();
  EXPECT_EQ(device_->Available().value(), 2);
  state.pop_back();
  EXPECT_FALSE(DriverQueue::Restore(lab_->memory, lab_->layout, options_, lab_->indirect, state).ok());
}

TEST_P(QueueTest, ABaseThatTheRingContradictsIsRefused) {
  Make(8, 0);
  const uint32_t wrong = options_.Has(kFRingPacked) ? 0x80008009 : 9;
  EXPECT_FALSE(DeviceQueue::Create(lab_->memory, lab_->layout, options_, wrong).ok());
}

TEST_P(QueueTest, CompletionsThatCannotBeAreRefused) {
  Make(8, 0);
  Add(1);
  driver_->Publish();
  Chain chain = Pop();
  EXPECT_FALSE(device_->Stage(static_cast<uint16_t>(chain.id + 1), 0).ok());
  EXPECT_FALSE(device_->Stage(chain.id, 33).ok());
  EXPECT_TRUE(device_->Stage(chain.id, 32).ok());
  EXPECT_FALSE(device_->Stage(chain.id, 32).ok());
}

// The descriptors of a ring as a hostile driver writes them. One buffer was fetched, so that something is in
// flight.
class HostileDriverTest : public QueueTest {
 protected:
  // Writes descriptor `index`; of a packed ring flags get the wrap bits of the first lap.
  void Desc(uint16_t index, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next_or_id) {
    uint8_t* at = lab_->At(lab_->layout.desc + 16u * index);
    Store<uint64_t>(at, addr);
    Store<uint32_t>(at + 8, len);
    if (options_.Has(kFRingPacked)) {
      Store<uint16_t>(at + 12, next_or_id);
      Store<uint16_t>(at + 14, flags | kDescAvail);
    } else {
      Store<uint16_t>(at + 12, flags);
      Store<uint16_t>(at + 14, next_or_id);
    }
  }
  // Makes descriptor 0 the next available one.
  void Offer() {
    if (options_.Has(kFRingPacked)) return;
    Store<uint16_t>(lab_->At(lab_->layout.driver + 4), 0);
    Store<uint16_t>(lab_->At(lab_->layout.driver + 2), 1);
  }
  std::string Error() {
    Chain chain;
    auto popped = device_->Pop(&chain);
    if (popped.ok()) return *popped ? "popped" : "empty";
    // It is said again: the queue has stopped.
    EXPECT_EQ(device_->Pop(&chain).status(), popped.status());
    EXPECT_EQ(ReasonOf(popped.status()), v1::STATE_MISMATCH);
    EXPECT_EQ(device_->in_flight(), 0);
    return std::string(popped.status().message());
  }
};

INSTANTIATE_TEST_SUITE_P(Kinds, HostileDriverTest, testing::Values(kFVersion1, kFVersion1 | kFRingPacked),
                         [](const auto& info) { return info.param & kFRingPacked ? "Packed" : "Split"; });

TEST_P(HostileDriverTest, AChainThatDoesNotEndEnds) {
  Make(4, 0);
  for (uint16_t i = 0; i < 4; ++i) Desc(i, lab_->buffers, 16, kDescNext, i == 3 ? 0 : i + 1);
  Offer();
  EXPECT_THAT(Error(), testing::AnyOf(testing::HasSubstr("loop"), testing::HasSubstr("in flight")));
}

TEST_P(HostileDriverTest, IndirectDescriptorsObeyTheirRules) {
  Make(4, 0);
  Desc(0, lab_->buffers, 32, kDescIndirect, 0);
  Offer();
  EXPECT_THAT(Error(), testing::HasSubstr("not negotiated"));
  for (auto [len, flags, what] : std::vector<std::tuple<uint32_t, uint16_t, const char*>>{
           {0, 0, "0 bytes"}, {24, 0, "24 bytes"}, {16 * 1025, 0, "1025"}, {16, kDescNext, "successor"}}) {
    Make(4, kFIndirectDesc);
    Desc(0, lab_->buffers, len, kDescIndirect | flags, 1);
    Offer();
    EXPECT_THAT(Error(), testing::HasSubstr(what));
  }
}

TEST_P(HostileDriverTest, ADescriptorToReadAfterOneToWriteIsRefused) {
  Make(4, 0);
  Desc(0, lab_->buffers, 16, kDescWrite | kDescNext, 1);
  Desc(1, lab_->buffers, 16, 0, 0);
  Offer();
  EXPECT_THAT(Error(), testing::HasSubstr("follows one to write"));
}

TEST_P(HostileDriverTest, ABufferThatWrapsAroundTheAddressSpaceIsRefused) {
  Make(4, 0);
  Desc(0, UINT64_MAX - 4, 16, 0, 0);
  Offer();
  EXPECT_THAT(Error(), testing::HasSubstr("16 bytes at"));
}

TEST_P(HostileDriverTest, ABufferOutsideGuestMemoryIsNotMapped) {
  Make(4, 0);
  Desc(0, lab_->memory.regions()[0].gpa - 8, 16, 0, 0);
  Offer();
  Chain chain = Pop();
  std::vector<iovec> iovecs;
  EXPECT_FALSE(AppendIovecs(lab_->memory, chain.segments, &iovecs).ok());
  char bytes[16];
  EXPECT_FALSE(CopyFromSegments(lab_->memory, chain.segments, 0, bytes, 16).ok());
}

TEST_P(HostileDriverTest, ABufferThatIsInFlightIsNotFetchedAgain) {
  Make(4, 0);
  Desc(0, lab_->buffers, 16, 0, 0);
  Offer();
  EXPECT_EQ(Pop().id, 0);
  if (options_.Has(kFRingPacked)) {
    Desc(1, lab_->buffers, 16, 0, 0);
  } else {
    Store<uint16_t>(lab_->At(lab_->layout.driver + 2), 2);
  }
  Chain chain;
  EXPECT_THAT(std::string(device_->Pop(&chain).status().message()),
              testing::HasSubstr("while it is in flight"));
}

TEST(HostileSplitTest, IndicesAndHeadsAreChecked) {
  RingLab lab(4);
  auto device = DeviceQueue::Create(lab.memory, lab.layout, {}, 0).value();
  Store<uint16_t>(lab.At(lab.layout.driver + 2), 5);
  Chain chain;
  EXPECT_FALSE(device.Available().ok());
  EXPECT_FALSE(device.Pop(&chain).ok());
  auto second = DeviceQueue::Create(lab.memory, lab.layout, {}, 5);
  ASSERT_FALSE(second.ok());
  Store<uint16_t>(lab.At(lab.layout.driver + 2), 1);
  Store<uint16_t>(lab.At(lab.layout.driver + 4), 4);
  auto third = DeviceQueue::Create(lab.memory, lab.layout, {}, 0).value();
  EXPECT_FALSE(third.Pop(&chain).ok());
}

// VIRTIO 2.7.5.3.2: normal descriptors followed by one to a table, whose own WRITE flag means nothing.
TEST(ChainTest, ATableMayEndASplitChain) {
  RingLab lab(4);
  const SplitDesc first{lab.buffers, 16, kDescNext, 1};
  const SplitDesc second{lab.indirect.gpa, 32, kDescIndirect | kDescWrite, 0};
  const SplitDesc table[2] = {{lab.buffers + 64, 8, kDescNext, 1}, {lab.buffers + 128, 4, kDescWrite, 0}};
  ASSERT_TRUE(lab.memory.Write(lab.layout.desc, &first, 16).ok());
  ASSERT_TRUE(lab.memory.Write(lab.layout.desc + 16, &second, 16).ok());
  ASSERT_TRUE(lab.memory.Write(lab.indirect.gpa, table, 32).ok());
  Store<uint16_t>(lab.At(lab.layout.driver + 2), 1);
  auto device = DeviceQueue::Create(lab.memory, lab.layout, {kFIndirectDesc, nullptr}, 0).value();
  Chain chain;
  ASSERT_TRUE(device.Pop(&chain).value());
  EXPECT_EQ(chain.segments,
            (std::vector<Segment>{{lab.buffers, 16}, {lab.buffers + 64, 8}, {lab.buffers + 128, 4}}));
  EXPECT_EQ(chain.readable, 2u);
  // A table within a table is one level too many, and one that leads to itself does not end.
  SplitDesc bad[2] = {{lab.buffers, 16, kDescIndirect, 0}, {}};
  for (auto [flags, what] : {std::pair{kDescIndirect, "within"}, std::pair{kDescNext, "loop"}}) {
    bad[0].flags = flags;
    ASSERT_TRUE(lab.memory.Write(lab.indirect.gpa, bad, 32).ok());
    auto again = DeviceQueue::Create(lab.memory, lab.layout, {kFIndirectDesc, nullptr}, 0).value();
    EXPECT_THAT(std::string(again.Pop(&chain).status().message()), testing::HasSubstr(what));
  }
}

TEST(SplitDriverTest, InOrderUsesDescriptorsInRingOrder) {
  RingLab lab(8);
  const QueueOptions options{kFVersion1 | kFInOrder, nullptr};
  auto driver = DriverQueue::Create(lab.memory, lab.layout, options).value();
  auto device = DeviceQueue::Create(lab.memory, lab.layout, options, 0).value();
  const Segment segments[3] = {{lab.buffers, 1}, {lab.buffers, 2}, {lab.buffers, 3}};
  uint16_t expected = 0;
  Chain chain;
  UsedBuffer used;
  for (int round = 0; round < 10; ++round) {
    for (int k = 0; k < 2; ++k) {
      EXPECT_EQ(driver.Add(segments, {}, 0).value(), expected);
      for (uint16_t i = 0; i < 2; ++i) {
        const auto desc = LoadDesc<SplitDesc>(lab.At(lab.layout.desc + 16u * ((expected + i) % 8)));
        EXPECT_EQ(desc.next, (expected + i + 1) % 8);
      }
      expected = (expected + 3) % 8;
    }
    driver.Publish();
    while (device.Pop(&chain).value()) ASSERT_TRUE(device.Stage(chain.id, 0).ok());
    device.Publish();
    while (driver.TakeUsed(&used).value()) {
    }
  }
}

TEST(GuestMemoryTest, RegionsAreCheckedAndReadAcrossTheirSeam) {
  alignas(64) uint8_t bytes[256] = {};
  EXPECT_FALSE(GuestMemory::Create({{0x1000, 0, bytes}}).ok());
  EXPECT_FALSE(GuestMemory::Create({{UINT64_MAX - 63, 128, bytes}}).ok());
  EXPECT_FALSE(GuestMemory::Create({{0x1000, 128, bytes}, {0x1040, 64, bytes + 128}}).ok());
  EXPECT_FALSE(GuestMemory::Create({{0x1000, 64, bytes + 8}}).ok());
  const GuestMemory memory =
      GuestMemory::Create({{0x1040, 64, bytes + 128}, {0x1000, 64, bytes}, {0x2000, 64, bytes + 64}}).value();
  EXPECT_EQ(memory.At(0x1000, 64), bytes);
  EXPECT_EQ(memory.At(0x1000, 65), nullptr);
  EXPECT_EQ(memory.At(0x1080, 0), nullptr);
  EXPECT_EQ(memory.At(0xfff, 1), nullptr);
  EXPECT_EQ(memory.At(UINT64_MAX, UINT64_MAX), nullptr);
  const uint32_t value = 0x01020304;
  ASSERT_TRUE(memory.Write(0x103e, &value, 4).ok());
  EXPECT_EQ(bytes[63], 3);
  EXPECT_EQ(bytes[128], 2);
  uint32_t back = 0;
  ASSERT_TRUE(memory.Read(0x103e, &back, 4).ok());
  EXPECT_EQ(back, value);
  EXPECT_FALSE(memory.Read(0x107e, &back, 4).ok());
  std::vector<iovec> iovecs;
  const Segment across{0x1020, 64};
  ASSERT_TRUE(AppendIovecs(memory, {&across, 1}, &iovecs).ok());
  ASSERT_EQ(iovecs.size(), 2u);
  EXPECT_EQ(iovecs[0].iov_len + iovecs[1].iov_len, 64u);
}

}  // namespace
}  // namespace baton::virtio
