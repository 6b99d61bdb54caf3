// The migration machine under random schedules: two hosts that follow the handover's rules, sessions and the
// peer link that break at any moment, guests and shims that die, cancellation, and a batond that is killed
// before or after it stores what it decided. Whatever happens, batond never says a guest is where it is not,
// never gives the source a verdict that the destination did not write, and comes to an end that matches the
// truth once everything answers again.
#include <gtest/gtest.h>

#include <deque>
#include <random>

#include "server/control/machine.h"

namespace baton::server {
namespace {

constexpr int64_t kSecondNs = 1'000'000'000;

// One host's side of the migration, as journal, shim and agent keep it.
struct Side {
  bool session = false;
  bool known = false;  // the agent has a report on this migration
  v1::SideReport report;
  std::deque<v1::Command> inbox;
  std::vector<CommandKind> kinds;
  std::deque<std::pair<CommandKind, v1::CommandResult>> answers;
  bool acked = false;
};

class World {
 public:
  explicit World(uint32_t seed) : random_(seed), machine_(NewMigration(), {}, {}) {
    for (auto [side, role] :
         {std::pair(&source_, v1::ROLE_SOURCE), std::pair(&destination_, v1::ROLE_DESTINATION)}) {
      side->report.set_migration_id("m1");
      side->report.set_vm("web1");
      side->report.set_role(role);
      side->report.set_handover(v1::IDLE);
      side->report.set_epoch(3);
    }
    source_.report.set_guest_running(true);
    Feed(Tick{});
  }

  void Step() {
    switch (Roll(16)) {
      case 0:
        return Toggle(source_, v1::ROLE_SOURCE);
      case 1:
        return Toggle(destination_, v1::ROLE_DESTINATION);
      case 2:
        now_ += kSecondNs * (1 + Roll(40));
        return Feed(Tick{});
      case 3:
        if (Roll(4) == 0) Feed(CancelAsked{});
        return;
      case 4:
        if (Roll(3) == 0) Restart();
        return;
      case 5:
        if (Roll(6) == 0) BreakSomething();
        return;
      case 6:
        return Feed(Admitted{});
      case 7:
      case 8:
        return Advance();
      case 9:
      case 10:
        return Carry(source_);
      case 11:
      case 12:
        return Carry(destination_);
      default:
        return Roll(2) ? Reply(source_) : Reply(destination_);
    }
  }

  // Everything answers again: it must come to an end.
  void Heal() {
    peer_up_ = true;
    for (int i = 0; i < 3000 && !machine_.settled(); ++i) {
      if (!source_.session) Toggle(source_, v1::ROLE_SOURCE);
      if (!destination_.session) Toggle(destination_, v1::ROLE_DESTINATION);
      Feed(Admitted{});
      Carry(source_);
      Carry(destination_);
      Reply(source_);
      Reply(destination_);
      Advance();
      if (i % 4 == 3) {
        now_ += kSecondNs;
        Feed(Tick{});
      }
    }
  }

  void CheckEnd() {
    const v1::Migration& m = machine_.migration();
    ASSERT_TRUE(machine_.ended()) << Describe();
    ASSERT_TRUE(machine_.settled()) << Describe();
    EXPECT_NE(m.guest_location(), v1::UNKNOWN) << Describe();
    EXPECT_EQ(m.guest_location() == v1::DESTINATION, DestinationRuns()) << Describe();
    EXPECT_EQ(m.guest_location() == v1::LOST, Lost()) << Describe();
    if (SourceRuns()) {
      EXPECT_EQ(m.guest_location(), v1::SOURCE) << Describe();
    }
    EXPECT_EQ(m.phase() == v1::SUCCEEDED, DestinationRuns()) << Describe();
    EXPECT_NE(m.reason(), v1::REASON_UNSPECIFIED) << Describe();
    if (destination_.known) {
      EXPECT_NE(destination_.report.handover(), v1::IDLE) << Describe();
    }
  }
  bool succeeded() const { return machine_.migration().phase() == v1::SUCCEEDED; }

