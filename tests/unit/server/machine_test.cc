// The migration machine, one case a rule.
#include "server/control/machine.h"

#include <gtest/gtest.h>

#include "server/control/words.h"

namespace baton::server {
namespace {

constexpr int64_t kSecond = 1'000'000'000;

class MachineTest : public ::testing::Test {
 protected:
  MachineTest() : machine_(NewMigration(), {}, {}) {}

  static v1::Migration NewMigration() {
    v1::Migration m;
    m.set_name("migrations/m1");
    m.set_vm("vms/web1");
    m.set_source("hosts/a");
    m.set_destination("hosts/b");
    m.set_epoch(3);
    m.mutable_params()->mutable_max_duration()->set_seconds(3600);
    return m;
  }
  Actions Do(const Event& event) {
    Actions actions = machine_.Handle(event, {now_, now_ + kSecond * 1'000'000});
    for (const OutgoingCommand& command : actions.commands) sent_.push_back(command);
    for (const AckToSend& ack : actions.acks) acks_.push_back(ack);
    return actions;
  }
  void Wait(int seconds) {
    now_ += seconds * kSecond;
    Do(Tick{});
  }
  void BothUp() {
    Do(HostUp{v1::ROLE_SOURCE, std::nullopt, true});
    Do(HostUp{v1::ROLE_DESTINATION, std::nullopt, false});
  }
  // The last command sent, which must be of this kind.
  const v1::Command& Last(CommandKind kind) {
    static const v1::Command none;
    EXPECT_FALSE(sent_.empty());
    if (sent_.empty()) return none;
    EXPECT_EQ(static_cast<int>(sent_.back().kind), static_cast<int>(kind));
    return sent_.back().command;
  }
  int Count(CommandKind kind) const {
    int count = 0;
    for (const OutgoingCommand& command : sent_) count += command.kind == kind;
    return count;
  }
  void Answer(CommandKind kind, v1::CommandResult result = {}) {
    absl::Status status = absl::OkStatus();
    if (result.code() != 0) {
      status = absl::Status(static_cast<absl::StatusCode>(result.code()), result.message());
      if (result.reason() != v1::REASON_UNSPECIFIED) status = WithReason(status, result.reason());
    }
    Do(CommandDone{kind, status, true, std::move(result)});
  }
  void AnswerError(CommandKind kind, absl::StatusCode code, const std::string& message,
                   v1::Reason reason = v1::REASON_UNSPECIFIED) {
    v1::CommandResult result;
    result.set_code(static_cast<int>(code));
    result.set_message(message);
    result.set_reason(reason);
    Answer(kind, result);
  }
  void AnswerInspect() {
    v1::CommandResult result;
    result.mutable_inspection()->set_epoch(3);
    auto* block = result.mutable_inspection()->add_blocks();
    block->set_id("ram");
    block->set_size(256 << 20);
    Answer(CommandKind::kInspect, result);
  }
  void AnswerPrepare() {
    v1::CommandResult result;
    result.mutable_prepared()->set_peer_address("127.0.0.1:7410");
    result.mutable_prepared()->set_token(std::string(32, 't'));
    Answer(CommandKind::kPrepare, result);
  }
  v1::SideReport Report(v1::Role role, v1::Phase phase, v1::HandoverState handover, bool running,
                        bool done = false, v1::Reason reason = v1::REASON_UNSPECIFIED,
                        const std::string& message = "") {
    v1::SideReport report;
    report.set_migration_id("m1");
    report.set_vm("web1");
    report.set_role(role);
    report.set_phase(phase);
    report.set_handover(handover);
    report.set_epoch(handover == v1::OWNER ? 4 : 3);
    report.set_guest_running(running);
    report.set_done(done);
    report.set_reason(reason);
    report.set_message(message);
    report.set_sequence(++sequence_);
    return report;
  }
  void Say(const v1::SideReport& report) { Do(Reported{report}); }
  // Up to pre-copy.
  void Run() {
    BothUp();
    Do(Admitted{});
    AnswerInspect();
    AnswerPrepare();
    Answer(CommandKind::kStart);
    Say(Report(v1::ROLE_SOURCE, v1::PRECOPY, v1::IDLE, true));
    Say(Report(v1::ROLE_DESTINATION, v1::PRECOPY, v1::IDLE, false));
  }
  void Yield() { Say(Report(v1::ROLE_SOURCE, v1::SWITCHOVER, v1::YIELDED, false)); }
  // What a batond that was killed finds again.
  void Restart() {
    v1::Migration m;
    MigrationControl control;
    ASSERT_TRUE(m.ParseFromString(machine_.migration().SerializeAsString()));
    ASSERT_TRUE(control.ParseFromString(machine_.control().SerializeAsString()));
    machine_ = Machine(m, control, {});
  }
  const v1::Migration& m() const { return machine_.migration(); }

