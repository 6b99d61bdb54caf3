// What the mediator does for NICs: the back-end's own state, the order in which rings start, announcements.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "agent/vhost/backend_state.h"
#include "agent/vhost/mediator.h"
#include "agent/vhost/probe.h"
#include "agent/virtio/net_protocol.h"
#include "tests/temp_dir.h"
#include "tests/unit/vhost/fake_vmm.h"
#include "tests/unit/vhost/scripted_backend.h"

namespace baton::vhost {
namespace {

using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint64_t kNicFeatures = virtio::kFVersion1 | virtio::kVhostUserFProtocolFeatures |
                                  virtio::kVhostFLogAll | virtio::kNetFMac | virtio::kNetFCtrlVq |
                                  virtio::kNetFMq;
constexpr uint64_t kNicProtocol =
    pf::kMq | pf::kLogShmfd | pf::kRarp | pf::kReplyAck | pf::kConfig | pf::kBackendReq | pf::kDeviceState;

class NicTest : public testing::Test {
 protected:
  NicTest() {
    options_.socket = dir_ + "/backend.sock";
    options_.features = kNicFeatures;
    options_.protocol_features = kNicProtocol;
    options_.queues = 2;
    options_.config = std::string("\x52\x54\0\1\2\3\1\0\2\0\xdc\5", 12);
    options_.state = "what the back-end remembers";
  }
  ~NicTest() override {
    vmm_.reset();
    mediator_.reset();
    backend_.reset();
  }
  void Begin() {
    backend_ = std::make_unique<ScriptedBackend>(options_);
    MediatorOptions options;
    options.spec.set_name("net0");
    options.spec.set_class_(v1::NET);
    options.backend.set_socket(options_.socket);
    options.backend.set_kind(kind_);
    options.listen_path = dir_ + "/vmm.sock";
    // Short only where it is waited for.
    options.request_timeout = options_.silent_save ? milliseconds(500) : milliseconds(10000);
    auto mediator = Mediator::Start(options, {});
    ASSERT_TRUE(mediator.ok()) << mediator.status();
    mediator_ = std::move(*mediator);
    vmm_ = std::make_unique<FakeVmm>(options.listen_path);
  }
  void Prepare() {
    ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
    ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
  }
  // Rings of their own pages, all empty.
  void StartRing(uint32_t index) {
    const uint64_t at = FakeVmm::kUser + 0x20000 + index * 0x4000;
    VringState num{index, FakeVmm::kRingSize}, base{index, 0}, enable{index, 1};
    VringAddr addr{index, 0, at, at + 0x2000, at + 0x1000, 0};
    UniqueFd kick(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    for (auto set : {vmm_->Set(Request::kSetVringNum, num), vmm_->Set(Request::kSetVringBase, base),
                     vmm_->Set(Request::kSetVringAddr, addr),
                     vmm_->Set(Request::kSetVringKick, uint64_t{index}, {kick.get()}),
                     vmm_->Set(Request::kSetVringEnable, enable)}) {
      ASSERT_TRUE(set.ok()) << set.status();
      ASSERT_EQ(*set, 0u);
    }
  }
  // Starts and stops the rings and returns what would travel.
  absl::StatusOr<v1::DeviceState> Collect(const std::vector<uint32_t>& rings) {
    for (uint32_t index : rings) StartRing(index);
    RETURN_IF_ERROR(mediator_->ArmStop(std::chrono::seconds(10)));
    for (uint32_t index : rings) RETURN_IF_ERROR(vmm_->GetBase(index).status());
    return mediator_->CollectState(Soon());
  }
  size_t Position(Request request, size_t occurrence = 0) const {
    const auto heard = backend_->heard();
    for (size_t i = 0; i < heard.size(); ++i) {
      if (heard[i].first == request && occurrence-- == 0) return i;
    }
    return heard.size();
  }

  // As a driver and a device would: so many buffers offered, so many completed.
  void SetIndices(uint32_t index, uint16_t avail, uint16_t used) {
    const uint64_t at = 0x20000 + index * 0x4000;
    std::memcpy(vmm_->At(at + 0x1000 + 2), &avail, sizeof avail);
    std::memcpy(vmm_->At(at + 0x2000 + 2), &used, sizeof used);
  }
  // Two rings whose back-end dies with buffers of the receive queue in its hands.
  void LoseBackend() {
    ASSERT_NO_FATAL_FAILURE(Begin());
    ASSERT_NO_FATAL_FAILURE(Prepare());
    for (uint32_t index : {0u, 1u}) StartRing(index);
    SetIndices(0, 7, 2);
    SetIndices(1, 4, 4);
    backend_.reset();
    backend_ = std::make_unique<ScriptedBackend>(options_);
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  v1::BackendKind kind_ = v1::LAB;
  ScriptedBackendOptions options_;
  std::unique_ptr<ScriptedBackend> backend_;
  std::unique_ptr<Mediator> mediator_;
  std::unique_ptr<FakeVmm> vmm_;
};

TEST_F(NicTest, StateIsSavedAfterTheLastRingHasStopped) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  auto state = Collect({0, 1, 2, 3});
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->backend_state(), options_.state);
  EXPECT_GT(Position(Request::kSetDeviceStateFd), Position(Request::kGetVringBase, 3));
  EXPECT_GT(Position(Request::kCheckDeviceState), Position(Request::kSetDeviceStateFd));
}

TEST_F(NicTest, LargeStateOverTheBackendsOwnChannel) {
  options_.state.assign(size_t{3} << 20, 'x');
  options_.own_channel = true;
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  auto state = Collect({0, 1});
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->backend_state(), options_.state);
}

// Whatever goes wrong at the source, the state was only read: the rings start again.
TEST_F(NicTest, FailedSave_AbortsAndTheDeviceGoesOn) {
  struct Case {
    const char* what;
    std::function<void(ScriptedBackendOptions&)> change;
    bool reconnects;
  };
  const Case cases[] = {
      {"refused", [](auto& o) { o.transfer = 1; }, false},
      {"check says no", [](auto& o) { o.check = 1; }, false},
      {"too large", [](auto& o) { o.state.assign(kMaxBackendState + 1, 'x'); }, false},
      {"never ends", [](auto& o) { o.silent_save = true; }, false},
      {"a file instead of a pipe", [](auto& o) { o.regular_file = true; }, true},
      {"hangs up", [](auto& o) { o.hangs_up = true; }, true},
  };
  const ScriptedBackendOptions sound = options_;
  for (const Case& c : cases) {
    SCOPED_TRACE(c.what);
    options_ = sound;
    c.change(options_);
    ASSERT_NO_FATAL_FAILURE(Begin());
    ASSERT_NO_FATAL_FAILURE(Prepare());
    auto state = Collect({0, 1});
    EXPECT_EQ(ReasonOf(state.status()), v1::SOURCE_BACKEND_FAILED) << state.status();
    EXPECT_TRUE(mediator_->DisarmStop().ok());
    StartRing(0);
    StartRing(1);
    EXPECT_TRUE(backend_->WaitFor(Request::kSetVringKick, 4));
    EXPECT_EQ(backend_->connections(), c.reconnects ? 2 : 1);
    vmm_.reset();
    mediator_.reset();
    backend_.reset();
  }
}

v1::DeviceState Arriving(const std::vector<uint32_t>& rings) {
  v1::DeviceState state;
  state.set_name("net0");
  state.set_acked_features((kNicFeatures & ~virtio::kVhostOnly));
  state.set_backend_state("of the source");
  for (uint32_t index : rings) {
    v1::VringState* v = state.add_vrings();
    v->set_index(index);
    v->set_size(FakeVmm::kRingSize);
    v->set_enabled(true);
    const uint64_t at = 0x20000 + index * 0x4000;
    v->set_desc_gpa(at);
    v->set_avail_gpa(at + 0x1000);
    v->set_used_gpa(at + 0x2000);
  }
  return state;
}

TEST_F(NicTest, StateIsLoadedBeforeAnyRing_WithTheFeaturesItBelongsTo) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_TRUE(mediator_->ExpectState(Arriving({0, 1})).ok());
  EXPECT_EQ(backend_->loaded(), "of the source");
  EXPECT_LT(Position(Request::kSetFeatures), Position(Request::kSetDeviceStateFd));
  ASSERT_NO_FATAL_FAILURE(Prepare());
  StartRing(0);
  StartRing(1);
  EXPECT_TRUE(mediator_->CheckExpected().ok()) << mediator_->CheckExpected();
  EXPECT_EQ(backend_->Of(Request::kSetDeviceStateFd).size(), 1u) << "once";
}

