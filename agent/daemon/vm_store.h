// The files of the VMs of a host: shim configurations, and what must be remembered of VMs that are gone.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "agent/daemon/agent_config.h"
#include "agent/migration/handover.h"
#include "baton/v1/shim.pb.h"
#include "common/status.h"

namespace baton::daemon {

// Thread-safe: no state of its own beside the files. Calls for one VM must not overlap.
class VmStore {
 public:
  explicit VmStore(const AgentConfig& config) : config_(config) {}

  // Names of the VMs that have a shim.conf, sorted. A directory without one is a start that was never
  // finished; it is removed here.
  absl::StatusOr<std::vector<std::string>> List() const;
  absl::StatusOr<v1::ShimConfig> Read(const std::string& vm) const;
  // Makes the VM's directories, then writes shim.conf durably.
  absl::Status Write(const std::string& vm, const v1::ShimConfig& config) const;
  // Records of the VM's journal; empty if there is none. DataLoss if it is corrupt.
  absl::StatusOr<std::vector<migration::JournalRecord>> ReadJournal(const std::string& vm) const;
  // Removes all that the VM has here: sockets, logs, memory file, configuration, journal. For a VM that came
  // by a migration the verdict is first kept as EndedIncoming (durable).
  absl::Status Remove(const std::string& vm) const;

  absl::Status RememberEnded(const v1::EndedIncoming& ended) const;
  std::optional<v1::EndedIncoming> FindEnded(const std::string& migration_id) const;

  const AgentConfig& config() const { return config_; }

 private:
  void PruneEnded() const;
  const AgentConfig& config_;
};

}  // namespace baton::daemon
