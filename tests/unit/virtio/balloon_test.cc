// The balloon's device side: what a driver says, byte by byte, and what it must not be able to do.
#include "agent/virtio/balloon.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/unit/virtio/fake_memory.h"

namespace baton::virtio {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

struct Recorder final : BalloonSink {
  void OnInflate(uint64_t gpa, uint64_t size) override { inflated.emplace_back(gpa, size); }
  void OnDeflate(uint64_t gpa, uint64_t size) override { deflated.emplace_back(gpa, size); }
  void OnReported(uint64_t gpa, uint64_t size) override { reported.emplace_back(gpa, size); }
  void OnHintStart() override { ++starts; }
  void OnHint(uint64_t gpa, uint64_t size) override { hinted.emplace_back(gpa, size); }
  void OnHintStop() override { ++stops; }
  using Ranges = std::vector<std::pair<uint64_t, uint64_t>>;
  Ranges inflated, deflated, reported, hinted;
  int starts = 0, stops = 0;
};

constexpr uint64_t kBase = 0x10000;
using Range = std::pair<uint64_t, uint64_t>;

class Balloon : public testing::Test {
 protected:
  Balloon() : memory(kBase, 65536) {
    device.SetFeatures(kBalloonFFreePageHint | kBalloonFPagePoison | kBalloonFReporting | kBalloonFStatsVq);
  }
  void Command(uint32_t id) {
    memory.Put<uint32_t>(kBase, id);
    const BalloonBuffer out{kBase, 4, false};
    EXPECT_EQ(device.HandleChain(BalloonQueue::kFreePage, 0, {&out, 1}, memory, sink),
              BalloonDevice::Disposition::kUsed);
  }
  void Hint(uint64_t gpa, uint32_t size = 0x400000) {
    const BalloonBuffer in{gpa, size, true};
    device.HandleChain(BalloonQueue::kFreePage, 1, {&in, 1}, memory, sink);
  }
  uint32_t ConfigId() {
    uint8_t bytes[4];
    device.ReadConfig(kBalloonConfigCmdId, bytes);
    return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
  }

