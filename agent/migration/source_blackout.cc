// The blackout: from the freeze to the verdict. What must be in it and what overlaps:
//
//   main     Freeze | states | harvest, last pages ... harvest | round end | Yield | verdict
//   journal                  | YIELDED + fsync .........|
//   relay                    | VMM state: continue, read to the end |
#include <algorithm>
#include <thread>

#include "agent/migration/source_impl.h"
#include "agent/migration/state_pipe.h"
#include "common/log.h"
#include "common/pause_point.h"

namespace baton::migration {

using Event = Handover::Event;
using std::chrono::milliseconds;
using std::chrono::seconds;

void OutgoingMigration::Impl::Mark(const std::string& name, Clock::time_point begin) {
  blackout_.parts.emplace_back(name, Clock::now() - begin);
}

absl::Status OutgoingMigration::Impl::Blackout() {
  ticking_ = false;
  RETURN_IF_ERROR(Interrupted());
  reporter_.EnterPhase(v1::SWITCHOVER);
  const Deadline deadline = Deadline::After(o_.switchover_timeout);
  RETURN_IF_ERROR(FreezeGuest(deadline));
  PausePoint(o_.pause_dir, "frozen");
  RETURN_IF_ERROR(Interrupted());
  const Clock::time_point begin = Clock::now();
  auto states = p_.devices.CollectStates(p_.ram, deadline);
  RecordStops();
  if (!states.ok()) return AtSource(states.status());
  blackout_.drain = p_.devices.stop_duration();
  Mark("device_states", begin);
  RETURN_IF_ERROR(GiveAway(*std::move(states), deadline));
  return AwaitVerdict();
}

absl::Status OutgoingMigration::Impl::FreezeGuest(Deadline deadline) {
  RETURN_IF_ERROR(AtSource(p_.devices.ArmStop({.drain_bound = drain_timeout_,
                                               .params = o_.params,
                                               .takes_inflight = takes_inflight_,
                                               .orders_inflight = orders_inflight_})));
  const Clock::time_point begin = Clock::now();
  const int64_t begin_ns = MonotonicNs();
  freeze_tried_ = true;
  // The VMM waits for its devices: their drain bound, a fence, and some time of its own.
  auto state = p_.driver.Freeze(deadline.Min(Deadline::After(drain_timeout_ + seconds(20))));
  if (!state.ok()) {
    // A drain that failed is the reason for a VMM that did not get to its stop.
    auto states = p_.devices.CollectStates(p_.ram, Deadline::After(milliseconds(1)));
    const v1::Reason device = ReasonOf(states.status(), v1::REASON_UNSPECIFIED);
    RecordStops();
    if (device == v1::DRAIN_TIMEOUT || device == v1::SOURCE_BACKEND_FAILED) return states.status();
    return WithReason(Annotate(state.status(), "freezing the guest"), v1::SOURCE_VMM_FAILED);
  }
  state_fd_ = *std::move(state);
  RETURN_IF_ERROR(Apply(Event::kFrozen));
  frozen_ = true;
  const int64_t told = p_.driver.frozen_at_ns();
  blackout_.frozen_at_ns = told >= begin_ns ? told : begin_ns;
  // QEMU tells of its stop once its devices have stopped, too (do_vm_stop), and one that drains takes its
  // time.
  if (const int64_t devices = p_.devices.stop_began_ns(); devices >= begin_ns)
    blackout_.frozen_at_ns = std::min(blackout_.frozen_at_ns, devices);
  blackout_.devices_stopped_ns = MonotonicNs();
  // Before the vCPUs stop the guest still runs: that part of Freeze is no blackout.
  Mark("freeze", begin + Duration(blackout_.frozen_at_ns - begin_ns));
  reporter_.Update([](v1::SideReport& r) {
    r.set_guest_running(false);
    r.set_handover(v1::FROZEN);
  });
  return absl::OkStatus();
}

// Everything from the decision to yield to the Yield message. An error leaves the handover in the state that
// Settle() has to deal with.
absl::Status OutgoingMigration::Impl::GiveAway(v1::DeviceStates states, Deadline deadline) {
  // From here on only the destination can say that the guest goes on at this side.
  if (absl::Status begun = Apply(Event::kYieldBegun); !begun.ok()) {
    RETURN_IF_ERROR(Interrupted());
    return begun;
  }
  std::thread journal([this] { WriteYielded(); });
  absl::Status relayed;
  std::thread relay([&] { relayed = RelayState(deadline); });
  absl::Status status = [&] {
    v1::PeerMessage message;
    *message.mutable_devices() = std::move(states);
    RETURN_IF_ERROR(link_->Send(message, deadline));
    return SendLastPages(relay, relayed, deadline);
  }();
  if (relay.joinable()) relay.join();
  const Clock::time_point begin = Clock::now();
  journal.join();
  Mark("yield_wait", begin);
  RETURN_IF_ERROR(yield_write_);
  reporter_.Update([](v1::SideReport& r) { r.set_handover(v1::YIELDED); });
  RETURN_IF_ERROR(status);
  RETURN_IF_ERROR(relayed);
  RETURN_IF_ERROR(Apply(Event::kAllSent));
  PausePoint(o_.pause_dir, "yielded");
  if (!handover().may_send_yield()) return absl::InternalError("the handover does not allow to yield");
  v1::PeerMessage message;
  message.mutable_yield()->set_migration_id(o_.migration_id);
  message.mutable_yield()->set_epoch(o_.epoch);
  message.mutable_yield()->set_frozen_at_ns(blackout_.frozen_at_ns);
  blackout_.yield_sent = Clock::now();
  return link_->Send(message, deadline);
}

void OutgoingMigration::Impl::WriteYielded() {
  const absl::Status written = p_.journal.Append(handover().YieldedRecord());
  if (written.ok()) {
    yield_write_ = Apply(Event::kYieldDurable);
    return;
  }
  yield_write_ = written;
  // Otherwise the record may be there or not, and the handover stays in between until it is known.
  if (p_.journal.certainly_absent()) (void)Apply(Event::kYieldFailed);
}

absl::Status OutgoingMigration::Impl::RelayState(Deadline deadline) {
  const auto send = [&](v1::VmmState::Stage stage, std::string data, bool eof) {
    v1::PeerMessage message;
    message.mutable_vmm_state()->set_stage(stage);
    state_bytes_ += data.size();
    message.mutable_vmm_state()->set_data(std::move(data));
    message.mutable_vmm_state()->set_eof(eof);
    return link_->Send(message, deadline);
  };
  const Clock::time_point begin = Clock::now();
  const auto failed = [&](const absl::Status& status) {
    if (ReasonOf(status, v1::REASON_UNSPECIFIED) != v1::REASON_UNSPECIFIED) return status;
    return WithReason(Annotate(status, "reading the VMM's state"), v1::SOURCE_VMM_FAILED);
  };
  for (bool eof = false; !eof;) {
    auto setup = ReadAvailable(state_fd_.get(), kStatePiece, eof);
    if (!setup.ok()) return failed(setup.status());
    if (eof) return failed(absl::UnavailableError("the VMM closed its state before it was asked to go on"));
    if (setup->empty()) break;
    RETURN_IF_ERROR(send(v1::VmmState::SETUP, *std::move(setup), false));
  }
  if (absl::Status status = p_.driver.ContinueState(deadline); !status.ok()) return failed(status);
  absl::Status status = ReadToEnd(state_fd_.get(), deadline, [&](std::string data) {
    return send(v1::VmmState::FINAL, std::move(data), false);
  });
  if (!status.ok()) return failed(status);
  if (status = p_.driver.ConfirmState(deadline); !status.ok()) return failed(status);
  const Duration took = Clock::now() - begin;
  RETURN_IF_ERROR(send(v1::VmmState::FINAL, "", true));
  state_time_ = took;
  return absl::OkStatus();
}

// The VMM may still write guest memory while it saves its devices, so memory is harvested twice: the bulk
// while it does, and what little there is once it has ended.
absl::Status OutgoingMigration::Impl::SendLastPages(std::thread& relay, const absl::Status& relayed,
                                                    Deadline deadline) {
  Clock::time_point begin = Clock::now();
  memory::PageSets pages = std::move(left_over_);
  RETURN_IF_ERROR(Harvest(pages));
  Mark("harvest", begin);
  begin = Clock::now();
  const uint32_t round = next_round_;
  ASSIGN_OR_RETURN(RoundSample sample, SendRound(pages, round, /*final=*/true, deadline));
  Mark("tail_send", begin);
  begin = Clock::now();
  relay.join();
  RETURN_IF_ERROR(relayed);
  Mark("state_wait", begin);
  begin = Clock::now();
  for (memory::PageSet& set : pages) set.Reset();
  RETURN_IF_ERROR(Harvest(pages));
  if (const uint64_t late = CountBytes(pages); late > 0) {
    sample.bytes += late;
    RETURN_IF_ERROR(sender_->SendRound(pages, round, {}, deadline));
  }
  RETURN_IF_ERROR(SendRoundEnd(round, true, deadline));
  Mark("last_harvest", begin);
  sample.duration = Clock::now() - begin;
  last_round_ = sample;
  return absl::OkStatus();
}

// The destination decides now. OK once its word was heard on the live connection.
absl::Status OutgoingMigration::Impl::AwaitVerdict() {
  const Deadline deadline = Deadline::After(o_.verdict_timeout);
  for (;;) {
    auto message = link_->Next(deadline);
    if (!message.ok()) return message.status();
    if (message->has_verdict() && message->verdict().migration_id() == o_.migration_id) {
      const v1::Verdict& verdict = message->verdict();
      if (verdict.verdict() == v1::OWNER) {
        Hear(v1::OWNER, "from the destination");
        return absl::OkStatus();
      }
      if (verdict.verdict() == v1::REFUSED) return Objection(*message);
    }
  }
}

}  // namespace baton::migration
