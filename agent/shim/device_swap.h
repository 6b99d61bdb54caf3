// Another back-end for a device of a running VM: the checks before, the swap, and what is written down of it.
#pragma once

#include "agent/shim/virtual_machine.h"
#include "baton/v1/agent_session.pb.h"
#include "common/status.h"

namespace baton::shim {

// Carries out what Fleet.SwapDevice describes. The new back-end is in shim.conf before it serves, so that a
// shim after this one begins with it. A blocker among the findings is an error (DESTINATION_BACKEND_FAILED),
// except for validate_only, which only tells it. One at a time; waits as long as the command's drain_timeout
// and a few requests to back-ends.
absl::StatusOr<v1::DeviceSwapped> SwapDevice(VirtualMachine& vm, const v1::SwapDeviceCommand& command);

}  // namespace baton::shim
