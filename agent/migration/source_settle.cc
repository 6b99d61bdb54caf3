// After the blackout, or after something failed: hear the verdict if the guest was given away, then release
// or resume, and report.
#include <cstdlib>

#include "agent/migration/source_impl.h"
#include "common/log.h"

namespace baton::migration {

using Event = Handover::Event;
using std::chrono::seconds;

namespace {

// The destination's figures are worth a short wait before the VMM is killed.
constexpr Duration kAwaitFigures = seconds(5);

}  // namespace

bool OutgoingMigration::Impl::SleepUnlessStopping(Duration duration) {
  std::unique_lock lock(mutex_);
  return !changed_.wait_for(lock, duration, [&] { return stopping_; });
}

void OutgoingMigration::Impl::Settle(const absl::Status& status) {
  if (!status.ok() && handover().must_ask()) {
    reporter_.Update([&](v1::SideReport& r) {
      r.set_handover(v1::YIELDED);
      r.set_guest_running(false);
      r.set_message(Message(status));
    });
    LOG_WARN("migration {}: {}; the guest was given away, asking the destination what became of it",
             o_.migration_id, Message(status));
    RepairYield();
    if (handover().must_ask()) AskUntilHeard();
  }
  if (handover().must_write_refusal()) WriteRefusal();
  if (stopping()) return;
  if (handover().must_release()) {
    Release();
  } else {
    ResumeHere(status);
  }
}

// A write of YIELDED that failed half-way must be known to be absent before anything else can be decided.
void OutgoingMigration::Impl::RepairYield() {
  while (!yield_write_.ok() && handover().must_ask()) {
    if (p_.journal.Repair().ok()) {
      (void)Apply(Event::kYieldFailed);
      return;
    }
    reporter_.Update([&](v1::SideReport& r) {
      r.set_reason(v1::STATE_WRITE_FAILED);
      r.set_message(
          fmt::format("the guest stands still until the journal can be written: {}", Message(yield_write_)));
    });
    if (!SleepUnlessStopping(kRetryWrite)) return;
  }
}

void OutgoingMigration::Impl::AskUntilHeard() {
  if (link_ && blackout_.yield_sent == Clock::time_point{} && link_->lost_status().ok()) {
    // Nothing was yielded to the destination yet, so it can only refuse; the live connection is the shortest
    // way.
    AbortPeer(WithReason(absl::AbortedError("the source failed before it could yield"), v1::INTERNAL));
    const Deadline deadline = Deadline::After(seconds(10));
    for (auto message = link_->Next(deadline); message.ok(); message = link_->Next(deadline)) {
      if (!Objection(*message).ok() && !handover().must_ask()) return;
    }
  }
  if (link_) link_->Shutdown();
  if (sender_) sender_->Cancel();
  for (;;) {
    VerdictAsker* asker = nullptr;
    {
      std::lock_guard lock(mutex_);
      if (stopping_ || !handover_.must_ask()) return;
      if (resolution_) {
        const Event event = resolution_->fenced                 ? Event::kFenced
                            : resolution_->verdict == v1::OWNER ? Event::kOwnerHeard
                                                                : Event::kRefusedHeard;
        const absl::Status applied = handover_.Apply(event);
        LOG_WARN("migration {}: resolved from outside: {} {}", o_.migration_id, EventName(event),
                 applied.ToString());
        return;
      }
      VerdictAsker::Options options{
          .dial = o_.dial, .backoff = o_.ask_backoff, .backoff_max = o_.ask_backoff_max};
      asker_ = std::make_unique<VerdictAsker>(std::move(options), [this](const absl::Status& failure) {
        reporter_.Update([&](v1::SideReport& r) {
          r.set_message(
              fmt::format("asking the destination whether it owns the guest: {}", Message(failure)));
        });
      });
      asker = asker_.get();
    }
    auto verdict = asker->Ask();
    if (verdict.ok()) {
      if (verdict->verdict() == v1::REFUSED && !verdict->message().empty())
        refusal_ =
            Error(verdict->reason() == v1::REASON_UNSPECIFIED ? v1::DESTINATION_REFUSED : verdict->reason(),
                  absl::StatusCode::kAborted, "the destination refused: {}", verdict->message());
      Hear(verdict->verdict(), "when asked");
    }
  }
}

void OutgoingMigration::Impl::Hear(v1::HandoverState verdict, const std::string& how) {
  LOG_INFO("migration {}: heard {} {}", o_.migration_id, v1::HandoverState_Name(verdict), how);
  if (absl::Status applied = Apply(verdict == v1::OWNER ? Event::kOwnerHeard : Event::kRefusedHeard);
      !applied.ok())
    LOG_ERROR("migration {}: {}", o_.migration_id, Message(applied));
}

// Until the refusal is durable the guest may not be resumed.
void OutgoingMigration::Impl::WriteRefusal() {
  for (;;) {
    const absl::Status written = p_.journal.Append(handover().RefusedRecord());
    if (written.ok()) {
      (void)Apply(Event::kRefusalDurable);
      return;
    }
    reporter_.Update([&](v1::SideReport& r) {
      r.set_reason(v1::STATE_WRITE_FAILED);
      r.set_message(
          fmt::format("the guest stands still until its refusal can be written: {}", Message(written)));
    });
    if (!SleepUnlessStopping(kRetryWrite)) return;
    (void)p_.journal.Repair();
  }
}

void OutgoingMigration::Impl::Release() {
  reporter_.EnterPhase(v1::FINISHING);
  // A record that cannot be written is no danger: a later shim asks again and hears OWNER again.
  if (absl::Status written = p_.journal.Append(handover().ReleasedRecord()); written.ok()) {
    (void)Apply(Event::kReleased);
  } else {
    LOG_WARN("migration {}: {}", o_.migration_id, Message(written));
  }
  if (link_) {
    const Deadline deadline = Deadline::After(kAwaitFigures);
    for (auto message = link_->Next(deadline); message.ok(); message = link_->Next(deadline)) {
      if (!message->has_resumed()) continue;
      FillDowntimes(message->resumed());
      break;
    }
  }
  p_.driver.Kill();
  StopTracking();
  if (link_) link_->Shutdown();
  reporter_.EnterPhase(v1::SUCCEEDED);
  reporter_.Update([&](v1::SideReport& r) {
    r.set_handover(v1::RELEASED);
    r.set_guest_running(false);
    r.set_done(true);
    r.set_reason(v1::NONE);
    r.clear_message();
    FillCounts(*r.mutable_progress());
    SetDuration(r.mutable_progress()->mutable_drain(), blackout_.drain);
  });
  End(Outcome::kReleased);
}

void OutgoingMigration::Impl::ResumeHere(const absl::Status& cause) {
  const Handover side = handover();
  absl::Status status = refusal_.ok() ? cause : refusal_;
  if (side.own_epoch() != o_.epoch)
    status = Error(v1::RESOLVED_BY_OPERATOR, absl::StatusCode::kAborted,
                   "the destination was confirmed to be fenced; the guest goes on at the source");
  if (status.ok())
    status = Error(v1::DESTINATION_REFUSED, absl::StatusCode::kAborted, "the destination refused");
  Outcome outcome = Outcome::kResumed;
  (void)p_.devices.DisarmStop();
  if (freeze_tried_ && !VmmEnded()) {
    if (absl::Status resumed = p_.driver.Resume(Deadline::After(seconds(30))); !resumed.ok()) {
      outcome = Outcome::kPaused;
      status = Annotate(status, fmt::format("the guest could not be resumed ({})", Message(resumed)));
      LOG_ERROR("migration {}: {}", o_.migration_id, Message(status));
    }
  }
  if (outcome == Outcome::kResumed) (void)Apply(Event::kResumed);
  // Whether the VMM ended may show only now.
  if (VmmEnded()) {
    outcome = Outcome::kLost;
    if (ReasonOf(status, v1::INTERNAL) != v1::SOURCE_VMM_FAILED)
      status = Error(v1::SOURCE_VMM_FAILED, absl::StatusCode::kUnavailable, "{}; and the VMM ended",
                     Message(status));
  }
  AbortPeer(status);
  StopTracking();
  if (sender_) sender_->Cancel();
  // A moment for the peer to read why before the connection ends under it; its refusal says that it has.
  if (link_ && !handover().refusal_heard()) {
    const Deadline grace = Deadline::After(seconds(1));
    for (auto message = link_->Next(grace); message.ok(); message = link_->Next(grace))
      if (!Objection(*message).ok()) break;
  }
  if (link_) link_->Shutdown();
  const bool cancelled = ReasonOf(status) == v1::CANCELLED_BY_REQUEST;
  reporter_.EnterPhase(cancelled ? v1::CANCELLED : v1::FAILED);
  reporter_.Update([&](v1::SideReport& r) {
    r.set_handover(handover().state());
    r.set_epoch(handover().own_epoch());
    r.set_guest_running(outcome == Outcome::kResumed);
    r.set_guest_lost(outcome == Outcome::kLost);
    r.set_done(true);
    r.set_reason(ReasonOf(status));
    r.set_message(Message(status));
    FillCounts(*r.mutable_progress());
  });
  LOG_WARN("migration {}: {}; the guest {}", o_.migration_id, Message(status),
           outcome == Outcome::kResumed  ? "goes on here"
           : outcome == Outcome::kPaused ? "stands still here"
                                         : "is lost");
  End(outcome);
}

void OutgoingMigration::Impl::AbortPeer(const absl::Status& status) {
  if (!link_ || !link_->lost_status().ok()) return;
  v1::PeerMessage message;
  message.mutable_abort()->set_reason(ReasonOf(status));
  message.mutable_abort()->set_message(Message(status));
  (void)link_->Send(message, Deadline::After(seconds(1)));
}

void OutgoingMigration::Impl::StopTracking() {
  EndHints();
  for (auto& source : dirty_sources_) source->Stop();
  dirty_sources_.clear();
}

void OutgoingMigration::Impl::End(Outcome outcome) {
  monitor_done_ = true;
  monitor_stop_.Signal();
  std::lock_guard lock(mutex_);
  outcome_ = outcome;
}

// ---------------------------------------------------------------------------------------------------------
// Figures

void OutgoingMigration::Impl::FillCounts(v1::Progress& progress) {
  if (sender_) *progress.mutable_bytes() = sender_->counts();
  v1::ByteCounts* bytes = progress.mutable_bytes();
  bytes->set_hole_skipped(bytes->hole_skipped() + hole_bytes_);
  bytes->set_hint_skipped(hint_bytes_);
  bytes->set_state(state_bytes_);
  bytes->set_wire(bytes->wire() + state_bytes_);
  progress.set_memory_total(p_.ram.total_bytes());
  if (sender_) progress.set_remaining(sender_->remaining());
  progress.set_round(round_.load(std::memory_order_relaxed));
}

void OutgoingMigration::Impl::RecordStops() {
  reporter_.Update([&](v1::SideReport& r) {
    v1::Progress* progress = r.mutable_progress();
    progress->clear_device_stops();
    uint32_t handed_off = 0;
    for (v1::DeviceStop& stop : p_.devices.stops()) {
      handed_off += stop.handed_off();
      *progress->add_device_stops() = std::move(stop);
    }
    progress->set_inflight_handed_off(handed_off);
  });
}

std::optional<uint64_t> OutgoingMigration::Impl::PresentRate() {
  std::lock_guard lock(mutex_);
  if (!sender_) return std::nullopt;
  const v1::ByteCounts counts = sender_->counts();
  return rate_.Sample(Clock::now(), counts.data() + counts.zero());
}

void OutgoingMigration::Impl::TickProgress() {
  const std::optional<uint64_t> rate = PresentRate();
  reporter_.Tick([&](v1::Progress& progress) {
    FillCounts(progress);
    if (!rate) return;
    progress.set_rate(*rate);
    if (*rate == 0) return;
    SetDuration(progress.mutable_forecast_remaining(),
                std::chrono::duration_cast<Duration>(std::chrono::duration<double>(
                    static_cast<double>(progress.remaining()) / static_cast<double>(*rate))));
  });
}

void OutgoingMigration::Impl::Record(const RoundSample& sample, const ConvergenceDecision& decision) {
  LOG_INFO("migration {}: round {}: {} bytes in {} ms, {} bytes dirty: {} ({})", o_.migration_id,
           sample.round, sample.bytes,
           std::chrono::duration_cast<std::chrono::milliseconds>(sample.duration).count(), sample.dirty_bytes,
           ActionName(decision.action), decision.why);
  const std::optional<uint64_t> rate = PresentRate();
  reporter_.Update([&](v1::SideReport& r) {
    v1::Progress* progress = r.mutable_progress();
    FillCounts(*progress);
    v1::RoundStats* round = progress->add_rounds();
    round->set_number(sample.round);
    SetDuration(round->mutable_duration(), sample.duration);
    round->set_pages(sample.bytes / memory::kPageSize);
    round->set_bytes(sample.bytes);
    const double seconds = std::max(1e-6, std::chrono::duration<double>(sample.duration).count());
    round->set_rate(static_cast<uint64_t>(static_cast<double>(sample.bytes) / seconds));
    round->set_dirty_rate(decision.dirty_rate / memory::kPageSize);
    SetDuration(round->mutable_forecast_downtime(), decision.forecast);
    // What the round shows of the connection is the forecast's; a short one is a burst.
    progress->set_rate(rate.value_or(decision.rate));
    progress->set_dirty_rate(decision.dirty_rate);
    progress->set_remaining(sample.dirty_bytes);
    SetDuration(progress->mutable_forecast_downtime(), decision.forecast);
    v1::Decision* out = progress->add_decisions();
    *out->mutable_time() = CurrentTime();
    out->set_round(sample.round);
    out->set_action(ActionName(decision.action));
    out->set_why(decision.why);
  });
}

void OutgoingMigration::Impl::FillDowntimes(const v1::Resumed& resumed) {
  int64_t offset = link_->clock_offset().value_or(0);
  // Monotonic clocks of different hosts differ by the time between their boots; an offset below what the
  // measurement can resolve is one clock.
  if (std::llabs(offset) <= link_->round_trip().count()) offset = 0;
  const Duration vcpu(resumed.running_at_ns() - offset - blackout_.frozen_at_ns);
  const Duration device =
      Duration(resumed.running_at_ns() - offset - blackout_.devices_stopped_ns) + blackout_.drain;
  reporter_.Update([&](v1::SideReport& r) {
    v1::Downtimes* out = r.mutable_progress()->mutable_downtimes();
    SetDuration(out->mutable_vcpu(), vcpu);
    SetDuration(out->mutable_device(), device);
    Duration network{0};
    for (const auto& [name, took] : blackout_.parts) AddPart(out->mutable_parts(), "source." + name, took);
    AddPart(out->mutable_parts(), "source.vmm_state", state_time_);
    for (const v1::NamedDuration& part : resumed.parts()) {
      v1::NamedDuration* copy = out->add_parts();
      *copy = part;
      copy->set_name("destination." + part.name());
      if (part.name() == "announce") network = vcpu + ToDuration(part.duration());
    }
    SetDuration(out->mutable_network(), o_.has_network ? network : Duration(0));
    v1::RoundStats* round = r.mutable_progress()->add_rounds();
    round->set_number(last_round_.round);
    round->set_bytes(last_round_.bytes);
    round->set_pages(last_round_.bytes / memory::kPageSize);
    SetDuration(round->mutable_duration(), last_round_.duration);
  });
}

OutgoingMigration::Outcome OutgoingMigration::Impl::outcome() const {
  std::lock_guard lock(mutex_);
  return ended_ ? outcome_ : Outcome::kNone;
}

absl::StatusOr<OutgoingMigration::Outcome> OutgoingMigration::Impl::Wait(Deadline deadline) {
  std::unique_lock lock(mutex_);
  ++waiters_;
  const bool ended = changed_.wait_until(lock, deadline.when(), [&] { return ended_; });
  --waiters_;
  changed_.notify_all();
  if (!ended) return absl::DeadlineExceededError("the migration goes on");
  return outcome_;
}

// ---------------------------------------------------------------------------------------------------------

OutgoingMigration::OutgoingMigration(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
OutgoingMigration::~OutgoingMigration() = default;

std::unique_ptr<OutgoingMigration> OutgoingMigration::Start(SourceOptions options, SourceParts parts) {
  Handover handover = Handover::Source(options.migration_id, options.epoch);
  std::unique_ptr<OutgoingMigration> migration(new OutgoingMigration(
      std::make_unique<Impl>(std::move(options), std::move(parts), std::move(handover))));
  migration->impl_->Launch(false);
  return migration;
}

absl::StatusOr<std::unique_ptr<OutgoingMigration>> OutgoingMigration::ResumeAsking(SourceOptions options,
                                                                                   SourceParts parts) {
  ASSIGN_OR_RETURN(Handover handover, Handover::Recover(v1::ROLE_SOURCE, options.migration_id, options.epoch,
                                                        parts.journal.Records()));
  std::unique_ptr<OutgoingMigration> migration(new OutgoingMigration(
      std::make_unique<Impl>(std::move(options), std::move(parts), std::move(handover))));
  migration->impl_->Launch(true);
  return migration;
}

absl::Status OutgoingMigration::Cancel() { return impl_->Cancel(); }
absl::Status OutgoingMigration::Retune(std::optional<uint64_t> bandwidth,
                                       std::optional<Duration> max_downtime) {
  return impl_->Retune(bandwidth, max_downtime);
}
absl::Status OutgoingMigration::Resolve(v1::HandoverState verdict, bool fenced) {
  return impl_->Resolve(verdict, fenced);
}
v1::SideReport OutgoingMigration::report() const { return impl_->report(); }
OutgoingMigration::Outcome OutgoingMigration::outcome() const { return impl_->outcome(); }
absl::StatusOr<OutgoingMigration::Outcome> OutgoingMigration::Wait(Deadline deadline) {
  return impl_->Wait(deadline);
}

}  // namespace baton::migration
