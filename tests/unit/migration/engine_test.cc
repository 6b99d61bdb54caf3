// Source and destination engine in one process, over loopback TCP, with a guest that writes all the time.
// Whatever fails: exactly one side may run the guest, its memory is what it wrote, and the next attempt
// works.
#include <gtest/gtest.h>

#include "tests/unit/migration/engine_testing.h"

namespace baton::migration {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using test::CuttingProxy;
using test::EngineTest;
using test::kEnd;
using K = JournalRecord::Kind;

TEST_F(EngineTest, MovesARunningGuest) {
  Prepare("m1");
  StartDestination();
  StartSource();
  ExpectMoved();
  const v1::SideReport report = out_->report();
  EXPECT_EQ(report.handover(), v1::RELEASED);
  EXPECT_GE(report.progress().rounds_size(), 2);
  EXPECT_GE(report.progress().decisions_size(), 1);
  EXPECT_GT(report.progress().bytes().hole_skipped(), 0u);
  EXPECT_GT(report.progress().bytes().state(), sizeof(test::GuestState));
  const v1::Downtimes& down = report.progress().downtimes();
  EXPECT_GT(ToDuration(down.vcpu()).count(), 0);
  EXPECT_LT(ToDuration(down.vcpu()), seconds(5));
  EXPECT_GE(down.parts_size(), 8);
  EXPECT_EQ(source_->journal.Records().back(), (JournalRecord{K::kReleased, 1, "m1"}));
  EXPECT_EQ(destination_->journal.Records().back(), (JournalRecord{K::kOwner, 2, "m1"}));
  std::vector<v1::Phase> phases;
  for (const v1::PhaseTime& time : report.phase_times()) phases.push_back(time.phase());
  EXPECT_EQ(phases, (std::vector<v1::Phase>{v1::PRECOPY, v1::SWITCHOVER, v1::FINISHING, v1::SUCCEEDED}));
}

// A balloon takes pages away also between their checksum and their copy, and no dirty source tells of it.
TEST_F(EngineTest, PageThatTheVmmTakesAwayMeanwhile_ComesAgainThoughNobodyWroteIt) {
  source_->vmm.working_set = 20;
  source_->vmm.roams = false;
  // What was written before it does not come twice.
  memory::PageSets before = source_->ram.MakeSets();
  source_->vmm.HarvestDirty(before);
  proxy_.damage = CuttingProxy::Damage::kPage;
  Prepare("m1");
  StartDestination();
  StartSource();
  ExpectMoved();
  EXPECT_EQ(proxy_.damaged_pages, 1);
}

// By a back-end that was given its descriptor, say. The pages are gone for the guest as well, but neither
// shim ends by it, and no guest is made of zeroes.
TEST_F(EngineTest, MemoryThatIsTruncatedAtTheSource_EndsTheMigration) {
  Prepare("m1");
  StartDestination();
  ASSERT_EQ(::ftruncate(source_->ram.blocks()[0].fd(), 64 * memory::kPageSize), 0);
  StartSource();
  EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kResumed);
  EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kRefused);
  EXPECT_EQ(out_->report().reason(), v1::SOURCE_VMM_FAILED) << out_->report().ShortDebugString();
  EXPECT_NE(out_->report().message().find("its file was truncated"), std::string::npos)
      << out_->report().message();
}

TEST_F(EngineTest, MemoryThatIsTruncatedAtTheDestination_GetsNoGuest) {
  Prepare("m1");
  StartDestination();
  proxy_.set_filter([&](bool to_destination, const v1::PeerMessage& message) {
    if (to_destination && message.has_yield()) {
      EXPECT_EQ(::ftruncate(destination_->ram.blocks()[0].fd(), 64 * memory::kPageSize), 0);
    }
    return true;
  });
  StartSource();
  ExpectStayed(v1::DESTINATION_VMM_FAILED);
}

