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
  // It is being moved to this host: libvirt answers no questions about its disks, its memory and its QEMU.
  bool incoming = false;
  // Targets of disks with a block job (copy, commit, backup …).
  std::vector<std::string> block_jobs;
  int snapshots = 0;
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

// How a path's file system is used, as far as its type tells.
enum class Sharing {
  kLocal,    // of this host alone: ext4, xfs, tmpfs …
  kShared,   // hosts share it: NFS, Ceph, GFS2 …
  kUnknown,  // a type that is not known here: nothing is concluded
};

// A disk of the domain as this host finds it under the path that the destination's XML names.
struct DiskFacts {
  bool exists = false;
  bool block_device = false;
  uint64_t size = 0;  // bytes of the file or device
  Sharing sharing = Sharing::kUnknown;
  std::string filesystem;       // in words: "nfs", "ext4", "type 0x1234"
  std::string trouble;          // why it cannot be looked at
  bool directory = false;       // the directory in which it is, or would be made, exists
  uint64_t directory_free = 0;  // bytes left there
};

// This host, as far as the domain's arrival depends on it.
struct DestinationFacts {
  std::string host;
  std::string libvirt_trouble;  // not empty: nothing else was asked of libvirt
  // The domain of that UUID, and another one of that name.
  std::optional<int> same_uuid_state;  // virDomainState
  bool same_uuid_absent = false;       // libvirt has said so
  std::optional<int> same_name_state;
  std::string same_uuid_name;
  // virConnectCompareHypervisorCPU: whether the guest's CPU can be had here; empty: it was not asked (the XML
  // asks for none, or for the host's), or could not be. `cpu_trouble`: what is missing, or why it could not.
  std::optional<bool> cpu_fits;
  bool cpu_is_hosts = false;  // host-passthrough, maximum: nothing can be compared
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
  // Only privileged processes may handle page faults of a guest (vm.unprivileged_userfaultfd is 0).
  bool userfaultfd_restricted = false;
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