  Machine machine_;
  int64_t now_ = kSecond;
  uint64_t sequence_ = 0;
  std::vector<OutgoingCommand> sent_;
  std::vector<AckToSend> acks_;
};

TEST_F(MachineTest, GoesThroughEveryPhaseToSuccess) {
  BothUp();
  EXPECT_EQ(m().phase(), v1::QUEUED);
  EXPECT_TRUE(sent_.empty());
  Do(Admitted{});
  EXPECT_EQ(m().phase(), v1::PREPARING);
  EXPECT_EQ(Last(CommandKind::kInspect).inspect_vm().vm(), "web1");
  AnswerInspect();
  EXPECT_EQ(m().progress().memory_total(), 256u << 20);
  EXPECT_EQ(Last(CommandKind::kPrepare).prepare_incoming().migration_id(), "m1");
  AnswerPrepare();
  EXPECT_EQ(Last(CommandKind::kStart).start_outgoing().token(), std::string(32, 't'));
  EXPECT_EQ(Last(CommandKind::kStart).start_outgoing().epoch(), 3u);
  Answer(CommandKind::kStart);
  Say(Report(v1::ROLE_SOURCE, v1::PRECOPY, v1::IDLE, true));
  EXPECT_EQ(m().phase(), v1::PRECOPY);
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
  Say(Report(v1::ROLE_SOURCE, v1::SWITCHOVER, v1::FROZEN, false));
  EXPECT_EQ(m().guest_location(), v1::PAUSED_SOURCE);
  Yield();
  EXPECT_EQ(m().guest_location(), v1::UNKNOWN);
  Say(Report(v1::ROLE_DESTINATION, v1::FINISHING, v1::OWNER, true));
  EXPECT_EQ(m().phase(), v1::FINISHING);
  EXPECT_EQ(m().guest_location(), v1::DESTINATION);
  Say(Report(v1::ROLE_SOURCE, v1::SUCCEEDED, v1::RELEASED, false, true, v1::NONE));
  EXPECT_EQ(m().phase(), v1::FINISHING);
  Say(Report(v1::ROLE_DESTINATION, v1::SUCCEEDED, v1::OWNER, true, true, v1::NONE));
  EXPECT_EQ(m().phase(), v1::SUCCEEDED);
  EXPECT_EQ(m().reason(), v1::NONE);
  EXPECT_EQ(m().guest_location(), v1::DESTINATION);
  EXPECT_NE(m().message().find("the guest runs at hosts/b"), std::string::npos) << m().message();
  EXPECT_TRUE(m().has_end_time());
  EXPECT_TRUE(machine_.settled());
  EXPECT_EQ(acks_.size(), 2u);
  // Phases in order, each once.
  for (int i = 1; i < m().phase_times_size(); ++i)
    EXPECT_LT(m().phase_times(i - 1).phase(), m().phase_times(i).phase());
}

TEST_F(MachineTest, BlockerAtTheDestinationFailsWithoutStarting) {
  BothUp();
  Do(Admitted{});
  AnswerInspect();
  v1::CommandResult result;
  auto* finding = result.mutable_prepared()->add_findings();
  finding->set_severity(v1::BLOCKER);
  finding->set_code("CAPACITY_DIFFERS");
  finding->set_subject("device disk0");
  finding->set_message("capacity differs");
  Answer(CommandKind::kPrepare, result);
  EXPECT_EQ(m().findings_size(), 1);
  EXPECT_EQ(Count(CommandKind::kStart), 0);
  Last(CommandKind::kAbort);
  EXPECT_EQ(m().phase(), v1::PREPARING);  // the destination's clean-up is waited for
  Answer(CommandKind::kAbort);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::VALIDATION_FAILED);
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
  EXPECT_NE(m().message().find("remedy the blockers"), std::string::npos);
  EXPECT_TRUE(machine_.settled());
}

TEST_F(MachineTest, AStaleSourceIsRefused) {
  BothUp();
  Do(Admitted{});
  v1::CommandResult result;
  result.mutable_inspection()->set_epoch(2);
  Answer(CommandKind::kInspect, result);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::VM_NOT_MIGRATABLE);
  EXPECT_NE(m().message().find("stale"), std::string::npos);
}

