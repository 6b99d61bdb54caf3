// The mediator between a scripted VMM and the lab back-end.
#include "agent/vhost/mediator.h"

#include <gmock/gmock.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstring>

#include "tests/unit/vhost/fake_vmm.h"

namespace baton::vhost {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class MediatorTest : public MediatorFixture {
 protected:
  // A mediator, a VMM and a running ring; harvests go to the VMM's memory.
  void Begin(BackendOptions backend = {}, uint64_t less_protocol = 0) {
    StartBackend(backend);
    ASSERT_NO_FATAL_FAILURE(StartMediator());
    vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
    ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate(less_protocol));
    ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
    ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
  }
  std::unique_ptr<FakeVmm> vmm_;
};

TEST_F(MediatorTest, RingRunsAndStops) {
  Begin();
  vmm_->Submit(0, true, 5, 0x77);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  vmm_->Submit(1, false, 5);
  ASSERT_TRUE(vmm_->AwaitUsed(2));
  EXPECT_EQ(*vmm_->At(FakeVmm::kBuffers + 0x1000 + 0x100), 0x77);
  EXPECT_EQ(mediator_->Describe().state(), v1::Device::ACTIVE);
  EXPECT_EQ(vmm_->GetBase().value_or(99), 2u);
  EXPECT_TRUE(Becomes(v1::Device::STOPPED_DEVICE));
}

TEST_F(MediatorTest, NoWakeUpsForRequests) {
  Begin();
  vmm_->Submit(0, true, 0, 1);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  const uint64_t before = mediator_->wakeups();
  for (uint16_t i = 1; i < 100; ++i) {
    vmm_->Submit(i % 5, true, i, 2);
    ASSERT_TRUE(vmm_->AwaitUsed(static_cast<uint16_t>(i + 1)));
  }
  EXPECT_EQ(mediator_->wakeups(), before);
}

TEST_F(MediatorTest, StateHasTheRingAndItsAddresses) {
  Begin();
  for (uint16_t i = 0; i < 3; ++i) vmm_->Submit(i, true, i, 3);
  ASSERT_TRUE(vmm_->AwaitUsed(3));
  ASSERT_TRUE(mediator_->ArmStop(seconds(1)).ok());
  // Nobody has stopped it yet.
  EXPECT_EQ(ReasonOf(mediator_->CollectState(Deadline::After(milliseconds(50))).status()),
            v1::SOURCE_VMM_FAILED);
  ASSERT_EQ(vmm_->GetBase().value_or(99), 3u);
  auto state = mediator_->CollectState(Soon());
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_EQ(state->vrings_size(), 1);
  const v1::VringState& v = state->vrings(0);
  EXPECT_EQ(v.last_avail(), 3u);
  EXPECT_EQ(v.avail_idx(), 3u);
  EXPECT_EQ(v.used_idx(), 3u);
  EXPECT_EQ(v.size(), FakeVmm::kRingSize);
  EXPECT_EQ(v.desc_gpa(), FakeVmm::kDesc);
  EXPECT_EQ(v.avail_gpa(), FakeVmm::kAvail);
  EXPECT_EQ(v.used_gpa(), FakeVmm::kUsed);
  EXPECT_EQ(state->config().size(), 60u);

  // The same memory verifies; a lost page does not.
  std::vector<memory::RamBlock> blocks;
  auto block = memory::RamBlock::FromFd("ram", UniqueFd(::dup(vmm_->memory_fd())));
  ASSERT_TRUE(block.ok());
  blocks.push_back(std::move(*block));
  memory::GuestRam ram(std::move(blocks));
  ASSERT_TRUE(ram.SetLayout({{0, FakeVmm::kMemory, 0, 0}}).ok());
  EXPECT_TRUE(VerifyAgainstMemory(*state, ram).ok());
  *vmm_->At(FakeVmm::kUsed + 2) = 2;
  EXPECT_EQ(ReasonOf(VerifyAgainstMemory(*state, ram)), v1::STATE_MISMATCH);
}

TEST_F(MediatorTest, CorruptIndicesAreAMismatch) {
  Begin();
  vmm_->Submit(0, true, 0, 1);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  ASSERT_TRUE(mediator_->ArmStop(milliseconds(100)).ok());
  ASSERT_TRUE(vmm_->GetBase().ok());
  *reinterpret_cast<uint16_t*>(vmm_->At(FakeVmm::kAvail + 2)) = 500;
  EXPECT_EQ(ReasonOf(mediator_->CollectState(Soon()).status()), v1::STATE_MISMATCH);
}

