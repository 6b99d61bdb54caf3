// The stop of a migration: armed, bounded, collected.
#include <algorithm>

#include "agent/vhost/mediator_impl.h"

namespace baton::vhost {

namespace {
constexpr Duration kRoundTrip = std::chrono::milliseconds(20);

}  // namespace

absl::Status Mediator::Impl::ArmStop(StopOrder order) {
  return Run(
      [this, order] {
        stop_space_ = {};
        if (order.handoff) PrepareSpace();
        std::lock_guard lock(mutex_);
        armed_ = order;
        stop_duration_ = {};
        stop_began_.reset();
        stop_ended_.reset();
        stop_ = {};
        stop_.drain_reason = order.why_not;
        return absl::OkStatus();
      },
      Deadline::After(options_.request_timeout * 2));
}

absl::Status Mediator::Impl::DisarmStop() {
  return Run(
      [this] {
        std::lock_guard lock(mutex_);
        armed_.reset();
        stop_began_.reset();
        stop_ended_.reset();
        stop_ = {};
        stop_space_ = {};
        return absl::OkStatus();
      },
      Deadline::After(options_.request_timeout * 2));
}

bool Mediator::Impl::HandoffWanted() const {
  std::lock_guard lock(mutex_);
  return armed_ && armed_->handoff;
}

bool Mediator::Impl::OrderKept() const {
  std::lock_guard lock(mutex_);
  return quirks_.replays_in_order && armed_ && armed_->ordered;
}

bool Mediator::Impl::Armed() const {
  std::lock_guard lock(mutex_);
  return armed_.has_value();
}

Deadline Mediator::Impl::StopDeadline(bool begin) {
  std::lock_guard lock(mutex_);
  if (!armed_) return Deadline::After(options_.stop_timeout);
  if (begin && !stop_began_) stop_began_ = Clock::now();
  // The last of many rings still gets time for a round trip.
  Clock::time_point until = stop_began_.value_or(Clock::now()) + armed_->drain_bound;
  return Deadline::At(std::max(until, Clock::now() + kRoundTrip));
}

Deadline Mediator::Impl::RequestDeadline() const {
  std::lock_guard lock(mutex_);
  Deadline ordinary = Deadline::After(options_.request_timeout);
  if (!armed_ || !stop_began_) return ordinary;
  return ordinary.Min(Deadline::At(std::max(*stop_began_ + armed_->drain_bound, Clock::now() + kRoundTrip)));
}

v1::DeviceStop Mediator::Impl::stop() const {
  std::lock_guard lock(mutex_);
  v1::DeviceStop out = stop_told_;
  out.set_device(name());
  out.mutable_duration()->set_seconds(stop_duration_.count() / 1000000000);
  out.mutable_duration()->set_nanos(static_cast<int32_t>(stop_duration_.count() % 1000000000));
  return out;
}

int64_t Mediator::Impl::stop_began_ns() const {
  std::lock_guard lock(mutex_);
  return stop_began_ ? std::chrono::nanoseconds(stop_began_->time_since_epoch()).count() : 0;
}

bool Mediator::Impl::TakesInflight() const {
  std::lock_guard lock(mutex_);
  return published_.no_takeover().empty() && published_.state() != v1::Device::BACKEND_LOST &&
         published_.state() != v1::Device::HELD;
}

void Mediator::Impl::TellStopped() {
  if (!options_.vmm_moves_memory || !callbacks_.on_stopped || !Armed()) return;
  absl::StatusOr<v1::DeviceState> state = BuildState();
  if (state.ok()) {
    if (absl::Status saved = SaveStateInto(&*state, StopDeadline(false)); !saved.ok()) state = saved;
  }
  Publish();
  callbacks_.on_stopped(state);
}

void Mediator::Impl::RenewStop() {
  if (!options_.vmm_moves_memory || !stop_.begun) return;
  std::lock_guard lock(mutex_);
  if (!armed_) return;
  stop_duration_ = {};
  stop_began_.reset();
  stop_ended_.reset();
  stop_ = {};
  stop_.drain_reason = armed_->why_not;
}

absl::StatusOr<v1::DeviceState> Mediator::Impl::CollectState(Deadline deadline) {
  auto running = [this] {
    return std::any_of(published_.queues().begin(), published_.queues().end(),
                       [](const auto& q) { return q.started(); });
  };
  {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, deadline.when(), [&] { return !running(); })) {
      return Error(v1::SOURCE_VMM_FAILED, absl::StatusCode::kDeadlineExceeded,
                   "device {}: the VMM did not stop it", name());
    }
  }
  auto state = std::make_shared<absl::StatusOr<v1::DeviceState>>(absl::InternalError("no state"));
  RETURN_IF_ERROR(Run(
      [this, state, deadline] {
        *state = BuildState();
        // Whatever was made of zeroes that stood for it.
        const absl::Status intact = options_.ram ? options_.ram->CheckIntact() : absl::OkStatus();
        if (!intact.ok()) *state = WithReason(Annotate(intact, "device " + name()), v1::SOURCE_VMM_FAILED);
        if (state->ok()) {
          if (absl::Status saved = SaveStateInto(&**state, deadline); !saved.ok()) *state = saved;
        }
        return absl::OkStatus();
      },
      deadline, /*changes=*/false));
  return std::move(*state);
}

}  // namespace baton::vhost
