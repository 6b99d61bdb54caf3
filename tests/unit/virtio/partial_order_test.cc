#include "agent/virtio/partial_order.h"

#include <gtest/gtest.h>

#include "agent/virtio/features.h"
#include "tests/unit/virtio/ring_lab.h"

namespace baton::virtio {
namespace {

using State = SplitOrderDevice::State;

TEST(OrderFeaturesTest, AtMostOneOrderAndTheExperimentOnlyIfAskedFor) {
  EXPECT_TRUE(CheckOrderFeatures(kFVersion1, false).ok());
  EXPECT_TRUE(CheckOrderFeatures(kFVersion1 | kFInOrder, false).ok());
  EXPECT_FALSE(CheckOrderFeatures(kFVersion1 | kFPartialOrder, false).ok());
  EXPECT_TRUE(CheckOrderFeatures(kFVersion1 | kFPartialOrder, true).ok());
  EXPECT_FALSE(CheckOrderFeatures(kFVersion1 | kFPartialOrder | kFInOrder, true).ok());
  EXPECT_FALSE(CheckOrderFeatures(kFPartialOrder, true).ok());
  EXPECT_NE(FeatureNames(kFPartialOrder, v1::BLK).find("experimental"), std::string::npos);
}

TEST(SplitOrderTest, TheHandshakeGoesThroughAllFourStates) {
  SplitOrderDevice device;
  EXPECT_FALSE(device.Step(false, Ordering::kInOrder, false));  // a younger buffer was used: not yet
  EXPECT_EQ(device.state(), State::kFree);
  EXPECT_TRUE(device.Step(false, Ordering::kInOrder, true));
  EXPECT_EQ(device.state(), State::kAsserting);
  EXPECT_TRUE(device.in_order());
  EXPECT_FALSE(device.batches());
  EXPECT_FALSE(device.Step(true, Ordering::kInOrder, true));
  EXPECT_EQ(device.state(), State::kAgreed);
  EXPECT_TRUE(device.batches());
  EXPECT_TRUE(device.Step(true, Ordering::kAsCompleted, true));
  EXPECT_EQ(device.state(), State::kReleasing);
  EXPECT_TRUE(device.in_order());
  EXPECT_FALSE(device.batches());
  // IN_ORDER is not asserted again before IN_ORDER_ACK is cleared.
  EXPECT_FALSE(device.Step(true, Ordering::kInOrder, true));
  EXPECT_EQ(device.state(), State::kReleasing);
  EXPECT_FALSE(device.Step(false, Ordering::kAsCompleted, true));
  EXPECT_EQ(device.state(), State::kFree);
  EXPECT_FALSE(device.in_order());
}

TEST(SplitOrderTest, AnAssertionIsWithdrawnOnlyOnceAcknowledged) {
  SplitOrderDevice device;
  EXPECT_TRUE(device.Step(false, Ordering::kInOrder, true));
  EXPECT_FALSE(device.Step(false, Ordering::kAsCompleted, true));
  EXPECT_EQ(device.state(), State::kAsserting);
  EXPECT_TRUE(device.Step(true, Ordering::kAsCompleted, true));
  EXPECT_EQ(device.state(), State::kReleasing);
}

TEST(SplitOrderTest, ADriverThatAcknowledgesOutOfTurnIsNotBelieved) {
  SplitOrderDevice device;
  EXPECT_FALSE(device.Step(true, Ordering::kInOrder, true));
  EXPECT_EQ(device.state(), State::kFree);
}

TEST(SplitOrderTest, ASuccessorContinuesFromTheFlagsInTheRing) {
  EXPECT_EQ(SplitOrderDevice(false, false).state(), State::kFree);
  EXPECT_EQ(SplitOrderDevice(true, false).state(), State::kAsserting);
  EXPECT_EQ(SplitOrderDevice(true, true).state(), State::kAgreed);
  EXPECT_EQ(SplitOrderDevice(false, true).state(), State::kReleasing);
}

TEST(SplitOrderTest, TheDriverFollowsAndKicksOncePerChange) {
  SplitOrderDriver driver;
  EXPECT_FALSE(driver.Follow(false));
  EXPECT_TRUE(driver.Follow(true));
  EXPECT_TRUE(driver.batches());
  EXPECT_FALSE(driver.Follow(true));
  EXPECT_TRUE(driver.Follow(false));
  EXPECT_FALSE(driver.batches());
}

// Both sides of a ring of 8 with three or more buffers of 32 bytes to write, fetched.
class PartialRing {
 public:
  PartialRing(uint64_t kind, int buffers) : lab_(8) {
    options_.features = kFVersion1 | kFPartialOrder | kind;
    driver_.emplace(DriverQueue::Create(lab_.memory, lab_.layout, options_).value());
    Restart(kind ? kPackedBaseAfterReset : 0);
    for (int i = 0; i < buffers; ++i) Add();
  }
  void Restart(uint32_t base) {
    device.emplace(DeviceQueue::Create(lab_.memory, lab_.layout, options_, base).value());
  }
  void Add() {
    const Segment segment{lab_.buffers, 32};
    ids.push_back(driver_->Add({}, {&segment, 1}, ids.size()).value());
    driver_->Publish();
    Chain chain;
    EXPECT_TRUE(device->Pop(&chain).value());
  }
  void Complete(size_t index) { ASSERT_TRUE(device->Stage(ids[index], 32).ok()); }
  std::vector<uint64_t> Take() {
    std::vector<uint64_t> tokens;
    skipped = 0;
    UsedBuffer used;
    while (driver_->TakeUsed(&used).value()) {
      tokens.push_back(used.token);
      skipped += used.skipped;
    }
    return tokens;
  }
  // The device looks for buffers: that is when it sees the driver's flags.
  void Poll() {
    Chain chain;
    EXPECT_FALSE(device->Pop(&chain).value());
  }
  uint16_t UsedFlags() { return Load<uint16_t>(lab_.At(lab_.layout.device)); }
  uint16_t AvailFlags() { return Load<uint16_t>(lab_.At(lab_.layout.driver)); }
  bool Flush(int slot) {
    return Load<uint16_t>(lab_.At(lab_.layout.desc + 16u * static_cast<unsigned>(slot) + 14)) & kDescFlush;
  }
  bool Kick() { return driver_->NeedsKick(); }

