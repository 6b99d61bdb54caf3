// Another back-end under a running guest: the rings move with nothing in flight, or not at all.
#include <gmock/gmock.h>
#include <sys/eventfd.h>

#include <atomic>

#include "tests/unit/vhost/fake_vmm.h"
#include "tests/unit/vhost/scripted_backend.h"

namespace baton::vhost {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class MediatorSwap : public MediatorFixture {
 protected:
  void Begin(BackendOptions backend = {}) {
    StartBackend(backend);
    ASSERT_NO_FATAL_FAILURE(StartMediator());
    vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
    ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
    ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
    ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
  }
  void StartOther(BackendOptions options = {}) {
    options.socket = dir_ + "/other.sock";
    options.image = dir_ + "/image";
    other_.reset();
    other_ = std::make_unique<BackendThread>(options);
  }
  SwapOptions To(const std::string& socket, Duration bound = seconds(2)) {
    SwapOptions wanted;
    wanted.backend.set_socket(dir_ + "/" + socket);
    wanted.backend.set_kind(v1::LAB);
    wanted.drain_bound = bound;
    return wanted;
  }
  absl::StatusOr<SwapResult> Swap(const SwapOptions& wanted, absl::Status record = absl::OkStatus()) {
    return mediator_->Swap(
        wanted,
        [this, record] {
          ++recorded_;
          return record;
        },
        Soon());
  }
  std::string Socket() const { return mediator_->Describe().backend().socket(); }
  // `count` requests, one after the other, each done with status 0.
  void Work(uint16_t count) {
    for (uint16_t i = 0; i < count; ++i) {
      const uint16_t slot = static_cast<uint16_t>(i % 5);
      vmm_->Submit(slot, true, i, static_cast<uint8_t>(i + 1));
      ASSERT_TRUE(vmm_->AwaitUsed(++done_)) << mediator_->Describe().ShortDebugString();
      EXPECT_EQ(*vmm_->At(FakeVmm::kBuffers + slot * 0x1000 + 0x800), 0);
    }
  }

