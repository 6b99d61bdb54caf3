#include "agent/daemon/destination_checks.h"

#include <algorithm>

#include "common/finding.h"
#include "common/units.h"
#include "common/vm_spec.h"

namespace baton::daemon {
namespace {

// Shim, QEMU's own memory and page tables beside the guest's.
constexpr uint64_t kMemoryOverhead = 128ull << 20;
// Journal, configuration and reports are a few KiB; less than this and the next log line fills the disk.
constexpr uint64_t kMinStateDir = 4ull << 20;

class Findings {
 public:
  explicit Findings(std::vector<v1::Finding>* out) : out_(out) {}
  void Block(const std::string& code, const std::string& subject, const std::string& message,
             const std::string& remedy) {
    out_->push_back(MakeFinding(v1::BLOCKER, code, subject, message, remedy));
  }
  void Warn(const std::string& code, const std::string& subject, const std::string& message,
            const std::string& remedy) {
    out_->push_back(MakeFinding(v1::WARNING, code, subject, message, remedy));
  }

 private:
  std::vector<v1::Finding>* out_;
};

std::string MajorMinor(const std::string& version) {
  size_t first = version.find('.');
  return version.substr(0, first == std::string::npos ? first : version.find('.', first + 1));
}

void CheckMemory(const v1::VmSpec& spec, const DestinationFacts& facts, Findings& findings) {
  std::string host = "host " + facts.host;
  uint64_t need = spec.memory_bytes();
  if (facts.memory_available < need + kMemoryOverhead)
    findings.Block(
        "MEMORY_INSUFFICIENT", host,
        fmt::format("the VM needs {}, {} MiB are available", FormatSize(need), facts.memory_available >> 20),
        "free memory on the host or choose another one");
  if (facts.memory_dir_free < need)
    findings.Block("MEMORY_DIR_FULL", host,
                   fmt::format("the VM needs {}, memory_dir has {} MiB left", FormatSize(need),
                               facts.memory_dir_free >> 20),
                   "enlarge the tmpfs (mount -o remount,size=…) or set memory_dir to another one");
  if (facts.state_dir_free < kMinStateDir)
    findings.Block("STATE_DIR_FULL", host,
                   fmt::format("state_dir has {} KiB left; the journal could not be written",
                               facts.state_dir_free >> 10),
                   "free disk space under state_dir");
}

void CheckVmm(const v1::Inspection& source, const DestinationFacts& facts, Findings& findings) {
  const v1::VmSpec& spec = source.vm().spec();
  if (!facts.qemu.ok()) {
    findings.Block("VMM_UNUSABLE", "VMM", Message(facts.qemu.status()),
                   "install QEMU or correct the `qemu` entry");
    return;
  }
  std::string ours = VersionNumber(facts.qemu->version), theirs = VersionNumber(source.vmm_version());
  if (theirs.empty()) {
    findings.Warn("VMM_VERSION_UNKNOWN", "VMM", "the source does not say which QEMU it runs", "");
  } else if (MajorMinor(ours) != MajorMinor(theirs)) {
    findings.Block("VMM_VERSION_DIFFERS", "VMM", fmt::format("QEMU {} at the source, {} here", theirs, ours),
                   "name a QEMU of the same version in the `qemu` map of this host and in the VM's spec");
  } else if (ours != theirs) {
    findings.Warn("VMM_PATCH_DIFFERS", "VMM", fmt::format("QEMU {} at the source, {} here", theirs, ours),
                  "update the older one");
  }
  if (!spec.machine().empty() && facts.qemu->machines.count(spec.machine()) == 0)
    findings.Block("MACHINE_UNKNOWN", "VMM",
                   fmt::format("QEMU {} has no machine type {}", ours, spec.machine()),
                   "use a machine type that both sides have");
}

}  // namespace

std::vector<v1::Finding> CheckDestination(const v1::Inspection& source, const v1::MigrationParams& params,
                                          const DestinationFacts& facts) {
  std::vector<v1::Finding> out;
  Findings findings(&out);
  const v1::VmSpec& spec = source.vm().spec();
  std::string host = "host " + facts.host;
  if (!facts.vm_in_use.empty())
    findings.Block("NAME_IN_USE", host,
                   fmt::format("a VM {} is on this host already ({})", spec.name(), facts.vm_in_use),
                   fmt::format("stop it: batonctl vm stop {} --host {}", spec.name(), facts.host));
  CheckMemory(spec, facts, findings);
  CheckVmm(source, facts, findings);
  for (const std::string& file : facts.missing_files)
    findings.Block("BOOT_FILE_MISSING", host,
                   file + " is not on this host; QEMU needs it to build the same machine",
                   "copy it to the same path");
  if (source.accelerator() == v1::ACCELERATOR_KVM && !facts.kvm)
    findings.Block("ACCELERATOR_DIFFERS", host, "the guest runs under KVM, this host has `kvm: off`",
                   "choose a host with KVM");
  if (source.accelerator() == v1::ACCELERATOR_TCG && facts.kvm && spec.accelerator() == v1::ACCELERATOR_AUTO)
    out.push_back(MakeFinding(v1::INFO, "ACCELERATOR_KEPT", host,
                              "the guest runs without KVM and stays so, though this host has it",
                              "stop and start the VM to use KVM"));
  if (spec.vcpus() > facts.cpus)
    findings.Warn("CPUS_OVERCOMMITTED", host, fmt::format("{} vCPUs on {} CPUs", spec.vcpus(), facts.cpus),
                  "expect the guest to be slower");
  if (params.tls() && !facts.peer_tls)
    findings.Block("TLS_NOT_CONFIGURED", host,
                   "the migration is to use TLS, this host has no peer certificates",
                   "set peer.ca, peer.cert and peer.key");
  if (facts.require_tls && !params.tls())
    findings.Block("TLS_REQUIRED", host, "this host migrates with TLS only (peer.tls: on)",
                   "migrate with TLS, or allow plaintext on this host");
  std::stable_sort(out.begin(), out.end(),
                   [](const v1::Finding& a, const v1::Finding& b) { return a.severity() > b.severity(); });
  return out;
}

}  // namespace baton::daemon