 private:
  static v1::Migration NewMigration() {
    v1::Migration m;
    m.set_name("migrations/m1");
    m.set_vm("vms/web1");
    m.set_source("hosts/a");
    m.set_destination("hosts/b");
    m.set_epoch(3);
    m.mutable_params()->mutable_max_duration()->set_seconds(600);
    return m;
  }
  uint32_t Roll(uint32_t sides) { return std::uniform_int_distribution<uint32_t>(0, sides - 1)(random_); }
  bool SourceRuns() const { return source_.report.guest_running(); }
  bool DestinationRuns() const { return destination_.report.guest_running(); }
  bool Lost() const { return !SourceRuns() && !DestinationRuns() && source_.report.guest_lost(); }
  v1::HandoverState Verdict() const { return destination_.report.handover(); }
  std::string Describe() const {
    return machine_.migration().ShortDebugString() + "\ncontrol: " + machine_.control().ShortDebugString() +
           "\nsource: " + source_.report.ShortDebugString() +
           "\ndestination: " + destination_.report.ShortDebugString();
  }

  // --- batond ---
  void Feed(const Event& event) {
    Machine next = machine_;
    Actions actions = next.Handle(event, {now_, now_});
    uint32_t fate = Roll(100);
    if (fate == 0) return Restart();  // killed before the commit
    machine_ = next;
    Check();
    if (fate == 1) return Restart();  // killed after the commit, before it acted
    for (OutgoingCommand& command : actions.commands) Send(command);
    for (AckToSend& ack : actions.acks) (ack.to == v1::ROLE_SOURCE ? source_ : destination_).acked = true;
  }
  void Send(const OutgoingCommand& out) {
    Side& side = out.to == v1::ROLE_SOURCE ? source_ : destination_;
    if (out.kind == CommandKind::kResolve) {
      // The destination's journal has what the source is told.
      EXPECT_EQ(out.command.resolve().verdict(), Verdict()) << Describe();
      EXPECT_FALSE(out.command.resolve().fenced());
    }
    if (!side.session) return;
    side.inbox.push_back(out.command);
    side.kinds.push_back(out.kind);
  }
  void Restart() {
    machine_ = Machine(machine_.migration(), machine_.control(), {});
    for (Side* side : {&source_, &destination_}) Drop(*side);
    Feed(Tick{});
  }
  void Check() {
    const v1::Migration& m = machine_.migration();
    if (m.guest_location() == v1::DESTINATION) {
      EXPECT_EQ(Verdict(), v1::OWNER) << Describe();
    }
    if (m.guest_location() == v1::SOURCE || m.guest_location() == v1::PAUSED_SOURCE) {
      EXPECT_TRUE(Verdict() != v1::OWNER || !source_.known ||
                  machine_.control().source().handover() != v1::YIELDED)
          << Describe();
    }
    if (m.phase() == v1::SUCCEEDED) {
      EXPECT_EQ(Verdict(), v1::OWNER) << Describe();
    }
    if (machine_.ended() && m.guest_location() == v1::SOURCE) {
      EXPECT_NE(Verdict(), v1::OWNER) << Describe();
    }
    if (m.phase() < last_phase_) {
      ADD_FAILURE() << "phase went back: " << Describe();
    }
    last_phase_ = m.phase();
  }

  // --- sessions ---
  void Drop(Side& side) {
    side.session = false;
    side.inbox.clear();
    side.kinds.clear();
    side.answers.clear();
  }
  void Toggle(Side& side, v1::Role role) {
    if (side.session) {
      Drop(side);
      return Feed(HostDown{role});
    }
    side.session = true;
    HostUp up{role, std::nullopt, false};
    if (side.known && !side.acked) up.report = side.report;
    up.has_vm = role == v1::ROLE_SOURCE ? !source_.report.guest_lost() : DestinationRuns();
    Feed(up);
  }
  void Tell(Side& side) {
    side.known = true;
    side.acked = false;
    side.report.set_sequence(side.report.sequence() + 1);
    if (side.session) Feed(Reported{side.report});
  }
  void Reply(Side& side) {
    if (side.answers.empty()) return;
    auto [kind, result] = side.answers.front();
    side.answers.pop_front();
    absl::Status status = result.code() == 0
                              ? absl::OkStatus()
                              : absl::Status(static_cast<absl::StatusCode>(result.code()), "scripted");
    Feed(CommandDone{kind, status, true, result});
  }