TEST_F(MachineTest, CancelWhileQueuedAndWhilePreparing) {
  Do(CancelAsked{});
  EXPECT_EQ(m().phase(), v1::CANCELLED);
  EXPECT_EQ(m().reason(), v1::CANCELLED_BY_REQUEST);
  EXPECT_TRUE(machine_.settled());

  machine_ = Machine(NewMigration(), {}, {});
  BothUp();
  Do(Admitted{});
  AnswerInspect();
  Do(CancelAsked{});
  EXPECT_EQ(Count(CommandKind::kAbort), 0);  // the preparation is still under way; its result comes first
  AnswerPrepare();
  Last(CommandKind::kAbort);
  EXPECT_EQ(Count(CommandKind::kStart), 0);
  Answer(CommandKind::kAbort);
  EXPECT_EQ(m().phase(), v1::CANCELLED);
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
}

TEST_F(MachineTest, CancelUnderWayFollowsTheSourcesWord) {
  Run();
  Do(CancelAsked{});
  Last(CommandKind::kCancel);
  EXPECT_TRUE(m().cancel_requested());
  Answer(CommandKind::kCancel);
  Say(Report(v1::ROLE_SOURCE, v1::CANCELLED, v1::IDLE, true, true, v1::CANCELLED_BY_REQUEST, "cancelled"));
  Last(CommandKind::kAbort);
  Say(Report(v1::ROLE_DESTINATION, v1::FAILED, v1::REFUSED, false, true, v1::PEER_CONNECTION_FAILED));
  EXPECT_EQ(m().phase(), v1::CANCELLED);
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
}

TEST_F(MachineTest, CancelThatIsTooLateSucceeds) {
  Run();
  Yield();
  Do(CancelAsked{});
  EXPECT_EQ(Count(CommandKind::kCancel), 0);
  Say(Report(v1::ROLE_DESTINATION, v1::FINISHING, v1::OWNER, true, true, v1::NONE));
  Last(CommandKind::kResolve);
  Say(Report(v1::ROLE_SOURCE, v1::SUCCEEDED, v1::RELEASED, false, true, v1::NONE));
  EXPECT_EQ(m().phase(), v1::SUCCEEDED);
}

TEST_F(MachineTest, TheSideThatBrokeFirstGivesTheReason) {
  Run();
  Say(Report(v1::ROLE_DESTINATION, v1::FAILED, v1::REFUSED, false, true, v1::DESTINATION_VMM_FAILED,
             "QEMU was killed"));
  Say(Report(v1::ROLE_SOURCE, v1::FAILED, v1::IDLE, true, true, v1::PEER_CONNECTION_FAILED,
             "connection reset"));
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::DESTINATION_VMM_FAILED);
  EXPECT_NE(m().message().find("QEMU was killed"), std::string::npos) << m().message();
  EXPECT_NE(m().message().find("the guest runs at hosts/a"), std::string::npos) << m().message();
}

TEST_F(MachineTest, YieldedWithoutVerdictIsUnknownUntilTheJournalSpeaks) {
  Run();
  Yield();
  Do(HostDown{v1::ROLE_DESTINATION});
  Wait(30);
  EXPECT_EQ(m().guest_location(), v1::UNKNOWN);
  EXPECT_EQ(m().phase(), v1::SWITCHOVER);
  Wait(40);  // past the switchover's deadline: the destination will be asked when it is back
  EXPECT_EQ(Count(CommandKind::kAbort), 0);
  EXPECT_EQ(m().phase(), v1::SWITCHOVER);
  Do(HostUp{v1::ROLE_DESTINATION, std::nullopt, false});
  Last(CommandKind::kAbort);
  Answer(CommandKind::kAbort);  // so REFUSED is in its journal
  const v1::ResolveCommand& resolve = Last(CommandKind::kResolve).resolve();
  EXPECT_EQ(resolve.verdict(), v1::REFUSED);
  EXPECT_FALSE(resolve.fenced());
  EXPECT_EQ(m().guest_location(), v1::PAUSED_SOURCE);
  Answer(CommandKind::kResolve);
  Say(Report(v1::ROLE_SOURCE, v1::FAILED, v1::REFUSED, true, true, v1::DESTINATION_REFUSED, "refused"));
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
}

