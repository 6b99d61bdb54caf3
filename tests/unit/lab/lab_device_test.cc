// The lab device as a guest and a front-end see it, with rings of both formats.
#include <gmock/gmock.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>

#include "tests/unit/lab/lab_front.h"

namespace baton::lab {
namespace {

class LabDeviceTest : public ::testing::TestWithParam<uint64_t> {
 protected:
  LabDeviceTest() { directory_.MakeImage(4 * kMiB); }
  LabDeviceOptions Options() {
    LabDeviceOptions options;
    options.socket = directory_.Path("socket");
    return options;
  }
  BlkOptions Blk() {
    BlkOptions blk;
    blk.image = directory_.Path("image");
    blk.queues = 2;
    return blk;
  }
  void Begin(LabDeviceOptions options, BlkOptions blk, uint64_t features = 0) {
    device_ = std::make_unique<DeviceThread>(std::move(options), std::move(blk));
    if (!front_) front_ = std::make_unique<LabFront>(GetParam() | features, 2, 32);
    absl::Status connected = front_->Connect(directory_.Path("socket"));
    ASSERT_TRUE(connected.ok()) << connected;
  }

  LabDirectory directory_;
  std::unique_ptr<DeviceThread> device_;
  std::unique_ptr<LabFront> front_;
};

TEST_P(LabDeviceTest, WritesAreReadBack) {
  Begin(Options(), Blk());
  for (uint32_t round = 0; round < 20; ++round) {
    front_->Submit(0, 0, kWriteOut, round, 1024, 1000 + round);
    ASSERT_EQ(front_->Await(0, 1).size(), 1u);
    front_->Submit(1, 1, kRead, round, 1024);
    const auto ended = front_->Await(1, 1);
    ASSERT_EQ(ended.size(), 1u);
    EXPECT_EQ(ended[0].status, 0);
    EXPECT_EQ(ended[0].written, 1025u);
    EXPECT_EQ(front_->Data(1, 1, 512), 1000 + round);
  }
  front_->Submit(0, 2, kFlushAll, 0);
  ASSERT_EQ(front_->Await(0, 1).size(), 1u);
  front_->Submit(0, 3, kIdentify, 0, 20);
  const auto ended = front_->Await(0, 1);
  ASSERT_EQ(ended.size(), 1u);
  EXPECT_EQ(std::memcmp(front_->At(front_->BufferGpa(0, 3) + 64), "baton-lab\0", 10), 0);
}

TEST_P(LabDeviceTest, WrongRequestsAreAnswered) {
  Begin(Options(), Blk());
  front_->Submit(0, 0, kRead, 4 * kMiB / 512, 512);           // behind the end
  front_->Submit(0, 1, kWriteOut, UINT64_MAX / 512, 512, 1);  // overflows
  front_->Submit(0, 2, 14, 0, 512);                           // SECURE_ERASE was not offered
  front_->Submit(0, 3, kAppend, 0, 512, 1);                   // no zones
  auto ended = front_->Await(0, 4);
  ASSERT_EQ(ended.size(), 4u);
  std::sort(ended.begin(), ended.end(), [](auto& a, auto& b) { return a.token < b.token; });
  EXPECT_EQ(ended[0].status, 1);
  EXPECT_EQ(ended[1].status, 1);
  EXPECT_EQ(ended[2].status, 2);
  EXPECT_EQ(ended[3].status, 2);
}

TEST_P(LabDeviceTest, DrainCompletesWhatIsInFlight) {
  BlkOptions blk = Blk();
  blk.latency_us = 50000;
  Begin(Options(), blk);
  for (uint32_t i = 0; i < 5; ++i) ASSERT_TRUE(front_->Add(0, i, kWriteOut, i, 512, i + 1).ok());
  front_->Kick(0);
  ASSERT_TRUE(device_->Await("in_flight", 5));
  ASSERT_TRUE(front_->Stop(0).ok());
  EXPECT_EQ(front_->Reap(0).size(), 5u);
  EXPECT_EQ(device_->Counter("cancelled"), 0);
}

TEST_P(LabDeviceTest, SuspendKeepsThemAndAStartResubmits) {
  for (auto base :
       {virtio::BaseConvention::kAvail, virtio::BaseConvention::kUsed, virtio::BaseConvention::kIgnored}) {
    front_.reset();
    device_.reset();
    BlkOptions blk = Blk();
    blk.latency_us = 3600u * 1000000;  // ended by the suspension
    LabDeviceOptions options = Options();
    options.base = base;
    Begin(options, blk);
    for (uint32_t i = 0; i < 5; ++i) ASSERT_TRUE(front_->Add(0, i, kWriteOut, i, 512, i + 1).ok());
    front_->Kick(0);
    ASSERT_TRUE(device_->Await("in_flight", 5));
    auto stopped = front_->Stop(0, kMsgGetBaseSkipDrain);
    ASSERT_TRUE(stopped.ok()) << stopped.status();
    EXPECT_TRUE(front_->Reap(0).empty());
    EXPECT_EQ(device_->Counter("cancelled"), 5);
    if (!(GetParam() & virtio::kFRingPacked)) {
      EXPECT_EQ(*stopped, base == virtio::BaseConvention::kUsed ? 0u : 5u);
    }
    device_->Command({{"cmd", "set"}, {"latency_us", 0}});
    if (base != virtio::BaseConvention::kIgnored) {
      // A base of the other convention is refused, not believed.
      front_->SetBase(0, *stopped + 1);
      EXPECT_FALSE(front_->StartQueue(0).ok());
      front_->SetBase(0, *stopped);
    }
    absl::Status started = front_->StartQueue(0);
    ASSERT_TRUE(started.ok()) << started;
    EXPECT_EQ(front_->Await(0, 5).size(), 5u);
    EXPECT_EQ(device_->Counter("resubmitted"), 5);
  }
}

TEST_P(LabDeviceTest, StopsAreAnsweredInOrderOfTheirRequests) {
  BlkOptions blk = Blk();
  blk.latency_us = 3600u * 1000000;
  Begin(Options(), blk);
  for (uint32_t q = 0; q < 2; ++q) front_->Submit(q, 0, kWriteOut, q, 512, 7);
  ASSERT_TRUE(device_->Await("in_flight", 2));
  // Ring 0 drains, which takes until its latency is taken away; ring 1 has been asked meanwhile.
  ASSERT_TRUE(front_->SendStop(0, 11).ok());
  ASSERT_TRUE(front_->SendStop(1, kMsgGetBaseSkipDrain).ok());
  ASSERT_TRUE(device_->Await("cancelled", 1));
  EXPECT_EQ(device_->Counter("in_flight"), 1);
  device_->Command({{"cmd", "set"}, {"latency_us", 0}});
  ASSERT_TRUE(front_->Answer(0).ok());
  ASSERT_TRUE(front_->Answer(1).ok());
  EXPECT_EQ(front_->Reap(0).size(), 1u);
  EXPECT_TRUE(front_->Reap(1).empty());
}

TEST_P(LabDeviceTest, ShuffledCompletionsAllArrive) {
  for (uint64_t order : {uint64_t{0}, virtio::kFInOrder}) {
    front_.reset();
    device_.reset();
    BlkOptions blk = Blk();
    blk.shuffle = 8;
    Begin(Options(), blk, order);
    std::vector<uint64_t> tokens;
    for (uint32_t round = 0; round < 4; ++round) {
      for (uint32_t i = 0; i < 8; ++i) ASSERT_TRUE(front_->Add(0, i, kWriteOut, i, 512, i + 1).ok());
      front_->Kick(0);
      for (const Finished& f : front_->Await(0, 8)) tokens.push_back(f.token);
    }
    ASSERT_EQ(tokens.size(), 32u);
    std::vector<uint64_t> in_order(32);
    for (size_t i = 0; i < 32; ++i) in_order[i] = i % 8;
    EXPECT_EQ(tokens == in_order, order != 0);
    EXPECT_THAT(tokens, ::testing::UnorderedElementsAreArray(in_order));
  }
}

TEST_P(LabDeviceTest, PartialOrderSwitchesUnderLoad) {
  LabDeviceOptions options = Options();
  options.extra_features = virtio::kFPartialOrder;
  BlkOptions blk = Blk();
  blk.shuffle = 4;
  Begin(options, blk, virtio::kFPartialOrder);
  for (uint32_t round = 0; round < 20; ++round) {
    device_->Command({{"cmd", "set"}, {"in_order", round % 2 == 0}});
    for (uint32_t i = 0; i < 8; ++i) ASSERT_TRUE(front_->Add(0, i, kWriteOut, i, 512, i + 1).ok());
    front_->Kick(0);
    ASSERT_EQ(front_->Await(0, 8).size(), 8u);
    front_->Kick(0);  // the driver's part of the handshake
  }
}

TEST_P(LabDeviceTest, EverythingTheDeviceWritesIsLogged) {
  Begin(Options(), Blk(), virtio::kVhostFLogAll);
  ASSERT_TRUE(front_->StartLog().ok());
  const vhost::VringAddr addr{0,
                              vhost::kVringFLog,
                              LabFront::kUser + front_->layout(0).desc - LabFront::kGpa,
                              LabFront::kUser + front_->layout(0).device - LabFront::kGpa,
                              LabFront::kUser + front_->layout(0).driver - LabFront::kGpa,
                              front_->layout(0).device};
  ASSERT_TRUE(front_->Set(9, vhost::Bytes(addr)).ok());
  front_->Submit(0, 4, kRead, 0, 512);
  ASSERT_EQ(front_->Await(0, 1).size(), 1u);
  EXPECT_TRUE(front_->Logged(front_->BufferGpa(0, 4) + 64));
  EXPECT_TRUE(front_->Logged(front_->BufferGpa(0, 4) + LabFront::kSlotBytes - 8));
  const virtio::QueueLayout& layout = front_->layout(0);
  EXPECT_TRUE(front_->Logged(GetParam() & virtio::kFRingPacked ? layout.desc : layout.device));
  EXPECT_FALSE(front_->Logged(front_->BufferGpa(0, 8)));
}

TEST_P(LabDeviceTest, AnAppendThatHasBegunIsCompletedBySuspension) {
  BlkOptions blk = Blk();
  blk.zone_sectors = 256;
  blk.latency_us = 3600u * 1000000;
  blk.latency_after = true;  // it has landed, and the guest has not heard
  Begin(Options(), blk);
  front_->Submit(0, 0, kAppend, 256, 512, 77);
  front_->Submit(0, 1, kWriteOut, 0, 512, 1);
  ASSERT_TRUE(device_->Await("executed", 2));
  ASSERT_TRUE(front_->Stop(0, kMsgGetBaseSkipDrain).ok());
  const auto ended = front_->Reap(0);
  ASSERT_EQ(ended.size(), 1u);
  EXPECT_EQ(ended[0].token, 0u);
  EXPECT_EQ(ended[0].status, 0);
  EXPECT_EQ(device_->Counter("cancelled"), 1);
}

TEST_P(LabDeviceTest, SuspendStatusStopsAndDriverOkGoesOn) {
  LabDeviceOptions options = Options();
  options.extra_features = virtio::Bit(43);
  BlkOptions blk = Blk();
  blk.latency_us = 20000;
  Begin(options, blk, virtio::Bit(43));
  constexpr uint64_t kRunning = 15, kSuspended = 16;
  ASSERT_EQ(front_->Set(39, vhost::Bytes(kRunning)).value_or(1), 0u);
  front_->Submit(0, 0, kWriteOut, 0, 512, 1);
  ASSERT_TRUE(device_->Await("in_flight", 1));
  ASSERT_EQ(front_->Set(39, vhost::Bytes(kRunning | kSuspended)).value_or(1), 0u);
  // Completed before the answer; DRIVER_OK gave way to SUSPEND.
  EXPECT_EQ(front_->Reap(0).size(), 1u);
  EXPECT_EQ(front_->Get(40).value_or(0), (kRunning & ~uint64_t{4}) | kSuspended);
  front_->Submit(0, 1, kWriteOut, 1, 512, 1);
  EXPECT_EQ(front_->Get(40).value_or(0), (kRunning & ~uint64_t{4}) | kSuspended);
  EXPECT_TRUE(front_->Reap(0).empty());
  ASSERT_EQ(front_->Set(39, vhost::Bytes(kRunning)).value_or(1), 0u);
  EXPECT_EQ(front_->Get(40).value_or(0), kRunning);
  EXPECT_EQ(front_->Await(0, 1).size(), 1u);
}

TEST_P(LabDeviceTest, ResetDeviceCancelsAndStartsAnew) {
  BlkOptions blk = Blk();
  blk.latency_us = 3600u * 1000000;
  Begin(Options(), blk);
  front_->Submit(0, 0, kWriteOut, 0, 512, 1);
  ASSERT_TRUE(device_->Await("in_flight", 1));
  ASSERT_EQ(front_->Set(34, {}).value_or(1), 0u);
  EXPECT_EQ(device_->Counter("in_flight"), 0);
  EXPECT_EQ(device_->Counter("rings_running"), 0);
  EXPECT_TRUE(front_->Reap(0).empty());
}

// Takes a buffer when something comes for it, as a NIC does, and otherwise leaves them in the ring.
class WantsWhenToldModel final : public DeviceModel {
 public:
  void Attach(DeviceHost* host) override { host_ = host; }
  uint64_t Features() const override { return 0; }
  uint32_t Queues() const override { return 2; }
  std::span<const uint8_t> Config() const override { return {}; }
  absl::Status WriteConfig(uint32_t, std::span<const uint8_t>, bool) override { return absl::OkStatus(); }
  void Replay(IoRequest* request) override { host_->Complete(request, 0); }
  void Available(uint32_t queue) override {
    if (queue == 0) Take();
  }
  void Stop(uint32_t, StopMode) override {}
  absl::Status Set(const nlohmann::json& command) override {
    waiting_ += command.value("arrived", 0);
    Take();
    return absl::OkStatus();
  }