TEST_F(EngineTest, ATunnelIsNoChannelOfAMigrationOfMemory) {
  Prepare("m1");
  StartDestination();
  int fds[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  UniqueFd ours(fds[0]), theirs(fds[1]);
  auto preamble =
      stream::EncodePreamble({stream::kProtocolVersion, stream::PreambleKind::kTunnel, 1, id_, token_});
  ASSERT_TRUE(preamble.ok());
  EXPECT_TRUE(absl::IsInvalidArgument(in_->AcceptChannel(*preamble, std::move(theirs))));
  // And channel 1 is free for the one to which it belongs.
  StartSource();
  ExpectMoved();
}

// What the destination can take decides what the source may hand over, and how each device stopped is in the
// report.
TEST_F(EngineTest, TheDestinationSaysWhichDevicesTakeRequestsInFlight) {
  Prepare("m1");
  params_.set_inflight(v1::HANDOFF);
  destination_->devices.takes_inflight_ = {"disk0"};
  v1::DeviceStop stop;
  stop.set_device("disk0");
  stop.set_answer(v1::HANDOFF);
  stop.set_handed_off(7);
  source_->devices.stops_ = {stop};
  StartDestination();
  StartSource();
  ASSERT_EQ(SourceEnd(), OutgoingMigration::Outcome::kReleased);
  ASSERT_EQ(DestinationEnd(), IncomingMigration::Outcome::kOwner);
  const StopOrders& orders = source_->devices.orders_;
  EXPECT_EQ(orders.params.inflight(), v1::HANDOFF);
  EXPECT_EQ(orders.takes_inflight, (std::set<std::string>{"disk0"}));
  EXPECT_TRUE(orders.orders_inflight.empty());
  const v1::Progress progress = out_->report().progress();
  EXPECT_EQ(progress.inflight_handed_off(), 7u);
  ASSERT_EQ(progress.device_stops_size(), 1);
  EXPECT_EQ(progress.device_stops(0).device(), "disk0");
}

struct Failure {
  const char* step;
  bool at_source;
  v1::Reason reason;
};

class StepFailureTest : public EngineTest, public testing::WithParamInterface<Failure> {};

TEST_P(StepFailureTest, GuestGoesOnAtTheSourceAndTheRetryWorks) {
  Prepare("m1");
  (GetParam().at_source ? source_ : destination_)->faults.Fail(GetParam().step);
  StartDestination();
  StartSource();
  ExpectStayed(GetParam().reason);
  ExpectRetryWorks();
}

INSTANTIATE_TEST_SUITE_P(Engine, StepFailureTest,
                         testing::Values(Failure{"reserve", true, v1::INTERNAL},
                                         Failure{"track", true, v1::INTERNAL},
                                         Failure{"harvest", true, v1::INTERNAL},
                                         Failure{"arm", true, v1::INTERNAL},
                                         Failure{"freeze", true, v1::SOURCE_VMM_FAILED},
                                         Failure{"freeze late", true, v1::SOURCE_VMM_FAILED},
                                         Failure{"drain", true, v1::DRAIN_TIMEOUT},
                                         Failure{"continue", true, v1::SOURCE_VMM_FAILED},
                                         Failure{"state not whole", true, v1::SOURCE_VMM_FAILED},
                                         Failure{"append YIELDED", true, v1::STATE_WRITE_FAILED},
                                         Failure{"uncertain YIELDED", true, v1::STATE_WRITE_FAILED},
                                         Failure{"begin load", false, v1::DESTINATION_VMM_FAILED},
                                         Failure{"finish load", false, v1::DESTINATION_VMM_FAILED},
                                         Failure{"expect", false, v1::STATE_MISMATCH},
                                         Failure{"append OWNER", false, v1::STATE_WRITE_FAILED},
                                         Failure{"uncertain OWNER", false, v1::STATE_WRITE_FAILED}),
                         [](const auto& info) {
                           std::string name = info.param.step;
                           for (char& c : name)
                             if (c == ' ') c = '_';
                           return name;
                         });

TEST_F(EngineTest, RefusalIsRetriedUntilItIsDurable) {
  Prepare("m1");
  destination_->faults.Fail("finish load");
  destination_->faults.Fail("append REFUSED", 1);
  source_->faults.Fail("append REFUSED", 1);
  StartDestination();
  StartSource();
  ExpectStayed(v1::DESTINATION_VMM_FAILED);
  ExpectRetryWorks();
}

TEST_F(EngineTest, LostPageUnderARingIsFoundBeforeOwner) {
  Prepare("m1");
  source_->devices.lose_page = true;
  StartDestination();
  StartSource();
  ExpectStayed(v1::STATE_MISMATCH);
  ExpectRetryWorks();
}

TEST_F(EngineTest, OwnerThatCannotStartKeepsOwning) {
  Prepare("m1");
  destination_->faults.Fail("start");
  StartDestination();
  StartSource();
  EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kReleased);
  EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kPaused);
  EXPECT_FALSE(source_->vmm.runs());
  EXPECT_EQ(in_->report().handover(), v1::OWNER);
  EXPECT_EQ(in_->report().reason(), v1::DESTINATION_VMM_FAILED);
  EXPECT_FALSE(in_->report().guest_running());
}