TEST_F(MachineTest, AnOwnerThatRefusesTheAbortIsOwner) {
  Run();
  Yield();
  Do(HostDown{v1::ROLE_DESTINATION});
  Wait(70);
  Do(HostUp{v1::ROLE_DESTINATION,
            Report(v1::ROLE_DESTINATION, v1::FINISHING, v1::OWNER, true, true, v1::NONE), true});
  EXPECT_EQ(Count(CommandKind::kAbort), 0);
  EXPECT_EQ(Last(CommandKind::kResolve).resolve().verdict(), v1::OWNER);
  EXPECT_EQ(m().guest_location(), v1::DESTINATION);
}

TEST_F(MachineTest, FencingLetsTheSourceResume) {
  Run();
  Yield();
  Do(HostDown{v1::ROLE_DESTINATION});
  EXPECT_TRUE(machine_.CanResolve().ok());
  Do(FencedAsked{});
  EXPECT_EQ(Last(CommandKind::kResolve).resolve().verdict(), v1::REFUSED);
  EXPECT_TRUE(Last(CommandKind::kResolve).resolve().fenced());
  Say(Report(v1::ROLE_SOURCE, v1::FAILED, v1::REFUSED, true, true, v1::RESOLVED_BY_OPERATOR));
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::RESOLVED_BY_OPERATOR);
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
  EXPECT_FALSE(machine_.settled());  // the destination may still come back and hold something
  // It comes back as owner: two copies may have run, and that is said.
  Do(HostUp{v1::ROLE_DESTINATION, Report(v1::ROLE_DESTINATION, v1::FINISHING, v1::OWNER, true, true), true});
  EXPECT_EQ(m().guest_location(), v1::UNKNOWN);
}

TEST_F(MachineTest, ResolveIsRefusedWhileTheGuestIsKnownOrTheSourceHasNotYielded) {
  Run();
  EXPECT_EQ(machine_.CanResolve().code(), absl::StatusCode::kFailedPrecondition);
  Do(HostDown{v1::ROLE_SOURCE});
  Wait(20);
  EXPECT_EQ(m().guest_location(), v1::UNKNOWN);
  absl::Status status = machine_.CanResolve();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(Message(status).find("bring hosts/a back"), std::string::npos);
}

TEST_F(MachineTest, OwnerWithoutTheSourcesYieldIsNotBelievedYet) {
  Run();
  Do(HostDown{v1::ROLE_SOURCE});
  Say(Report(v1::ROLE_DESTINATION, v1::FINISHING, v1::OWNER, true, true, v1::NONE));
  EXPECT_EQ(m().phase(), v1::FINISHING);
  EXPECT_EQ(m().guest_location(), v1::UNKNOWN);
  Wait(600);
  EXPECT_EQ(m().phase(), v1::FINISHING);
  // Either the source comes back and confirms, or an operator says that it never will.
  EXPECT_TRUE(machine_.CanResolve().ok());
  Machine other = machine_;
  Do(HostUp{v1::ROLE_SOURCE, Report(v1::ROLE_SOURCE, v1::SWITCHOVER, v1::YIELDED, false), false});
  EXPECT_EQ(m().guest_location(), v1::DESTINATION);
  machine_ = other;
  Do(FencedAsked{});
  EXPECT_EQ(m().phase(), v1::SUCCEEDED);
  EXPECT_EQ(m().reason(), v1::RESOLVED_BY_OPERATOR);
  EXPECT_EQ(m().guest_location(), v1::DESTINATION);
}

TEST_F(MachineTest, LostGuestIsReportedAsLost) {
  Run();
  v1::SideReport report = Report(v1::ROLE_SOURCE, v1::FAILED, v1::IDLE, false, true, v1::SOURCE_VMM_FAILED,
                                 "QEMU was killed by SIGKILL");
  report.set_guest_lost(true);
  Say(report);
  Last(CommandKind::kAbort);
  Answer(CommandKind::kAbort);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::SOURCE_VMM_FAILED);
  EXPECT_EQ(m().guest_location(), v1::LOST);
  EXPECT_NE(m().message().find("runs nowhere"), std::string::npos);
}