TEST_F(NicTest, RefusedState_FailsBeforeTheCommitAndReconnects) {
  options_.check = 1;
  ASSERT_NO_FATAL_FAILURE(Begin());
  absl::Status status = mediator_->ExpectState(Arriving({0, 1}));
  EXPECT_EQ(ReasonOf(status), v1::DESTINATION_BACKEND_FAILED) << status;
  for (Deadline deadline = Soon(); backend_->connections() < 2 && !deadline.Expired();) ::poll(nullptr, 0, 2);
  EXPECT_EQ(backend_->connections(), 2) << "what it holds is undefined: a fresh connection";
}

TEST_F(NicTest, BackendWithoutDeviceState_CannotTakeAState) {
  options_.protocol_features &= ~pf::kDeviceState;
  ASSERT_NO_FATAL_FAILURE(Begin());
  absl::Status status = mediator_->ExpectState(Arriving({0, 1}));
  EXPECT_EQ(ReasonOf(status), v1::DESTINATION_BACKEND_FAILED);
  EXPECT_THAT(Message(status), HasSubstr("DEVICE_STATE"));
}

TEST_F(NicTest, VmmSessionBetweenLoadAndStart_LoadsAgain) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  ASSERT_TRUE(mediator_->ExpectState(Arriving({0, 1})).ok());
  vmm_.reset();
  for (Deadline deadline = Soon(); backend_->connections() < 2 && !deadline.Expired();) ::poll(nullptr, 0, 2);
  vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
  ASSERT_NO_FATAL_FAILURE(Prepare());
  StartRing(0);
  StartRing(1);
  EXPECT_EQ(backend_->Of(Request::kSetDeviceStateFd).size(), 2u);
  EXPECT_GT(Position(Request::kSetVringKick), Position(Request::kSetDeviceStateFd, 1));
}