 private:
  void Take() {
    for (; waiting_ > 0; --waiting_) {
      IoRequest* request = host_->Pop(0);
      if (!request) return;
      host_->Complete(request, 0);
      ++host_->Counter("taken");
    }
  }
  DeviceHost* host_ = nullptr;
  int waiting_ = 0;
};

TEST_P(LabDeviceTest, BuffersThatComeAfterTheLastWasTakenAreHeardOf) {
  device_ = std::make_unique<DeviceThread>(Options(), std::make_unique<WantsWhenToldModel>());
  front_ = std::make_unique<LabFront>(GetParam(), 2, 32);
  ASSERT_TRUE(front_->Connect(directory_.Path("socket")).ok());
  for (uint32_t i = 0; i < 8; ++i) ASSERT_TRUE(front_->Add(0, i, kRead, 0, 512, 0).ok());
  front_->Kick(0);
  device_->Command({{"cmd", "set"}, {"arrived", 10}});
  ASSERT_EQ(front_->Await(0, 8).size(), 8u);
  ASSERT_TRUE(device_->Await("taken", 8));
  front_->Submit(0, 0, kRead, 0);
  ASSERT_EQ(front_->Await(0, 1).size(), 1u);
  front_->Submit(0, 1, kRead, 0);
  ASSERT_EQ(front_->Await(0, 1).size(), 1u);
}

INSTANTIATE_TEST_SUITE_P(Rings, LabDeviceTest,
                         ::testing::Values(0, virtio::kFRingPacked,
                                           virtio::kFIndirectDesc | virtio::kFEventIdx,
                                           virtio::kFRingPacked | virtio::kFIndirectDesc |
                                               virtio::kFEventIdx),
                         [](const auto& info) {
                           std::string name = info.param & virtio::kFRingPacked ? "Packed" : "Split";
                           return name + (info.param & virtio::kFIndirectDesc ? "IndirectEventIdx" : "");
                         });

}  // namespace
}  // namespace baton::lab
