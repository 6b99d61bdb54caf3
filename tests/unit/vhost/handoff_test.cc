// Requests in flight that go from one back-end to another, and the rules by which they may not.
#include <fcntl.h>
#include <gmock/gmock.h>

#include <fstream>
#include <sstream>

#include "agent/vhost/inflight_answer.h"
#include "agent/vhost/inflight_proto.h"
#include "agent/vhost/probe.h"
#include "tests/unit/vhost/fake_vmm.h"
#include "tests/unit/vhost/scripted_backend.h"

namespace baton::vhost {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

// Suspends, and completes nothing that it does not find in a region.
BackendOptions Patient() { return {.inflight = true, .suspends = true, .delay_us = 3600000000u}; }

class HandoffTest : public MediatorFixture {
 protected:
  void Begin(BackendOptions backend = Patient()) { Begin(backend, Options()); }
  void Begin(BackendOptions backend, MediatorOptions options) {
    StartBackend(backend);
    ASSERT_NO_FATAL_FAILURE(StartMediator(std::move(options)));
    vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
    ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate(pf::kInflightShmfd));
    ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
    ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
  }
  MediatorOptions OfKind(v1::BackendKind kind) {
    MediatorOptions options = Options();
    options.backend.set_kind(kind);
    return options;
  }
  // Writes of sectors 0, 1, … in flight, all fetched.
  void Submit(uint16_t n) {
    for (uint16_t i = 0; i < n; ++i) vmm_->Submit(i, true, i, static_cast<uint8_t>(0x40 + i));
    ASSERT_TRUE(backend_->AwaitFetched(n));
  }
  absl::StatusOr<v1::DeviceState> Stop(Duration bound = seconds(5)) {
    RETURN_IF_ERROR(mediator_->ArmStop(StopOrder{bound, true, ordered_, ""}));
    ASSIGN_OR_RETURN(told_, vmm_->GetBase());
    return mediator_->CollectState(Soon());
  }
  uint8_t Image(uint64_t sector) {
    UniqueFd image(::open((dir_ + "/image").c_str(), O_RDONLY | O_CLOEXEC));
    uint8_t byte = 0;
    EXPECT_EQ(::pread(image.get(), &byte, 1, static_cast<off_t>(512 * sector)), 1);
    return byte;
  }
  // Another host: a back-end, a mediator and a VMM with a copy of the memory.
  void Move(const v1::DeviceState& state) {
    auto vmm = std::move(vmm_);
    mediator_.reset();
    ASSERT_NO_FATAL_FAILURE(StartBackend({.inflight = true, .suspends = true}));
    ASSERT_NO_FATAL_FAILURE(StartMediator());
    ASSERT_TRUE(mediator_->ExpectState(state).ok());
    vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
    std::memcpy(vmm_->At(0), vmm->At(0), FakeVmm::kMemory);
    ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate(pf::kInflightShmfd));
    ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
    ASSERT_NO_FATAL_FAILURE(vmm_->StartRing(static_cast<uint16_t>(told_)));
  }
  std::unique_ptr<FakeVmm> vmm_;
  uint32_t told_ = 0;
  bool ordered_ = true;
};

TEST_F(HandoffTest, WhatIsInFlightIsCompletedByTheOtherBackend) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Submit(4));
  auto state = Stop();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(told_, 4u) << "the VMM is told the next request to fetch";
  EXPECT_EQ(vmm_->UsedIndex(), 0u);
  EXPECT_TRUE(state->handed_off());
  const v1::VringState& v = state->vrings(0);
  EXPECT_EQ(v.last_avail(), 4u);
  EXPECT_EQ(v.used_idx(), 0u);
  ASSERT_EQ(v.inflight_size(), 4);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(v.inflight(i), 3u * i) << "oldest first";
  const v1::DeviceStop stop = mediator_->stop();
  EXPECT_EQ(stop.answer(), v1::HANDOFF);
  EXPECT_EQ(stop.handed_off(), 4u);
  EXPECT_EQ(stop.why(), "");
  EXPECT_EQ(Image(3), 0) << "it has no effect at the source any more";

  ASSERT_NO_FATAL_FAILURE(Move(*state));
  ASSERT_TRUE(vmm_->AwaitUsed(4));
  EXPECT_TRUE(mediator_->CheckExpected().ok()) << mediator_->CheckExpected();
  for (uint16_t i = 0; i < 4; ++i) EXPECT_EQ(Image(i), 0x40 + i);
  // And it goes on there.
  vmm_->SetAvail(4);
  vmm_->Submit(4, true, 9, 0x77);
  ASSERT_TRUE(vmm_->AwaitUsed(5));
  EXPECT_EQ(Image(9), 0x77);
}

