// The files of the domains of a host that Baton has to do with: shim.conf while a shim serves one, and the
// journal, which stays as the memory of who owned the domain at which epoch.
#pragma once

#include <string>
#include <vector>

#include "agent/daemon/agent_config.h"
#include "agent/migration/handover.h"
#include "baton/v1/shim.pb.h"
#include "common/status.h"

namespace baton::daemon {

// Thread-safe: no state of its own beside the files. Calls that change one domain must not overlap. `uuid` is
// libvirt's canonical text.
class DomainStore {
 public:
  explicit DomainStore(const AgentConfig& config) : config_(config) {}

  // Of the domains that have a shim.conf.
  absl::StatusOr<std::vector<std::string>> List() const;
  absl::StatusOr<v1::ShimConfig> Read(const std::string& uuid) const;
  // For a shim that is to start; durable after Sync().
  absl::Status WriteSoon(const std::string& uuid, const v1::ShimConfig& config) const;
  absl::Status Sync(const std::string& uuid) const;
  // kNothing if there is no journal. DataLoss if it is corrupt.
  absl::StatusOr<migration::Ownership> OwnershipOf(const std::string& uuid) const;
  // OWNER, REFUSED or IDLE, as the journal has it.
  v1::HandoverState VerdictOf(const std::string& uuid, const std::string& migration) const;
  // Removes shim.conf and everything in the runtime directory; the journal stays.
  absl::Status Retire(const std::string& uuid) const;
  // Removes the journal as well.
  absl::Status Forget(const std::string& uuid) const;

  // Files that were made here for the disks of a migration to here, and are nobody's until the domain is
  // here.
  absl::Status NoteImages(const std::string& uuid, const std::vector<std::string>& paths) const;
  // Deletes them, because the domain does not come.
  void DropImages(const std::string& uuid) const;
  // They belong to the domain now.
  void KeepImages(const std::string& uuid) const;

 private:
  const AgentConfig& config_;
};

}  // namespace baton::daemon
