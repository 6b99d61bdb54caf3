// The checks of PREPARING without a record: what `--dry-run` and validate_only answer.
#pragma once

#include <functional>

#include "baton/v1/migrations.pb.h"
#include "server/fleet/fleet.h"

namespace baton::server {

// Inspects the VM at its host (sampling the dirty rate), asks the destination to check the pair by really
// connecting to its back-ends, and fills findings and the forecast in. `rate` is a measured transfer rate in
// bytes a second, or 0. The callback comes later on the loop; `fleet` outlives it.
void StartDryRun(Fleet& fleet, v1::Migration migration, Duration dirty_sample, double rate,
                 std::function<void(absl::StatusOr<v1::Migration>)> callback);

// Forecast of a pre-copy: pure. `rate` bytes a second of the link (0: assumed, and said so), `dirty_rate`
// likewise, `memory` bytes to send in round 0. Fills progress and adds a finding.
void Forecast(uint64_t memory, uint64_t dirty_rate, double rate, v1::Migration* migration);

}  // namespace baton::server
