// Requests in flight when the shim, the VMM's connection or the back-end goes away: nothing lost, nothing
// repeated.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <sys/eventfd.h>

#include <filesystem>

#include "tests/unit/vhost/fake_vmm.h"

namespace baton::vhost {
namespace {

constexpr uint32_t kSlow = 2000000;

class MediatorRecovery : public MediatorFixture {
 protected:
  // A ring that has served three requests, and has four in flight at a slow back-end.
  void FourInFlight() {
    StartBackend({.inflight = true});
    MediatorOptions options = Options();
    options.memo_dir = dir_;
    ASSERT_NO_FATAL_FAILURE(StartMediator(std::move(options)));
    vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
    ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
    ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
    ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
    for (uint16_t i = 0; i < 3; ++i) {
      vmm_->Submit(4, true, i, 1);
      ASSERT_TRUE(vmm_->AwaitUsed(static_cast<uint16_t>(i + 1)));
    }
    StartBackend({.inflight = true, .delay_us = kSlow});
    ASSERT_TRUE(AwaitReconnects(1));
    for (uint16_t i = 0; i < 4; ++i) vmm_->Submit(i, true, i, static_cast<uint8_t>(10 + i));
    ASSERT_TRUE(AwaitInFlight(4));
  }
  // The flags of the region's entries, by the file that the mediator keeps.
  bool AwaitInFlight(int n) {
    // A back-end writes there without telling anybody.
    for (const Deadline deadline = Soon(); InFlight() != n && !deadline.Expired();) std::this_thread::yield();
    return InFlight() == n;
  }
  int InFlight() const {
    UniqueFd fd(::open((dir_ + "/disk0.inflight-1").c_str(), O_RDONLY | O_CLOEXEC));
    std::vector<uint8_t> bytes(4160);
    if (::pread(fd.get(), bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) return -1;
    int n = 0;
    for (size_t i = 16; i + 16 <= bytes.size(); i += 16) n += bytes[i] == 1;
    return n;
  }
  void NewMediator() {
    mediator_.reset();
    MediatorOptions options = Options();
    options.memo_dir = dir_;
    options.vmm_returns = true;
    options.backend_required = false;
    ASSERT_NO_FATAL_FAILURE(StartMediator(std::move(options)));
  }
  void VmmReturns(uint16_t base) {
    ASSERT_NO_FATAL_FAILURE(vmm_->Reconnect(dir_ + "/vmm.sock"));
    ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
    ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
    ASSERT_NO_FATAL_FAILURE(vmm_->StartRing(base));
  }
  // All of the four are done, each once.
  void AllDoneOnce() {
    EXPECT_TRUE(vmm_->AwaitUsed(7)) << vmm_->UsedIndex() << " " << mediator_->Describe().ShortDebugString();
    for (uint16_t i = 0; i < 4; ++i) EXPECT_EQ(*vmm_->At(FakeVmm::kBuffers + i * 0x1000 + 0x800), 0) << i;
    EXPECT_TRUE(AwaitInFlight(0));
    vmm_->Submit(0, true, 9, 1);
    EXPECT_TRUE(vmm_->AwaitUsed(8));
    EXPECT_EQ(vmm_->GetBase().value_or(99), 8u);
  }
  std::unique_ptr<FakeVmm> vmm_;
};

TEST_F(MediatorRecovery, ANewShimGoesOnWithWhatIsInFlight) {
  ASSERT_NO_FATAL_FAILURE(FourInFlight());
  mediator_.reset();
  StartBackend({.inflight = true});
  ASSERT_NO_FATAL_FAILURE(NewMediator());
  ASSERT_NO_FATAL_FAILURE(VmmReturns(3));
  AllDoneOnce();
}

TEST_F(MediatorRecovery, TheSameBackendSubmitsThemAgainForTheNewShim) {
  ASSERT_NO_FATAL_FAILURE(FourInFlight());
  ASSERT_NO_FATAL_FAILURE(NewMediator());
  ASSERT_NO_FATAL_FAILURE(VmmReturns(3));
  AllDoneOnce();
}

TEST_F(MediatorRecovery, ShimAndBackendDieTogether) {
  ASSERT_NO_FATAL_FAILURE(FourInFlight());
  backend_.reset();
  ASSERT_NO_FATAL_FAILURE(NewMediator());
  StartBackend({.inflight = true});
  ASSERT_TRUE(Becomes(v1::Device::IDLE_DEVICE));
  ASSERT_NO_FATAL_FAILURE(VmmReturns(3));
  AllDoneOnce();
}

TEST_F(MediatorRecovery, AVmmThatReconnectsLosesNothing) {
  ASSERT_NO_FATAL_FAILURE(FourInFlight());
  ASSERT_NO_FATAL_FAILURE(VmmReturns(3));
  AllDoneOnce();
}

TEST_F(MediatorRecovery, AGuestThatWasResetMeanwhileBeginsAnew) {
  ASSERT_NO_FATAL_FAILURE(FourInFlight());
  mediator_.reset();
  vmm_->ClearRing();
  StartBackend({.inflight = true});
  ASSERT_NO_FATAL_FAILURE(NewMediator());
  ASSERT_NO_FATAL_FAILURE(VmmReturns(0));
  EXPECT_EQ(mediator_->Describe().state(), v1::Device::ACTIVE) << mediator_->Describe().ShortDebugString();
  vmm_->Submit(0, true, 0, 1);
  EXPECT_TRUE(vmm_->AwaitUsed(1));
  EXPECT_EQ(vmm_->GetBase().value_or(99), 1u);
}

TEST_F(MediatorRecovery, AnotherGuestBeginsAnew) {
  ASSERT_NO_FATAL_FAILURE(FourInFlight());
  vmm_.reset();
  StartBackend({.inflight = true});
  ASSERT_NO_FATAL_FAILURE(NewMediator());
  vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
  ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
  ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
  vmm_->Submit(0, true, 0, 1);
  EXPECT_TRUE(vmm_->AwaitUsed(1));
}

TEST_F(MediatorRecovery, ARegionThatWasCutShortHoldsTheDevice) {
  ASSERT_NO_FATAL_FAILURE(FourInFlight());
  mediator_.reset();
  std::filesystem::resize_file(dir_ + "/disk0.inflight-1", 64);
  StartBackend({.inflight = true});
  ASSERT_NO_FATAL_FAILURE(NewMediator());
  ASSERT_NO_FATAL_FAILURE(VmmReturns(3));
  ASSERT_TRUE(Becomes(v1::Device::HELD)) << mediator_->Describe().ShortDebugString();
  EXPECT_THAT(mediator_->Describe().message(), testing::HasSubstr("bytes instead of"));
  EXPECT_EQ(vmm_->UsedIndex(), 3u);
}

TEST_F(MediatorRecovery, ARegionThatContradictsTheRingHoldsTheDevice) {
  ASSERT_NO_FATAL_FAILURE(FourInFlight());
  mediator_.reset();
  {
    // used_idx of the region: far from the ring's.
    UniqueFd fd(::open((dir_ + "/disk0.inflight-1").c_str(), O_RDWR | O_CLOEXEC));
    uint16_t used = 5000;
    ASSERT_EQ(::pwrite(fd.get(), &used, sizeof used, 14), 2);
  }
  StartBackend({.inflight = true});
  ASSERT_NO_FATAL_FAILURE(NewMediator());
  ASSERT_NO_FATAL_FAILURE(VmmReturns(3));
  ASSERT_TRUE(Becomes(v1::Device::HELD)) << mediator_->Describe().ShortDebugString();
}

TEST_F(MediatorRecovery, WhatIsNotedIsForgottenWithTheVm) {
  ASSERT_NO_FATAL_FAILURE(FourInFlight());
  mediator_.reset();
  EXPECT_TRUE(std::filesystem::exists(dir_ + "/disk0.memo"));
  ForgetDevice(dir_, "disk0");
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/disk0.memo"));
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/disk0.inflight-1"));
}

// --- what the back-end tells of errors ---

TEST_F(MediatorRecovery, ErrorsOfTheBackendBecomeEventsAndReachTheVmm) {
  StartBackend({.inflight = true, .no_space = true});
  MediatorOptions options = Options();
  options.memo_dir = dir_;
  ASSERT_NO_FATAL_FAILURE(StartMediator(std::move(options)));
  vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
  ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
  ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
  UniqueFd error(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  const uint64_t ring = 0;
  ASSERT_TRUE(vmm_->Set(Request::kSetVringErr, ring, {error.get()}).ok());
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
  EXPECT_EQ(mediator_->Describe().events(), 0u);
  auto events = [&](uint64_t n) {
    (void)AwaitDevice([n](const v1::Device& device) { return device.events() >= n; });
    return mediator_->Describe().events();
  };
  vmm_->Submit(0, true, 0, 1);
  ASSERT_EQ(events(1), 1u);
  v1::DeviceEvent event = mediator_->Describe().last_event();
  EXPECT_EQ(event.kind(), v1::DeviceEvent::QUEUE_ERROR);
  EXPECT_EQ(event.queue(), 0u);
  EXPECT_EQ(event.held(), 1u);
  EXPECT_EQ(event.sequence(), 1u);
  EXPECT_GT(event.time().seconds(), 0);
  uint64_t told = 0;
  EXPECT_EQ(::read(error.get(), &told, sizeof told), static_cast<ssize_t>(sizeof told));
  // A burst is one event, or two if it begins before the pause has ended.
  for (uint16_t i = 1; i < 5; ++i) vmm_->Submit(i, true, i, 1);
  ASSERT_GE(events(2), 2u);
  EXPECT_LE(mediator_->Describe().events(), 3u);
  const uint64_t before = mediator_->Describe().events();
  // The next shim counts on.
  ASSERT_NO_FATAL_FAILURE(NewMediator());
  EXPECT_EQ(mediator_->Describe().events(), before);
  EXPECT_EQ(mediator_->Describe().last_event().sequence(), before);
}

}  // namespace
}  // namespace baton::vhost
