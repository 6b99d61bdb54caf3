// What is so, and what may be done, after libvirt's migration of a domain came to an end that has to be
// looked at: the states that libvirt leaves to "a third party". Pure.
//
// libvirt's peer-to-peer migration has the phases begin, prepare, perform, finish and confirm. The guest's
// state has left the source when QEMU's migration is complete (perform is done); finish starts it at the
// destination, confirm ends the source's copy. A daemon that restarts, or a connection that is lost between
// them, leaves copies behind that neither daemon will touch (source: PERFORM3_DONE, paused by migration), and
// a finish that fails for lack of an answer makes the source's libvirt start its copy again, although the
// destination may run.
//
// The rules (docs/decisions/0007-settling-libvirt.md): both ends are looked at. Nothing is destroyed by
// inference from one of them: a copy is destroyed only if it does not run and the other side was seen to run
// the guest, or if it has never run and the other side was seen to hold it. Nothing is resumed unless the
// other side was seen to have no copy that runs or may yet run. A side that cannot be seen makes the answer
// UNKNOWN, and it is asked again.
#pragma once

#include <string>

#include "baton/v1/types.pb.h"

namespace baton::vmm {

enum class MigrationRole { kSource, kDestination };

// A domain of one side, as libvirt's state and reason tell it.
enum class DomainCondition {
  kUnreachable,      // libvirt did not answer, or does not know
  kAbsent,           // there is no such domain
  kShutOff,          // defined and not active, for whatever reason but the next two
  kShutOffMigrated,  // defined; libvirt ended its copy because the guest is at the other side
  // Destination: defined; libvirt gave the copy up while it was taking it in. It has never run: libvirt gives
  // this reason only when it fails to start a guest's processors or what comes before that, and any later end
  // of the copy has another reason (qemuMigrationDstFinishActive, libvirt 9.0 to 11.3).
  kShutOffFailed,
  kRunning,                // runs
  kRunningPostcopy,        // destination: runs while pages are still missing
  kRunningPostcopyFailed,  // destination: runs; the connection that brings missing pages was lost
  kPaused,                 // stands still and holds the guest: paused by a user, an I/O error, a watchdog …
  kPausedMigration,        // source: stopped by QEMU's or libvirt's migration
  kPausedIncoming,         // destination: waits for the guest, or for finish
  kPausedPostcopy,         // source: handed over in post-copy; its memory is still needed
  kPausedPostcopyFailed,   // post-copy lost its connection (either side)
  kCrashed,                // the guest crashed and its QEMU was kept; it does not run
};
const char* NameOf(DomainCondition condition);
inline constexpr int kDomainConditions = static_cast<int>(DomainCondition::kCrashed) + 1;

// From virDomainGetState. Which side it is decides how "paused by migration" is meant.
DomainCondition ConditionOf(int state, int reason, MigrationRole role);

// What the source's QEMU says of its own migration, which libvirt may not have heard of: libvirt 9.0 does not
// know every state of a QEMU that is newer, and calls a recovery failed that goes on.
enum class SourceStream {
  kUnknown,     // it was not asked or did not answer, or says something else
  kBroken,      // it waits for another connection
  kConnecting,  // it is being connected again
  kConnected,   // it sends
  kSent,        // it has sent everything
};
// By QEMU's word for it (query-migrate's status).
SourceStream SourceStreamOf(const std::string& status);

// What is known of one side.
struct SideView {
  DomainCondition condition = DomainCondition::kUnreachable;
  // A migration job of libvirt is under way for it (virDomainGetJobInfo or -Stats): libvirt will act by
  // itself.
  bool job = false;
  bool operator==(const SideView&) const = default;
};

struct SettlementInput {
  SideView source;
  SideView destination;
  // The call of virDomainMigrateToURI3 has not returned (known only to the shim that made it).
  bool call_active = false;
  // The destination's copy was seen to run since this migration began, now or earlier (an event, its
  // journal's OWNER). Durable: once true, true.
  bool destination_ran = false;
  // The source's state may have been taken over: QEMU's migration was complete at the source, or the source
  // was seen paused by it and nobody knows better. False only if it is certain that the stream did not get
  // through: who lost sight of the source's libvirt during the call (its daemon restarted, an event was
  // missed) does not know.
  bool handed_over = true;
  // The domain stood still before the migration began, so it stands still at the destination too.
  bool was_paused = false;
  // Whoever keeps `destination_ran` saw everything that the destination's libvirt did since before the
  // handover. False (nobody watched for a while) means that a copy may have run and ended unseen, unless it
  // is kShutOffFailed.
  bool destination_watched = true;
  // The source's copy was suspended because of an earlier kPauseSource (to be recorded durably before it is
  // done), so that "paused by a user" means us.
  bool source_suspended = false;
  // query-migrate's status at the source, asked where libvirt says that post-copy lost its connection there;
  // empty if QEMU did not answer.
  std::string source_qemu;
  // The source has said for a while that post-copy lost its connection, and the destination has not.
  bool unnoticed = false;
  // The call under way is to recover post-copy, and has taken a while.
  bool recovery_lasts = false;
  // An operator or a fencing hook has confirmed that the destination's copy does not run and never will.
  // Taken in the place of a look at a destination that does not answer; one that answers is believed instead.
  bool fenced = false;
};

enum class SettlementAction {
  kNothing,        // settled: `location` says where the guest is
  kWait,           // libvirt is at work: look again at its next event
  kAskAgain,       // a side that must be seen is not: look again when it answers
  kResumeSource,   // start the source's copy; then look again
  kPauseSource,    // the source's copy runs though the destination's does or may: suspend it; then look again
  kDestroySource,  // end the source's copy, which stands still; then look again
  kDestroyDestination,  // end the destination's copy, which has never run; then look again
  kRecoverPostcopy,     // virDomainMigrateToURI3 with POSTCOPY_RESUME
  kOperator,  // nothing that is safe can be done: a person decides (`batonctl migration resolve`). Look again
              // at events all the same.
};
const char* NameOf(SettlementAction action);
inline constexpr int kSettlementActions = static_cast<int>(SettlementAction::kOperator) + 1;

struct Settlement {
  SettlementAction action = SettlementAction::kAskAgain;
  // Where the guest is now, before the action.
  v1::GuestLocation location = v1::UNKNOWN;
  // In words, with what was seen at each side.
  std::string why;
};

Settlement Settle(const SettlementInput& input);

}  // namespace baton::vmm