// QEMU starts pair after pair, each with its receive queue first: the first transmit queue would run before
// the last receive queue.
TEST_F(NicTest, AtTheDestination_TransmitWaitsForEveryReceiveQueue) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_TRUE(mediator_->ExpectState(Arriving({0, 1, 2, 3})).ok());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  for (uint32_t index : {0u, 1u, 2u, 3u}) StartRing(index);
  ASSERT_TRUE(backend_->WaitFor(Request::kSetVringKick, 4));
  EXPECT_THAT(backend_->Of(Request::kSetVringKick), ElementsAre(0, 2, 1, 3));
  EXPECT_TRUE(mediator_->CheckExpected().ok()) << mediator_->CheckExpected();
}

TEST_F(NicTest, AtTheDestination_AReceiveQueueThatNeverComesHoldsTransmitOnlyForAWhile) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_TRUE(mediator_->ExpectState(Arriving({0, 1, 2, 3})).ok());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  StartRing(0);
  StartRing(1);
  EXPECT_THAT(backend_->Of(Request::kSetVringKick), ElementsAre(0));
  ASSERT_TRUE(backend_->WaitFor(Request::kSetVringKick, 2));
  EXPECT_THAT(backend_->Of(Request::kSetVringKick), ElementsAre(0, 1));
}

TEST_F(NicTest, HeldQueueThatTheVmmStopsAgain_IsNotStarted) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_TRUE(mediator_->ExpectState(Arriving({0, 1, 2, 3})).ok());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  StartRing(0);
  StartRing(1);
  EXPECT_EQ(vmm_->GetBase(1).value_or(99), 0u);
  StartRing(2);
  StartRing(3);
  ASSERT_TRUE(backend_->WaitFor(Request::kSetVringKick, 3));
  EXPECT_THAT(backend_->Of(Request::kSetVringKick), ElementsAre(0, 2, 3));
}

TEST_F(NicTest, AfterARebuild_ReceiveQueuesAreFirst) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  for (uint32_t index : {0u, 1u, 2u, 3u}) StartRing(index);
  EXPECT_THAT(backend_->Of(Request::kSetVringKick), ElementsAre(0, 1, 2, 3)) << "as the VMM said";
  backend_.reset();
  backend_ = std::make_unique<ScriptedBackend>(options_);
  ASSERT_TRUE(backend_->WaitFor(Request::kSetVringEnable, 4));
  EXPECT_THAT(backend_->Of(Request::kSetVringKick), ElementsAre(0, 2, 1, 3));
  EXPECT_THAT(backend_->Of(Request::kSetVringEnable), ElementsAre(0, 2, 1, 3));
}