// A vCPU paused between its store to avail->idx and its kick: the back-end has not heard of the request.
TEST_F(MediatorTest, RequestWithoutItsKickIsDrainedByTheStop) {
  Begin();
  vmm_->Submit(0, true, 0, 1);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  vmm_->Submit(1, true, 1, 2, /*kick=*/false);
  ASSERT_TRUE(mediator_->ArmStop(seconds(20)).ok());
  EXPECT_EQ(vmm_->GetBase().value_or(99), 2u);
  EXPECT_EQ(vmm_->UsedIndex(), 2u);
  auto state = mediator_->CollectState(Soon());
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->vrings(0).used_idx(), 2u);
}

// QEMU 7.2 resets the status before it stops the rings.
TEST_F(MediatorTest, StatusResetAheadOfTheStopCancelsNothing) {
  Begin({.delay_us = 200000});
  const uint64_t up = 0xf, reset = 0;
  ASSERT_TRUE(vmm_->Set(Request::kSetStatus, up).ok());
  for (uint16_t i = 0; i < 3; ++i) vmm_->Submit(i, true, i, 1);
  ASSERT_TRUE(vmm_->Set(Request::kSetStatus, reset).ok());
  EXPECT_EQ(vmm_->GetBase().value_or(99), 3u);
  EXPECT_EQ(vmm_->UsedIndex(), 3u);
}

TEST_F(MediatorTest, SlowRequestsEndTheStopAtItsBoundAndTheRingGoesOn) {
  Begin({.delay_us = 400000});
  for (uint16_t i = 0; i < 4; ++i) vmm_->Submit(i, true, i, 4);
  ASSERT_TRUE(mediator_->ArmStop(milliseconds(5)).ok());
  auto told = vmm_->GetBase();
  ASSERT_TRUE(told.ok());
  auto state = mediator_->CollectState(Soon());
  EXPECT_EQ(ReasonOf(state.status()), v1::DRAIN_TIMEOUT) << state.status();
  vmm_->StartRing(static_cast<uint16_t>(*told));
  ASSERT_TRUE(mediator_->DisarmStop().ok());
  EXPECT_TRUE(vmm_->AwaitUsed(4));
  vmm_->Submit(0, true, 9, 4);
  EXPECT_TRUE(vmm_->AwaitUsed(5));
  // And a stop with patience works.
  ASSERT_TRUE(mediator_->ArmStop(seconds(2)).ok());
  EXPECT_EQ(vmm_->GetBase().value_or(99), 5u);
  EXPECT_TRUE(mediator_->CollectState(Soon()).ok());
}

