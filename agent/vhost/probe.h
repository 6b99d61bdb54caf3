// Looks at a back-end without a VMM, and compares what two sides of a migration offer.
#pragma once

#include <vector>

#include "baton/v1/fleet.pb.h"
#include "baton/v1/types.pb.h"
#include "baton/v1/vm_spec.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::vhost {

// Connects to `backend`, asks for features, protocol features, number of queues, memory slots and
// configuration space, and disconnects. The back-end is left as it was. The answer has state IDLE_DEVICE,
// what is offered in offered_features and offered_protocol_features, and the configuration space. Errors:
// NotFound (no such socket), Unavailable (nobody listens, or it hung up), DeadlineExceeded (it accepts but is
// silent: stopped, or it serves another front-end and takes one at a time), FailedPrecondition (it answers
// nonsense); they name the socket, not the device, which is the subject of the finding that is made of them.
// Any thread.
absl::StatusOr<v1::Device> ProbeBackend(const v1::DeviceSpec& spec, const v1::Backend& backend,
                                        Deadline deadline);

// What stands in the way of moving `source` (as its mediator describes it) to `destination` (as ProbeBackend
// found it). Empty means nothing. Pure.
// `params`: of the migration, for what is asked about requests in flight.
std::vector<v1::Finding> CompareForMigration(const v1::Device& source, const v1::Device& destination,
                                             const v1::MigrationParams& params = {});

// The same for another back-end of this host: `device` as its mediator describes it, `candidate` as
// ProbeBackend found it. Dirty logging and a lost back-end stand in nobody's way here.
std::vector<v1::Finding> CompareForSwap(const v1::Device& device, const v1::Device& candidate);

}  // namespace baton::vhost
