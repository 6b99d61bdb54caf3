// OWNER or REFUSED, and what follows.
#include <poll.h>

#include <cstdlib>

#include "agent/migration/destination_impl.h"
#include "common/log.h"
#include "common/pause_point.h"

namespace baton::migration {

using Event = Handover::Event;
using std::chrono::seconds;

namespace {
// The source closes once it has read the verdict.
constexpr Duration kLinger = seconds(10);
}  // namespace

void IncomingMigration::Impl::AddTime(const std::string& name, Clock::time_point begin) {
  parts_.emplace_back(name, Clock::now() - begin);
}

void IncomingMigration::Impl::Run(bool recovered) {
  absl::Status status;
  recovered_ = recovered;
  if (recovered) {
    const Handover side = handover();
    if (side.may_start()) return StartGuest();
    status = Error(v1::DESTINATION_SHIM_FAILED, absl::StatusCode::kAborted,
                   "the destination's shim was restarted, and what it had received is lost");
    if (!side.must_refuse()) {
      p_.driver.Kill();
      return End(Outcome::kRefused);
    }
  } else {
    reporter_.EnterPhase(v1::PREPARING);
    status = Receive();
    // A memory file that others make shorter shows in many ways.
    if (const absl::Status intact = p_.ram.CheckIntact(); !intact.ok())
      status = WithReason(intact, v1::DESTINATION_VMM_FAILED);
    if (status.ok()) status = Own();
  }
  if (stopping()) return;
  if (status.ok()) return StartGuest();
  Refuse(Cause(status));
}

// Writes OWNER. An error means that it is certainly not in the journal.
absl::Status IncomingMigration::Impl::Own() {
  PausePoint(o_.pause_dir, "loaded");
  // Its end may not have been heard of yet, and who becomes owner of a guest whose VMM is dead has lost it.
  if (pollfd ended{p_.driver.exit_fd(), POLLIN, 0}; ::poll(&ended, 1, 0) == 1) {
    const absl::Status how = p_.driver.IsRunning(Deadline::After(seconds(1))).status();
    return Error(v1::DESTINATION_VMM_FAILED, absl::StatusCode::kAborted,
                 "the VMM ended before it was given the guest: {}", Message(how));
  }
  RETURN_IF_ERROR(Apply(Event::kOwnerBegun));
  const Clock::time_point begin = Clock::now();
  const absl::Status written = p_.journal.Append(handover().OwnerRecord());
  if (written.ok()) {
    AddTime("owner_sync", begin);
    return Apply(Event::kOwnerDurable);
  }
  while (!p_.journal.certainly_absent() && !p_.journal.Repair().ok()) {
    reporter_.Update([&](v1::SideReport& r) {
      r.set_reason(v1::STATE_WRITE_FAILED);
      r.set_message(
          fmt::format("nothing can be decided until the journal can be written: {}", Message(written)));
    });
    if (!SleepUnlessStopping(kRetryWrite)) return absl::CancelledError("the shim is ending");
  }
  RETURN_IF_ERROR(Apply(Event::kOwnerFailed));
  return written;
}

void IncomingMigration::Impl::StartGuest() {
  reporter_.EnterPhase(v1::FINISHING);
  PausePoint(o_.pause_dir, "owner");
  const Deadline deadline = Deadline::After(o_.load_timeout);
  const Clock::time_point begin = Clock::now();
  // A shim before this one may have started it.
  const auto runs = recovered_ ? p_.driver.IsRunning(deadline) : absl::StatusOr<bool>(false);
  const absl::Status started = runs.ok() && *runs ? absl::OkStatus() : p_.driver.Start(deadline);
  running_at_ns_ = MonotonicNs();
  if (started.ok()) (void)Apply(Event::kStarted);
  AddTime("start", begin);
  // Whatever the source did not get to say: a guest that runs here has its memory.
  if (started.ok() && p_.devices.hints() != nullptr) p_.devices.hints()->Finish();
  if (link_) (void)link_->Send(VerdictMessage(), Deadline::After(seconds(5)));

  Duration announce_time{0};
  if (started.ok() && o_.has_network) {
    const Clock::time_point announcing = Clock::now();
    if (absl::Status announced = p_.driver.Announce(deadline); !announced.ok())
      LOG_WARN("migration {}: announcing the guest: {}", o_.migration_id, Message(announced));
    if (absl::Status announced = p_.devices.Announce(deadline); !announced.ok())
      LOG_WARN("migration {}: announcing the guest's NICs: {}", o_.migration_id, Message(announced));
    AddTime("announce", announcing);
    announce_time = Clock::now() - announcing;
  }
  if (started.ok() && link_) {
    v1::PeerMessage message;
    message.mutable_resumed()->set_running_at_ns(running_at_ns_);
    for (const auto& [name, took] : parts_) AddPart(message.mutable_resumed()->mutable_parts(), name, took);
    (void)link_->Send(message, Deadline::After(seconds(5)));
  }
  if (receiver_) receiver_->Stop();
  if (absl::Status devices = started.ok() ? p_.devices.CheckStarted() : absl::OkStatus();
      !devices.ok() && ReasonOf(devices, v1::INTERNAL) == v1::STATE_MISMATCH)
    LOG_ERROR("migration {}: {}", o_.migration_id, Message(devices));
  pollfd ended{p_.driver.exit_fd(), POLLIN, 0};
  const bool lost = !started.ok() && ::poll(&ended, 1, 0) == 1;
  reporter_.EnterPhase(started.ok() ? v1::SUCCEEDED : v1::FAILED);
  reporter_.Update([&](v1::SideReport& r) {
    r.set_handover(v1::OWNER);
    r.set_epoch(handover().own_epoch());
    r.set_guest_running(started.ok());
    r.set_guest_lost(lost);
    r.set_done(true);
    r.set_reason(started.ok() ? v1::NONE : v1::DESTINATION_VMM_FAILED);
    r.set_message(started.ok()
                      ? ""
                      : fmt::format("this side owns the guest but could not start it: {}", Message(started)));
    if (receiver_) *r.mutable_progress()->mutable_bytes() = receiver_->counts();
    r.mutable_progress()->mutable_bytes()->set_state(state_bytes_);
    r.mutable_progress()->set_memory_total(p_.ram.total_bytes());
    if (started.ok() && link_ && source_frozen_at_ns_ != 0) {
      int64_t offset = link_->clock_offset().value_or(0);
      if (std::llabs(offset) <= link_->round_trip().count()) offset = 0;  // one clock
      const Duration vcpu(running_at_ns_ + offset - source_frozen_at_ns_);
      v1::Downtimes* downtimes = r.mutable_progress()->mutable_downtimes();
      SetDuration(downtimes->mutable_vcpu(), vcpu);
      SetDuration(downtimes->mutable_network(), o_.has_network ? vcpu + announce_time : Duration(0));
    }
    for (const auto& [name, took] : parts_)
      AddPart(r.mutable_progress()->mutable_downtimes()->mutable_parts(), "destination." + name, took);
  });
  if (!started.ok())
    LOG_ERROR("migration {}: owns the guest but could not start it: {}", o_.migration_id, Message(started));
  // The verdict is in the journal; whoever misses it here asks.
  if (link_) {
    link_->WaitLost(Deadline::After(started.ok() ? kLinger : seconds(1)));
    link_->Shutdown();
  }
  End(started.ok() ? Outcome::kOwner : Outcome::kPaused);
}

void IncomingMigration::Impl::Refuse(const absl::Status& why) {
  LOG_WARN("migration {}: refused: {}", o_.migration_id, Message(why));
  {
    std::lock_guard lock(mutex_);
    refusal_ = why;
    if (absl::Status begun = handover_.Apply(Event::kRefuseBegun); !begun.ok())
      LOG_ERROR("migration {}: {}", o_.migration_id, Message(begun));
  }
  load_fd_.reset();
  // What must never run may as well end before it is written down that it never will.
  p_.driver.Kill();
  for (;;) {
    const absl::Status written = p_.journal.Append(handover().RefusedRecord());
    if (written.ok()) break;
    reporter_.Update([&](v1::SideReport& r) {
      r.set_reason(v1::STATE_WRITE_FAILED);
      r.set_message(
          fmt::format("refused ({}), but that cannot be written: {}", Message(why), Message(written)));
    });
    if (!SleepUnlessStopping(kRetryWrite)) return;
    (void)p_.journal.Repair();
  }
  (void)Apply(Event::kRefuseDurable);
  if (link_) (void)link_->Send(VerdictMessage(), Deadline::After(seconds(5)));
  if (receiver_) receiver_->Stop();
  const bool cancelled = ReasonOf(why) == v1::CANCELLED_BY_REQUEST;
  reporter_.EnterPhase(cancelled ? v1::CANCELLED : v1::FAILED);
  reporter_.Update([&](v1::SideReport& r) {
    r.set_handover(v1::REFUSED);
    r.set_guest_running(false);
    r.set_done(true);
    r.set_reason(ReasonOf(why));
    r.set_message(Message(why));
    if (receiver_) *r.mutable_progress()->mutable_bytes() = receiver_->counts();
  });
  if (link_) {
    link_->WaitLost(Deadline::After(seconds(2)));
    link_->Shutdown();
  }
  End(Outcome::kRefused);
}

void IncomingMigration::Impl::End(Outcome outcome) {
  std::lock_guard lock(mutex_);
  outcome_ = outcome;
}

}  // namespace baton::migration
