#include "server/control/machine.h"

#include <algorithm>

#include "common/reason.h"
#include "server/control/words.h"

namespace baton::server {
namespace {

google::protobuf::Timestamp Stamp(int64_t wall_ns) {
  google::protobuf::Timestamp stamp;
  stamp.set_seconds(wall_ns / 1'000'000'000);
  stamp.set_nanos(static_cast<int32_t>(wall_ns % 1'000'000'000));
  return stamp;
}

// The agent understood the command and refused it for good: it has not begun and will not.
bool Refusal(const CommandDone& done) {
  if (!done.answered) return false;
  switch (done.status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kAlreadyExists:
      return true;
    default:
      return false;
  }
}

}  // namespace

Machine::Machine(v1::Migration migration, MigrationControl control, const MachineTimes& times)
    : pub_(std::move(migration)), ctl_(std::move(control)), times_(times) {
  if (ctl_.step() == MigrationControl::STEP_UNSPECIFIED) {
    ctl_.set_step(MigrationControl::WAITING);
    pub_.set_phase(v1::QUEUED);
    pub_.set_guest_location(v1::SOURCE);
  }
}

Actions Machine::Handle(const Event& event, Now now) {
  now_ = now;
  actions_ = {};
  next_tick_.reset();
  if (step_since_ == 0) step_since_ = now.mono_ns;
  if (phase_since_ == 0) phase_since_ = now.mono_ns;
  // A batond that comes back gives the agents the same time to come back as it gives a restarted agent.
  for (Side* side : {&source_, &destination_}) {
    if (!side->up && side->down_since == 0) side->down_since = now.mono_ns;
  }
  std::string public_before = pub_.SerializeAsString(), control_before = ctl_.SerializeAsString();
  if (pub_.phase_times().empty()) {
    auto* time = pub_.add_phase_times();
    time->set_phase(v1::QUEUED);
    *time->mutable_time() = Stamp(now.wall_ns);
  }
  std::visit([this](const auto& e) { On(e); }, event);
  Advance();
  Want();
  actions_.public_changed = pub_.SerializeAsString() != public_before;
  actions_.control_changed = ctl_.SerializeAsString() != control_before;
  return std::move(actions_);
}

bool Machine::settled() const {
  if (!ended()) return false;
  bool source_over = !ctl_.outgoing_issued() || ctl_.source_clean() || ctl_.source().done();
  bool destination_over = DestinationOver() || (DestinationOwns() && ctl_.destination().done());
  return source_over && destination_over;
}

absl::Status Machine::CanResolve() const {
  if (pub_.guest_location() != v1::UNKNOWN) {
    if (!ended() && !pub_.message().empty()) {
      return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                   "{}: both ends are known, so that to confirm that one is down changes nothing. {}",
                   pub_.name(), pub_.message());
    }
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "{}: there is nothing to resolve, since {}", pub_.name(), WhereInWords(pub_));
  }
  if (DestinationOwns()) {
    if (!Unreachable(v1::ROLE_SOURCE)) {
      return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                   "{}: the destination owns the guest and {} answers; it will settle by itself", pub_.name(),
                   pub_.source());
    }
    return absl::OkStatus();
  }
  if (ctl_.source().handover() != v1::YIELDED) {
    return Error(
        v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
        "{}: the source has not given the guest away as far as is known; bring {} back, it decides by itself",
        pub_.name(), pub_.source());
  }
  return absl::OkStatus();
}

// --- events ---

void Machine::On(const Admitted&) {
  if (ctl_.step() != MigrationControl::WAITING) return;
  EnterPhase(v1::PREPARING);
  SetStep(MigrationControl::INSPECTING);
}

void Machine::On(const CommandDone& done) {
  in_flight_.erase(done.kind);
  if (!done.answered && !done.status.ok()) not_before_[done.kind] = now_.mono_ns + times_.retry.count();
  switch (done.kind) {
    case CommandKind::kInspect:
      return Inspected(done);
    case CommandKind::kPrepare:
      return Prepared(done);
    case CommandKind::kStart:
      return Started(done);
    case CommandKind::kCancel:
      return Cancelled(done);
    case CommandKind::kAbort:
      return Aborted(done);
    case CommandKind::kResolve:
      // What counts is the report that follows; until it comes the verdict is repeated.
      not_before_[done.kind] = now_.mono_ns + 3 * times_.retry.count();
      return;
    case CommandKind::kRetune:
      if (done.answered) ctl_.clear_retune();
      return;
  }
}

void Machine::Inspected(const CommandDone& done) {
  if (ctl_.step() != MigrationControl::INSPECTING) return;
  if (!done.answered) return;  // again until the phase's deadline
  if (!done.status.ok()) {
    return Give(v1::FAILED, ReasonOf(done.status, v1::VM_NOT_MIGRATABLE),
                fmt::format("{} cannot migrate {}: {}", pub_.source(), pub_.vm(), Message(done.status)));
  }
  const v1::Inspection& inspection = done.result.inspection();
  if (inspection.epoch() < pub_.epoch()) {
    return Give(v1::FAILED, v1::VM_NOT_MIGRATABLE,
                fmt::format("{} offers {} at epoch {}, but the record says {}: it is a stale copy",
                            pub_.source(), pub_.vm(), inspection.epoch(), pub_.epoch()));
  }
  *ctl_.mutable_inspection() = inspection;
  pub_.set_epoch(inspection.epoch());
  *pub_.mutable_findings() = inspection.findings();
  pub_.mutable_progress()->set_dirty_rate(inspection.dirty_rate());
  uint64_t memory = 0;
  for (const auto& block : inspection.blocks()) memory += block.size();
  if (memory > 0) pub_.mutable_progress()->set_memory_total(memory);
  for (const v1::Finding& finding : inspection.findings()) {
    if (finding.severity() == v1::BLOCKER) {
      return Give(
          v1::FAILED, v1::VALIDATION_FAILED,
          fmt::format("a check at {} found: {}: {}", pub_.source(), finding.subject(), finding.message()));
    }
  }
  ctl_.set_prepare_issued(true);
  SetStep(MigrationControl::READYING);
}

void Machine::Prepared(const CommandDone& done) {
  if (ctl_.step() != MigrationControl::READYING) {
    // Whatever came of it after the migration was given up: what it made must go.
    if (done.answered && ctl_.abort_wanted()) ctl_.set_destination_clean(false);
    return;
  }
  if (!done.answered) return;
  for (const v1::Finding& finding : done.result.prepared().findings()) *pub_.add_findings() = finding;
  for (const v1::Finding& finding : done.result.prepared().findings()) {
    if (finding.severity() == v1::BLOCKER) {
      return Give(v1::FAILED, v1::VALIDATION_FAILED,
                  fmt::format("a check at {} found: {}: {}", pub_.destination(), finding.subject(),
                              finding.message()));
    }
  }
  if (!done.status.ok()) {
    return Give(v1::FAILED, ReasonOf(done.status, v1::DESTINATION_START_FAILED),
                fmt::format("{} could not get ready: {}", pub_.destination(), Message(done.status)));
  }
  *ctl_.mutable_prepared() = done.result.prepared();
  ctl_.mutable_prepared()->clear_findings();
  ctl_.set_outgoing_issued(true);
  SetStep(MigrationControl::STARTING);
}

void Machine::Started(const CommandDone& done) {
  if (ctl_.step() != MigrationControl::STARTING || !done.answered) return;
  if (done.status.ok()) {
    ctl_.set_outgoing_accepted(true);
    source_.missing_since = 0;
    SetStep(MigrationControl::RUNNING);
    return;
  }
  std::string message = fmt::format("{} could not start: {}", pub_.source(), Message(done.status));
  v1::Reason reason = ReasonOf(done.status, v1::SOURCE_SHIM_FAILED);
  if (Refusal(done) && !HasSource()) {
    if (vm_ended_) return LoseAtSource(v1::SOURCE_VMM_FAILED, *vm_ended_);
    ctl_.set_source_clean(true);
    return Give(v1::FAILED, reason, message);
  }
  // It may have begun all the same: whoever cancels learns what became of it.
  SetStep(MigrationControl::RUNNING);
  WantCancel(reason, message);
}

void Machine::Cancelled(const CommandDone& done) {
  if (!done.answered) return;
  if (done.status.ok() || done.status.code() == absl::StatusCode::kFailedPrecondition) {
    cancel_told_ = true;  // a report will say what became of it
    return;
  }
  if (done.status.code() == absl::StatusCode::kNotFound && !SourceYielded()) {
    // The source's agent knows nothing of it. What a shim of it knew is gone with the shim.
    if (!HasSource() || source_.has_vm) {
      ctl_.set_source_clean(true);
    } else {
      LoseAtSource(v1::SOURCE_SHIM_FAILED,
                   fmt::format("{} has neither the VM nor a trace of the migration", pub_.source()));
    }
    return;
  }
  not_before_[CommandKind::kCancel] = now_.mono_ns + times_.retry.count();
}

void Machine::Aborted(const CommandDone& done) {
  if (!done.answered) return;
  if (done.status.ok() || done.status.code() == absl::StatusCode::kNotFound) {
    ctl_.set_destination_clean(true);
    return;
  }
  // FAILED_PRECONDITION: it is owner; its report says so or will. Anything else is tried again.
  not_before_[CommandKind::kAbort] = now_.mono_ns + 2 * times_.retry.count();
}

void Machine::On(const Reported& event) { TakeReport(event.report); }

void Machine::TakeReport(const v1::SideReport& report) {
  bool from_source = report.role() == v1::ROLE_SOURCE;
  if (!from_source && report.role() != v1::ROLE_DESTINATION) return;
  if (report.done()) {
    v1::ReportAck ack;
    ack.set_migration_id(report.migration_id());
    ack.set_role(report.role());
    ack.set_sequence(report.sequence());
    actions_.acks.push_back({report.role(), std::move(ack)});
  }
  v1::SideReport* known = from_source ? ctl_.mutable_source() : ctl_.mutable_destination();
  Side& side = from_source ? source_ : destination_;
  if (side.sequence != 0 && report.sequence() <= side.sequence) return;
  v1::HandoverState verdict = known->handover();
  *known = report;
  // A destination's journal never takes a verdict back; whoever says less just does not know it.
  if (!from_source && (verdict == v1::OWNER || verdict == v1::REFUSED)) known->set_handover(verdict);
  side.sequence = report.sequence();
  side.missing_since = 0;
  if (from_source) {
    ctl_.set_source_clean(false);
    if (ctl_.step() == MigrationControl::STARTING) {
      ctl_.set_outgoing_accepted(true);
      SetStep(MigrationControl::RUNNING);
    }
  } else if (!report.done()) {
    // It holds something after all (a PrepareIncoming that was carried out late).
    ctl_.set_destination_clean(false);
  }
  MergeProgress();
}

void Machine::On(const HostUp& event) {
  Side& side = event.role == v1::ROLE_SOURCE ? source_ : destination_;
  side.up = true;
  side.down_since = 0;
  side.sequence = 0;
  side.has_vm = event.has_vm;
  if (event.role == v1::ROLE_SOURCE) cancel_told_ = false;
  not_before_.clear();
  if (event.report) {
    TakeReport(*event.report);
  } else if (ctl_.outgoing_issued()) {
    side.missing_since = now_.mono_ns;
  }
}

void Machine::On(const HostDown& event) {
  Side& side = event.role == v1::ROLE_SOURCE ? source_ : destination_;
  side.up = false;
  side.down_since = now_.mono_ns;
  side.missing_since = 0;
  // Results of these will never come.
  auto forget = [&](std::initializer_list<CommandKind> kinds) {
    for (CommandKind kind : kinds) in_flight_.erase(kind);
  };
  if (event.role == v1::ROLE_SOURCE) {
    forget({CommandKind::kInspect, CommandKind::kStart, CommandKind::kCancel, CommandKind::kResolve,
            CommandKind::kRetune});
  } else {
    forget({CommandKind::kPrepare, CommandKind::kAbort});
  }
}

void Machine::On(const VmEnded& event) {
  switch (ctl_.step()) {
    case MigrationControl::INSPECTING:
    case MigrationControl::READYING:
      SetLocation(v1::LOST);
      return Give(v1::FAILED, v1::SOURCE_VMM_FAILED,
                  fmt::format("the guest was lost at {}: {}", pub_.source(), event.how));
    case MigrationControl::STARTING:
      vm_ended_ = event.how;  // the answer to StartOutgoing tells whether the source's shim has a word in it
      return;
    default:
      // QUEUED: the inspection will find out. Later the source itself reports what became of the guest.
      return;
  }
}

void Machine::On(const CancelAsked&) {
  if (ended() || pub_.cancel_requested()) return;
  pub_.set_cancel_requested(true);
  if (ctl_.step() == MigrationControl::ENDING) return;
  if (!ctl_.outgoing_issued()) return Give(v1::CANCELLED, v1::CANCELLED_BY_REQUEST, "cancelled on request");
  WantCancel(v1::CANCELLED_BY_REQUEST, "cancelled on request");
}

void Machine::On(const RetuneAsked& event) {
  if (ended()) return;
  if (event.retune.has_bandwidth()) {
    pub_.mutable_params()->set_bandwidth(event.retune.bandwidth());
    ctl_.mutable_retune()->set_bandwidth(event.retune.bandwidth());
  }
  if (event.retune.has_max_downtime()) {
    *pub_.mutable_params()->mutable_max_downtime() = event.retune.max_downtime();
    *ctl_.mutable_retune()->mutable_max_downtime() = event.retune.max_downtime();
  }
  // Before StartOutgoing the parameters travel with it.
  if (!ctl_.outgoing_issued()) ctl_.clear_retune();
}

void Machine::On(const FencedAsked&) {
  if (!CanResolve().ok()) return;
  if (DestinationOwns()) {
    ctl_.set_source_fenced(true);
  } else {
    ctl_.set_fenced(true);
  }
}

// --- what follows from the state ---

void Machine::LoseAtSource(v1::Reason reason, const std::string& how) {
  auto* report = ctl_.mutable_source();
  report->set_done(true);
  report->set_guest_lost(true);
  report->set_guest_running(false);
  report->set_reason(reason);
  report->set_message(how);
  if (ctl_.step() == MigrationControl::STARTING) SetStep(MigrationControl::RUNNING);
}

void Machine::Give(v1::Phase phase, v1::Reason reason, const std::string& message) {
  ctl_.set_end_phase(phase);
  ctl_.set_end_reason(reason);
  ctl_.set_end_message(message);
  ctl_.set_abort_wanted(ctl_.prepare_issued());
  SetStep(MigrationControl::ENDING);
}

void Machine::WantCancel(v1::Reason reason, const std::string& message) {
  if (ctl_.cancel_wanted()) return;
  ctl_.set_cancel_wanted(true);
  ctl_.set_cancel_reason(reason);
  ctl_.set_cancel_message(message);
}

void Machine::SetStep(MigrationControl::Step step) {
  ctl_.set_step(step);
  step_since_ = now_.mono_ns;
}

void Machine::EnterPhase(v1::Phase phase) {
  if (phase <= pub_.phase()) return;
  pub_.set_phase(phase);
  phase_since_ = now_.mono_ns;
  for (const v1::PhaseTime& time : pub_.phase_times()) {
    if (time.phase() == phase) return;  // a side has reported when it began
  }
  auto* time = pub_.add_phase_times();
  time->set_phase(phase);
  *time->mutable_time() = Stamp(now_.wall_ns);
}

void Machine::MergeProgress() {
  const v1::SideReport& source = ctl_.source();
  const v1::SideReport& destination = ctl_.destination();
  for (const v1::SideReport* side : {&source, &destination}) {
    for (const v1::PhaseTime& reported : side->phase_times()) {
      if (reported.phase() <= v1::PREPARING || reported.phase() > v1::FINISHING) continue;
      bool known = std::any_of(pub_.phase_times().begin(), pub_.phase_times().end(),
                               [&](const v1::PhaseTime& time) { return time.phase() == reported.phase(); });
      if (!known) *pub_.add_phase_times() = reported;
    }
  }
  std::sort(pub_.mutable_phase_times()->begin(), pub_.mutable_phase_times()->end(),
            [](const v1::PhaseTime& a, const v1::PhaseTime& b) { return a.phase() < b.phase(); });
  if (source.has_progress()) {
    // Figures of the checks stay where the source has none yet.
    v1::Progress before = pub_.progress();
    *pub_.mutable_progress() = source.progress();
    auto* progress = pub_.mutable_progress();
    if (progress->memory_total() == 0) progress->set_memory_total(before.memory_total());
    if (progress->dirty_rate() == 0 && progress->rounds().empty())
      progress->set_dirty_rate(before.dirty_rate());
  }
  if (destination.progress().has_downtimes()) {
    // The resume happens at the destination, so its figures complete and override the source's.
    auto* downtimes = pub_.mutable_progress()->mutable_downtimes();
    v1::Downtimes theirs = destination.progress().downtimes();
    if (theirs.has_vcpu()) *downtimes->mutable_vcpu() = theirs.vcpu();
    if (theirs.has_device()) *downtimes->mutable_device() = theirs.device();
    if (theirs.has_network()) *downtimes->mutable_network() = theirs.network();
    for (const v1::NamedDuration& part : theirs.parts()) {
      bool known = std::any_of(downtimes->parts().begin(), downtimes->parts().end(),
                               [&](const v1::NamedDuration& p) { return p.name() == part.name(); });
      if (!known) *downtimes->add_parts() = part;
    }
  }
}

bool Machine::Unreachable(v1::Role role) const {
  const Side& side = role == v1::ROLE_SOURCE ? source_ : destination_;
  return !side.up && now_.mono_ns - side.down_since >= times_.unreachable.count();
}

// Whether `limit` has passed since `start`; arms the tick for it otherwise.
bool Machine::Passed(int64_t start, Duration limit) {
  int64_t when = start + limit.count();
  if (now_.mono_ns >= when) return true;
  Wake(when);
  return false;
}

void Machine::Wake(int64_t mono_ns) {
  if (!next_tick_ || mono_ns < *next_tick_) next_tick_ = mono_ns;
}

void Machine::Advance() {
  switch (ctl_.step()) {
    case MigrationControl::WAITING:
      return;
    case MigrationControl::INSPECTING:
    case MigrationControl::READYING:
      return AdvanceBeforeStart();
    case MigrationControl::ENDING:
      // Nothing of this migration could move the guest: the source was never asked, or refused.
      if (DestinationOver() || Passed(step_since_, times_.cleanup)) {
        End(ctl_.end_phase(), ctl_.end_reason(), ctl_.end_message());
      }
      return;
    default:
      // Ended before the source was asked: nothing can change any more.
      if (!ctl_.outgoing_issued()) return;
      return AdvanceRunning();
  }
}

void Machine::AdvanceBeforeStart() {
  if (!Passed(phase_since_, times_.preparing)) return;
  v1::Role role = ctl_.step() == MigrationControl::INSPECTING ? v1::ROLE_SOURCE : v1::ROLE_DESTINATION;
  if (!Up(role)) {
    Give(v1::FAILED, v1::AGENT_UNREACHABLE,
         fmt::format("the agent of {} did not answer within {} s", HostOf(role),
                     std::chrono::duration_cast<std::chrono::seconds>(times_.preparing).count()));
  } else {
    Give(v1::FAILED, v1::PHASE_TIMEOUT,
         fmt::format("{} was not ready within {} s", HostOf(role),
                     std::chrono::duration_cast<std::chrono::seconds>(times_.preparing).count()));
  }
  Advance();
}

void Machine::End(v1::Phase phase, v1::Reason reason, const std::string& message) {
  if (ended()) {
    // Only the whereabouts may still become known; the outcome stands.
    if (pub_.guest_location() != v1::UNKNOWN &&
        pub_.message().find(WhereInWords(pub_)) == std::string::npos) {
      pub_.set_message(EndMessage(pub_, pub_.reason(), message));
    }
    return;
  }
  SetStep(MigrationControl::ENDED);
  EnterPhase(phase);
  pub_.set_reason(reason);
  pub_.set_message(EndMessage(pub_, reason, message));
  *pub_.mutable_end_time() = Stamp(now_.wall_ns);
  if (!DestinationOver() && !DestinationOwns()) ctl_.set_abort_wanted(true);
  ctl_.clear_retune();
  if (settled()) {
    ctl_.clear_inspection();
    ctl_.clear_prepared();
  }
}

}  // namespace baton::server