// Whoever holds a descriptor of it may do that; a mapping of this process would end it with SIGBUS.
TEST_F(MediatorTest, MemoryThatIsTruncatedUnderItIsAnErrorOfTheDevice) {
  StartBackend();
  UniqueFd file(::memfd_create("ram", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(file.get(), FakeVmm::kMemory), 0);
  auto block = memory::RamBlock::FromFd("ram", file.Duplicate());
  ASSERT_TRUE(block.ok()) << block.status();
  std::vector<memory::RamBlock> blocks;
  blocks.push_back(*std::move(block));
  ram_ = std::make_unique<memory::GuestRam>(std::move(blocks));
  ASSERT_TRUE(ram_->SetLayout({{0, FakeVmm::kMemory, 0, 0}}).ok());
  MediatorOptions options = Options();
  options.ram = ram_.get();
  ASSERT_NO_FATAL_FAILURE(StartMediator(std::move(options)));
  vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
  ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
  ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
  vmm_->Submit(0, true, 0, 1);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  ASSERT_EQ(::ftruncate(file.get(), 0), 0);
  ASSERT_TRUE(mediator_->ArmStop(seconds(2)).ok());
  EXPECT_EQ(vmm_->GetBase().value_or(99), 1u);
  auto state = mediator_->CollectState(Soon());
  EXPECT_EQ(ReasonOf(state.status()), v1::SOURCE_VMM_FAILED) << state.status();
  EXPECT_THAT(Message(state.status()), testing::HasSubstr("device disk0: RAM block ram: "));
  // It is still served.
  ASSERT_TRUE(mediator_->DisarmStop().ok());
  vmm_->StartRing(1);
  vmm_->Submit(1, true, 1, 2);
  EXPECT_TRUE(vmm_->AwaitUsed(2)) << mediator_->Describe().ShortDebugString();
}

TEST_F(MediatorTest, LogHasTheWritesOfTheBackendAndNothingElse) {
  StartBackend();
  MediatorOptions options = Options();
  auto blocks = std::vector<memory::RamBlock>();
  auto block = memory::RamBlock::FromFd("ram", UniqueFd([] {
                                          int fd = ::memfd_create("ram", MFD_CLOEXEC);
                                          EXPECT_EQ(::ftruncate(fd, FakeVmm::kMemory), 0);
                                          return fd;
                                        }()));
  blocks.push_back(std::move(*block));
  ram_ = std::make_unique<memory::GuestRam>(std::move(blocks));
  ASSERT_TRUE(ram_->SetLayout({{0, FakeVmm::kMemory, 0, 0}}).ok());
  options.ram = ram_.get();
  StartMediator(std::move(options));
  vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
  vmm_->Negotiate();
  vmm_->SetMemory();
  vmm_->StartRing();
  vmm_->Submit(0, true, 0, 1);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  ASSERT_TRUE(mediator_->StartLogging(Soon()).ok());
  ASSERT_TRUE(mediator_->StartLogging(Soon()).ok());
  memory::PageSets pages = ram_->MakeSets();
  ASSERT_TRUE(mediator_->HarvestLog(pages).ok());
  EXPECT_TRUE(pages[0].Empty());
  vmm_->Submit(1, false, 0);
  ASSERT_TRUE(vmm_->AwaitUsed(2));
  // Used ring, data and status; logged before or just after used->idx.
  for (const Deadline deadline = Soon(); pages[0].Count() < 2 && !deadline.Expired();)
    ASSERT_TRUE(mediator_->HarvestLog(pages).ok());
  EXPECT_EQ(pages[0].Count(), 2u);
  EXPECT_TRUE(pages[0].Test(FakeVmm::kUsed / 4096));
  EXPECT_TRUE(pages[0].Test((FakeVmm::kBuffers + 0x1000) / 4096));
  // A VMM's own log changes nothing.
  LogDescription log{4096, 0};
  ASSERT_TRUE(vmm_->Send(Request::kSetLogBase, Bytes(log), {vmm_->memory_fd()}).ok());
  ASSERT_TRUE(vmm_->Receive().ok());
  // A back-end that dies makes everything dirty.
  StartBackend();
  ASSERT_TRUE(AwaitReconnects(1));
  pages[0].Reset();
  ASSERT_TRUE(mediator_->HarvestLog(pages).ok());
  EXPECT_EQ(pages[0].Count(), pages[0].pages());
  // The new one logs as well.
  pages[0].Reset();
  vmm_->Submit(2, false, 0);
  ASSERT_TRUE(vmm_->AwaitUsed(3));
  for (const Deadline deadline = Soon(); pages[0].Count() < 2 && !deadline.Expired();)
    ASSERT_TRUE(mediator_->HarvestLog(pages).ok());
  EXPECT_EQ(pages[0].Count(), 2u);
  ASSERT_TRUE(mediator_->StopLogging(Soon()).ok());
  ASSERT_TRUE(mediator_->StopLogging(Soon()).ok());
}

TEST_F(MediatorTest, InflightRequestsOfADeadBackendAreSubmittedAgain) {
  Begin({.inflight = true, .delay_us = 2000000});
  for (uint16_t i = 0; i < 5; ++i) vmm_->Submit(i, true, i, static_cast<uint8_t>(10 + i));
  ASSERT_TRUE(backend_->AwaitFetched(5));
  StartBackend({.inflight = true});
  EXPECT_TRUE(vmm_->AwaitUsed(5)) << vmm_->UsedIndex() << mediator_->Describe().ShortDebugString();
  for (uint16_t i = 0; i < 5; ++i) EXPECT_EQ(*vmm_->At(FakeVmm::kBuffers + i * 0x1000 + 0x800), 0) << i;
  EXPECT_TRUE(AwaitReconnects(1)) << mediator_->Describe().ShortDebugString();
}

TEST_F(MediatorTest, WithoutRegionOutOfOrderRequestsAreHeldAndANewStartFreesTheDevice) {
  Begin({.delay_us = 2000000});
  for (uint16_t i = 0; i < 4; ++i) vmm_->Submit(i, true, i, 1);
  ASSERT_TRUE(backend_->AwaitFetched(4));
  StartBackend();
  ASSERT_TRUE(Becomes(v1::Device::HELD)) << mediator_->Describe().ShortDebugString();
  EXPECT_THAT(mediator_->Describe().message(), testing::HasSubstr("in flight"));
  // The guest resets the device: an empty ring.
  ASSERT_TRUE(vmm_->GetBase().ok());
  std::memset(vmm_->At(FakeVmm::kAvail), 0, 0x1000);
  std::memset(vmm_->At(FakeVmm::kUsed), 0, 0x1000);
  vmm_->StartRing(0);
  EXPECT_TRUE(Becomes(v1::Device::ACTIVE)) << mediator_->Describe().ShortDebugString();
}

TEST_F(MediatorTest, LostBackendWithNothingOutstandingComesBackExactly) {
  Begin();
  for (uint16_t i = 0; i < 4; ++i) vmm_->Submit(i, true, i, 1);
  ASSERT_TRUE(vmm_->AwaitUsed(4));
  backend_.reset();
  ASSERT_TRUE(Becomes(v1::Device::BACKEND_LOST));
  // The VMM is answered meanwhile.
  EXPECT_TRUE(vmm_->Get(Request::kGetFeatures).ok());
  StartBackend();
  ASSERT_TRUE(Becomes(v1::Device::ACTIVE));
  vmm_->Submit(0, true, 8, 1);
  EXPECT_TRUE(vmm_->AwaitUsed(5));
}

// Between its bind(2), which the mediator hears of, and its listen(2) connections are refused; nothing tells
// of the latter.
TEST_F(MediatorTest, BackendThatBindsAndListensLaterIsTriedAgainSoon) {
  StartBackend();
  MediatorOptions options = Options();
  options.first_retry = std::chrono::hours(1);
  ASSERT_NO_FATAL_FAILURE(StartMediator(std::move(options)));
  backend_.reset();
  ASSERT_TRUE(Becomes(v1::Device::BACKEND_LOST));
  UniqueFd late(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, (dir_ + "/backend.sock").c_str());
  const uint64_t before = mediator_->wakeups();
  ASSERT_EQ(::bind(late.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  // The first is that of the bind.
  for (const Deadline deadline = Soon(); mediator_->wakeups() < before + 4 && !deadline.Expired();)
    ::poll(nullptr, 0, 1);
  ASSERT_GE(mediator_->wakeups(), before + 4);
  ASSERT_EQ(::listen(late.get(), 1), 0);
  pollfd incoming{late.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&incoming, 1, Soon().PollTimeoutMs()), 1);
}

TEST_F(MediatorTest, BackendThatCameBackWithoutAFeatureIsHeld) {
  Begin();
  backend_.reset();
  ASSERT_TRUE(Becomes(v1::Device::BACKEND_LOST));
  StartBackend({.less_features = virtio::kFVersion1});
  ASSERT_TRUE(Becomes(v1::Device::HELD));
  EXPECT_THAT(mediator_->Describe().message(), testing::HasSubstr("VERSION_1"));
}

TEST_F(MediatorTest, VmmThatComesAgainIsServed) {
  Begin();
  vmm_->Submit(0, true, 0, 1);
  ASSERT_TRUE(vmm_->AwaitUsed(1));
  vmm_.reset();
  ASSERT_TRUE(Becomes(v1::Device::IDLE_DEVICE));
  vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
  vmm_->Negotiate();
  vmm_->SetMemory();
  vmm_->StartRing();
  vmm_->Submit(0, true, 1, 1);
  EXPECT_TRUE(vmm_->AwaitUsed(1));
}

TEST_F(MediatorTest, ExpectedStateIsComparedWithTheStart) {
  StartBackend();
  StartMediator();
  v1::DeviceState state;
  state.set_name("disk0");
  state.set_acked_features(virtio::kFVersion1 | virtio::Bit(9));
  auto* v = state.add_vrings();
  v->set_size(FakeVmm::kRingSize);
  v->set_last_avail(3);
  v->set_desc_gpa(FakeVmm::kDesc);
  v->set_avail_gpa(FakeVmm::kAvail);
  v->set_used_gpa(FakeVmm::kUsed);
  ASSERT_TRUE(mediator_->ExpectState(state).ok());
  EXPECT_TRUE(absl::IsUnavailable(mediator_->CheckExpected()));
  vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
  vmm_->Negotiate();
  vmm_->SetMemory();
  vmm_->StartRing(0);
  EXPECT_EQ(ReasonOf(mediator_->CheckExpected()), v1::STATE_MISMATCH) << mediator_->CheckExpected();
  ASSERT_TRUE(vmm_->GetBase().ok());
  ASSERT_TRUE(mediator_->ExpectState(state).ok());
  *reinterpret_cast<uint16_t*>(vmm_->At(FakeVmm::kAvail + 2)) = 3;
  *reinterpret_cast<uint16_t*>(vmm_->At(FakeVmm::kUsed + 2)) = 3;
  vmm_->StartRing(3);
  EXPECT_TRUE(mediator_->CheckExpected().ok()) << mediator_->CheckExpected();
}

TEST_F(MediatorTest, BackendWithoutLogSaysSo) {
  StartBackend({.less_protocol = pf::kLogShmfd});
  StartMediator();
  EXPECT_TRUE(absl::IsFailedPrecondition(mediator_->StartLogging(Soon())));
}

}  // namespace
}  // namespace baton::vhost