TEST_F(HandoffTest, AGuestThatStaysGetsItsRequestsCompletedOnce) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Submit(4));
  auto state = Stop();
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_TRUE(mediator_->DisarmStop().ok());
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing(static_cast<uint16_t>(told_)));
  ASSERT_TRUE(vmm_->AwaitUsed(4));
  for (uint16_t i = 0; i < 4; ++i) EXPECT_EQ(Image(i), 0x40 + i);
  // The next attempt finds nothing in flight.
  state = Stop();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->vrings(0).inflight_size(), 0);
  EXPECT_EQ(told_, 4u);
}

TEST_F(HandoffTest, ABackendThatDiesWhileItIsStoppedLosesNothing) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Submit(3));
  ASSERT_TRUE(Stop().ok());
  StartBackend({.inflight = true, .suspends = true});
  ASSERT_TRUE(mediator_->DisarmStop().ok());
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing(static_cast<uint16_t>(told_)));
  ASSERT_TRUE(vmm_->AwaitUsed(3));
}

TEST_F(HandoffTest, ProtocolBit20IsNegotiatedForTheStopOnly) {
  BackendOptions backend = Patient();
  backend.suspends = false;
  backend.suspends_by_bit_20 = true;
  ASSERT_NO_FATAL_FAILURE(Begin(backend));
  EXPECT_EQ(mediator_->Describe().protocol_features() & pf::kGetVringBaseInflight, 0u);
  ASSERT_NO_FATAL_FAILURE(Submit(2));
  auto state = Stop();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->vrings(0).inflight_size(), 2);
  EXPECT_EQ(mediator_->Describe().protocol_features() & pf::kGetVringBaseInflight, 0u);
}

// A base of used->idx is the other convention; one beside both is none.
TEST_F(HandoffTest, BaseConventionsAreNormalisedAndAWrongOneDrains) {
  BackendOptions backend = Patient();
  backend.base_offset = -4;
  ASSERT_NO_FATAL_FAILURE(Begin(backend));
  ASSERT_NO_FATAL_FAILURE(Submit(4));
  auto state = Stop();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(told_, 4u);
  EXPECT_EQ(state->vrings(0).inflight_size(), 4);

  vmm_.reset();
  mediator_.reset();
  backend.base_offset = 1;
  ASSERT_NO_FATAL_FAILURE(Begin(backend));
  ASSERT_NO_FATAL_FAILURE(Submit(2));
  state = Stop(seconds(5));
  // Running again, the back-end finds them in its region and completes them.
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_FALSE(state->handed_off());
  EXPECT_EQ(told_, 2u);
  EXPECT_EQ(mediator_->stop().answer(), v1::DRAIN);
  EXPECT_NE(mediator_->stop().why(), "");
}

TEST_F(HandoffTest, RequestsThatMayNotBeDoneTwiceDrain) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Submit(2));
  // The device here has no zones and would refuse a zone append at once; so it becomes one after it was
  // fetched.
  const uint32_t zone_append = 15;
  std::memcpy(vmm_->At(FakeVmm::kBuffers), &zone_append, sizeof zone_append);
  auto state = Stop(seconds(5));
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_FALSE(state->handed_off());
  EXPECT_EQ(vmm_->UsedIndex(), 2u);
  EXPECT_THAT(mediator_->stop().why(), HasSubstr("twice"));
}

