#include "agent/migration/handover.h"

#include <set>

namespace baton::migration {

using Kind = JournalRecord::Kind;

const char* KindName(Kind kind) {
  switch (kind) {
    case Kind::kInvalid:
      return "INVALID";
    case Kind::kOwner:
      return "OWNER";
    case Kind::kYielded:
      return "YIELDED";
    case Kind::kRefused:
      return "REFUSED";
    case Kind::kReleased:
      return "RELEASED";
    case Kind::kIncoming:
      return "INCOMING";
    case Kind::kFenced:
      return "FENCED";
  }
  return "?";
}

const char* EventName(Handover::Event event) {
  static constexpr const char* kNames[] = {
      "frozen",        "yield-begun",     "yield-durable", "yield-failed", "all-sent",     "owner-heard",
      "refused-heard", "refusal-durable", "resumed",       "fenced",       "released",     "state-checked",
      "yield-heard",   "owner-begun",     "owner-durable", "owner-failed", "refuse-begun", "refuse-durable",
      "started",       "connection-lost", "cancel"};
  return kNames[static_cast<size_t>(event)];
}

absl::StatusOr<Ownership> ReplayOwnership(const std::vector<JournalRecord>& records) {
  using S = Ownership::State;
  Ownership now;
  std::set<std::string> refused;
  uint64_t newest = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    const JournalRecord& record = records[i];
    const char* why = nullptr;
    const bool same = record.migration == now.migration && record.epoch == now.epoch;
    switch (record.kind) {
      case Kind::kOwner:
        if (record.epoch <= newest && newest != 0) why = "the epoch does not grow";
        if (refused.count(record.migration)) why = "this migration was refused";
        if (!record.migration.empty() && !(now.state == S::kIncoming && now.migration == record.migration &&
                                           now.epoch + 1 == record.epoch))
          why = "no migration of the epoch before was under way";
        if (now.state == S::kYielded) why = "the guest was given away and its whereabouts are not known";
        now.state = S::kOwner;
        break;
      case Kind::kYielded:
        if (now.state != S::kOwner || now.epoch != record.epoch) why = "this side does not own that epoch";
        now.state = S::kYielded;
        break;
      case Kind::kRefused:
        refused.insert(record.migration);
        if (now.state == S::kYielded && same) {
          now.state = S::kOwner;
        } else if (now.state == S::kOwner || now.state == S::kYielded) {
          why = "this side owns the guest";
        } else {
          now.state = S::kRefused;
        }
        break;
      case Kind::kFenced:
        if (now.state != S::kYielded || now.migration != record.migration || record.epoch != now.epoch + 2)
          why = "nothing was given away in that migration";
        now.state = S::kOwner;
        break;
      case Kind::kReleased:
        if (now.state != S::kYielded || !same) why = "nothing was given away in that migration";
        now.state = S::kReleased;
        break;
      case Kind::kIncoming:
        if (now.state == S::kOwner || now.state == S::kYielded) why = "this side owns the guest";
        now.state = S::kIncoming;
        break;
      case Kind::kInvalid:
        why = "no such kind";
        break;
    }
    if (why != nullptr)
      return Error(absl::StatusCode::kDataLoss,
                   "journal record {} ({} epoch {} migration '{}') is impossible: {}", i,
                   KindName(record.kind), record.epoch, record.migration, why);
    now.epoch = record.epoch;
    now.migration = record.migration;
    if (record.kind == Kind::kOwner || record.kind == Kind::kFenced) newest = record.epoch;
  }
  return now;
}

JournalVerdict VerdictOf(const std::vector<JournalRecord>& records, const std::string& migration) {
  for (const JournalRecord& record : records) {
    if (record.migration != migration || migration.empty()) continue;
    if (record.kind == Kind::kOwner) return {v1::OWNER, record.epoch};
    if (record.kind == Kind::kRefused) return {v1::REFUSED, record.epoch};
  }
  return {};
}

Handover Handover::Source(const std::string& migration, uint64_t epoch) {
  return Handover(v1::ROLE_SOURCE, State::kRunning, migration, epoch);
}

Handover Handover::Destination(const std::string& migration, uint64_t epoch) {
  return Handover(v1::ROLE_DESTINATION, State::kWaiting, migration, epoch);
}

