// What stands in the way of moving a libvirt domain: found at the source, and at the destination before it
// starts anything. What asks (libvirt, files, sockets) is apart from what judges, which is pure.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "agent/vmm/libvirt/connection.h"
#include "agent/vmm/libvirt/domain_description.h"
#include "baton/v1/agent_session.pb.h"
#include "baton/v1/types.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::vmm {

// --- at the source ---

// A domain as its libvirt has it, with what a migration has to know of it.
struct SourceFacts {
  std::string xml;             // as it runs
  std::string migratable_xml;  // in the form for migration (VIR_DOMAIN_XML_MIGRATABLE, SECURE)
  int state = 0, reason = 0;   // virDomainGetState
  bool persistent = false;
  // The job under way, in words ("a migration", "a snapshot"); empty: none.
  std::string job;
  // QEMU's blocked-reasons, as far as its monitor answered; `vmm_trouble` says why not.
  std::vector<std::string> blockers;
  std::string vmm_version;
  std::string vmm_trouble;
  std::vector<v1::DomainDisk> disks;
};

// NotFound if there is no such domain; otherwise what could not be asked is left empty.
absl::StatusOr<SourceFacts> GatherSourceFacts(LibvirtConnection& connection, const std::string& uuid,
                                              Deadline deadline);
// Pure. Worst first.
std::vector<v1::Finding> JudgeSource(const SourceFacts& facts, const DomainDescription& domain,
                                     const v1::MigrationParams& params);

// --- at the destination ---

// Looks at the back-end of a vhost-user or vDPA device of this host, for real; OK, findings, or why it cannot
// be used. Called with the domain's device as the destination's XML has it.
using BackendProbe =
    std::function<absl::StatusOr<std::vector<v1::Finding>>(const DomainDevice& device, Deadline deadline)>;

struct DestinationRequest {
  // The XML with which it would be started here (RewriteForDestination), and its description.
  std::string xml;
  DomainDescription domain;
  v1::MigrationParams params;
  std::string source_vmm_version;     // of QEMU, "7.2.22"; empty: unknown
  std::vector<v1::DomainDisk> disks;  // of the source, paths as there; by target
  BackendProbe probe;                 // may be empty: back-ends are not looked at
  // Directory in which QEMU's sockets of this migration will be made; empty: not checked.
  std::string tunnel_dir;
};

// A disk of the domain as this host finds it under the path that the destination's XML names.
struct DiskFacts {
  bool exists = false;
  uint64_t size = 0;       // bytes of the file or device
  bool writable = false;   // by this process; QEMU's user may differ
  std::string filesystem;  // "nfs", "ceph", "gfs2", "ocfs2", "gluster" for file systems that hosts share;
                           // else "local"
  std::string trouble;     // why it cannot be looked at, if it exists or may exist
  uint64_t directory_free = 0;  // bytes left where it would be made
  bool directory = false;       // that directory exists
};

// This host, as far as the domain's arrival depends on it.
struct DestinationFacts {
  std::string host;
  std::string libvirt_trouble;  // not empty: nothing else was asked of libvirt
  // The domain of that UUID, and another one of that name.
  std::optional<int> same_uuid_state;  // virDomainState
  std::optional<int> same_name_state;
  std::string same_uuid_name;
  // virConnectCompareHypervisorCPU: VIR_CPU_COMPARE_*; empty: not asked (no <cpu>), or `cpu_trouble`.
  std::optional<int> cpu;
  std::string cpu_trouble;
  // virConnectGetDomainCapabilities for emulator, arch, machine and virt type: why it has none, or empty.
  std::string capabilities_trouble;
  std::string canonical_machine;
  std::string emulator_version;  // "7.2.22"; empty: unknown
  bool kvm_missing = false;
  std::map<std::string, DiskFacts> disks;  // by target
  std::set<std::string> missing_bridges;
  std::map<std::string, std::string> networks;  // name → trouble; empty: active
  // By the device's name: what the probe found, or why it could not.
  std::map<std::string, absl::StatusOr<std::vector<v1::Finding>>> backends;
  uint64_t memory_available = 0;
  uint64_t hugepage_size = 0;  // of the domain's <hugepages>, bytes; 0: it has none
  uint64_t hugepages_free = 0;
  std::string hugepage_trouble;
  uint64_t memlock_limit = 0;  // of a QEMU that libvirt starts; ~0: unlimited
  uint32_t cpus = 0;
  std::string tunnel_trouble;  // why QEMU could not make sockets in tunnel_dir
};

// Never an error: what could not be asked is a fact as well.
DestinationFacts GatherDestinationFacts(LibvirtConnection& connection, const DestinationRequest& request,
                                        Deadline deadline);
// Which disks have to be copied because this host does not have them: targets. Pure.
std::vector<std::string> DisksToCopy(const DestinationRequest& request, const DestinationFacts& facts);
// Pure. Worst first.
std::vector<v1::Finding> JudgeDestination(const DestinationRequest& request, const DestinationFacts& facts);

}  // namespace baton::vmm
