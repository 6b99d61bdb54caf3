// The checks of a (VM, destination) pair that need no back-end: memory, disk, VMM, CPU, TLS. Pure.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "agent/daemon/qemu_info.h"
#include "baton/v1/agent_session.pb.h"

namespace baton::daemon {

// This host, as far as a VM's arrival depends on it. Gathered by GatherDestinationFacts (host_info.h).
struct DestinationFacts {
  std::string host;
  uint64_t memory_available = 0;  // MemAvailable
  uint64_t memory_dir_free = 0;   // of the tmpfs that will hold guest memory
  uint64_t state_dir_free = 0;
  uint32_t cpus = 0;
  bool kvm = false;
  bool peer_tls = false;  // certificates for peers are configured
  bool require_tls = false;
  std::string vm_in_use;  // a VM of that name is here already: how it is
  absl::StatusOr<QemuFacts> qemu = absl::NotFoundError("");
  std::vector<std::string> missing_files;  // of the spec's boot files
};

// What stands in the way, worst first. No finding means nothing.
std::vector<v1::Finding> CheckDestination(const v1::Inspection& source, const v1::MigrationParams& params,
                                          const DestinationFacts& facts);

}  // namespace baton::daemon