TEST_F(HandoffTest, OverlappingRequestsGoOnlyToABackendThatKeepsTheirOrder) {
  for (bool ordered : {false, true}) {
    vmm_.reset();
    mediator_.reset();
    ASSERT_NO_FATAL_FAILURE(Begin());
    vmm_->Submit(0, true, 5, 1);
    vmm_->Submit(1, true, 5, 2);
    ASSERT_TRUE(backend_->AwaitFetched(2));
    ordered_ = ordered;
    auto state = Stop(seconds(5));
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_EQ(state->handed_off(), ordered) << mediator_->stop().why();
  }
}

TEST_F(HandoffTest, WithoutConfirmationOrFenceWritesDrain) {
  BackendOptions backend = Patient();
  ASSERT_NO_FATAL_FAILURE(Begin(backend, OfKind(v1::YC_LIBVHOST)));
  ASSERT_NO_FATAL_FAILURE(Submit(2));
  auto state = Stop(seconds(5));
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_FALSE(state->handed_off());
  EXPECT_EQ(vmm_->UsedIndex(), 2u);
  EXPECT_NE(mediator_->Describe().no_handoff_of_writes(), "");
}

TEST_F(HandoffTest, AFenceConfirmsAndIsLiftedWhenTheGuestStays) {
  MediatorOptions options = OfKind(v1::YC_LIBVHOST);
  ordered_ = false;
  options.fence.command = {"/bin/sh", "-c", "echo $0 $BATON_VM $BATON_DEVICE >> " + dir_ + "/fence"};
  options.fence.env = {{"BATON_VM", "vm1"}};
  ASSERT_NO_FATAL_FAILURE(Begin(Patient(), options));
  ASSERT_NO_FATAL_FAILURE(Submit(2));
  auto state = Stop(seconds(5));
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->vrings(0).inflight_size(), 2) << mediator_->stop().why();
  ASSERT_TRUE(mediator_->DisarmStop().ok());
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing(static_cast<uint16_t>(told_)));
  ASSERT_TRUE(vmm_->AwaitUsed(2));
  std::ifstream file(dir_ + "/fence");
  std::stringstream ran;
  ran << file.rdbuf();
  EXPECT_EQ(ran.str(), "fence vm1 disk0\nunfence vm1 disk0\n");
}

TEST_F(HandoffTest, AFenceThatFailsDrains) {
  MediatorOptions options = OfKind(v1::YC_LIBVHOST);
  options.fence.command = {"/bin/sh", "-c", "test $0 = unfence"};
  ASSERT_NO_FATAL_FAILURE(Begin(Patient(), options));
  ASSERT_NO_FATAL_FAILURE(Submit(2));
  auto state = Stop(seconds(5));
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_FALSE(state->handed_off());
  EXPECT_EQ(vmm_->UsedIndex(), 2u);
  EXPECT_THAT(mediator_->stop().why(), HasSubstr("fence"));
}

TEST_F(HandoffTest, ALostReplyEndsTheStopAndLosesNothing) {
  BackendOptions backend = Patient();
  backend.silent_at = static_cast<uint32_t>(Request::kGetVringBaseSkipDrain);
  ASSERT_NO_FATAL_FAILURE(Begin(backend));
  ASSERT_NO_FATAL_FAILURE(Submit(3));
  auto state = Stop(milliseconds(100));
  EXPECT_EQ(ReasonOf(state.status()), v1::SOURCE_BACKEND_FAILED) << state.status();
  ASSERT_TRUE(mediator_->DisarmStop().ok());
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing(static_cast<uint16_t>(told_)));
  ASSERT_TRUE(vmm_->AwaitUsed(3));
}