  // --- hosts ---
  void Carry(Side& side) {
    if (side.inbox.empty()) return;
    v1::Command command = side.inbox.front();
    CommandKind kind = side.kinds.front();
    side.inbox.pop_front();
    side.kinds.erase(side.kinds.begin());
    v1::CommandResult result;
    auto fail = [&](absl::StatusCode code) { result.set_code(static_cast<int>(code)); };
    bool tell = false;
    v1::SideReport& s = source_.report;
    switch (kind) {
      case CommandKind::kInspect:
        result.mutable_inspection()->set_epoch(3);
        if (s.guest_lost()) fail(absl::StatusCode::kNotFound);
        break;
      case CommandKind::kPrepare:
        if (Verdict() == v1::REFUSED) {
          fail(absl::StatusCode::kFailedPrecondition);
        } else {
          result.mutable_prepared()->set_peer_address("b:1");
          result.mutable_prepared()->set_token("t");
          prepared_ = true;
          destination_.known = true;
        }
        break;
      case CommandKind::kAbort:
        if (Verdict() == v1::OWNER) {
          fail(absl::StatusCode::kFailedPrecondition);
        } else {
          Refuse();
        }
        break;
      case CommandKind::kStart:
        if (s.guest_lost()) {
          fail(absl::StatusCode::kNotFound);
        } else if (Roll(20) == 0) {
          fail(Roll(2) ? absl::StatusCode::kDeadlineExceeded : absl::StatusCode::kFailedPrecondition);
          if (result.code() == static_cast<int>(absl::StatusCode::kDeadlineExceeded) && Roll(2)) Begin();
        } else {
          Begin();
        }
        break;
      case CommandKind::kCancel:
        if (!source_.known) {
          fail(absl::StatusCode::kNotFound);
        } else if (s.handover() == v1::YIELDED || s.handover() == v1::RELEASED) {
          fail(absl::StatusCode::kFailedPrecondition);
        } else if (!s.done()) {
          EndSource(v1::CANCELLED, v1::CANCELLED_BY_REQUEST);
          tell = true;
        }
        break;
      case CommandKind::kResolve:
        if (s.handover() == v1::YIELDED && !s.done()) {
          if (command.resolve().verdict() == v1::OWNER) {
            Release();
          } else {
            s.set_handover(v1::REFUSED);
            s.set_guest_running(!s.guest_lost());
            s.set_done(true);
            s.set_reason(v1::DESTINATION_REFUSED);
          }
          tell = true;
        }
        break;
      default:
        break;
    }
    side.answers.emplace_back(kind, result);
    if (tell) Tell(source_);
  }
  void Begin() {
    if (source_.known) return;  // idempotent
    source_.report.set_phase(v1::PRECOPY);
    began_ = true;
    Tell(source_);
  }
  void Refuse() {
    destination_.report.set_handover(v1::REFUSED);
    destination_.report.set_done(true);
    if (destination_.report.reason() == v1::REASON_UNSPECIFIED) {
      destination_.report.set_reason(v1::PEER_CONNECTION_FAILED);
    }
    if (prepared_) Tell(destination_);
  }
  void EndSource(v1::Phase phase, v1::Reason reason) {
    source_.report.set_phase(phase);
    source_.report.set_handover(v1::IDLE);
    source_.report.set_guest_running(!source_.report.guest_lost());
    source_.report.set_done(true);
    source_.report.set_reason(reason);
  }
  void Release() {
    source_.report.set_handover(v1::RELEASED);
    source_.report.set_phase(v1::SUCCEEDED);
    source_.report.set_reason(v1::NONE);
    source_.report.set_done(true);
  }
  // The protocol between the hosts goes one step on.
  void Advance() {
    v1::SideReport& s = source_.report;
    v1::SideReport& d = destination_.report;
    if (began_ && !s.done() && s.handover() != v1::YIELDED) {
      if (!peer_up_ || d.done()) {
        EndSource(v1::FAILED, v1::PEER_CONNECTION_FAILED);
        return Tell(source_);
      }
      if (s.phase() == v1::PRECOPY) {
        s.set_phase(v1::SWITCHOVER);
        s.set_handover(v1::FROZEN);
        s.set_guest_running(false);
      } else {
        s.set_handover(v1::YIELDED);
      }
      return Tell(source_);
    }
    if (prepared_ && !d.done()) {
      if (d.handover() == v1::OWNER) {
        d.set_guest_running(true);
        d.set_done(true);
        d.set_reason(v1::NONE);
        return Tell(destination_);
      }
      if (!peer_up_ || (s.done() && s.handover() != v1::RELEASED)) return Refuse();
      if (s.handover() == v1::YIELDED) {
        d.set_handover(v1::OWNER);
        d.set_phase(v1::FINISHING);
        d.set_epoch(4);
        return Tell(destination_);
      }
    }
    if (s.handover() == v1::YIELDED && !s.done() && peer_up_ &&
        (d.handover() == v1::OWNER || d.handover() == v1::REFUSED)) {
      if (d.handover() == v1::OWNER) {
        Release();
      } else {
        s.set_handover(v1::REFUSED);
        s.set_guest_running(!s.guest_lost());
        s.set_done(true);
        s.set_reason(v1::DESTINATION_REFUSED);
      }
      return Tell(source_);
    }
  }
  void BreakSomething() {
    v1::SideReport& s = source_.report;
    switch (Roll(4)) {
      case 0:
        peer_up_ = false;
        return;
      case 1:
        peer_up_ = true;
        return;
      case 2:  // the source's VMM is killed
        if (s.done() || !began_ || s.guest_lost()) return;
        s.set_guest_lost(true);
        s.set_guest_running(false);
        s.set_done(s.handover() != v1::YIELDED);
        s.set_reason(v1::SOURCE_VMM_FAILED);
        if (s.handover() == v1::FROZEN) s.set_handover(v1::IDLE);
        return Tell(source_);
      default:  // the destination's shim is killed
        if (!prepared_ || destination_.report.done() || Verdict() == v1::OWNER) return;
        destination_.report.set_reason(v1::DESTINATION_SHIM_FAILED);
        return Refuse();
    }
  }

  std::mt19937 random_;
  Machine machine_;
  int64_t now_ = kSecondNs;
  Side source_, destination_;
  bool prepared_ = false;
  bool began_ = false;
  bool peer_up_ = true;
  v1::Phase last_phase_ = v1::PHASE_UNSPECIFIED;
};

TEST(MachineSchedule, EveryScheduleEndsInTheTruth) {
  int succeeded = 0;
  constexpr uint32_t kSchedules = 1500;
  for (uint32_t seed = 1; seed <= kSchedules; ++seed) {
    SCOPED_TRACE(seed);
    World world(seed);
    int steps = 20 + static_cast<int>(seed % 200);
    for (int i = 0; i < steps; ++i) world.Step();
    world.Heal();
    world.CheckEnd();
    succeeded += world.succeeded();
    if (::testing::Test::HasFailure()) return;
  }
  // The schedules reach both kinds of end.
  EXPECT_GT(succeeded, static_cast<int>(kSchedules / 10));
  EXPECT_LT(succeeded, static_cast<int>(kSchedules * 9 / 10));
}

}  // namespace
}  // namespace baton::server