TEST_F(EngineTest, DestinationVmmKilledDuringPrecopy) {
  Prepare("m1");
  proxy_.set_filter([&](bool to_destination, const v1::PeerMessage& message) {
    if (!to_destination && message.has_welcome()) destination_->vmm.Kill();
    return true;
  });
  params_.set_bandwidth(1 << 20);
  StartDestination();
  StartSource();
  ExpectStayed(v1::DESTINATION_VMM_FAILED);
  params_.set_bandwidth(0);
  ExpectRetryWorks();
}

// Everything has been loaded, and nobody told the engine yet that the VMM is dead.
TEST_F(EngineTest, DestinationVmmKilledRightBeforeTheYieldIsHeard) {
  Prepare("m1");
  proxy_.set_filter([&](bool to_destination, const v1::PeerMessage& message) {
    if (to_destination && message.has_yield()) destination_->vmm.Kill();
    return true;
  });
  StartDestination();
  StartSource();
  ExpectStayed(v1::DESTINATION_VMM_FAILED);
  ExpectRetryWorks();
}

TEST_F(EngineTest, SourceVmmThatDiesTakesTheGuestWithItAndIsReported) {
  Prepare("m1");
  proxy_.set_filter([&](bool to_destination, const v1::PeerMessage& message) {
    if (!to_destination && message.has_welcome()) source_->vmm.Kill();
    return true;
  });
  params_.set_bandwidth(1 << 20);
  StartDestination();
  StartSource();
  EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kLost);
  EXPECT_TRUE(out_->report().guest_lost());
  EXPECT_EQ(out_->report().reason(), v1::SOURCE_VMM_FAILED);
  EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kRefused);
}

TEST_F(EngineTest, WrongTokenAndWrongEpochAreTurnedAway) {
  Prepare("m1");
  StartDestination();
  token_.fill(77);
  StartSource();
  EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kResumed);
  EXPECT_EQ(in_->outcome(), IncomingMigration::Outcome::kNone) << "a stranger's connection changes nothing";
}

// Bytes that mean nothing end the migration that they came in, and nothing else.
class MalformedTest : public EngineTest, public testing::WithParamInterface<CuttingProxy::Damage> {};

TEST_P(MalformedTest, EndsThatMigrationOnly) {
  Prepare("m1");
  StartDestination();
  proxy_.damage = GetParam();
  StartSource();
  EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kResumed);
  EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kRefused);
  EXPECT_FALSE(out_->report().message().empty());
  EXPECT_TRUE(out_->report().reason() == v1::PEER_PROTOCOL_ERROR ||
              in_->report().reason() == v1::PEER_PROTOCOL_ERROR)
      << out_->report().ShortDebugString() << in_->report().ShortDebugString();
  ExpectOneGuest(false);
  proxy_.damage = CuttingProxy::Damage::kNone;
  ExpectRetryWorks();
}

INSTANTIATE_TEST_SUITE_P(Engine, MalformedTest,
                         testing::Values(CuttingProxy::Damage::kMemory, CuttingProxy::Damage::kToDestination,
                                         CuttingProxy::Damage::kToSource));

TEST_F(EngineTest, NobodyListens) {
  Prepare("m1");
  proxy_.unreachable = true;
  StartSource();
  EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kResumed);
  EXPECT_EQ(out_->report().reason(), v1::PEER_CONNECTION_FAILED) << out_->report().ShortDebugString();
  proxy_.unreachable = false;
  ExpectRetryWorks();
}

TEST_F(EngineTest, GuestThatWritesTooMuchIsNotMovedWhenThePolicySaysAbort) {
  Prepare("m1");
  source_->vmm.writes_everything = true;
  params_.mutable_max_downtime()->set_nanos(21'000'000);
  params_.set_on_stall(v1::ON_STALL_ABORT);
  params_.set_max_stalled_rounds(2);
  params_.set_bandwidth(20 << 20);
  StartDestination();
  StartSource();
  ExpectStayed(v1::NOT_CONVERGING);
}

TEST_F(EngineTest, RetuneInFlightLetsItFinish) {
  Prepare("m1");
  params_.set_bandwidth(100 << 10);  // would take a minute
  StartDestination();
  StartSource();
  ASSERT_TRUE(out_->Retune(0, seconds(1)).ok());
  ExpectMoved();
}

TEST_F(EngineTest, MaxDurationEndsPrecopy) {
  Prepare("m1");
  params_.set_bandwidth(100 << 10);
  params_.mutable_max_duration()->set_nanos(300'000'000);
  StartDestination();
  StartSource();
  ExpectStayed(v1::PHASE_TIMEOUT);
}

// --- after YIELDED with the destination out of reach ---