TEST_F(HandoffTest, ARegionThatIsTruncatedWhileTheDeviceStopsIsNotBelieved) {
  ScriptedBackend scripted({.socket = dir_ + "/backend.sock",
                            .features = virtio::kFVersion1 | virtio::kVhostUserFProtocolFeatures,
                            .protocol_features = pf::kReplyAck | pf::kInflightShmfd | pf::kSkipDrain,
                            .truncates_region = true});
  ASSERT_NO_FATAL_FAILURE(StartMediator());
  vmm_ = std::make_unique<FakeVmm>(dir_ + "/vmm.sock");
  ASSERT_NO_FATAL_FAILURE(vmm_->Negotiate());
  ASSERT_NO_FATAL_FAILURE(vmm_->SetMemory());
  ASSERT_NO_FATAL_FAILURE(vmm_->StartRing());
  // Whatever comes of the device, this process goes on.
  (void)Stop();
  EXPECT_THAT(mediator_->stop().why(), HasSubstr("made shorter by its back-end"));
  EXPECT_EQ(mediator_->stop().handed_off(), 0u);
  EXPECT_EQ(scripted.Of(Request::kGetVringBaseSkipDrain).size(), 1u);
}

TEST_F(HandoffTest, ABackendThatCannotSuspendDrainsAndAbortsAtTheBound) {
  BackendOptions backend = Patient();
  backend.suspends = false;
  ASSERT_NO_FATAL_FAILURE(Begin(backend));
  ASSERT_NO_FATAL_FAILURE(Submit(2));
  auto state = Stop(milliseconds(20));
  EXPECT_EQ(ReasonOf(state.status()), v1::DRAIN_TIMEOUT) << state.status();
  EXPECT_THAT(Message(state.status()), HasSubstr("GET_VRING_BASE_SKIP_DRAIN"));
}

TEST_F(HandoffTest, ADestinationThatCannotTakeThemRefuses) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  ASSERT_NO_FATAL_FAILURE(Submit(2));
  auto state = Stop();
  ASSERT_TRUE(state.ok()) << state.status();
  vmm_.reset();
  mediator_.reset();
  ASSERT_NO_FATAL_FAILURE(StartBackend());  // no region
  ASSERT_NO_FATAL_FAILURE(StartMediator());
  EXPECT_FALSE(mediator_->TakesInflight());
  EXPECT_EQ(ReasonOf(mediator_->ExpectState(*state)), v1::DESTINATION_BACKEND_FAILED);
  // A set that contradicts itself is refused whatever the back-end.
  mediator_.reset();
  ASSERT_NO_FATAL_FAILURE(StartBackend({.inflight = true, .suspends = true}));
  ASSERT_NO_FATAL_FAILURE(StartMediator());
  EXPECT_TRUE(mediator_->TakesInflight());
  state->mutable_vrings(0)->set_inflight(1, state->vrings(0).inflight(0));
  EXPECT_EQ(ReasonOf(mediator_->ExpectState(*state)), v1::STATE_MISMATCH);
}

