// Devices of a VMM that moves memory itself (vmm_moves_memory): its own dirty log reaches the back-end, and
// it hears of a stop only after the state of the device has been told.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <sys/mman.h>

#include <future>

#include "tests/unit/vhost/fake_vmm.h"

namespace baton::vhost {
namespace {

constexpr uint64_t kLogBytes = 4096;
constexpr auto kUsedPage = static_cast<size_t>(FakeVmm::kUsed / 4096);

// As QEMU makes it.
class VmmLog {
 public:
  explicit VmmLog(bool sealed = true) : fd_(::memfd_create("log", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
    EXPECT_EQ(::ftruncate(fd_.get(), kLogBytes), 0);
    const int seals = sealed ? F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL : 0;
    EXPECT_EQ(::fcntl(fd_.get(), F_ADD_SEALS, seals), 0);
    map_ =
        static_cast<uint8_t*>(::mmap(nullptr, kLogBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0));
  }
  ~VmmLog() { ::munmap(map_, kLogBytes); }
  int fd() const { return fd_.get(); }
  bool Test(size_t page) const { return __atomic_load_n(&map_[page / 8], __ATOMIC_ACQUIRE) >> page % 8 & 1; }
  bool Becomes(size_t page) const {
    for (Deadline deadline = Soon(); !deadline.Expired(); ::usleep(1000)) {
      if (Test(page)) return true;
    }
    return false;
  }
  size_t Count() const {
    size_t count = 0;
    for (size_t page = 0; page < kLogBytes * 8; ++page) count += Test(page);
    return count;
  }
  void Clear() { std::memset(map_, 0, kLogBytes); }

 private:
  UniqueFd fd_;
  uint8_t* map_;
};

class VmmLogTest : public MediatorFixture {
 protected:
  void Begin(BackendOptions backend = {}) {
    StartBackend(backend);
    MediatorOptions options = Options();
    options.vmm_moves_memory = true;
    MediatorCallbacks callbacks;
    callbacks.on_stopped = [this](const absl::StatusOr<v1::DeviceState>& state) {
      if (on_stopped_) on_stopped_(state);
    };
    ASSERT_NO_FATAL_FAILURE(StartMediator(std::move(options), std::move(callbacks)));
    vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
    ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
    ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
    ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
  }
  absl::Status SetLog(const VmmLog& log) {
    LogDescription wanted{kLogBytes, 0};
    RETURN_IF_ERROR(vmm_->Send(Request::kSetLogBase, Bytes(wanted), {log.fd()}));
    return vmm_->Receive().status();
  }
  void Log(bool on) {
    auto features = vmm_->Get(Request::kGetFeatures);
    ASSERT_TRUE(features.ok());
    auto set = vmm_->Set(Request::kSetFeatures,
                         on ? *features | virtio::kVhostFLogAll : *features & ~virtio::kVhostFLogAll);
    ASSERT_TRUE(set.ok() && *set == 0) << set.status();
  }

  std::function<void(const absl::StatusOr<v1::DeviceState>&)> on_stopped_;
  std::unique_ptr<FakeVmm> vmm_;
};

TEST_F(VmmLogTest, TheBackendWritesToTheVmmsLogAsLongAsItIsAskedTo) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  VmmLog log;
  ASSERT_TRUE(SetLog(log).ok());
  vmm_->Submit(0, true, 0, 1);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  EXPECT_EQ(log.Count(), 0u) << "it was not asked to log yet";
  ASSERT_NO_FATAL_FAILURE(Log(true));
  vmm_->Submit(1, false, 0);
  ASSERT_TRUE(vmm_->AwaitUsed(2));
  EXPECT_TRUE(log.Becomes(kUsedPage));
  EXPECT_TRUE(log.Becomes((FakeVmm::kBuffers + 0x1000) / 4096));
  EXPECT_EQ(log.Count(), 2u);
  ASSERT_NO_FATAL_FAILURE(Log(false));
  log.Clear();
  vmm_->Submit(2, false, 0);
  ASSERT_TRUE(vmm_->AwaitUsed(3));
  ASSERT_TRUE(vmm_->GetBase().ok());
  EXPECT_EQ(log.Count(), 0u);
  EXPECT_TRUE(absl::IsFailedPrecondition(mediator_->StartLogging(Soon())));
}

TEST_F(VmmLogTest, ALargerLogTakesThePlaceOfTheFirst) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  VmmLog first, second;
  ASSERT_TRUE(SetLog(first).ok());
  ASSERT_NO_FATAL_FAILURE(Log(true));
  ASSERT_TRUE(SetLog(second).ok());
  vmm_->Submit(0, false, 0);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  EXPECT_TRUE(second.Becomes(kUsedPage));
  EXPECT_EQ(second.Count(), 2u) << "nothing was written without a log";
}

TEST_F(VmmLogTest, WhatWasWrittenBeforeTheLogWasNamedIsAllMemory) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Log(true));
  VmmLog log;
  ASSERT_TRUE(SetLog(log).ok());
  EXPECT_EQ(log.Count(), kLogBytes * 8);
}

