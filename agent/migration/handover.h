// The handover of a guest's ownership between two hosts as a pure state machine: no clock, no descriptor, no
// thread. The same class runs in shims, in tests and under fault injection; tests/model/ holds its Promela
// model, docs/handover.md the prose.
//
// Rules (design, section 5):
//  1. The source may resume after freezing only while its journal holds no YIELDED(m), or once it holds
//     REFUSED(m).
//  2. The destination may start the guest only when the whole state arrived and was checked, the source has
//     yielded, and its own journal holds OWNER(epoch+1).
//  3. The destination may write REFUSED(m) at any time before OWNER, and never OWNER after REFUSED.
//  4. After YIELDED the source asks until it hears OWNER (then it releases) or REFUSED (then it resumes).
//  5. If the destination is gone for good, only a confirmed fencing lets the source resume.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "baton/v1/types.pb.h"
#include "common/status.h"

namespace baton::migration {

// A record of a side's journal. One journal holds one VM's history on one host.
struct JournalRecord {
  enum class Kind : uint8_t {
    kInvalid = 0,
    // This side owns the guest at `epoch` (fresh start with an empty `migration`, or after a handover).
    kOwner = 1,
    // Source: the guest of `epoch` was given away in `migration`.
    kYielded = 2,
    // Destination: will never own the guest in `migration`. Source: heard that.
    kRefused = 3,
    // Source: heard OWNER; will never run this guest again at this epoch.
    kReleased = 4,
    // Destination: a migration of a guest of `epoch` was prepared here. Nothing owned.
    kIncoming = 5,
    // Source, after an operator or hook confirmed that the destination is fenced. Counts as REFUSED, and
    // makes this side owner at `epoch`, which is the yielded epoch + 2: newer than anything that the fenced
    // destination may have written.
    kFenced = 6,
  };
  Kind kind = Kind::kInvalid;
  uint64_t epoch = 0;
  std::string migration;  // empty for a fresh start

  bool operator==(const JournalRecord&) const = default;
};

// "YIELDED", "OWNER" …
const char* KindName(JournalRecord::Kind kind);

// What a journal's whole history says now.
struct Ownership {
  enum class State : uint8_t {
    kNothing,   // empty journal, a refused or unfinished incoming migration, or released
    kOwner,     // this side owns the guest at `epoch` and may run it
    kYielded,   // given away in `migration` at `epoch`; the outcome is not known: ask
    kReleased,  // the guest of `epoch` belongs to someone else for good
    kIncoming,  // prepared for `migration` of a guest of `epoch`; undecided
    kRefused,   // `migration` was refused here; nothing owned
  };
  State state = State::kNothing;
  uint64_t epoch = 0;
  std::string migration;  // of the record that made the state
};

// Replays a history and checks that it could have been written by the rules: DataLoss names the first record
// that could not (OWNER after REFUSED of the same migration, YIELDED by a side that owns nothing, an epoch
// that goes back, …).
absl::StatusOr<Ownership> ReplayOwnership(const std::vector<JournalRecord>& records);

// The answer of a *destination's* journal to "what became of `migration`?": OWNER with its epoch, REFUSED, or
// IDLE (undecided; also for a migration never heard of).
struct JournalVerdict {
  v1::HandoverState verdict = v1::IDLE;
  uint64_t epoch = 0;
};
JournalVerdict VerdictOf(const std::vector<JournalRecord>& records, const std::string& migration);

// One side of one migration. Events tell it what happened; it answers what is allowed now. An event that the
// rules forbid in the present state is refused (FailedPrecondition) and changes nothing.
//
// Every journal write is two events: ...Begun before the write is handed to the disk, then ...Durable once it
// is certain, or ...Failed once it is certain that the record is *not* there. In between, and for ever if
// neither becomes certain, the record has to be thought both present and absent: nothing is allowed that
// either would forbid.
//
// Not thread-safe; copyable.
class Handover {
 public:
  enum class Event : uint8_t {
    // --- source ---
    kFrozen,          // the guest's vCPUs and devices stand still
    kYieldBegun,      // the write of YIELDED was begun
    kYieldDurable,    // the journal holds YIELDED
    kYieldFailed,     // the journal certainly holds no YIELDED
    kAllSent,         // last page, device states and VMM state were handed to the connection
    kOwnerHeard,      // the destination (or its agent, or batond on its behalf) says OWNER
    kRefusedHeard,    // likewise REFUSED
    kRefusalDurable,  // the source's journal holds REFUSED, or FENCED after kFenced
    kResumed,         // the guest runs at the source again
    kFenced,          // confirmed: the destination is down and stays down
    kReleased,        // the source's journal holds RELEASED
    // --- destination ---
    kStateChecked,    // everything arrived and every check passed
    kYieldHeard,      // the source's Yield message for this migration and epoch arrived
    kOwnerBegun,      // the write of OWNER was begun
    kOwnerDurable,    // the journal holds OWNER
    kOwnerFailed,     // the journal certainly holds no OWNER
    kRefuseBegun,     // the write of REFUSED was begun
    kRefuseDurable,   // the journal holds REFUSED
    kStarted,         // the guest runs at the destination
    kConnectionLost,  // the peer is gone; also on the source
    kCancel,          // asked to give up; also on the source
  };