// Two requests of a packed ring of 8, of two descriptors and of one.
TEST(InflightProto, WhatWasShippedComesBackOrIsRefused) {
  virtio::InflightSet set;
  set.format = virtio::RingFormat::kPacked;
  set.used = {6, true};
  set.avail = {1, false};
  set.requests = {{5, 2, 0, 1}, {9, 1, 2, 2}};
  set.descs = {{0x1000, 16, 5, 1}, {0x2000, 512, 5, 0}, {0x3000, 1, 9, 2}};
  v1::VringState good;
  good.set_size(8);
  good.set_packed(true);
  ToProto(set, &good);
  auto back = FromProto(good);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, set);

  auto refused = [&](auto&& damage) {
    v1::VringState v = good;
    damage(&v);
    return ReasonOf(FromProto(v).status()) == v1::STATE_MISMATCH;
  };
  EXPECT_TRUE(refused([](auto* v) { v->set_size(0); }));
  EXPECT_TRUE(refused([](auto* v) { v->set_size(2); })) << "more descriptors than the ring has";
  EXPECT_TRUE(refused([](auto* v) { v->set_last_avail(0x10000); }));
  EXPECT_TRUE(refused([](auto* v) { v->set_inflight(0, 0x10000); }));
  EXPECT_TRUE(refused([](auto* v) { v->set_inflight(0, 6); })) << "not the id that the chain bears";
  EXPECT_TRUE(refused([](auto* v) { v->add_inflight(7); })) << "a request without a chain";
  EXPECT_TRUE(refused([](auto* v) { v->set_chain_lengths(1, 2); })) << "beyond the descriptors";
  EXPECT_TRUE(refused([](auto* v) { v->set_chain_lengths(1, 0xffffffff); }));
  EXPECT_TRUE(refused([](auto* v) { v->set_chain_lengths(0, 1); })) << "a descriptor that belongs to none";
  EXPECT_TRUE(refused([](auto* v) { v->mutable_descriptors()->pop_back(); }));
  EXPECT_TRUE(refused([](auto* v) { v->mutable_descriptors()->clear(); }));
  EXPECT_TRUE(refused([](auto* v) { v->set_packed(false); })) << "split rings ship no descriptors";
}

TEST(InflightProto, RoomChangesNothingOfWhatIsSaid) {
  virtio::InflightSet set;
  set.format = virtio::RingFormat::kPacked;
  set.used = {6, true};
  set.avail = {1, false};
  set.requests = {{5, 2, 0, 1}, {9, 1, 2, 2}};
  set.descs = {{0x1000, 16, 5, 1}, {0x2000, 512, 5, 0}, {0x3000, 1, 9, 2}};
  v1::VringState plain, roomy, unused;
  ToProto(set, &plain);
  EXPECT_TRUE(RoomIn(&roomy).empty());
  for (v1::VringState* v : {&roomy, &unused}) {
    MakeRoom(/*packed=*/true, 8, v);
    ASSERT_EQ(RoomIn(v).size(), 8u);
  }
  std::copy(set.descs.begin(), set.descs.end(), RoomIn(&roomy).begin());
  virtio::InflightView in_place(set);
  in_place.descs = RoomIn(&roomy).first(set.descs.size());
  ToProto(in_place, &roomy);
  EXPECT_EQ(roomy.SerializeAsString(), plain.SerializeAsString());
  ToProto(set, &unused);
  EXPECT_EQ(unused.SerializeAsString(), plain.SerializeAsString());
}

TEST(AnswerFor, TheMostSpecificRuleWins) {
  v1::MigrationParams params;
  EXPECT_EQ(AnswerFor(params, "disk0", v1::BLK), v1::DRAIN);
  params.set_inflight(v1::HANDOFF);
  EXPECT_EQ(AnswerFor(params, "disk0", v1::BLK), v1::HANDOFF);
  v1::InflightRule* rule = params.add_inflight_rules();
  rule->set_class_(v1::BLK);
  rule->set_answer(v1::DRAIN);
  EXPECT_EQ(AnswerFor(params, "disk0", v1::BLK), v1::DRAIN);
  EXPECT_EQ(AnswerFor(params, "nic0", v1::NET), v1::HANDOFF);
  rule = params.add_inflight_rules();
  rule->set_device("disk0");
  rule->set_answer(v1::HANDOFF);
  EXPECT_EQ(AnswerFor(params, "disk0", v1::BLK), v1::HANDOFF);
  EXPECT_EQ(AnswerFor(params, "disk1", v1::BLK), v1::DRAIN);
}

