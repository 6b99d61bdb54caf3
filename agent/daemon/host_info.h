// What this host has: for the inventory and for the checks before a VM arrives.
#pragma once

#include "agent/daemon/agent_config.h"
#include "agent/daemon/destination_checks.h"
#include "agent/daemon/qemu_info.h"
#include "baton/v1/fleet.pb.h"

namespace baton::daemon {

// MemAvailable of /proc/meminfo in bytes; 0 if it cannot be read.
uint64_t MemoryAvailable();
// Free bytes of the file system at `path` for us; 0 if it cannot be told.
uint64_t DiskFree(const std::string& path);

// The host as batond lists it. A QEMU that does not run is left out with a log line.
v1::Host DescribeHost(const AgentConfig& config, QemuInfo& qemu, Deadline deadline);

// Everything but vm_in_use.
DestinationFacts GatherDestinationFacts(const AgentConfig& config, QemuInfo& qemu, const v1::VmSpec& spec,
                                        Deadline deadline);

}  // namespace baton::daemon