  std::optional<DeviceQueue> device;
  std::vector<uint16_t> ids;
  int skipped = 0;

 private:
  RingLab lab_;
  QueueOptions options_;
  std::optional<DriverQueue> driver_;
};

TEST(PartialOrderRingTest, PackedFlushIsSetWhenEverythingBeforeIsUsed) {
  PartialRing ring(kFRingPacked, 4);
  ring.device->SetOrdering(Ordering::kAsCompleted);
  ring.Complete(1);
  ring.device->Publish();
  EXPECT_FALSE(ring.Flush(0));
  ring.Complete(2);
  ring.device->Publish();
  EXPECT_FALSE(ring.Flush(1));
  ring.Complete(0);
  ring.device->Publish();
  EXPECT_TRUE(ring.Flush(2));
  EXPECT_EQ(ring.Take(), (std::vector<uint64_t>{1, 2, 0}));
  EXPECT_EQ(ring.skipped, 0);
}

TEST(PartialOrderRingTest, PackedTwoFlushesInARowReturnABatch) {
  PartialRing ring(kFRingPacked, 5);
  ring.Complete(0);
  ring.device->Publish();
  EXPECT_TRUE(ring.Flush(0));
  ring.Complete(2);
  EXPECT_EQ(ring.device->Publish(), 0);
  ring.Complete(3);
  ring.Complete(1);
  EXPECT_EQ(ring.device->Publish(), 3);
  EXPECT_TRUE(ring.Flush(1));
  EXPECT_EQ(ring.Take(), (std::vector<uint64_t>{0, 1, 2, 3}));
  EXPECT_EQ(ring.skipped, 2);
}

// A page fault on one buffer: the device goes on with those that follow, and returns to order after it.
TEST(PartialOrderRingTest, PackedLeavesOrderForAFaultAndComesBack) {
  PartialRing ring(kFRingPacked, 4);
  ring.Complete(0);
  ring.device->Publish();
  ring.Complete(2);
  ring.Complete(3);
  EXPECT_EQ(ring.device->Publish(), 0);
  ring.device->SetOrdering(Ordering::kAsCompleted);
  EXPECT_EQ(ring.device->Publish(), 2);
  EXPECT_FALSE(ring.Flush(1));
  EXPECT_EQ(ring.Take(), (std::vector<uint64_t>{0, 2, 3}));
  ring.device->SetOrdering(Ordering::kInOrder);
  ring.Complete(1);
  ring.device->Publish();
  EXPECT_TRUE(ring.Flush(3));
  EXPECT_EQ(ring.Take(), (std::vector<uint64_t>{1}));
}

TEST(PartialOrderRingTest, SplitBatchesOnlyBetweenAssertionAndRelease) {
  PartialRing ring(0, 7);
  // Asserted by the first look at a ring in order, not acknowledged: in order, one by one.
  EXPECT_TRUE(ring.UsedFlags() & kUsedInOrder);
  ring.Complete(1);
  EXPECT_EQ(ring.device->Publish(), 0);
  ring.Complete(0);
  ring.device->Publish();
  EXPECT_EQ(ring.Take(), (std::vector<uint64_t>{0, 1}));
  EXPECT_EQ(ring.skipped, 0);
  EXPECT_TRUE(ring.AvailFlags() & kAvailInOrderAck);
  EXPECT_TRUE(ring.Kick());
  ring.Poll();
  EXPECT_EQ(ring.device->split()->order().state(), State::kAgreed);
  ring.Complete(3);
  ring.Complete(2);
  ring.device->Publish();
  EXPECT_EQ(ring.Take(), (std::vector<uint64_t>{2, 3}));
  EXPECT_EQ(ring.skipped, 1);
  // Released: what overtook is held until the driver agrees, and told so by an interrupt.
  ring.Complete(5);
  (void)ring.device->NeedsCall();
  ring.device->SetOrdering(Ordering::kAsCompleted);
  EXPECT_FALSE(ring.UsedFlags() & kUsedInOrder);
  EXPECT_TRUE(ring.device->NeedsCall());
  EXPECT_TRUE(ring.device->staged().empty());
  EXPECT_TRUE(ring.Take().empty());
  EXPECT_FALSE(ring.AvailFlags() & kAvailInOrderAck);
  ring.Poll();
  EXPECT_EQ(ring.device->Publish(), 1);
  EXPECT_EQ(ring.Take(), (std::vector<uint64_t>{5}));
  EXPECT_EQ(ring.skipped, 0);
}

TEST(PartialOrderRingTest, ASuccessorOfASplitDeviceKeepsTheAgreement) {
  PartialRing ring(0, 4);
  ring.Complete(0);
  ring.device->Publish();
  ring.Take();
  ring.Poll();
  const uint32_t base = ring.device->base();
  ring.Restart(base);
  EXPECT_TRUE(ring.UsedFlags() & kUsedInOrder);
  Chain chain;
  for (size_t i = 1; i < 4; ++i) ASSERT_TRUE(ring.device->Resubmit(ring.ids[i], {}, &chain).ok());
  ring.Complete(3);
  ring.Complete(2);
  EXPECT_EQ(ring.device->Publish(), 0);
  ring.Complete(1);
  EXPECT_EQ(ring.device->Publish(), 3);
  EXPECT_EQ(ring.Take(), (std::vector<uint64_t>{1, 2, 3}));
  EXPECT_EQ(ring.skipped, 2);
}

TEST(PartialOrderRingTest, BothOrdersTogetherMakeNoQueue) {
  RingLab lab(8);
  const QueueOptions options{kFVersion1 | kFInOrder | kFPartialOrder, nullptr};
  EXPECT_FALSE(DeviceQueue::Create(lab.memory, lab.layout, options, 0).ok());
  EXPECT_FALSE(DriverQueue::Create(lab.memory, lab.layout, options).ok());
}

}  // namespace
}  // namespace baton::virtio