TEST(ObstaclesOf, EachIsNamed) {
  const uint64_t all = pf::kInflightShmfd | pf::kSkipDrain;
  EXPECT_EQ(ObstaclesOf(v1::BLK, v1::LAB, all, false).handoff, "");
  EXPECT_EQ(ObstaclesOf(v1::BLK, v1::LAB, all, false).writes, "");
  EXPECT_EQ(ObstaclesOf(v1::BLK, v1::LAB, all, false).takeover, "");
  EXPECT_THAT(ObstaclesOf(v1::NET, v1::LAB, all, false).handoff, HasSubstr("block"));
  EXPECT_THAT(ObstaclesOf(v1::BLK, v1::BACKEND_KIND_UNSPECIFIED, all, false).handoff, HasSubstr("kind"));
  EXPECT_THAT(ObstaclesOf(v1::BLK, v1::LAB, pf::kSkipDrain, false).takeover, HasSubstr("INFLIGHT_SHMFD"));
  // Bit 20 counts only where it is known to mean that.
  const uint64_t bit_20 = pf::kInflightShmfd | pf::kGetVringBaseInflight;
  EXPECT_EQ(ObstaclesOf(v1::BLK, v1::YC_LIBVHOST, bit_20, true).handoff, "");
  EXPECT_NE(ObstaclesOf(v1::BLK, v1::SPDK, bit_20, false).handoff, "");
  EXPECT_NE(ObstaclesOf(v1::BLK, v1::YC_LIBVHOST, bit_20, false).writes, "");
  EXPECT_EQ(ObstaclesOf(v1::BLK, v1::YC_LIBVHOST, bit_20, true).writes, "");
}

TEST(CompareForMigration, AHandoffThatCannotBeIsAWarning) {
  v1::Device source, destination;
  source.set_name("disk0");
  source.set_class_(v1::BLK);
  destination = source;
  destination.mutable_backend()->set_kind(v1::LAB);
  auto warned = [&](const v1::MigrationParams& params) {
    for (const v1::Finding& f : CompareForMigration(source, destination, params)) {
      if (f.code() == "HANDOFF_IMPOSSIBLE") return v1::Severity_Name(f.severity()) + " " + f.message();
    }
    return std::string();
  };
  v1::MigrationParams params;
  source.set_no_handoff("something");
  EXPECT_EQ(warned(params), "");
  params.set_inflight(v1::HANDOFF);
  EXPECT_THAT(warned(params), HasSubstr("WARNING"));
  EXPECT_THAT(warned(params), HasSubstr("at the source something"));
  source.clear_no_handoff();
  EXPECT_EQ(warned(params), "");
  destination.set_no_takeover("something else");
  EXPECT_THAT(warned(params), HasSubstr("at the destination something else"));
}

// VIRTIO 1.4: the device as a whole completes what it has, and nothing is handed over.
TEST_F(HandoffTest, ADeviceWithTheSuspendStatusIsStoppedByIt) {
  constexpr uint64_t kRunning = 15;
  ordered_ = false;
  for (bool stays : {true, false}) {
    ASSERT_NO_FATAL_FAILURE(Begin({.delay_us = 50000, .suspends_by_status = true}));
    auto offered = vmm_->Get(Request::kGetFeatures);
    ASSERT_TRUE(offered.ok());
    EXPECT_FALSE(*offered & virtio::kFSuspend) << "it is not the guest's";
    ASSERT_EQ(vmm_->Set(Request::kSetStatus, kRunning).value_or(1), 0u);
    ASSERT_NO_FATAL_FAILURE(Submit(4));
    auto state = Stop();
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_EQ(backend_->Counter("suspended"), 1u);
    EXPECT_EQ(told_, 4u);
    EXPECT_EQ(vmm_->UsedIndex(), 4u);
    if (stays) {
      ASSERT_TRUE(mediator_->DisarmStop().ok());
      ASSERT_NO_FATAL_FAILURE(vmm_->StartRing(static_cast<uint16_t>(told_)));
      vmm_->Submit(4, true, 9, 0x77);
      ASSERT_TRUE(vmm_->AwaitUsed(5)) << "it goes on with the status that it had";
    }
    vmm_.reset();
    mediator_.reset();
    backend_.reset();
  }
}

}  // namespace
}  // namespace baton::vhost
