// One migration as batond drives it: a pure state machine. Events go in (admission, command results, reports
// of the sides, sessions coming and going, requests of callers, the clock), the new record and the commands
// to send come out. No clock, no thread, no I/O of its own, so that it can be tested by random schedules.
//
//   WAITING ─admit→ INSPECTING → READYING → STARTING → RUNNING ─┬→ ENDED
//       └──────────────┴───────────┴─ failure, cancel → ENDING ─┘
//
// Rules that hold it together:
// - The record that allows an act is returned together with the act; the caller commits the one before it
// does the other.
//   A batond that dies between them repeats the act after its restart: every command is idempotent.
// - Commands follow from the state ("what does this state still want from a side?"), not from events. Losing
// a session
//   forgets what was in flight, and the same commands are wanted again when it is back.
// - The outcome is never inferred from one side. The guest is at the destination when the destination's
// journal says
//   OWNER and the source says that it yielded; it is at the source when the source says that it owns it and
//   the destination has not said OWNER. Anything else is UNKNOWN until someone who knows has spoken.
// - AbortIncoming doubles as the question for the verdict: a destination that carries it out has written
// REFUSED, one
//   that is owner refuses it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "baton/v1/agent_session.pb.h"
#include "baton/v1/migrations.pb.h"
#include "common/clock.h"
#include "common/status.h"
#include "server/store/records.pb.h"

namespace baton::server {

// Both clocks as of an event: steady for deadlines, wall for what people read.
struct Now {
  int64_t mono_ns = 0;
  int64_t wall_ns = 0;  // since the Unix epoch
};

// How long each part may take. Defaults as documented in docs/batond.md.
struct MachineTimes {
  Duration preparing = std::chrono::seconds(60);   // PREPARING as a whole
  Duration switchover = std::chrono::seconds(60);  // SWITCHOVER until a verdict; then batond settles
  Duration finishing = std::chrono::seconds(60);  // FINISHING; then the record ends without the last clean-up
  Duration cleanup =
      std::chrono::seconds(15);  // a failed destination's clean-up; then the record ends without it
  // Beyond params.max_duration, which the source keeps itself.
  Duration overtime = std::chrono::seconds(60);
  // A session may be gone for this long (an agent's restart) before "unreachable" is said of the host.
  Duration unreachable = std::chrono::seconds(15);
  // With the destination out of it, a source that is silent for this long ends the record as FAILED, location
  // UNKNOWN.
  Duration lost = std::chrono::minutes(5);
  Duration retry = std::chrono::seconds(1);  // between attempts of a command that came to nothing
};

// What a command is for; at most one of a kind is under way.
enum class CommandKind { kInspect, kPrepare, kStart, kCancel, kAbort, kResolve, kRetune };

struct OutgoingCommand {
  CommandKind kind;
  v1::Role to;
  v1::Command command;  // without id; timeout set
};

struct AckToSend {
  v1::Role to;
  v1::ReportAck ack;
};

// Events.
struct Admitted {};
struct CommandDone {
  CommandKind kind;
  // OK; or, with `answered`, the agent's own error; or why no answer came.
  absl::Status status;
  bool answered = false;
  v1::CommandResult result;  // with `answered`
};
struct Reported {
  v1::SideReport report;
};
// A session of that side's host is up; `report` is what its inventory says of this migration.
struct HostUp {
  v1::Role role;
  std::optional<v1::SideReport> report;
  bool has_vm = false;  // its inventory has the VM, and not as INCOMING
};
struct HostDown {
  v1::Role role;
};
// The VM has ended at the source, by its agent's word.
struct VmEnded {
  std::string how;
};
struct CancelAsked {};
struct RetuneAsked {
  v1::RetuneCommand retune;  // bandwidth and max_downtime
};
struct FencedAsked {};
struct Tick {};
using Event = std::variant<Admitted, CommandDone, Reported, HostUp, HostDown, VmEnded, CancelAsked,
                           RetuneAsked, FencedAsked, Tick>;

struct Actions {
  std::vector<OutgoingCommand> commands;
  std::vector<AckToSend> acks;
  bool public_changed = false;   // the Migration differs
  bool control_changed = false;  // the control record differs
};

// Not thread-safe. Copyable: apply an event to a copy to see whether its record can be stored.
class Machine {
 public:
  // A new migration (step unset), or one loaded from the store. Hosts count as down until HostUp.
  Machine(v1::Migration migration, MigrationControl control, const MachineTimes& times);