TEST_F(MachineTest, WhatOnlyAPersonCanDecideIsInTheRecordBeforeTheEnd) {
  Run();
  Yield();
  Say(Report(v1::ROLE_DESTINATION, v1::POSTCOPY, v1::OWNER, true));
  EXPECT_EQ(m().message(), "");
  // What is asked again by itself is not for a person.
  Say(Report(v1::ROLE_SOURCE, v1::SWITCHOVER, v1::YIELDED, false, false, v1::REASON_UNSPECIFIED,
             "the destination does not answer"));
  EXPECT_EQ(m().message(), "");
  Say(Report(v1::ROLE_SOURCE, v1::SWITCHOVER, v1::YIELDED, false, false, v1::SOURCE_VMM_FAILED,
             "the source's half is gone; end the other one"));
  EXPECT_EQ(m().phase(), v1::POSTCOPY);
  EXPECT_EQ(m().guest_location(), v1::DESTINATION);
  EXPECT_EQ(m().reason(), v1::REASON_UNSPECIFIED) << "it has not ended";
  EXPECT_EQ(m().message(), "hosts/a: the source's half is gone; end the other one");
  EXPECT_FALSE(m().has_end_time());
  absl::Status resolved = machine_.CanResolve();
  EXPECT_EQ(resolved.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(Message(resolved).find("end the other one"), std::string::npos);
  Restart();
  EXPECT_NE(m().message().find("end the other one"), std::string::npos);
  Say(Report(v1::ROLE_SOURCE, v1::SWITCHOVER, v1::YIELDED, false));
  EXPECT_EQ(m().message(), "");
}

TEST_F(MachineTest, AGuestThatEndedAtTheDestinationIsLostAndTheSourceSaysWhatIsLeft) {
  Run();
  Yield();
  Say(Report(v1::ROLE_DESTINATION, v1::POSTCOPY, v1::OWNER, true));
  v1::SideReport here = Report(v1::ROLE_SOURCE, v1::FAILED, v1::YIELDED, false, true, v1::SOURCE_VMM_FAILED,
                               "the source's copy is a half; end it");
  here.set_guest_lost(true);
  Say(here);
  EXPECT_NE(m().phase(), v1::FAILED);
  v1::SideReport there = Report(v1::ROLE_DESTINATION, v1::FAILED, v1::OWNER, false, true,
                                v1::DESTINATION_VMM_FAILED, "the domain has ended since it came here");
  there.set_guest_lost(true);
  Say(there);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().guest_location(), v1::LOST);
  EXPECT_EQ(m().reason(), v1::DESTINATION_VMM_FAILED);
  EXPECT_NE(m().message().find("the source's copy is a half; end it"), std::string::npos);
}

TEST_F(MachineTest, GuestThatEndsWhileTheDestinationPreparesIsLost) {
  BothUp();
  Do(Admitted{});
  AnswerInspect();
  Do(VmEnded{"QEMU was killed by SIGKILL"});
  AnswerPrepare();
  Last(CommandKind::kAbort);
  Answer(CommandKind::kAbort);
  Wait(1);
  EXPECT_EQ(Count(CommandKind::kStart), 0);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::SOURCE_VMM_FAILED);
  EXPECT_EQ(m().guest_location(), v1::LOST);
}

TEST_F(MachineTest, GuestThatEndsBeforeTheSourceStartsIsLost) {
  BothUp();
  Do(Admitted{});
  AnswerInspect();
  AnswerPrepare();
  Do(VmEnded{"QEMU was killed by SIGKILL"});
  AnswerError(CommandKind::kStart, absl::StatusCode::kFailedPrecondition, "the VM is STOPPED",
              v1::VM_NOT_MIGRATABLE);
  Last(CommandKind::kAbort);
  Answer(CommandKind::kAbort);
  Wait(1);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::SOURCE_VMM_FAILED);
  EXPECT_EQ(m().guest_location(), v1::LOST);
  EXPECT_TRUE(machine_.settled());
}