// Open vSwitch restarted under a guest: a receive queue always has buffers that wait for packets.
TEST_F(NicTest, AfterACrash_AKindThatKeepsTheOrderGoesOnAtItsLastCompletion) {
  kind_ = v1::DPDK;
  ASSERT_NO_FATAL_FAILURE(LoseBackend());
  ASSERT_TRUE(backend_->WaitFor(Request::kSetVringEnable, 2));
  EXPECT_THAT(backend_->bases(), ElementsAre(testing::Pair(0, 2), testing::Pair(1, 4)));
}

TEST_F(NicTest, AfterACrash_AnotherKindWithoutARegionIsHeld) {
  ASSERT_NO_FATAL_FAILURE(LoseBackend());
  for (Deadline deadline = Soon(); mediator_->Describe().state() != v1::Device::HELD && !deadline.Expired();)
    ::poll(nullptr, 0, 2);
  EXPECT_EQ(mediator_->Describe().state(), v1::Device::HELD) << mediator_->Describe().ShortDebugString();
  EXPECT_TRUE(backend_->Of(Request::kSetVringKick).empty());
}

TEST_F(NicTest, Announce_SendsRarpSeveralTimesWithTheAddress) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  StartRing(0);
  StartRing(1);
  ASSERT_TRUE(mediator_->Announce(Soon()).ok());
  ASSERT_TRUE(backend_->WaitFor(Request::kSendRarp, 5));
  EXPECT_EQ(backend_->Of(Request::kSendRarp)[0], 0x01005452u) << "52:54:00:01 in the order of the bytes";
  ::poll(nullptr, 0, 100);
  EXPECT_EQ(backend_->Of(Request::kSendRarp).size(), 5u);
}

TEST_F(NicTest, Announce_OfAGuestThatCanIsAskedOfTheGuest) {
  options_.features |= virtio::kNetFGuestAnnounce;
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  UniqueFd theirs(ends[1]);
  Connection channel{UniqueFd(ends[0])};
  auto opened = vmm_->Set(Request::kSetBackendReqFd, std::span<const uint8_t>(), {theirs.get()});
  ASSERT_TRUE(opened.ok() && *opened == 0) << opened.status();
  StartRing(0);
  StartRing(1);
  ASSERT_TRUE(mediator_->Announce(Soon()).ok());
  EXPECT_EQ(backend_->Of(Request::kSetConfig), std::vector<uint32_t>{6}) << "the status field";
  // Nothing else happens in the mediator that could wake it: the VMM is told at once.
  auto told = channel.Receive(/*reply=*/false, Soon());
  ASSERT_TRUE(told.ok()) << told.status();
  EXPECT_EQ(told->header.request, static_cast<uint32_t>(BackendRequest::kConfigChange));
  EXPECT_TRUE(backend_->Of(Request::kSendRarp).empty());
}

TEST_F(NicTest, Announce_WithoutRarpSaysSo) {
  options_.protocol_features &= ~pf::kRarp;
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Prepare());
  StartRing(0);
  EXPECT_THAT(Message(mediator_->Announce(Soon())), HasSubstr("no RARP"));
}

TEST_F(NicTest, Findings_NameAMissingStateAndAMissingAnnouncement) {
  v1::Device source, destination;
  source.set_name("net0");
  source.set_class_(v1::NET);
  source.set_acked_features(kNicFeatures & ~virtio::kVhostOnly);
  source.set_offered_features(kNicFeatures);
  source.set_protocol_features(kNicProtocol);
  source.set_offered_protocol_features(kNicProtocol);
  source.set_config(options_.config);
  destination = source;
  destination.set_max_queues(2);
  EXPECT_TRUE(CompareForMigration(source, destination).empty());
  destination.set_offered_protocol_features(kNicProtocol & ~(pf::kDeviceState | pf::kRarp));
  auto findings = CompareForMigration(source, destination);
  ASSERT_EQ(findings.size(), 2u);
  EXPECT_EQ(findings[0].code(), "NO_DEVICE_STATE");
  EXPECT_EQ(findings[0].severity(), v1::BLOCKER);
  EXPECT_EQ(findings[1].code(), "NO_ANNOUNCEMENT");
  EXPECT_EQ(findings[1].severity(), v1::WARNING);
  source.set_acked_features(source.acked_features() | virtio::kNetFGuestAnnounce);
  destination.set_offered_features(destination.offered_features() | virtio::kNetFGuestAnnounce);
  EXPECT_EQ(CompareForMigration(source, destination).size(), 1u) << "the guest announces itself";
}

}  // namespace
}  // namespace baton::vhost