  // `epoch` is the one that the source owns the guest at, on both sides.
  static Handover Source(const std::string& migration, uint64_t epoch);
  static Handover Destination(const std::string& migration, uint64_t epoch);
  // The side as a restarted process finds it. Source: from a journal whose last word is YIELDED(migration)
  // the result asks; from one that owns, it may run. Destination: what was received died with the process, so
  // a migration not decided must be refused. DataLoss if the history is impossible, FailedPrecondition if it
  // has nothing to do with `migration`.
  static absl::StatusOr<Handover> Recover(v1::Role role, const std::string& migration, uint64_t epoch,
                                          const std::vector<JournalRecord>& records);

  absl::Status Apply(Event event);

  // --- source: what is allowed or due ---
  // The guest runs or may be resumed at this side: rule 1.
  bool may_resume() const;
  // YIELDED may be written: the guest stands still and nobody asked to give up.
  bool may_write_yielded() const;
  // The Yield message may be sent: YIELDED is durable and everything was sent before it.
  bool may_send_yield() const;
  // Given away (perhaps), outcome not known: ask until a verdict is heard. Rule 4.
  bool must_ask() const;
  // REFUSED (or FENCED) was heard and has to be made durable before the guest may be resumed.
  bool must_write_refusal() const;
  // The destination said REFUSED.
  bool refusal_heard() const { return refusal_heard_; }
  // The destination owns the guest: kill the VMM, never run it again. Rule 4.
  bool must_release() const;

  // --- destination ---
  // OWNER may be written: rule 2.
  bool may_write_owner() const;
  // REFUSED may be written: rule 3. False once OWNER was begun.
  bool may_write_refused() const;
  // Giving up was asked for or cannot be avoided any more: write REFUSED.
  bool must_refuse() const;
  // The guest may be started (or is running): rule 2.
  bool may_start() const;
  // What to answer to a verdict query: OWNER, REFUSED or IDLE. Only what is durable.
  v1::HandoverState answer_to_query() const;

  // --- both ---
  v1::Role role() const { return role_; }
  const std::string& migration() const { return migration_; }
  // Epoch at which this side owns, yielded or would own the guest: the source's epoch, epoch + 1 at the
  // destination, epoch + 2 after fencing.
  uint64_t own_epoch() const;
  // For reports.
  v1::HandoverState state() const;
  // Nothing is left to decide at this side.
  bool settled() const;
  // Records to write for the next step.
  JournalRecord YieldedRecord() const;
  JournalRecord OwnerRecord() const;
  // REFUSED, or FENCED at a source that was told so.
  JournalRecord RefusedRecord() const;
  JournalRecord ReleasedRecord() const;
  JournalRecord IncomingRecord() const;

  bool operator==(const Handover&) const = default;

 private:
  enum class State : uint8_t {
    kRunning,      // source: owns, guest may run
    kFrozen,       // source: owns, guest stands still, nothing yielded
    kYielding,     // source: YIELDED may or may not be in the journal
    kYielded,      // source: asks
    kHeardNo,      // source: heard REFUSED or fenced, not yet durable
    kMayResume,    // source: refusal durable
    kHeardOwner,   // source: heard OWNER
    kReleased,     // source: that is durable
    kWaiting,      // destination: undecided
    kOwning,       // destination: OWNER may or may not be in the journal
    kOwner,        // destination: owns
    kDestRunning,  // destination: owns, guest was started
    kRefusing,     // destination: REFUSED may or may not be in the journal; never OWNER
    kRefused,      // destination: for good
  };
  Handover(v1::Role role, State state, const std::string& migration, uint64_t epoch)
      : role_(role), state_(state), migration_(migration), epoch_(epoch) {}
  bool TrySource(Event event);
  bool TryDestination(Event event);

  v1::Role role_;
  State state_;
  std::string migration_;
  uint64_t epoch_;
  bool all_sent_ = false;
  bool given_up_ = false;
  bool fenced_ = false;
  bool checked_ = false;
  bool yield_heard_ = false;
  // Source: the destination said REFUSED.
  bool refusal_heard_ = false;
};

const char* EventName(Handover::Event event);

}  // namespace baton::migration