TEST_F(MachineTest, LostAfterYieldingWaitsForTheDestinationsVerdict) {
  Run();
  Yield();
  v1::SideReport report =
      Report(v1::ROLE_SOURCE, v1::FAILED, v1::YIELDED, false, true, v1::SOURCE_SHIM_FAILED, "killed");
  report.set_guest_lost(true);
  Say(report);
  EXPECT_NE(m().phase(), v1::FAILED);
  Say(Report(v1::ROLE_DESTINATION, v1::FINISHING, v1::OWNER, true, true, v1::NONE));
  EXPECT_EQ(m().phase(), v1::SUCCEEDED);
  EXPECT_EQ(m().guest_location(), v1::DESTINATION);
}

TEST_F(MachineTest, PreparingHasADeadlineThatNamesTheSilentHost) {
  Do(HostUp{v1::ROLE_SOURCE, std::nullopt, true});
  Do(Admitted{});
  AnswerInspect();
  Wait(61);
  EXPECT_EQ(m().phase(), v1::PREPARING);  // clean-up at the destination, which does not answer
  Wait(16);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::AGENT_UNREACHABLE);
  EXPECT_NE(m().message().find("hosts/b"), std::string::npos);
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
  // The destination comes back later: it is still told to clean up.
  EXPECT_FALSE(machine_.settled());
  Do(HostUp{v1::ROLE_DESTINATION, std::nullopt, false});
  Last(CommandKind::kAbort);
  Answer(CommandKind::kAbort);
  EXPECT_TRUE(machine_.settled());
}

TEST_F(MachineTest, SessionLossForgetsWhatWasInFlightAndAsksAgain) {
  BothUp();
  Do(Admitted{});
  AnswerInspect();
  EXPECT_EQ(Count(CommandKind::kPrepare), 1);
  Do(HostDown{v1::ROLE_DESTINATION});
  Do(HostUp{v1::ROLE_DESTINATION, std::nullopt, false});
  EXPECT_EQ(Count(CommandKind::kPrepare), 2);
}

TEST_F(MachineTest, ARestartRepeatsWhatTheStateWants) {
  BothUp();
  Do(Admitted{});
  AnswerInspect();
  AnswerPrepare();
  EXPECT_EQ(Count(CommandKind::kStart), 1);
  Restart();
  BothUp();
  EXPECT_EQ(Count(CommandKind::kStart), 2);
  EXPECT_EQ(Last(CommandKind::kStart).start_outgoing().token(), std::string(32, 't'));
}

TEST_F(MachineTest, AnInterruptedStartIsTriedAgainAndARefusedOneEnds) {
  BothUp();
  Do(Admitted{});
  AnswerInspect();
  AnswerPrepare();
  Do(CommandDone{CommandKind::kStart, absl::UnavailableError("session broke"), false, {}});
  EXPECT_EQ(Count(CommandKind::kStart), 1);
  Wait(2);
  EXPECT_EQ(Count(CommandKind::kStart), 2);
  AnswerError(CommandKind::kStart, absl::StatusCode::kFailedPrecondition, "no userfaultfd",
              v1::DIRTY_TRACKING_UNAVAILABLE);
  Answer(CommandKind::kAbort);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::DIRTY_TRACKING_UNAVAILABLE);
}

TEST_F(MachineTest, ADoubtfulStartIsCancelledBeforeItIsCalledFailed) {
  BothUp();
  Do(Admitted{});
  AnswerInspect();
  AnswerPrepare();
  AnswerError(CommandKind::kStart, absl::StatusCode::kDeadlineExceeded, "the shim did not answer");
  Last(CommandKind::kCancel);
  EXPECT_EQ(m().phase(), v1::PREPARING);
  // It had begun: its report says what became of it.
  Answer(CommandKind::kCancel);
  Say(Report(v1::ROLE_SOURCE, v1::CANCELLED, v1::IDLE, true, true, v1::CANCELLED_BY_REQUEST));
  Answer(CommandKind::kAbort);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_NE(m().reason(), v1::CANCELLED_BY_REQUEST);
}

