// What to do with a VM whose shim has ended unasked. Pure.
#pragma once

#include <string>

#include "agent/migration/handover.h"
#include "baton/v1/types.pb.h"

namespace baton::daemon {

enum class ShimDeathAction {
  // The VMM lives and this host owns the guest, or gave it away and must ask for the outcome: a new shim
  // takes over.
  kAdopt,
  // This host owned the guest and the VMM is gone as well.
  kGuestLost,
  // Given away, outcome unknown, and the VMM is gone: there is nothing to resume here any more.
  kYieldedLost,
  // Incoming and undecided: what had arrived died with the shim. Write REFUSED, end the VMM, remove
  // everything.
  kRefuse,
  // Refused or released: only leftovers.
  kCleanUp,
  // Nothing was ever owned and nothing was incoming: a first start that did not get far.
  kNeverStarted,
};

ShimDeathAction DecideAfterShimDeath(const migration::Ownership& ownership, bool incoming, bool vmm_alive);

// For logs and metrics: "adopt", "guest_lost" …
std::string NameOf(ShimDeathAction action);

// The final report of one side of a migration whose shim ended without giving one. `open` is the last report
// heard (or only ids and role). `action` as decided above; `adopted_running`: after kAdopt, whether the new
// shim says the guest runs.
v1::SideReport FinalReportAfterShimDeath(const v1::SideReport& open, ShimDeathAction action,
                                         const migration::Ownership& ownership, bool adopted_running);

}  // namespace baton::daemon
