// What becomes of the guest: the words of the two sides are put together, and the deadlines of what is
// missing.
#include <algorithm>

#include "common/reason.h"
#include "server/control/machine.h"
#include "server/control/words.h"

namespace baton::server {
namespace {

Duration FromProto(const google::protobuf::Duration& duration) {
  return std::chrono::seconds(duration.seconds()) + std::chrono::nanoseconds(duration.nanos());
}

// A side that says why it cannot go on by itself: a reason before its end.
bool Troubled(const v1::SideReport& report) {
  return !report.done() && report.reason() != v1::REASON_UNSPECIFIED && report.reason() != v1::NONE &&
         !report.message().empty();
}

bool Final(v1::Phase phase) { return phase >= v1::SUCCEEDED; }

// Reasons that say no more than "the other side went away".
bool Secondary(v1::Reason reason) {
  return reason == v1::REASON_UNSPECIFIED || reason == v1::NONE || reason == v1::PEER_CONNECTION_FAILED ||
         reason == v1::DESTINATION_REFUSED || reason == v1::INTERNAL;
}

}  // namespace

// From StartOutgoing on the sides decide; here their words are put together.
void Machine::AdvanceRunning() {
  const v1::SideReport& source = ctl_.source();
  const v1::SideReport& destination = ctl_.destination();
  if (!ended()) {
    for (v1::Phase phase : {source.phase(), destination.phase()}) {
      if (!Final(phase)) EnterPhase(phase);
    }
    if (Troubled(source) || Troubled(destination)) {
      const v1::SideReport& side = Troubled(source) ? source : destination;
      pub_.set_message(
          fmt::format("{}: {}", Troubled(source) ? pub_.source() : pub_.destination(), side.message()));
    } else {
      pub_.clear_message();
    }
  }
  if (DestinationOwns()) {
    if (ctl_.fenced()) {
      // Both were allowed to run. Saying so loudly is all that is left; the fleet refuses the void claim.
      SetLocation(v1::UNKNOWN);
      return End(
          v1::FAILED, v1::INTERNAL,
          fmt::format("{} claims the guest although it was confirmed as fenced: two copies may have run",
                      pub_.destination()));
    }
    // In post-copy the guest runs there while its memory still comes: that may take long, and may yet fail.
    const bool postcopy = destination.phase() == v1::POSTCOPY && !destination.done();
    if (!ended()) EnterPhase(postcopy ? v1::POSTCOPY : v1::FINISHING);
    if (!SourceYielded() && !ctl_.source_fenced()) return SetLocation(v1::UNKNOWN);
    SetLocation(destination.guest_lost()      ? v1::LOST
                : destination.guest_running() ? v1::DESTINATION
                                              : v1::PAUSED_DESTINATION);
    bool source_over = source.done() || ctl_.source_fenced();
    bool late = !ended() && !postcopy && Passed(phase_since_, times_.finishing);
    if (!(destination.done() && source_over) &&
        !(late && (destination.done() || destination.guest_running()))) {
      return;
    }
    if (destination.guest_lost() || !destination.guest_running()) {
      std::string what = fmt::format("{} took the guest over and could not keep it running: {}",
                                     pub_.destination(), destination.message());
      // It has seen both ends.
      if (source.done() && source.guest_lost()) what += "; " + source.message();
      return End(v1::FAILED,
                 Secondary(destination.reason()) ? v1::DESTINATION_VMM_FAILED : destination.reason(), what);
    }
    std::string what = fmt::format("{} moved from {} to {}", pub_.vm(), pub_.source(), pub_.destination());
    if (!source_over) what += fmt::format(" ({} has not confirmed its clean-up yet)", pub_.source());
    if (ctl_.source_fenced()) return End(v1::SUCCEEDED, v1::RESOLVED_BY_OPERATOR, what);
    return End(v1::SUCCEEDED, v1::NONE, what);
  }
  if (source.done() && source.guest_lost()) {
    ctl_.set_abort_wanted(true);
    if (source.handover() == v1::YIELDED && !DestinationRefused()) return SetLocation(v1::UNKNOWN);
    SetLocation(v1::LOST);
    if (outcome_since_ == 0) outcome_since_ = now_.mono_ns;
    if (!ended() && !DestinationOver() && !Passed(outcome_since_, times_.cleanup)) return;
    return End(v1::FAILED, Secondary(source.reason()) ? v1::SOURCE_SHIM_FAILED : source.reason(),
               fmt::format("the guest was lost at {}: {}", pub_.source(), source.message()));
  }
  if (ctl_.source_clean() || (source.done() && !SourceYielded())) return SourceKeepsGuest();
  Undecided();
}

// The source says that it owns the guest and has finished with the migration.
void Machine::SourceKeepsGuest() {
  const v1::SideReport& source = ctl_.source();
  const v1::SideReport& destination = ctl_.destination();
  SetLocation(ctl_.source_clean() || source.guest_running() ? v1::SOURCE : v1::PAUSED_SOURCE);
  ctl_.set_abort_wanted(true);
  if (outcome_since_ == 0) outcome_since_ = now_.mono_ns;
  // A fenced destination is not waited for.
  if (!ended() && !DestinationOver() && !ctl_.fenced() && !Passed(outcome_since_, times_.cleanup)) return;
  v1::Reason reason = source.reason();
  std::string message = source.message();
  if (ctl_.fenced()) {
    reason = v1::RESOLVED_BY_OPERATOR;
    message =
        fmt::format("{} was confirmed as fenced, so {} resumed the guest", pub_.destination(), pub_.source());
  } else if (ctl_.source_clean() || (ctl_.cancel_wanted() && reason == v1::CANCELLED_BY_REQUEST)) {
    // The source was told to stop for a reason of ours, or never had anything.
    if (ctl_.cancel_wanted()) {
      reason = ctl_.cancel_reason();
      message = ctl_.cancel_message();
    }
  }
  // The side that broke first knows why; the other one only lost its peer. A destination that was told to
  // give up knows nothing: that was the consequence.
  if (Secondary(reason) && !Secondary(destination.reason()) &&
      destination.reason() != v1::CANCELLED_BY_REQUEST) {
    reason = destination.reason();
    message = fmt::format("{}: {}", pub_.destination(), destination.message());
  }
  if (reason == v1::REASON_UNSPECIFIED || reason == v1::NONE) reason = v1::INTERNAL;
  if (message.empty()) message = LabelOf(reason);
  if (!DestinationOver())
    message += fmt::format(" ({} has not confirmed its clean-up yet)", pub_.destination());
  End(reason == v1::CANCELLED_BY_REQUEST ? v1::CANCELLED : v1::FAILED, reason, message);
}

void Machine::Undecided() {
  const v1::SideReport& source = ctl_.source();
  if (source.handover() == v1::RELEASED) {
    SetLocation(v1::UNKNOWN);  // it heard OWNER; the destination's own word is on its way
  } else if (source.handover() == v1::YIELDED) {
    SetLocation(DestinationRefused() || ctl_.fenced() ? v1::PAUSED_SOURCE : v1::UNKNOWN);
    // A destination that ended without a verdict is made to write one.
    if (ctl_.destination().done()) ctl_.set_abort_wanted(true);
  } else if (Unreachable(v1::ROLE_SOURCE)) {
    SetLocation(v1::UNKNOWN);
  } else {
    SetLocation(!HasSource() || source.guest_running() ? v1::SOURCE : v1::PAUSED_SOURCE);
  }
  if (!source_.up) Wake(source_.down_since + times_.unreachable.count());
  if (!ended()) CheckDeadlines();
}

void Machine::CheckDeadlines() {
  const v1::SideReport& destination = ctl_.destination();
  // The source's agent is back and knows nothing of a migration that had begun: its shim is gone. Some time
  // is left for shims that it finds again late.
  if (source_.missing_since != 0 && (HasSource() || ctl_.outgoing_accepted()) &&
      Passed(source_.missing_since, times_.unreachable)) {
    WantCancel(v1::SOURCE_SHIM_FAILED, fmt::format("{} lost its side of the migration", pub_.source()));
  }
  if (ctl_.step() == MigrationControl::STARTING && Passed(phase_since_, times_.preparing)) {
    ctl_.set_abort_wanted(true);
    if (source_.up) {
      WantCancel(v1::PHASE_TIMEOUT, fmt::format("{} did not start in time", pub_.source()));
    } else {
      WantCancel(v1::AGENT_UNREACHABLE, fmt::format("the agent of {} did not answer", pub_.source()));
    }
  }
  if (pub_.phase() == v1::PRECOPY) {
    Duration limit = FromProto(pub_.params().max_duration());
    if (limit > Duration(0) && Passed(phase_since_, limit + times_.overtime)) {
      WantCancel(v1::PHASE_TIMEOUT, "the migration took longer than max_duration");
    }
  }
  if (pub_.phase() == v1::SWITCHOVER && Passed(phase_since_, times_.switchover)) {
    if (SourceYielded()) {
      ctl_.set_abort_wanted(true);  // the question for the verdict
    } else {
      WantCancel(v1::PHASE_TIMEOUT, "the switchover did not end in time");
    }
  }
  if (DestinationOver() && ctl_.outgoing_issued()) {
    if (outcome_since_ == 0) outcome_since_ = now_.mono_ns;
    if (!SourceYielded() && Passed(outcome_since_, times_.cleanup)) {
      // The source has not noticed that there is nobody to migrate to.
      v1::Reason reason = Secondary(destination.reason()) ? v1::PEER_CONNECTION_FAILED : destination.reason();
      WantCancel(reason, destination.message().empty()
                             ? fmt::format("{} gave up", pub_.destination())
                             : fmt::format("{}: {}", pub_.destination(), destination.message()));
    }
    if (!source_.up && Passed(std::max(source_.down_since, outcome_since_), times_.lost)) {
      SetLocation(v1::UNKNOWN);
      End(v1::FAILED, v1::AGENT_UNREACHABLE,
          fmt::format("{} has not answered for {} s and {} holds nothing of the guest", pub_.source(),
                      std::chrono::duration_cast<std::chrono::seconds>(times_.lost).count(),
                      pub_.destination()));
    }
  } else if (!DestinationOwns()) {
    outcome_since_ = 0;
  }
}

}  // namespace baton::server