TEST_F(VmmLogTest, ABackendThatDiesWhileLoggingMakesAllMemoryDirty) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  VmmLog log;
  ASSERT_TRUE(SetLog(log).ok());
  ASSERT_NO_FATAL_FAILURE(Log(true));
  StartBackend();
  for (Deadline deadline = Soon(); mediator_->Describe().reconnects() == 0 && !deadline.Expired();)
    ::usleep(1000);
  EXPECT_EQ(log.Count(), kLogBytes * 8);
  // The new one logs as well.
  log.Clear();
  vmm_->Submit(0, false, 0);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  EXPECT_TRUE(log.Becomes(kUsedPage));
}

TEST_F(VmmLogTest, ALogThatCouldBeCutOffUnderUsIsRefused) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  VmmLog log(/*sealed=*/false);
  EXPECT_FALSE(SetLog(log).ok());
  EXPECT_TRUE(Becomes(v1::Device::IDLE_DEVICE)) << "the VMM's connection was closed";
}

TEST_F(VmmLogTest, TheStateIsToldBeforeTheVmmHearsOfTheStop) {
  ASSERT_NO_FATAL_FAILURE(Begin({.inflight = true, .suspends = true, .delay_us = 3600000000u}));
  vmm_->Submit(0, true, 0, 1);
  vmm_->Submit(1, true, 1, 2);
  ASSERT_TRUE(backend_->AwaitFetched(2));
  std::promise<void> told, go_on;
  absl::StatusOr<v1::DeviceState> heard = absl::UnavailableError("nothing yet");
  on_stopped_ = [&](const absl::StatusOr<v1::DeviceState>& state) {
    heard = state;
    told.set_value();
    go_on.get_future().wait();
  };
  ASSERT_TRUE(mediator_->ArmStop(StopOrder{std::chrono::seconds(5), true, true, ""}).ok());
  auto base = std::async(std::launch::async, [&] { return vmm_->GetBase(); });
  told.get_future().wait();
  EXPECT_EQ(base.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout);
  go_on.set_value();
  auto answer = base.get();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(*answer, 2u);
  ASSERT_TRUE(heard.ok()) << heard.status();
  EXPECT_TRUE(heard->handed_off());
  ASSERT_EQ(heard->vrings_size(), 1);
  EXPECT_EQ(heard->vrings(0).inflight_size(), 2);
}

TEST_F(VmmLogTest, AStopThatWasNotTheMigrationsIsFollowedByAnother) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  int stops = 0;
  absl::StatusOr<v1::DeviceState> heard = absl::UnavailableError("nothing yet");
  on_stopped_ = [&](const absl::StatusOr<v1::DeviceState>& state) {
    heard = state;
    ++stops;
  };
  ASSERT_TRUE(mediator_->ArmStop(std::chrono::seconds(5)).ok());
  vmm_->Submit(0, true, 0, 1);
  auto base = vmm_->GetBase();
  ASSERT_TRUE(base.ok());
  EXPECT_EQ(stops, 1);
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing(static_cast<uint16_t>(*base)));
  vmm_->Submit(1, true, 1, 2);
  ASSERT_TRUE(vmm_->GetBase().ok());
  EXPECT_EQ(stops, 2);
  ASSERT_TRUE(heard.ok()) << heard.status();
  EXPECT_EQ(heard->vrings(0).last_avail(), 2u);
}

TEST_F(VmmLogTest, AStopThatDoesNotDrainIsToldAsSuch) {
  ASSERT_NO_FATAL_FAILURE(Begin({.no_space = true}));
  vmm_->Submit(0, true, 0, 1);
  ASSERT_TRUE(backend_->AwaitFetched(1));
  absl::Status heard;
  on_stopped_ = [&](const absl::StatusOr<v1::DeviceState>& state) { heard = state.status(); };
  ASSERT_TRUE(mediator_->ArmStop(std::chrono::milliseconds(50)).ok());
  ASSERT_TRUE(vmm_->GetBase().ok());
  EXPECT_EQ(ReasonOf(heard), v1::DRAIN_TIMEOUT) << heard;
}

}  // namespace
}  // namespace baton::vhost
