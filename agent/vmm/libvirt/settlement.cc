#include "agent/vmm/libvirt/settlement.h"

#include <fmt/format.h>
#include <libvirt/libvirt.h>

namespace baton::vmm {
namespace {

using Action = SettlementAction;
using Condition = DomainCondition;

// The source's copy, by what it means here.
enum class SourceCopy {
  kUnseen,
  kNone,
  kRuns,
  kHolds,    // stands still of its own accord, and holds the guest
  kStopped,  // stands still because of the migration (or of our suspending)
  kPostcopy,
  kPostcopyFailed,
  kCrashed,
};

enum class DestinationCopy {
  kUnseen,
  kNone,
  kRuns,
  kPostcopy,        // started, pages are missing
  kPostcopyFailed,  // the same, and nobody brings them
  kHolds,           // finished, stands still
  kIncoming,        // not finished
  kCrashed,
};

SourceCopy SourceOf(const SettlementInput& in) {
  switch (in.source.condition) {
    case Condition::kUnreachable:
      return SourceCopy::kUnseen;
    case Condition::kAbsent:
    case Condition::kShutOff:
    case Condition::kShutOffMigrated:
    case Condition::kShutOffFailed:
      return SourceCopy::kNone;
    case Condition::kRunning:
    case Condition::kRunningPostcopy:
    case Condition::kRunningPostcopyFailed:
      return SourceCopy::kRuns;
    case Condition::kPaused:
      return in.source_suspended && !in.was_paused ? SourceCopy::kStopped : SourceCopy::kHolds;
    case Condition::kPausedMigration:
    case Condition::kPausedIncoming:
      return SourceCopy::kStopped;
    case Condition::kPausedPostcopy:
      return SourceCopy::kPostcopy;
    case Condition::kPausedPostcopyFailed:
      return SourceCopy::kPostcopyFailed;
    case Condition::kCrashed:
      return SourceCopy::kCrashed;
  }
  return SourceCopy::kUnseen;
}

DestinationCopy DestinationOf(const SettlementInput& in) {
  switch (in.destination.condition) {
    case Condition::kUnreachable:
      return in.fenced ? DestinationCopy::kNone : DestinationCopy::kUnseen;
    case Condition::kAbsent:
    case Condition::kShutOff:
    case Condition::kShutOffMigrated:
    case Condition::kShutOffFailed:
      return DestinationCopy::kNone;
    case Condition::kRunning:
      return DestinationCopy::kRuns;
    case Condition::kRunningPostcopy:
    case Condition::kPausedPostcopy:
      return DestinationCopy::kPostcopy;
    case Condition::kRunningPostcopyFailed:
    case Condition::kPausedPostcopyFailed:
      return DestinationCopy::kPostcopyFailed;
    case Condition::kPaused:
      return DestinationCopy::kHolds;
    case Condition::kPausedMigration:
    case Condition::kPausedIncoming:
      return DestinationCopy::kIncoming;
    case Condition::kCrashed:
      return DestinationCopy::kCrashed;
  }
  return DestinationCopy::kUnseen;
}

Settlement Make(Action action, v1::GuestLocation location, const char* why) {
  Settlement out;
  out.action = action;
  out.location = location;
  out.why = why;
  return out;
}

// Where the guest is while libvirt is at work.
v1::GuestLocation Meanwhile(SourceCopy s, DestinationCopy d) {
  if (s == SourceCopy::kUnseen) return v1::UNKNOWN;
  if (d == DestinationCopy::kRuns || d == DestinationCopy::kPostcopy || d == DestinationCopy::kPostcopyFailed)
    return s == SourceCopy::kRuns ? v1::UNKNOWN : v1::DESTINATION;
  return s == SourceCopy::kRuns ? v1::SOURCE : v1::UNKNOWN;
}

Settlement DestinationRuns(SourceCopy s) {
  switch (s) {
    case SourceCopy::kUnseen:
      return Make(Action::kAskAgain, v1::UNKNOWN,
                  "the destination runs the guest; the source does not answer, and may run it too");
    case SourceCopy::kNone:
      return Make(Action::kNothing, v1::DESTINATION,
                  "the destination runs the guest, the source has no copy");
    case SourceCopy::kRuns:
      return Make(Action::kPauseSource, v1::UNKNOWN,
                  "both ends run: libvirt started the source again although the destination had taken over");
    case SourceCopy::kCrashed:
      return Make(Action::kOperator, v1::DESTINATION,
                  "the destination runs the guest; the source keeps a crashed copy");
    case SourceCopy::kHolds:
    case SourceCopy::kStopped:
    case SourceCopy::kPostcopy:
    case SourceCopy::kPostcopyFailed:
      return Make(Action::kDestroySource, v1::DESTINATION,
                  "the destination was seen to run the guest; what the source has is left over");
  }
  return {};
}

// libvirt says at the source that post-copy lost its connection. `failed`: at the destination too.
//
// libvirt's daemon at the destination may say `post-copy` for good although its QEMU waits for another
// connection: it calls a recovery failed whose connection its QEMU has yet to tell of (a state of QEMU's that
// libvirt 9.0 does not know makes that likely), hears that QEMU goes on, and nobody in it watches for the
// next break (qemuProcessHandleMigrationStatus, libvirt 9.0 to 11.3). Asked to recover it looks at its QEMU
// itself, and refuses unless that waits; so the one whose QEMU was seen to wait at the source, where the
// destination has had the time to notice, asks.
Settlement BrokenPostcopy(const SettlementInput& in, bool failed) {
  switch (SourceStreamOf(in.source_qemu)) {
    case SourceStream::kConnected:
      return Make(Action::kWait, v1::DESTINATION,
                  "post-copy goes on: the source's QEMU is connected, and only libvirt has not noticed");
    case SourceStream::kConnecting:
      return Make(Action::kWait, v1::DESTINATION, "post-copy is being connected again, by the source's QEMU");
    case SourceStream::kSent:
      return Make(Action::kWait, v1::DESTINATION,
                  "the source's QEMU has sent everything; libvirt has not noticed yet");
    case SourceStream::kBroken:
    case SourceStream::kUnknown:
      break;
  }
  if (failed)
    return Make(Action::kRecoverPostcopy, v1::DESTINATION,
                "post-copy lost its connection; both ends wait for another one");
  if (in.unnoticed)
    return Make(Action::kRecoverPostcopy, v1::DESTINATION,
                "post-copy lost its connection at the source, and the destination's libvirt does not say so: "
                "it is asked to look");
  return Make(Action::kWait, v1::DESTINATION,
              "post-copy lost its connection at the source; the destination has not noticed yet");
}

// It runs, or would, and some of its memory is at the source only.
Settlement DestinationInPostcopy(SourceCopy s, const SettlementInput& in, bool failed) {
  switch (s) {
    case SourceCopy::kUnseen:
      return Make(Action::kAskAgain, v1::UNKNOWN,
                  "the guest was started at the destination in post-copy; the source does not answer");
    case SourceCopy::kRuns:
      return Make(Action::kPauseSource, v1::UNKNOWN,
                  "the source runs although the destination took over in post-copy");
    case SourceCopy::kPostcopyFailed:
      return BrokenPostcopy(in, failed);
    case SourceCopy::kPostcopy:
    case SourceCopy::kStopped:
      return Make(Action::kWait, v1::DESTINATION,
                  failed ? "post-copy lost its connection at the destination; the source has not noticed yet"
                         : "post-copy is under way");
    case SourceCopy::kNone:
      if (!failed)
        return Make(Action::kWait, v1::DESTINATION,
                    "the source has ended its copy; the destination is about to see that it has everything");
      return Make(
          Action::kOperator, v1::DESTINATION,
          "the source's QEMU is gone, and with it memory that the guest at the destination still misses: it "
          "stands still as soon as it needs some of that, and nothing brings it. What to do: when what still "
          "runs of it may end, end it (virsh destroy, at the "
          "destination), and start the guest anew, which is a power cut to it");
    case SourceCopy::kHolds:
    case SourceCopy::kCrashed:
      return Make(Action::kOperator, v1::DESTINATION,
                  "the destination took over in post-copy; the source's copy does not take part in it");
  }
  return {};
}

// It was finished, and stands still. `ran`: it was seen to run. `may_have_run`: it was not left standing on
// purpose, so it must have been started.
Settlement DestinationHolds(SourceCopy s, bool ran, bool may_have_run) {
  switch (s) {
    case SourceCopy::kUnseen:
      return Make(Action::kAskAgain, v1::UNKNOWN,
                  "the destination holds the guest, paused; the source does not answer, and may run it");
    case SourceCopy::kNone:
      return Make(Action::kNothing, v1::PAUSED_DESTINATION,
                  "the destination holds the guest, paused; the source has no copy");
    case SourceCopy::kRuns:
      if (ran)
        return Make(Action::kPauseSource, v1::UNKNOWN,
                    "the source runs although the guest has run at the destination, where it is paused now");
      if (may_have_run)
        return Make(Action::kOperator, v1::UNKNOWN,
                    "the source runs; the destination's copy is paused, and may have run before");
      return Make(Action::kDestroyDestination, v1::SOURCE,
                  "the source runs the guest; the destination's paused copy has never run");
    case SourceCopy::kHolds:
    case SourceCopy::kStopped:
      if (ran)
        return Make(Action::kDestroySource, v1::PAUSED_DESTINATION,
                    "the guest has run at the destination and is paused there; what the source has is old");
      if (may_have_run)
        return Make(Action::kOperator, v1::UNKNOWN,
                    "both copies are paused, and the destination's may have run before");
      return Make(Action::kDestroyDestination, v1::PAUSED_SOURCE,
                  "the source holds the guest, paused; the destination's copy of it has never run");
    case SourceCopy::kPostcopyFailed:
    case SourceCopy::kPostcopy:
    case SourceCopy::kCrashed:
      return Make(Action::kOperator, v1::PAUSED_DESTINATION,
                  "the destination holds the guest, paused; the source's copy may still be needed");
  }
  return {};
}

// It waits for the guest, or for libvirt's finish.
Settlement DestinationIncoming(SourceCopy s, bool ran, bool migrated) {
  if (s == SourceCopy::kUnseen)
    return Make(Action::kAskAgain, v1::UNKNOWN,
                "the destination's copy was never started; the source does not answer");
  if (ran)
    return Make(Action::kOperator, v1::UNKNOWN,
                "the guest has run at the destination, and libvirt says that it is arriving there");
  switch (s) {
    case SourceCopy::kRuns:
      return Make(Action::kDestroyDestination, v1::SOURCE,
                  "the source runs the guest; the destination's copy was never started");
    case SourceCopy::kStopped:
    case SourceCopy::kHolds:
    case SourceCopy::kCrashed:
      return Make(Action::kDestroyDestination, v1::PAUSED_SOURCE,
                  "the source holds the whole guest; the destination's copy was never started");
    case SourceCopy::kPostcopyFailed:
    case SourceCopy::kPostcopy:
      return Make(Action::kWait, v1::UNKNOWN, "post-copy began, and the destination has not started yet");
    case SourceCopy::kNone:
      return Make(Action::kOperator, migrated ? v1::PAUSED_DESTINATION : v1::UNKNOWN,
                  "the only copy is the destination's, which was never started and may not be whole");
    case SourceCopy::kUnseen:
      break;
  }
  return {};
}

Settlement DestinationEmpty(SourceCopy s, const SettlementInput& in, bool fenced) {
  if (s == SourceCopy::kUnseen)
    return Make(Action::kAskAgain, v1::UNKNOWN, "the destination has no copy; the source does not answer");
  if (in.destination_ran) {
    switch (s) {
      case SourceCopy::kRuns:
        return Make(
            Action::kOperator, v1::SOURCE,
            "the source runs; but the guest had run at the destination, where it ended, so what it wrote "
            "there is on its disks and not in its memory");
      case SourceCopy::kNone:
        return Make(Action::kNothing, v1::LOST, "the guest ran at the destination and ended there");
      case SourceCopy::kPostcopyFailed:
        // Nobody can decide otherwise: the halves cannot be put together again.
        return Make(
            Action::kNothing, v1::LOST,
            "the guest ran at the destination in post-copy and ended there, when a part of its memory was at "
            "each end. The source's copy is a half, older than the disks, and must not run. What to do: end "
            "it (virsh destroy, at the source), and start the guest anew, which is a power cut to it");
      default:
        return Make(
            Action::kOperator, v1::LOST,
            "the guest ran at the destination and ended there; the source's copy is old and must not run");
    }
  }
  switch (s) {
    case SourceCopy::kRuns:
      return Make(Action::kNothing, v1::SOURCE, "the source runs the guest, the destination has no copy");
    case SourceCopy::kHolds:
    case SourceCopy::kCrashed:
      return Make(Action::kNothing, v1::PAUSED_SOURCE,
                  "the source holds the guest, which stood still by itself; the destination has no copy");
    case SourceCopy::kStopped:
      if (!in.destination_watched && !fenced && in.destination.condition != Condition::kShutOffFailed)
        return Make(Action::kOperator, v1::UNKNOWN,
                    "the destination has no copy; one may have run and ended while nobody watched");
      return Make(Action::kResumeSource, v1::PAUSED_SOURCE,
                  "the source holds the guest; the destination has no copy and none has run there");
    case SourceCopy::kPostcopy:
    case SourceCopy::kPostcopyFailed:
      return Make(
          Action::kOperator, v1::LOST,
          "the guest was given to the destination in post-copy and is gone there, and nobody saw it run. "
          "What to do: end the source's copy (virsh destroy, at the source), and start the guest anew, "
          "which is a power cut to it");
    case SourceCopy::kNone:
    case SourceCopy::kUnseen:
      return Make(Action::kNothing, v1::LOST, "neither end has a copy: the guest has ended");
  }
  return {};
}

Settlement DestinationCrashed(SourceCopy s, bool ran) {
  switch (s) {
    case SourceCopy::kUnseen:
      return Make(Action::kAskAgain, v1::UNKNOWN,
                  "the guest crashed at the destination; the source does not answer");
    case SourceCopy::kNone:
      return Make(Action::kNothing, v1::PAUSED_DESTINATION,
                  "the guest crashed at the destination and was kept there");
    case SourceCopy::kRuns:
      return Make(Action::kOperator, v1::SOURCE, "the source runs; a copy crashed at the destination");
    case SourceCopy::kHolds:
    case SourceCopy::kStopped:
      if (ran)
        return Make(Action::kDestroySource, v1::PAUSED_DESTINATION,
                    "the guest ran at the destination and crashed there; what the source has is old");
      [[fallthrough]];
    case SourceCopy::kPostcopy:
    case SourceCopy::kPostcopyFailed:
    case SourceCopy::kCrashed:
      return Make(Action::kOperator, v1::PAUSED_DESTINATION,
                  "a copy crashed at the destination, and the source has one");
  }
  return {};
}

Settlement DestinationUnseen(SourceCopy s, const SettlementInput& in) {
  // Certain: what the destination has, if anything, is not whole and cannot be started. A source that the
  // migration has stopped contradicts that, and is not believed.
  if (!in.handed_over && !in.destination_ran) {
    switch (s) {
      case SourceCopy::kRuns:
        return Make(Action::kNothing, v1::SOURCE,
                    "the source runs the guest, whose state never got to the destination whole");
      case SourceCopy::kHolds:
      case SourceCopy::kCrashed:
        return Make(Action::kNothing, v1::PAUSED_SOURCE,
                    "the source holds the guest, whose state never got to the destination whole");
      default:
        break;
    }
  }
  if (s == SourceCopy::kRuns)
    return Make(
        Action::kPauseSource, v1::UNKNOWN,
        "the source runs, after the destination may have taken over; the destination does not answer");
  return Make(Action::kAskAgain, v1::UNKNOWN, "the destination does not answer, and may run the guest");
}

Settlement Decide(const SettlementInput& in) {
  const SourceCopy s = SourceOf(in);
  const DestinationCopy d = DestinationOf(in);
  // A source that runs and has nothing under way will not stop by itself, whatever the destination is about
  // to do.
  const bool both_run = s == SourceCopy::kRuns && !in.call_active && !in.source.job &&
                        (d == DestinationCopy::kRuns || d == DestinationCopy::kPostcopy ||
                         d == DestinationCopy::kPostcopyFailed);
  // libvirt keeps the job of a broken post-copy, for the call that recovers it.
  const bool busy =
      in.call_active || in.source.job || (in.destination.job && d != DestinationCopy::kPostcopyFailed);
  // The same at the source, where nothing is left to recover with.
  const bool halved = !in.call_active && s == SourceCopy::kPostcopyFailed && d == DestinationCopy::kNone;
  const bool broken = !in.call_active &&
                      (s == SourceCopy::kPostcopyFailed || d == DestinationCopy::kPostcopyFailed) &&
                      (s == SourceCopy::kPostcopyFailed || s == SourceCopy::kPostcopy) &&
                      (d == DestinationCopy::kPostcopyFailed || d == DestinationCopy::kPostcopy);
  const bool hangs = in.call_active && in.recovery_lasts && s == SourceCopy::kPostcopyFailed &&
                     (d == DestinationCopy::kPostcopyFailed || d == DestinationCopy::kPostcopy) &&
                     SourceStreamOf(in.source_qemu) == SourceStream::kBroken;
  if (hangs)
    return Make(
        Action::kWait, v1::DESTINATION,
        "post-copy lost its connection, and libvirt's call that is to recover it has not got there for "
        "a while: the destination's libvirt waits for its QEMU, or hangs");
  if (!in.call_active && s == SourceCopy::kPostcopyFailed && d == DestinationCopy::kUnseen)
    return Make(Action::kAskAgain, v1::UNKNOWN,
                "post-copy lost its connection at the source, and the destination does not answer");
  if (busy && !both_run && !broken && !halved)
    return Make(Action::kWait, Meanwhile(s, d), "libvirt is at work");
  switch (d) {
    case DestinationCopy::kUnseen:
      return s == SourceCopy::kUnseen ? Make(Action::kAskAgain, v1::UNKNOWN, "neither end answers")
                                      : DestinationUnseen(s, in);
    case DestinationCopy::kNone:
      return DestinationEmpty(s, in, in.destination.condition == Condition::kUnreachable);
    case DestinationCopy::kRuns:
      return DestinationRuns(s);
    case DestinationCopy::kPostcopy:
      return DestinationInPostcopy(s, in, false);
    case DestinationCopy::kPostcopyFailed:
      return DestinationInPostcopy(s, in, true);
    case DestinationCopy::kHolds:
      return DestinationHolds(s, in.destination_ran, in.destination_ran || !in.was_paused);
    case DestinationCopy::kIncoming:
      return DestinationIncoming(s, in.destination_ran, in.source.condition == Condition::kShutOffMigrated);
    case DestinationCopy::kCrashed:
      return DestinationCrashed(s, in.destination_ran);
  }
  return {};
}

}  // namespace

const char* NameOf(DomainCondition condition) {
  switch (condition) {
    case Condition::kUnreachable:
      return "does not answer";
    case Condition::kAbsent:
      return "absent";
    case Condition::kShutOff:
      return "shut off";
    case Condition::kShutOffMigrated:
      return "shut off, migrated";
    case Condition::kShutOffFailed:
      return "shut off, failed to arrive";
    case Condition::kRunning:
      return "running";
    case Condition::kRunningPostcopy:
      return "running in post-copy";
    case Condition::kRunningPostcopyFailed:
      return "running, post-copy failed";
    case Condition::kPaused:
      return "paused";
    case Condition::kPausedMigration:
      return "paused by migration";
    case Condition::kPausedIncoming:
      return "arriving";
    case Condition::kPausedPostcopy:
      return "paused in post-copy";
    case Condition::kPausedPostcopyFailed:
      return "paused, post-copy failed";
    case Condition::kCrashed:
      return "crashed";
  }
  return "unknown";
}

const char* NameOf(SettlementAction action) {
  switch (action) {
    case Action::kNothing:
      return "nothing";
    case Action::kWait:
      return "wait";
    case Action::kAskAgain:
      return "ask again";
    case Action::kResumeSource:
      return "resume the source";
    case Action::kPauseSource:
      return "pause the source";
    case Action::kDestroySource:
      return "destroy what the source has left";
    case Action::kDestroyDestination:
      return "destroy the destination's copy";
    case Action::kRecoverPostcopy:
      return "recover post-copy";
    case Action::kOperator:
      return "a person decides";
  }
  return "unknown";
}

SourceStream SourceStreamOf(const std::string& status) {
  if (status == "postcopy-paused") return SourceStream::kBroken;
  if (status == "postcopy-recover" || status == "postcopy-recover-setup") return SourceStream::kConnecting;
  if (status == "postcopy-active" || status == "postcopy-device") return SourceStream::kConnected;
  return status == "completed" ? SourceStream::kSent : SourceStream::kUnknown;
}

DomainCondition ConditionOf(int state, int reason, MigrationRole role) {
  switch (state) {
    case VIR_DOMAIN_RUNNING:
    case VIR_DOMAIN_BLOCKED:
    case VIR_DOMAIN_SHUTDOWN:  // the guest is shutting down: its vCPUs run
      if (state == VIR_DOMAIN_RUNNING && reason == VIR_DOMAIN_RUNNING_POSTCOPY)
        return Condition::kRunningPostcopy;
      if (state == VIR_DOMAIN_RUNNING && reason == VIR_DOMAIN_RUNNING_POSTCOPY_FAILED)
        return Condition::kRunningPostcopyFailed;
      return Condition::kRunning;
    case VIR_DOMAIN_PAUSED:
      switch (reason) {
        case VIR_DOMAIN_PAUSED_MIGRATION:
        case VIR_DOMAIN_PAUSED_STARTING_UP:
          return role == MigrationRole::kSource ? Condition::kPausedMigration : Condition::kPausedIncoming;
        // libvirt could not tell after its daemon's restart. At the source its own recovery takes this for
        // the migration's doing as well.
        case VIR_DOMAIN_PAUSED_UNKNOWN:
          return role == MigrationRole::kSource ? Condition::kPausedMigration : Condition::kPaused;
        case VIR_DOMAIN_PAUSED_POSTCOPY:
          return Condition::kPausedPostcopy;
        case VIR_DOMAIN_PAUSED_POSTCOPY_FAILED:
          return Condition::kPausedPostcopyFailed;
        case VIR_DOMAIN_PAUSED_CRASHED:
          return Condition::kCrashed;
        default:
          return Condition::kPaused;
      }
    case VIR_DOMAIN_PMSUSPENDED:
      return Condition::kPaused;
    case VIR_DOMAIN_SHUTOFF:
      if (reason == VIR_DOMAIN_SHUTOFF_FAILED && role == MigrationRole::kDestination)
        return Condition::kShutOffFailed;
      return reason == VIR_DOMAIN_SHUTOFF_MIGRATED ? Condition::kShutOffMigrated : Condition::kShutOff;
    case VIR_DOMAIN_CRASHED:
      return Condition::kCrashed;
    default:
      return Condition::kUnreachable;
  }
}

Settlement Settle(const SettlementInput& input) {
  Settlement out = Decide(input);
  out.why += fmt::format(
      " (source: {}{}{}; destination: {}{}{})", NameOf(input.source.condition),
      input.source.job ? ", with a job" : "",
      input.source_qemu.empty() ? "" : ", its QEMU " + input.source_qemu, NameOf(input.destination.condition),
      input.destination.job ? ", with a job" : "",
      input.fenced && input.destination.condition == Condition::kUnreachable ? ", confirmed not to run" : "");
  return out;
}

}  // namespace baton::vmm