class UndecidedTest : public EngineTest {
 protected:
  // Cuts everything as Yield passes (or its verdict), and keeps the destination out of reach.
  void LoseAt(bool verdict) {
    Prepare("m1");
    proxy_.set_filter([this, verdict](bool to_destination, const v1::PeerMessage& message) {
      const bool here =
          verdict ? !to_destination && message.has_verdict() : to_destination && message.has_yield();
      if (here) proxy_.unreachable = true;
      return !here;
    });
    StartDestination();
    StartSource();
    // Asks, and is not answered.
    ASSERT_TRUE(proxy_.WaitQueries(3, Deadline::After(kEnd)));
    EXPECT_EQ(out_->outcome(), OutgoingMigration::Outcome::kNone);
    EXPECT_FALSE(source_->vmm.runs());
    EXPECT_EQ(out_->report().handover(), v1::YIELDED);
    EXPECT_FALSE(out_->report().guest_running());
    EXPECT_FALSE(out_->Cancel().ok());
  }
};

TEST_F(UndecidedTest, HearsRefusedOnceTheDestinationIsBack) {
  LoseAt(false);
  proxy_.unreachable = false;
  ExpectStayed(v1::PEER_CONNECTION_FAILED);
  ExpectRetryWorks();
}

TEST_F(UndecidedTest, HearsOwnerOnceTheDestinationIsBack) {
  LoseAt(true);
  EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kOwner);
  proxy_.unreachable = false;
  ExpectMoved();
}

TEST_F(UndecidedTest, ResolvedByTheDestinationsJournal) {
  LoseAt(true);
  ASSERT_TRUE(out_->Resolve(v1::OWNER, false).ok());
  ExpectMoved();
}

TEST_F(UndecidedTest, ResolvedByFencingOwnsAtANewerEpoch) {
  LoseAt(false);
  EXPECT_FALSE(out_->Resolve(v1::IDLE, false).ok());
  destination_->vmm.Kill();
  ASSERT_TRUE(out_->Resolve(v1::REFUSED, true).ok());
  EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kResumed);
  EXPECT_EQ(out_->report().reason(), v1::RESOLVED_BY_OPERATOR);
  EXPECT_EQ(out_->report().epoch(), 3u);
  EXPECT_EQ(source_->journal.Records().back(), (JournalRecord{K::kFenced, 3, "m1"}));
  ExpectOneGuest(false);
}

TEST_F(UndecidedTest, ARestartedShimGoesOnAsking) {
  LoseAt(false);
  out_.reset();
  EXPECT_FALSE(source_->vmm.runs());
  auto asking = OutgoingMigration::ResumeAsking(MakeSourceOptions(), MakeSourceParts());
  ASSERT_TRUE(asking.ok()) << asking.status();
  out_ = *std::move(asking);
  EXPECT_EQ(out_->Wait(Deadline::After(milliseconds(50))).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  proxy_.unreachable = false;
  source_->vmm.tracking = false;
  EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kResumed);
  ExpectOneGuest(false);
}

TEST_F(UndecidedTest, ARestartedDestinationRefusesWhatItHadNotDecided) {
  LoseAt(false);
  EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kRefused);
  proxy_.set_accept(nullptr);
  in_.reset();
  auto recovered = IncomingMigration::Recover(MakeDestinationOptions(), MakeDestinationParts());
  ASSERT_TRUE(recovered.ok()) << recovered.status();
  in_ = *std::move(recovered);
  proxy_.set_accept([this](const stream::PreambleBytes& preamble, UniqueFd fd) {
    return in_->AcceptChannel(preamble, std::move(fd));
  });
  proxy_.unreachable = false;
  EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kResumed);
  ExpectOneGuest(false);
}

TEST_F(UndecidedTest, ARestartedOwnerGoesOnOwning) {
  LoseAt(true);
  EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kOwner);
  proxy_.set_accept(nullptr);
  in_.reset();
  auto recovered = IncomingMigration::Recover(MakeDestinationOptions(), MakeDestinationParts());
  ASSERT_TRUE(recovered.ok()) << recovered.status();
  in_ = *std::move(recovered);
  EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kOwner);
  proxy_.set_accept([this](const stream::PreambleBytes& preamble, UniqueFd fd) {
    return in_->AcceptChannel(preamble, std::move(fd));
  });
  proxy_.unreachable = false;
  ExpectMoved();
}

TEST_F(UndecidedTest, ReconnectedShimOfAnUndecidedJournalMustNotStart) {
  LoseAt(false);
  EXPECT_EQ(OutgoingMigration::ResumeAsking(
                [&] {
                  SourceOptions options = MakeSourceOptions();
                  options.migration_id = "other";
                  return options;
                }(),
                MakeSourceParts())
                .status()
                .code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace baton::migration
