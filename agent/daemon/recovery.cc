#include "agent/daemon/recovery.h"

namespace baton::daemon {

ShimDeathAction DecideAfterShimDeath(const migration::Ownership& ownership, bool incoming, bool vmm_alive) {
  using State = migration::Ownership::State;
  switch (ownership.state) {
    case State::kOwner:
      return vmm_alive ? ShimDeathAction::kAdopt : ShimDeathAction::kGuestLost;
    case State::kYielded:
      return vmm_alive ? ShimDeathAction::kAdopt : ShimDeathAction::kYieldedLost;
    case State::kReleased:
    case State::kRefused:
      return ShimDeathAction::kCleanUp;
    case State::kIncoming:
      return ShimDeathAction::kRefuse;
    case State::kNothing:
      // An incoming shim that died before it wrote INCOMING is refused like one that died after it.
      return incoming ? ShimDeathAction::kRefuse : ShimDeathAction::kNeverStarted;
  }
  return ShimDeathAction::kCleanUp;
}

std::string NameOf(ShimDeathAction action) {
  switch (action) {
    case ShimDeathAction::kAdopt:
      return "adopt";
    case ShimDeathAction::kGuestLost:
      return "guest_lost";
    case ShimDeathAction::kYieldedLost:
      return "yielded_lost";
    case ShimDeathAction::kRefuse:
      return "refuse";
    case ShimDeathAction::kCleanUp:
      return "clean_up";
    case ShimDeathAction::kNeverStarted:
      return "never_started";
  }
  return "unknown";
}

namespace {

void FillSource(v1::SideReport& report, ShimDeathAction action, const migration::Ownership& ownership,
                bool adopted_running) {
  using State = migration::Ownership::State;
  report.set_reason(v1::SOURCE_SHIM_FAILED);
  report.set_phase(v1::FAILED);
  switch (ownership.state) {
    case State::kReleased:
      // Handed over; only the report of it was lost.
      report.set_handover(v1::RELEASED);
      report.set_phase(v1::SUCCEEDED);
      report.set_reason(v1::NONE);
      report.set_message("handed over; the shim ended before it had reported");
      return;
    case State::kYielded:
      report.set_handover(v1::YIELDED);
      report.set_guest_lost(true);
      report.set_message(
          "shim and VMM at the source ended after the guest had been given away; whether the "
          "destination owns it only the destination can tell");
      return;
    default:
      break;
  }
  report.set_handover(v1::IDLE);
  if (action == ShimDeathAction::kAdopt) {
    report.set_guest_running(adopted_running);
    report.set_message(
        "the shim at the source ended during the migration; a new one took the VM over, the guest goes "
        "on at the source");
  } else {
    report.set_guest_lost(true);
    report.set_message("shim and VMM at the source ended before the handover; the guest is lost");
  }
}

void FillDestination(v1::SideReport& report, ShimDeathAction action, const migration::Ownership& ownership,
                     bool adopted_running) {
  using State = migration::Ownership::State;
  if (ownership.state == State::kOwner || ownership.state == State::kYielded) {
    report.set_handover(v1::OWNER);
    report.set_phase(v1::SUCCEEDED);
    report.set_reason(v1::NONE);
    if (action == ShimDeathAction::kAdopt) {
      report.set_guest_running(adopted_running);
      report.set_message("the shim at the destination ended after the handover; a new one took the VM over");
    } else {
      report.set_guest_lost(true);
      report.set_phase(v1::FAILED);
      report.set_reason(v1::DESTINATION_VMM_FAILED);
      report.set_message("shim and VMM at the destination ended after the handover; the guest is lost");
    }
    return;
  }
  report.set_handover(v1::REFUSED);
  report.set_phase(v1::FAILED);
  report.set_reason(v1::DESTINATION_SHIM_FAILED);
  report.set_message("the shim at the destination ended before the handover; the destination refused");
}

}  // namespace

v1::SideReport FinalReportAfterShimDeath(const v1::SideReport& open, ShimDeathAction action,
                                         const migration::Ownership& ownership, bool adopted_running) {
  v1::SideReport report = open;
  report.set_done(true);
  report.set_guest_running(false);
  if (report.role() == v1::ROLE_SOURCE) {
    FillSource(report, action, ownership, adopted_running);
  } else {
    FillDestination(report, action, ownership, adopted_running);
  }
  return report;
}

}  // namespace baton::daemon
