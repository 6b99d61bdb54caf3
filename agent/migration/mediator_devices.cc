#include "agent/migration/mediator_devices.h"

#include <algorithm>

#include "agent/migration/reporter.h"
#include "agent/vhost/inflight_answer.h"

namespace baton::migration {
namespace {

class MediatorDevices final : public DeviceSet {
 public:
  MediatorDevices(std::vector<vhost::Mediator*> mediators, vhost::BalloonBackend* balloon)
      : mediators_(std::move(mediators)), balloon_(balloon) {}

  memory::HintSource* hints() override { return balloon_; }

  std::vector<std::unique_ptr<memory::DirtySource>> MakeDirtySources() override {
    std::vector<std::unique_ptr<memory::DirtySource>> sources;
    for (vhost::Mediator* mediator : mediators_) sources.push_back(mediator->MakeDirtySource());
    return sources;
  }

  absl::Status ArmStop(const StopOrders& orders) override {
    for (vhost::Mediator* mediator : mediators_) {
      vhost::StopOrder order{orders.drain_bound, false, orders.orders_inflight.contains(mediator->name()),
                             ""};
      if (vhost::AnswerFor(orders.params, mediator->name(), mediator->Describe().class_()) == v1::HANDOFF) {
        order.handoff = orders.takes_inflight.contains(mediator->name());
        if (!order.handoff) order.why_not = "the destination's back-end cannot be given requests in flight";
      }
      RETURN_IF_ERROR(mediator->ArmStop(std::move(order)));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<v1::DeviceStates> CollectStates(const memory::GuestRam& ram, Deadline deadline) override {
    v1::DeviceStates states;
    for (vhost::Mediator* mediator : mediators_) {
      ASSIGN_OR_RETURN(v1::DeviceState state, mediator->CollectState(deadline));
      if (IsBalloon(*mediator)) *state.mutable_balloon() = balloon_->state();
      *states.add_devices() = std::move(state);
    }
    for (const memory::GpaRange& range : ram.layout()) {
      v1::RamRange* out = states.add_layout();
      out->set_gpa(range.gpa);
      out->set_size(range.size);
      out->set_block(range.block);
      out->set_offset(range.offset);
    }
    return states;
  }

  Duration stop_duration() const override {
    Duration longest{0};
    for (const v1::DeviceStop& stop : stops()) longest = std::max(longest, ToDuration(stop.duration()));
    return longest;
  }

  int64_t stop_began_ns() const override {
    int64_t first = 0;
    for (const vhost::Mediator* mediator : mediators_) {
      const int64_t began = mediator->stop_began_ns();
      if (began != 0 && (first == 0 || began < first)) first = began;
    }
    return first;
  }

  std::vector<v1::DeviceStop> stops() const override {
    std::vector<v1::DeviceStop> stops;
    for (const vhost::Mediator* mediator : mediators_) stops.push_back(mediator->stop());
    return stops;
  }

  absl::Status DisarmStop() override {
    absl::Status first;
    for (vhost::Mediator* mediator : mediators_) first.Update(mediator->DisarmStop());
    return first;
  }

  std::vector<std::string> TakesInflight() const override {
    std::vector<std::string> names;
    for (const vhost::Mediator* mediator : mediators_) {
      if (mediator->TakesInflight()) names.push_back(mediator->name());
    }
    return names;
  }

  std::vector<std::string> OrdersInflight() const override {
    std::vector<std::string> names;
    for (const vhost::Mediator* mediator : mediators_) {
      if (mediator->TakesInflight() && mediator->OrdersInflight()) names.push_back(mediator->name());
    }
    return names;
  }

  absl::Status ExpectStates(const v1::DeviceStates& states) override {
    if (states.devices_size() != static_cast<int>(mediators_.size()))
      return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition,
                   "the source sent the state of {} devices; this side has {}", states.devices_size(),
                   mediators_.size());
    for (vhost::Mediator* mediator : mediators_) {
      const auto state = std::find_if(states.devices().begin(), states.devices().end(),
                                      [&](const v1::DeviceState& s) { return s.name() == mediator->name(); });
      if (state == states.devices().end())
        return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition,
                     "the source sent no state of device {}", mediator->name());
      RETURN_IF_ERROR(mediator->ExpectState(*state));
      if (!IsBalloon(*mediator)) continue;
      if (!state->has_balloon())
        return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition,
                     "the source sent no state of the balloon");
      if (absl::Status restored = balloon_->Restore(state->balloon()); !restored.ok())
        return WithReason(restored, v1::PEER_PROTOCOL_ERROR);
    }
    return absl::OkStatus();
  }

  absl::Status VerifyAgainstMemory(const v1::DeviceStates& states, const memory::GuestRam& ram) override {
    for (const v1::DeviceState& state : states.devices())
      RETURN_IF_ERROR(vhost::VerifyAgainstMemory(state, ram));
    return absl::OkStatus();
  }

  absl::Status CheckStarted() const override {
    for (const vhost::Mediator* mediator : mediators_) RETURN_IF_ERROR(mediator->CheckExpected());
    return absl::OkStatus();
  }

  absl::Status Announce(Deadline deadline) override {
    absl::Status first;
    for (vhost::Mediator* mediator : mediators_) first.Update(mediator->Announce(deadline));
    return first;
  }

 private:
  bool IsBalloon(const vhost::Mediator& mediator) const {
    return balloon_ != nullptr && mediator.name() == balloon_->name();
  }

  const std::vector<vhost::Mediator*> mediators_;
  vhost::BalloonBackend* const balloon_;
};

}  // namespace

std::unique_ptr<DeviceSet> MakeMediatorDevices(std::vector<vhost::Mediator*> mediators,
                                               vhost::BalloonBackend* balloon) {
  return std::make_unique<MediatorDevices>(std::move(mediators), balloon);
}

}  // namespace baton::migration