  FakeMemory memory;
  BalloonDevice device;
  Recorder sink;
};

TEST_F(Balloon, QueuesAreNumberedWithoutGaps) {
  using Q = BalloonQueue;
  EXPECT_EQ(BalloonQueueAt(0, 1), Q::kDeflate);
  EXPECT_EQ(BalloonQueueAt(0, 2), std::nullopt);
  EXPECT_EQ(BalloonQueueAt(kBalloonFFreePageHint, 2), Q::kFreePage);
  EXPECT_EQ(BalloonQueueAt(kBalloonFReporting, 2), Q::kReporting);
  EXPECT_EQ(BalloonQueueAt(kBalloonFStatsVq | kBalloonFReporting, 3), Q::kReporting);
  const uint64_t all = kBalloonFStatsVq | kBalloonFFreePageHint | kBalloonFReporting;
  EXPECT_EQ(BalloonQueueAt(all, 2), Q::kStats);
  EXPECT_EQ(BalloonQueueAt(all, 3), Q::kFreePage);
  EXPECT_EQ(BalloonQueueAt(all, 4), Q::kReporting);
  EXPECT_EQ(BalloonQueueCount(all), 5u);
  EXPECT_EQ(BalloonQueueCount(0), 2u);
}

// HintRaceG: the command id and the poison value are little endian whatever host and guest are.
TEST_F(Balloon, HintRaceG_ConfigurationAndCommandIdsAreLittleEndian) {
  ASSERT_EQ(*device.StartHinting(), 0x80000000u);
  ASSERT_EQ(*device.StartHinting(), 0x80000001u);
  const uint8_t poison[] = {0xaa, 0xbb, 0xcc, 0xdd};
  ASSERT_TRUE(device.WriteConfig(kBalloonConfigPoison, poison).ok());
  uint8_t config[16];
  device.ReadConfig(0, config);
  EXPECT_THAT(config, ElementsAre(0, 0, 0, 0, 0, 0, 0, 0, 0x01, 0, 0, 0x80, 0xaa, 0xbb, 0xcc, 0xdd));
  EXPECT_EQ(device.poison(), 0xddccbbaau);
  const uint8_t bytes[] = {0x01, 0x00, 0x00, 0x80};
  for (int i = 0; i < 4; ++i) memory.Put<uint8_t>(kBase + i, bytes[i]);
  const BalloonBuffer out{kBase, 4, false};
  device.HandleChain(BalloonQueue::kFreePage, 0, {&out, 1}, memory, sink);
  EXPECT_EQ(sink.starts, 1);
}

TEST_F(Balloon, ConfigurationSpace_DriverWritesOnlyWhatIsItsOwn) {
  const uint8_t ones[16] = {1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4};
  ASSERT_TRUE(device.WriteConfig(0, ones).ok());
  EXPECT_EQ(device.state().num_pages, 0u);
  EXPECT_EQ(device.actual(), 0x02020202u);
  EXPECT_EQ(ConfigId(), kHintDone);
  EXPECT_EQ(device.poison(), 0x04040404u);
  EXPECT_FALSE(device.WriteConfig(13, {ones, 4}).ok());
  EXPECT_FALSE(device.WriteConfig(UINT32_MAX, {ones, 4}).ok());
  // Without the feature there is no such field.
  BalloonDevice plain;
  ASSERT_TRUE(plain.WriteConfig(0, ones).ok());
  EXPECT_EQ(plain.state().poison_val, 0u);
}

TEST_F(Balloon, InflateAndDeflate_MergeRunsOfPages) {
  for (uint32_t i = 0; i < 300; ++i) memory.Put<uint32_t>(kBase + 4 * i, i < 299 ? 100 + i : 7);
  const BalloonBuffer out{kBase, 1200, false};
  device.HandleChain(BalloonQueue::kInflate, 0, {&out, 1}, memory, sink);
  EXPECT_THAT(sink.inflated, ElementsAre(Range(100 * 4096, 299 * 4096), Range(7 * 4096, 4096)));
  device.HandleChain(BalloonQueue::kDeflate, 0, {&out, 1}, memory, sink);
  EXPECT_EQ(sink.deflated, sink.inflated);
}

TEST_F(Balloon, MalformedBuffersAreIgnoredAndCounted) {
  const BalloonBuffer bad[] = {{kBase, 3, false},
                               {kBase, 4, true},
                               {UINT64_MAX - 3, 8, false},
                               {kBase + 65536, 4, false},
                               {kBase, 1 << 20, false}};
  device.HandleChain(BalloonQueue::kInflate, 0, bad, memory, sink);
  EXPECT_THAT(sink.inflated, IsEmpty());
  EXPECT_EQ(device.malformed(), 5u);
  (void)device.StartHinting();
  const BalloonBuffer outs[] = {{kBase, 8, false}, {kBase + 65536, 4, false}, {UINT64_MAX, 2, true}};
  device.HandleChain(BalloonQueue::kFreePage, 0, outs, memory, sink);
  EXPECT_EQ(device.malformed(), 8u);
  EXPECT_EQ(sink.starts, 0);
}

TEST_F(Balloon, Statistics_OneBufferIsHeldUntilTaken) {
  memory.Put<uint16_t>(kBase, 4);
  memory.Put<uint64_t>(kBase + 2, 0x1122334455667788);
  memory.Put<uint16_t>(kBase + 10, 99);  // a tag of the future
  const BalloonBuffer out{kBase, 23, false};
  EXPECT_EQ(device.HandleChain(BalloonQueue::kStats, 9, {&out, 1}, memory, sink),
            BalloonDevice::Disposition::kHeld);
  ASSERT_EQ(device.stats().size(), 2u);
  EXPECT_EQ(device.stats()[0].tag, 4);
  EXPECT_EQ(device.stats()[0].value, 0x1122334455667788u);
  EXPECT_EQ(device.HandleChain(BalloonQueue::kStats, 10, {&out, 1}, memory, sink),
            BalloonDevice::Disposition::kUsed);
  EXPECT_EQ(device.TakeHeldStats(), 9);
  EXPECT_EQ(device.TakeHeldStats(), std::nullopt);
}

TEST_F(Balloon, Reporting_IsForbiddenWithPoison) {
  const BalloonBuffer in[] = {{0x400000, 0x200000, true}, {0x800000, 0x400000, true}};
  device.HandleChain(BalloonQueue::kReporting, 0, in, memory, sink);
  EXPECT_THAT(sink.reported, ElementsAre(Range(0x400000, 0x200000), Range(0x800000, 0x400000)));
  sink.reported.clear();
  const uint8_t poison[] = {0xaa, 0xaa, 0xaa, 0xaa};
  ASSERT_TRUE(device.WriteConfig(kBalloonConfigPoison, poison).ok());
  device.HandleChain(BalloonQueue::kReporting, 0, in, memory, sink);
  EXPECT_THAT(sink.reported, IsEmpty());
}

// HintRaceD: the echo of the id is the start of the hints, not their end; the end is a STOP in the queue.
TEST_F(Balloon, HintRaceD_EchoOfTheIdIsNotTheEnd) {
  const uint32_t id = *device.StartHinting();
  EXPECT_EQ(ConfigId(), id);
  Command(id);
  EXPECT_EQ(sink.starts, 1);
  EXPECT_EQ(sink.stops, 0);
  Hint(0x400000);
  EXPECT_THAT(sink.hinted, ElementsAre(Range(0x400000, 0x400000)));
  Command(kHintStop);
  EXPECT_EQ(sink.stops, 1);
  // Said once.
  Command(kHintStop);
  EXPECT_EQ(sink.stops, 1);
}

// HintRaceB: what comes late belongs to a round that is over, and counts for none.
TEST_F(Balloon, HintRaceB_HintsOfAnEarlierIdAreIgnored) {
  const uint32_t first = *device.StartHinting();
  Command(first);
  Hint(0x400000);
  device.StopHinting();
  EXPECT_EQ(ConfigId(), kHintStop);
  Hint(0x800000);  // was in the queue when STOP was published
  EXPECT_EQ(sink.hinted.size(), 1u);
  const uint32_t second = *device.StartHinting();
  EXPECT_NE(second, first);
  Hint(0xc00000);      // still in the name of the first id
  Command(kHintStop);  // the stop of the first id is not that of the second
  EXPECT_EQ(sink.stops, 0);
  Command(second);
  Hint(0x1000000);
  Command(kHintStop);
  EXPECT_EQ(sink.stops, 1);
  EXPECT_THAT(sink.hinted, ElementsAre(Range(0x400000, 0x400000), Range(0x1000000, 0x400000)));
}

// The 2017 discussion: the device writes STOP to the configuration space in the moment in which the driver
// comes to its end by itself. The in-band STOP is the one word that counts, whoever was first.
TEST_F(Balloon, StopFromBothSidesAtOnce_IsOneStop) {
  for (bool device_first : {true, false}) {
    sink.stops = 0;
    const uint32_t id = *device.StartHinting();
    Command(id);
    if (device_first) device.StopHinting();
    Command(kHintStop);
    if (!device_first) device.StopHinting();
    Command(kHintStop);  // the driver reacts to the configuration interrupt as well
    EXPECT_EQ(sink.stops, 1) << device_first;
    device.FinishHinting();
  }
}

TEST_F(Balloon, StaleStop_DoesNotEndARoundThatHasNotBegun) {
  Command(kHintStop);
  const uint32_t id = *device.StartHinting();
  Command(kHintStop);
  EXPECT_EQ(device.hint_status(), BalloonDevice::HintStatus::kRequested);
  Command(id);
  EXPECT_EQ(sink.starts, 1);
  EXPECT_EQ(sink.stops, 0);
}

TEST_F(Balloon, AfterDone_NothingCounts) {
  const uint32_t id = *device.StartHinting();
  Command(id);
  device.FinishHinting();
  EXPECT_EQ(ConfigId(), kHintDone);
  Hint(0x400000);
  Command(kHintStop);
  EXPECT_THAT(sink.hinted, IsEmpty());
  EXPECT_EQ(sink.stops, 0);
  device.StopHinting();
  EXPECT_EQ(ConfigId(), kHintDone);
}

TEST_F(Balloon, IdsAreNotUsedAgainBeforeTheirStop) {
  BalloonState state;
  state.last_id = 0xfffffffe;
  state.open_ids = {0x80000000, 0x80000001};  // published long ago, and never answered
  ASSERT_TRUE(device.Restore(state).ok());
  EXPECT_EQ(*device.StartHinting(), 0xffffffffu);
  EXPECT_EQ(*device.StartHinting(), 0x80000002u);
  // The stop of one is the stop of those before it.
  Command(0x80000002);
  Command(kHintStop);
  EXPECT_THAT(device.state().open_ids, IsEmpty());
}

TEST_F(Balloon, DriverThatNeverAnswers_IsAskedNoMore) {
  for (size_t i = 0; i < kMaxOpenIds; ++i) ASSERT_TRUE(device.StartHinting().ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(device.StartHinting().status()));
}

TEST_F(Balloon, WithoutTheFeature_NobodyCanBeAsked) {
  device.SetFeatures(kBalloonFReporting);
  EXPECT_TRUE(absl::IsFailedPrecondition(device.StartHinting().status()));
}

// HintRaceH: the device is reset (or its driver goes) with hints in its queue.
TEST_F(Balloon, HintRaceH_ResetForgetsWhatWasSaidAndKeepsTheIds) {
  const uint32_t id = *device.StartHinting();
  Command(id);
  device.Reset();
  EXPECT_EQ(ConfigId(), kHintDone);
  Hint(0x400000);
  Command(kHintStop);
  EXPECT_THAT(sink.hinted, IsEmpty());
  EXPECT_EQ(sink.stops, 0);
  device.SetFeatures(kBalloonFFreePageHint);
  EXPECT_EQ(*device.StartHinting(), id + 1);
}

TEST_F(Balloon, StateMovesToAnotherHost) {
  const uint8_t actual[] = {5, 0, 0, 0};
  ASSERT_TRUE(device.WriteConfig(kBalloonConfigActual, actual).ok());
  const uint32_t id = *device.StartHinting();
  Command(id);
  BalloonDevice there;
  there.SetFeatures(device.features());
  ASSERT_TRUE(there.Restore(device.state()).ok());
  EXPECT_EQ(there.actual(), 5u);
  EXPECT_EQ(there.state().cmd_id, id);
  // Nobody there has asked; the guest is told DONE, and the id stays taken.
  EXPECT_EQ(there.hint_status(), BalloonDevice::HintStatus::kStop);
  there.FinishHinting();
  EXPECT_EQ(*there.StartHinting(), id + 1);
  BalloonState bad = device.state();
  bad.cmd_id = 17;
  EXPECT_FALSE(there.Restore(bad).ok());
  bad = device.state();
  bad.open_ids = {3};
  EXPECT_FALSE(there.Restore(bad).ok());
  bad.open_ids.assign(kMaxOpenIds + 1, kHintFirstId);
  EXPECT_FALSE(there.Restore(bad).ok());
}

}  // namespace
}  // namespace baton::virtio