TEST_F(MachineTest, ASourceThatForgotTheMigrationKeepsItsGuest) {
  Run();
  Do(HostDown{v1::ROLE_SOURCE});
  Do(HostUp{v1::ROLE_SOURCE, std::nullopt, true});
  EXPECT_EQ(Count(CommandKind::kCancel), 0);  // its shims may be found again a little later
  Wait(16);
  Last(CommandKind::kCancel);
  AnswerError(CommandKind::kCancel, absl::StatusCode::kNotFound, "no such migration");
  Answer(CommandKind::kAbort);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().reason(), v1::SOURCE_SHIM_FAILED);
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
}

TEST_F(MachineTest, ADeadDestinationAndASilentSourceEndAsUnknown) {
  Run();
  Do(HostDown{v1::ROLE_SOURCE});
  Say(Report(v1::ROLE_DESTINATION, v1::FAILED, v1::REFUSED, false, true, v1::PEER_CONNECTION_FAILED));
  Wait(60);
  EXPECT_EQ(m().phase(), v1::PRECOPY);
  Wait(300);
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().guest_location(), v1::UNKNOWN);
  // The host comes back with its guest: the record says so.
  Do(HostUp{v1::ROLE_SOURCE,
            Report(v1::ROLE_SOURCE, v1::FAILED, v1::IDLE, true, true, v1::PEER_CONNECTION_FAILED), true});
  EXPECT_EQ(m().phase(), v1::FAILED);
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
  EXPECT_NE(m().message().find("the guest runs at hosts/a"), std::string::npos);
  EXPECT_TRUE(machine_.settled());
}

TEST_F(MachineTest, FinishingEndsWithoutTheLastCleanUp) {
  Run();
  Yield();
  Say(Report(v1::ROLE_DESTINATION, v1::FINISHING, v1::OWNER, true, true, v1::NONE));
  Do(HostDown{v1::ROLE_SOURCE});
  Wait(61);
  EXPECT_EQ(m().phase(), v1::SUCCEEDED);
  EXPECT_FALSE(machine_.settled());
  // The source hears the verdict when it is back.
  Do(HostUp{v1::ROLE_SOURCE, Report(v1::ROLE_SOURCE, v1::SWITCHOVER, v1::YIELDED, false), false});
  EXPECT_EQ(Last(CommandKind::kResolve).resolve().verdict(), v1::OWNER);
  Say(Report(v1::ROLE_SOURCE, v1::SUCCEEDED, v1::RELEASED, false, true, v1::NONE));
  EXPECT_TRUE(machine_.settled());
}

TEST_F(MachineTest, RetuneTravelsAndChangesTheParameters) {
  Run();
  v1::RetuneCommand retune;
  retune.set_bandwidth(1 << 20);
  retune.mutable_max_downtime()->set_seconds(1);
  Do(RetuneAsked{retune});
  EXPECT_EQ(Last(CommandKind::kRetune).retune().bandwidth(), 1u << 20);
  EXPECT_EQ(m().params().bandwidth(), 1u << 20);
  EXPECT_EQ(m().params().max_downtime().seconds(), 1);
  Answer(CommandKind::kRetune);
  Wait(5);
  EXPECT_EQ(Count(CommandKind::kRetune), 1);
}

TEST_F(MachineTest, OldReportsOfASessionAreIgnoredNewSessionsCountAnew) {
  Run();
  v1::SideReport old = Report(v1::ROLE_SOURCE, v1::PRECOPY, v1::IDLE, true);
  Say(Report(v1::ROLE_SOURCE, v1::SWITCHOVER, v1::FROZEN, false));
  Say(old);
  EXPECT_EQ(m().guest_location(), v1::PAUSED_SOURCE);
  Do(HostDown{v1::ROLE_SOURCE});
  old.set_sequence(1);
  Do(HostUp{v1::ROLE_SOURCE, old, true});
  EXPECT_EQ(m().guest_location(), v1::SOURCE);
}

TEST(Words, EveryReasonAndLocationGivesASentence) {
  v1::Migration m;
  m.set_source("hosts/a");
  m.set_destination("hosts/b");
  for (int location = 0; location < v1::GuestLocation_ARRAYSIZE; ++location) {
    m.set_guest_location(static_cast<v1::GuestLocation>(location));
    for (int reason = 0; reason < v1::Reason_ARRAYSIZE; ++reason) {
      std::string text = EndMessage(m, static_cast<v1::Reason>(reason), "what");
      EXPECT_EQ(text.rfind("what; ", 0), 0u);
      EXPECT_EQ(text.find(";;"), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace baton::server
