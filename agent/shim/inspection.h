// What a source knows of its VM before a migration, and what stands in the way at the source itself.
#pragma once

#include "agent/shim/virtual_machine.h"
#include "baton/v1/agent_session.pb.h"

namespace baton::shim {

// Takes as long as `dirty_sample` (0: does not measure), and little else; `cancelled` is polled while it
// measures. The guest goes on; while its dirty rate is measured its first write to each page costs a
// microsecond.
absl::StatusOr<v1::Inspection> InspectVm(VirtualMachine& vm, Duration dirty_sample, int cancel_fd,
                                         Deadline deadline);

// Findings that follow from the description of the VM alone. Pure.
std::vector<v1::Finding> FindingsOf(const v1::Vm& vm);

}  // namespace baton::shim