absl::StatusOr<Handover> Handover::Recover(v1::Role role, const std::string& migration, uint64_t epoch,
                                           const std::vector<JournalRecord>& records) {
  ASSIGN_OR_RETURN(Ownership now, ReplayOwnership(records));
  using S = Ownership::State;
  if (role == v1::ROLE_SOURCE) {
    if (now.state == S::kYielded && now.migration == migration && now.epoch == epoch)
      return Handover(role, State::kYielded, migration, epoch);
    if (now.state == S::kReleased && now.migration == migration)
      return Handover(role, State::kReleased, migration, epoch);
    if (now.state == S::kOwner && now.epoch == epoch) {
      // Either nothing was written yet, or the refusal was: the guest may run.
      const bool refused = !records.empty() && records.back().migration == migration;
      return Handover(role, refused ? State::kMayResume : State::kRunning, migration, epoch);
    }
    if (now.state == S::kOwner && now.migration == migration && now.epoch == epoch + 2) {
      Handover side(role, State::kMayResume, migration, epoch);
      side.fenced_ = true;
      return side;
    }
    return Error(absl::StatusCode::kFailedPrecondition,
                 "the journal says nothing of a guest of epoch {} given away in migration '{}'", epoch,
                 migration);
  }
  switch (VerdictOf(records, migration).verdict) {
    case v1::OWNER:
      return Handover(role, State::kOwner, migration, epoch);
    case v1::REFUSED:
      return Handover(role, State::kRefused, migration, epoch);
    default:
      break;
  }
  if (now.state == S::kOwner || now.state == S::kYielded)
    return Error(absl::StatusCode::kFailedPrecondition, "this side has owned the guest since epoch {}",
                 now.epoch);
  Handover side(role, State::kWaiting, migration, epoch);
  side.given_up_ = true;
  return side;
}

absl::Status Handover::Apply(Event event) {
  Handover next = *this;
  const bool allowed = role_ == v1::ROLE_SOURCE ? next.TrySource(event) : next.TryDestination(event);
  if (!allowed)
    return Error(absl::StatusCode::kFailedPrecondition,
                 "handover of migration '{}': '{}' is not allowed in {} at the {}", migration_,
                 EventName(event), v1::HandoverState_Name(state()),
                 role_ == v1::ROLE_SOURCE ? "source" : "destination");
  *this = next;
  return absl::OkStatus();
}

bool Handover::TrySource(Event event) {
  const auto go = [&](State from, State to) {
    if (state_ != from) return false;
    state_ = to;
    return true;
  };
  switch (event) {
    case Event::kFrozen:
      return go(State::kRunning, State::kFrozen);
    case Event::kYieldBegun:
      return may_write_yielded() && go(State::kFrozen, State::kYielding);
    case Event::kYieldDurable:
      return go(State::kYielding, refusal_heard_ ? State::kHeardNo : State::kYielded);
    case Event::kYieldFailed:
      return go(State::kYielding, State::kFrozen);
    case Event::kAllSent:
      all_sent_ = true;
      return state_ == State::kFrozen || state_ == State::kYielding || state_ == State::kYielded;
    case Event::kOwnerHeard:
      // A destination that owns what was never yielded broke the rules; it is not believed.
      return go(State::kYielded, State::kHeardOwner) || state_ == State::kHeardOwner ||
             state_ == State::kReleased;
    case Event::kRefusedHeard:
      given_up_ = true;
      if (state_ == State::kYielded) state_ = State::kHeardNo;
      refusal_heard_ = true;
      // Before YIELDED, and once more after the refusal, it changes nothing.
      return state_ != State::kHeardOwner && state_ != State::kReleased;
    case Event::kFenced:
      if (!go(State::kYielded, State::kHeardNo)) return false;
      fenced_ = true;
      return true;
    case Event::kRefusalDurable:
      return go(State::kHeardNo, State::kMayResume);
    case Event::kResumed:
      if (!may_resume()) return false;
      if (state_ == State::kFrozen) state_ = State::kRunning;
      given_up_ = true;  // a later attempt is another migration
      return true;
    case Event::kReleased:
      return go(State::kHeardOwner, State::kReleased);
    case Event::kConnectionLost:
    case Event::kCancel:
      given_up_ = true;
      return true;
    default:
      return false;
  }
}