  std::unique_ptr<FakeVmm> vmm_;
  std::unique_ptr<BackendThread> other_;
  std::atomic<int> recorded_{0};
  uint16_t done_ = 0;
};

TEST_F(MediatorSwap, ThereAndBack) {
  Begin();
  StartOther();
  Work(7);
  auto swapped = Swap(To("other.sock"));
  ASSERT_TRUE(swapped.ok()) << swapped.status();
  EXPECT_FALSE(swapped->unchanged);
  EXPECT_EQ(Socket(), dir_ + "/other.sock");
  EXPECT_EQ(mediator_->Describe().state(), v1::Device::ACTIVE);
  EXPECT_EQ(mediator_->Describe().swaps(), 1u);
  backend_.reset();  // not used any more
  Work(7);
  StartBackend();
  ASSERT_TRUE(Swap(To("backend.sock")).ok());
  other_.reset();
  Work(7);
  EXPECT_EQ(recorded_, 2);
  EXPECT_EQ(vmm_->GetBase().value_or(99), 21u);
}

TEST_F(MediatorSwap, RequestsInFlightAreDoneOnceAtTheOldOne) {
  for (bool region : {false, true}) {
    done_ = 0;
    Begin({.inflight = region, .delay_us = 50000});
    StartOther({.inflight = region});
    for (uint16_t i = 0; i < 5; ++i) vmm_->Submit(i, true, i, static_cast<uint8_t>(10 + i));
    auto swapped = Swap(To("other.sock"));
    ASSERT_TRUE(swapped.ok()) << swapped.status();
    EXPECT_TRUE(vmm_->AwaitUsed(5));
    done_ = 5;
    Work(6);
    EXPECT_EQ(vmm_->GetBase().value_or(99), 11u);
    mediator_.reset();
    vmm_.reset();
  }
}

// What the guest makes available while the old one drains waits for the new one.
TEST_F(MediatorSwap, RequestsThatComeMeanwhileGoToTheNewOne) {
  Begin({.inflight = true, .delay_us = 200000});
  StartOther({.inflight = true});
  vmm_->Submit(0, true, 0, 1);
  std::thread guest([&] {
    ::usleep(50000);
    for (uint16_t i = 1; i < 5; ++i) vmm_->Submit(i, true, i, 2);
  });
  auto swapped = Swap(To("other.sock"));
  guest.join();
  ASSERT_TRUE(swapped.ok()) << swapped.status();
  EXPECT_TRUE(vmm_->AwaitUsed(5));
  EXPECT_EQ(vmm_->GetBase().value_or(99), 5u);
}

TEST_F(MediatorSwap, ADrainThatDoesNotEndLeavesTheOldOne) {
  for (bool region : {false, true}) {
    Begin({.inflight = region, .delay_us = 600000});
    StartOther({.inflight = region});
    for (uint16_t i = 0; i < 5; ++i) vmm_->Submit(i, true, i, 1);
    auto swapped = Swap(To("other.sock", milliseconds(20)));
    EXPECT_EQ(ReasonOf(swapped.status()), v1::DRAIN_TIMEOUT) << swapped.status();
    EXPECT_EQ(Socket(), dir_ + "/backend.sock");
    EXPECT_TRUE(vmm_->AwaitUsed(5)) << mediator_->Describe().ShortDebugString();
    vmm_->Submit(0, true, 9, 1);
    EXPECT_TRUE(vmm_->AwaitUsed(6));
    EXPECT_EQ(mediator_->Describe().swaps(), 0u);
    EXPECT_EQ(recorded_, 0);
    mediator_.reset();
    vmm_.reset();
  }
}

TEST_F(MediatorSwap, ABackendThatNeverAnswersTheStopIsKept) {
  Begin({.silent_at = 11});  // GET_VRING_BASE
  StartOther();
  Work(2);
  auto swapped = Swap(To("other.sock", milliseconds(20)));
  EXPECT_EQ(ReasonOf(swapped.status()), v1::DRAIN_TIMEOUT) << swapped.status();
  EXPECT_EQ(Socket(), dir_ + "/backend.sock");
  // Until it answers nothing may be said to it; a new process goes on where it was.
  EXPECT_EQ(Swap(To("other.sock")).status().code(), absl::StatusCode::kUnavailable);
  StartBackend();
  ASSERT_TRUE(Becomes(v1::Device::ACTIVE)) << mediator_->Describe().ShortDebugString();
  Work(3);
}

// One that drains when it is left is first given a kick descriptor that it has to read. Whatever comes from
// it instead, the device is recovered over a new connection, and the message says what it was.
TEST_F(MediatorSwap, WhatComesInsteadOfTheReadIsSaid) {
  struct Case {
    uint32_t speaks, leaves;
    std::string message;
  };
  // The first kick descriptor is that of the ring's start.
  for (const Case& c :
       {Case{2, 0, "while a ring drained: the back-end sent GET_FEATURES (8 bytes), and nobody"},
        Case{0, 2, "while a ring drained: the back-end hung up"}}) {
    ScriptedBackendOptions scripted{
        .socket = dir_ + "/other.sock",
        .features = virtio::kFVersion1 | virtio::kVhostUserFProtocolFeatures,
        .protocol_features = pf::kReplyAck | pf::kConfig,
    };
    const ScriptedBackend other(scripted);
    scripted.socket = dir_ + "/backend.sock";
    scripted.speaks_at_kick = c.speaks;
    scripted.leaves_at_kick = c.leaves;
    const ScriptedBackend backend(scripted);
    MediatorOptions options = Options();
    options.backend.set_kind(v1::QEMU_STORAGE_DAEMON);
    ASSERT_NO_FATAL_FAILURE(StartMediator(std::move(options)));
    vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
    ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
    ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
    ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
    auto swapped = Swap(To("other.sock"));
    EXPECT_EQ(ReasonOf(swapped.status()), v1::SOURCE_BACKEND_FAILED) << swapped.status();
    EXPECT_THAT(Message(swapped.status()), testing::HasSubstr(c.message));
    EXPECT_EQ(Socket(), dir_ + "/backend.sock");
    EXPECT_EQ(recorded_, 0);
    EXPECT_TRUE(AwaitReconnects(1)) << mediator_->Describe().ShortDebugString();
    mediator_.reset();
    vmm_.reset();
  }
}

TEST_F(MediatorSwap, WhatCannotTakeOverLeavesTheOldOne) {
  Begin();
  Work(2);
  EXPECT_TRUE(absl::IsNotFound(Swap(To("nowhere.sock")).status()));
  StartOther({.less_features = virtio::kFVersion1});
  auto without = Swap(To("other.sock"));
  EXPECT_EQ(ReasonOf(without.status()), v1::DESTINATION_BACKEND_FAILED) << without.status();
  EXPECT_THAT(Message(without.status()), testing::HasSubstr("VERSION_1"));
  other_.reset();
  // Silent at the first question, and later.
  for (uint32_t silent : {1u, 5u}) {
    StartOther({.silent_at = silent});
    EXPECT_FALSE(Swap(To("other.sock")).ok());
    other_.reset();
  }
  StartOther({.garble_at = 24});
  EXPECT_FALSE(Swap(To("other.sock")).ok());
  EXPECT_EQ(Socket(), dir_ + "/backend.sock");
  EXPECT_EQ(recorded_, 0);
  Work(3);
}

TEST_F(MediatorSwap, WhatCannotBeRecordedIsNotDone) {
  Begin();
  StartOther();
  Work(2);
  auto swapped = Swap(To("other.sock"), absl::ResourceExhaustedError("disk full"));
  EXPECT_THAT(Message(swapped.status()), testing::HasSubstr("disk full"));
  EXPECT_EQ(Socket(), dir_ + "/backend.sock");
  Work(3);
}

TEST_F(MediatorSwap, ANewOneThatFailsAfterTheSwitchIsWaitedFor) {
  Begin();
  StartOther({.garble_at = 8});  // SET_VRING_NUM
  Work(2);
  auto swapped = Swap(To("other.sock"));
  EXPECT_EQ(swapped.status().code(), absl::StatusCode::kUnavailable) << swapped.status();
  EXPECT_EQ(Socket(), dir_ + "/other.sock");
  EXPECT_EQ(recorded_, 1);
  StartOther();
  ASSERT_TRUE(Becomes(v1::Device::ACTIVE)) << mediator_->Describe().ShortDebugString();
  Work(3);
}

TEST_F(MediatorSwap, TheSameBackendIsNoSwap) {
  Begin();
  auto swapped = Swap(To("backend.sock"));
  ASSERT_TRUE(swapped.ok());
  EXPECT_TRUE(swapped->unchanged);
  EXPECT_EQ(recorded_, 0);
}

TEST_F(MediatorSwap, NotDuringAMigration) {
  Begin();
  StartOther();
  ASSERT_TRUE(mediator_->StartLogging(Soon()).ok());
  EXPECT_EQ(ReasonOf(Swap(To("other.sock")).status()), v1::VM_NOT_MIGRATABLE);
  ASSERT_TRUE(mediator_->StopLogging(Soon()).ok());
  ASSERT_TRUE(mediator_->ArmStop(seconds(1)).ok());
  EXPECT_EQ(ReasonOf(Swap(To("other.sock")).status()), v1::VM_NOT_MIGRATABLE);
  ASSERT_TRUE(mediator_->DisarmStop().ok());
  EXPECT_TRUE(Swap(To("other.sock")).ok());
  Work(2);
}

TEST_F(MediatorSwap, ADeadBackendIsReplacedWithWhatItHadInFlight) {
  Begin({.inflight = true, .delay_us = 2000000});
  for (uint16_t i = 0; i < 5; ++i) vmm_->Submit(i, true, i, 1);
  ASSERT_TRUE(backend_->AwaitFetched(5));
  backend_.reset();
  ASSERT_TRUE(Becomes(v1::Device::BACKEND_LOST));
  StartOther({.inflight = true});
  auto swapped = Swap(To("other.sock"));
  ASSERT_TRUE(swapped.ok()) << swapped.status();
  EXPECT_TRUE(vmm_->AwaitUsed(5)) << mediator_->Describe().ShortDebugString();
  EXPECT_EQ(vmm_->GetBase().value_or(99), 5u);
}

TEST_F(MediatorSwap, RequestsInFlightAreHandedOver) {
  // It completes nothing by itself, so whatever is done was handed over.
  Begin({.inflight = true, .suspends = true, .delay_us = 3600000000u});
  StartOther({.inflight = true, .suspends = true});
  for (uint16_t i = 0; i < 4; ++i) vmm_->Submit(i, true, i, 1);
  ASSERT_TRUE(backend_->AwaitFetched(4));
  SwapOptions wanted = To("other.sock");
  wanted.inflight = v1::HANDOFF;
  auto failed = Swap(wanted, absl::ResourceExhaustedError("disk full"));
  EXPECT_THAT(Message(failed.status()), testing::HasSubstr("disk full"));
  EXPECT_EQ(Socket(), dir_ + "/backend.sock");
  auto swapped = Swap(wanted);
  ASSERT_TRUE(swapped.ok()) << swapped.status();
  EXPECT_EQ(Socket(), dir_ + "/other.sock");
  EXPECT_TRUE(vmm_->AwaitUsed(4)) << mediator_->Describe().ShortDebugString();
  for (uint16_t i = 0; i < 4; ++i) EXPECT_EQ(*vmm_->At(FakeVmm::kBuffers + i * 0x1000 + 0x800), 0) << i;
  backend_.reset();
  done_ = 4;
  Work(3);
}

TEST_F(MediatorSwap, WhatCannotSuspendIsNotAskedToHandOver) {
  Begin({.inflight = true});
  StartOther({.inflight = true});
  SwapOptions wanted = To("other.sock");
  wanted.inflight = v1::HANDOFF;
  auto swapped = Swap(wanted);
  EXPECT_EQ(ReasonOf(swapped.status()), v1::INFLIGHT_UNKNOWN) << swapped.status();
  EXPECT_EQ(Socket(), dir_ + "/backend.sock");
  Work(2);
}

TEST_F(MediatorSwap, ADeviceThatTheGuestHasNotStarted) {
  StartBackend();
  StartMediator();
  StartOther();
  ASSERT_TRUE(Swap(To("other.sock")).ok());
  backend_.reset();
  vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
  ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
  ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
  Work(3);
}

}  // namespace
}  // namespace baton::vhost