  Actions Handle(const Event& event, Now now);
  // When to send the next Tick, if nothing happens before.
  std::optional<int64_t> next_tick() const { return next_tick_; }

  const v1::Migration& migration() const { return pub_; }
  const MigrationControl& control() const { return ctl_; }
  bool ended() const { return ctl_.step() == MigrationControl::ENDED; }
  // Ended, and nobody holds anything of it any more: the control record may go.
  bool settled() const;
  // The guest's whereabouts cannot be told and an operator's word would settle it; else why not.
  absl::Status CanResolve() const;

 private:
  void On(const Admitted&);
  void On(const CommandDone& done);
  void On(const Reported& event);
  void On(const HostUp& event);
  void On(const HostDown& event);
  void On(const VmEnded& event);
  void On(const CancelAsked&);
  void On(const RetuneAsked& event);
  void On(const FencedAsked&);
  void On(const Tick&) {}

  void Inspected(const CommandDone& done);
  void Prepared(const CommandDone& done);
  void Started(const CommandDone& done);
  void Cancelled(const CommandDone& done);
  void Aborted(const CommandDone& done);
  void TakeReport(const v1::SideReport& report);
  // The guest ended at the source, which has no shim that could report it.
  void LoseAtSource(v1::Reason reason, const std::string& how);
  // Failure or cancel before the source began.
  void Give(v1::Phase phase, v1::Reason reason, const std::string& message);
  void WantCancel(v1::Reason reason, const std::string& message);
  void Advance();
  void AdvanceBeforeStart();
  void AdvanceRunning();
  void SourceKeepsGuest();
  void Undecided();
  void CheckDeadlines();
  void End(v1::Phase phase, v1::Reason reason, const std::string& message);
  void EnterPhase(v1::Phase phase);
  void SetStep(MigrationControl::Step step);
  void MergeProgress();
  void SetLocation(v1::GuestLocation location) { pub_.set_guest_location(location); }
  void Want();
  void Issue(CommandKind kind, v1::Role to, v1::Command command, Duration timeout);
  void Wake(int64_t mono_ns);

  bool HasSource() const { return ctl_.has_source(); }
  bool DestinationOwns() const { return ctl_.destination().handover() == v1::OWNER; }
  bool DestinationRefused() const {
    return ctl_.destination_clean() || ctl_.destination().handover() == v1::REFUSED;
  }
  // The destination holds nothing any more, or never did.
  bool DestinationOver() const {
    return !ctl_.prepare_issued() || ctl_.destination_clean() ||
           (ctl_.destination().done() && !DestinationOwns());
  }
  bool SourceYielded() const {
    return ctl_.source().handover() == v1::YIELDED || ctl_.source().handover() == v1::RELEASED;
  }
  bool Up(v1::Role role) const { return role == v1::ROLE_SOURCE ? source_.up : destination_.up; }
  // Down for longer than an agent's restart takes.
  bool Unreachable(v1::Role role) const;
  const std::string& HostOf(v1::Role role) const {
    return role == v1::ROLE_SOURCE ? pub_.source() : pub_.destination();
  }
  bool Passed(int64_t start, Duration limit);

  v1::Migration pub_;
  MigrationControl ctl_;
  MachineTimes times_;  // constant after construction

  // Not stored: begins anew after a restart of batond.
  struct Side {
    bool up = false;
    int64_t down_since = 0;
    // The session is up and its inventory lacks this migration since then; 0: not so.
    int64_t missing_since = 0;
    bool has_vm = false;
    // Of the last report taken in this session. A shim or agent that was started anew may count from the
    // beginning.
    uint64_t sequence = 0;
  };
  Side source_, destination_;
  std::map<CommandKind, bool> in_flight_;
  std::map<CommandKind, int64_t> not_before_;
  std::optional<std::string> vm_ended_;  // how, while StartOutgoing is not yet answered
  bool cancel_told_ = false;             // the source's agent confirmed CancelOutgoing in this session
  int64_t step_since_ = 0;               // 0: set at the next event
  int64_t phase_since_ = 0;
  int64_t outcome_since_ = 0;  // since when only the destination's clean-up is waited for
  Now now_;                    // of the event being handled
  std::optional<int64_t> next_tick_;
  Actions actions_;
};

}  // namespace baton::server