bool Handover::TryDestination(Event event) {
  const auto go = [&](State from, State to) {
    if (state_ != from) return false;
    state_ = to;
    return true;
  };
  switch (event) {
    case Event::kStateChecked:
      checked_ = true;
      return state_ == State::kWaiting && !given_up_;
    case Event::kYieldHeard:
      yield_heard_ = true;
      // Duplicates of a message that was acted upon change nothing.
      return true;
    case Event::kOwnerBegun:
      return may_write_owner() && go(State::kWaiting, State::kOwning);
    case Event::kOwnerDurable:
      return go(State::kOwning, State::kOwner);
    case Event::kOwnerFailed:
      given_up_ = true;
      return go(State::kOwning, State::kWaiting);
    case Event::kRefuseBegun:
      return may_write_refused() && (go(State::kWaiting, State::kRefusing) || state_ == State::kRefusing);
    case Event::kRefuseDurable:
      return go(State::kRefusing, State::kRefused);
    case Event::kStarted:
      return go(State::kOwner, State::kDestRunning) || state_ == State::kDestRunning;
    case Event::kConnectionLost:
      // With the whole state and the yield in hand nobody else can run the guest: carry on.
      if (!(checked_ && yield_heard_)) given_up_ = true;
      return true;
    case Event::kCancel:
      if (state_ == State::kOwning || state_ == State::kOwner || state_ == State::kDestRunning) return false;
      given_up_ = true;
      return true;
    default:
      return false;
  }
}

bool Handover::may_resume() const {
  return state_ == State::kRunning || state_ == State::kFrozen || state_ == State::kMayResume;
}
bool Handover::may_write_yielded() const { return state_ == State::kFrozen && !given_up_; }
bool Handover::may_send_yield() const { return state_ == State::kYielded && all_sent_; }
bool Handover::must_ask() const { return state_ == State::kYielded || state_ == State::kYielding; }
bool Handover::must_write_refusal() const { return state_ == State::kHeardNo; }
bool Handover::must_release() const { return state_ == State::kHeardOwner || state_ == State::kReleased; }

bool Handover::may_write_owner() const {
  return state_ == State::kWaiting && checked_ && yield_heard_ && !given_up_;
}
bool Handover::may_write_refused() const { return state_ == State::kWaiting || state_ == State::kRefusing; }
bool Handover::must_refuse() const {
  return (state_ == State::kWaiting && given_up_) || state_ == State::kRefusing;
}
bool Handover::may_start() const { return state_ == State::kOwner || state_ == State::kDestRunning; }
v1::HandoverState Handover::answer_to_query() const {
  if (role_ != v1::ROLE_DESTINATION) return v1::IDLE;
  if (may_start()) return v1::OWNER;
  return state_ == State::kRefused ? v1::REFUSED : v1::IDLE;
}

uint64_t Handover::own_epoch() const {
  if (role_ == v1::ROLE_DESTINATION) return epoch_ + 1;
  return fenced_ ? epoch_ + 2 : epoch_;
}

v1::HandoverState Handover::state() const {
  switch (state_) {
    case State::kRunning:
    case State::kWaiting:
      return v1::IDLE;
    case State::kFrozen:
      return v1::FROZEN;
    case State::kYielding:
    case State::kYielded:
    case State::kHeardNo:
      return v1::YIELDED;
    case State::kMayResume:
    case State::kRefused:
      return v1::REFUSED;
    case State::kHeardOwner:
    case State::kReleased:
      return v1::RELEASED;
    case State::kOwner:
    case State::kDestRunning:
      return v1::OWNER;
    case State::kOwning:
    case State::kRefusing:
      return v1::IDLE;
  }
  return v1::HANDOVER_STATE_UNSPECIFIED;
}

bool Handover::settled() const {
  return state_ == State::kMayResume || state_ == State::kReleased || state_ == State::kDestRunning ||
         state_ == State::kRefused;
}

JournalRecord Handover::YieldedRecord() const { return {Kind::kYielded, epoch_, migration_}; }
JournalRecord Handover::OwnerRecord() const { return {Kind::kOwner, epoch_ + 1, migration_}; }
JournalRecord Handover::RefusedRecord() const {
  if (fenced_) return {Kind::kFenced, epoch_ + 2, migration_};
  return {Kind::kRefused, epoch_, migration_};
}
JournalRecord Handover::ReleasedRecord() const { return {Kind::kReleased, epoch_, migration_}; }
JournalRecord Handover::IncomingRecord() const { return {Kind::kIncoming, epoch_, migration_}; }

}  // namespace baton::migration
