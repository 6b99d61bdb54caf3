// Whether a domain may come, by what is known of this host: the judging half of checks.h. Pure.
#include <absl/strings/numbers.h>
#include <absl/strings/str_split.h>
#include <libvirt/libvirt.h>

#include <algorithm>

#include "agent/vmm/libvirt/checks.h"
#include "agent/vmm/libvirt/domain_needs.h"
#include "common/finding.h"
#include "common/units.h"

namespace baton::vmm {
namespace {

// QEMU's own memory and page tables beside the guest's.
constexpr uint64_t kVmmOverhead = 128ull << 20;

const v1::DomainDisk* SourceDisk(const DestinationRequest& request, const std::string& target) {
  for (const v1::DomainDisk& disk : request.disks) {
    if (disk.target() == target) return &disk;
  }
  return nullptr;
}

// Whether the source's disk has to be sent for this host to have it. A file on a file system of this host
// alone is another one than the source's. What both hosts may share is never copied onto itself: writing it
// while its guest does would destroy it.
bool MustBeCopied(const NeededDisk& disk, const DiskFacts& facts) {
  if (disk.readonly || disk.shareable || disk.block || facts.block_device || !facts.trouble.empty())
    return false;
  return !facts.exists || facts.sharing == Sharing::kLocal;
}

class Judge {
 public:
  Judge(const DestinationRequest& request, const DestinationFacts& facts)
      : request_(request), facts_(facts), host_("host " + facts.host) {}

  std::vector<v1::Finding> Findings() {
    if (!facts_.libvirt_trouble.empty()) {
      Block("LIBVIRT_UNREACHABLE", host_, facts_.libvirt_trouble, "start the daemon, or see its log");
    } else {
      Domains();
      Vmm();
      Cpu();
      Networks();
    }
    if (auto needs = ReadDomainNeeds(request_.xml); needs.ok()) {
      for (const NeededDisk& disk : needs->disks) Disk(disk);
    } else {
      Block("XML_INVALID", "domain " + request_.domain.name, Message(needs.status()), "");
    }
    Memory();
    Backends();
    Params();
    std::stable_sort(out_.begin(), out_.end(),
                     [](const v1::Finding& a, const v1::Finding& b) { return a.severity() > b.severity(); });
    return std::move(out_);
  }

 private:
  void Block(const std::string& code, const std::string& subject, const std::string& message,
             const std::string& remedy) {
    out_.push_back(MakeFinding(v1::BLOCKER, code, subject, message, remedy));
  }
  void Warn(const std::string& code, const std::string& subject, const std::string& message,
            const std::string& remedy) {
    out_.push_back(MakeFinding(v1::WARNING, code, subject, message, remedy));
  }

  void Domains() {
    const std::string& name = request_.domain.name;
    if (facts_.same_uuid_state && *facts_.same_uuid_state != VIR_DOMAIN_SHUTOFF) {
      Block("DOMAIN_ACTIVE", host_,
            fmt::format("a domain of its UUID is active here ({})", facts_.same_uuid_name),
            "find out which of the two is the guest; the other one may have been left behind by a migration");
    } else if (facts_.same_uuid_state && facts_.same_uuid_name != name) {
      Block("UUID_IN_USE", host_,
            fmt::format("its UUID belongs to the domain {} here", facts_.same_uuid_name),
            fmt::format("virsh undefine {}, or give one of them another UUID", facts_.same_uuid_name));
    }
    if (facts_.same_name_state)
      Block("NAME_IN_USE", host_, fmt::format("another domain is called {} here", name),
            fmt::format("virsh domrename {} to something else", name));
  }

  void Vmm() {
    if (facts_.kvm_missing)
      Block("ACCELERATOR_DIFFERS", host_, "the guest runs under KVM, which this host does not have",
            "choose a host with KVM");
    if (!facts_.capabilities_trouble.empty()) {
      Block("VMM_UNUSABLE", "VMM",
            fmt::format("{} {} cannot be had here: {}", request_.domain.emulator, request_.domain.machine,
                        facts_.capabilities_trouble),
            "install the QEMU that it needs, or give this host a rule for `emulator`");
      return;
    }
    if (request_.source_vmm_version.empty() || facts_.emulator_version.empty()) return;
    const auto theirs = Numbers(request_.source_vmm_version), ours = Numbers(facts_.emulator_version);
    if (ours < theirs)
      Warn("VMM_OLDER", "VMM",
           fmt::format("QEMU {} at the source, {} here: what it sends may be unknown here",
                       request_.source_vmm_version, facts_.emulator_version),
           "update this host first");
  }

  // {7, 2} of "QEMU 7.2.22 (Debian …)": another patch level changes nothing in what is sent.
  static std::pair<int, int> Numbers(const std::string& version) {
    const size_t begin = version.find_first_of("0123456789");
    if (begin == std::string::npos) return {};
    const std::vector<std::string> parts =
        absl::StrSplit(version.substr(begin, version.find_first_not_of("0123456789.", begin) - begin), '.');
    std::pair<int, int> out;
    if (!absl::SimpleAtoi(parts[0], &out.first)) return {};
    if (parts.size() > 1 && !absl::SimpleAtoi(parts[1], &out.second)) return {};
    return out;
  }

  void Cpu() {
    if (facts_.cpu_is_hosts)
      Warn("CPU_IS_HOSTS", "CPU",
           "the guest has the CPU of its host as it is (host-passthrough): whether it finds the same here "
           "cannot be "
           "compared",
           "move it only between hosts of the same CPU and microcode, or give it a named model");
    if (facts_.cpu_fits == std::optional<bool>(false)) {
      Block("CPU_INCOMPATIBLE", "CPU",
            facts_.cpu_trouble.empty() ? "this host cannot give the guest the CPU that it has"
                                       : facts_.cpu_trouble,
            "choose a host with that CPU, or give the guest a model that both have");
    } else if (!facts_.cpu_trouble.empty()) {
      Warn("CPU_NOT_COMPARED", "CPU", facts_.cpu_trouble, "");
    }
    if (facts_.cpus > 0 && request_.domain.vcpus > facts_.cpus)
      Warn("CPUS_OVERCOMMITTED", host_,
           fmt::format("{} vCPUs on {} CPUs", request_.domain.vcpus, facts_.cpus),
           "expect the guest to be slower");
  }

  void Networks() {
    for (const auto& [name, trouble] : facts_.networks) {
      if (!trouble.empty())
        Block("NETWORK_MISSING", "network " + name, trouble,
              fmt::format("virsh net-start {}, or give this host a rule for `network`", name));
    }
    for (const std::string& name : facts_.missing_bridges)
      Block("BRIDGE_MISSING", "bridge " + name, "this host has no network device of that name",
            "create it, or give this host a rule for `bridge`");
  }

  void Disk(const NeededDisk& disk) {
    const auto found = facts_.disks.find(disk.target);
    if (found == facts_.disks.end()) return;
    const DiskFacts& here = found->second;
    const std::string subject = "disk " + disk.target;
    if (!here.trouble.empty()) {
      Block("DISK_UNUSABLE", subject, fmt::format("{}: {}", disk.path, here.trouble), "");
    } else if (MustBeCopied(disk, here)) {
      Copied(disk, here, subject);
    } else if (!here.exists) {
      Block("DISK_MISSING", subject,
            fmt::format("{} is not on this host{}", disk.path,
                        disk.readonly || disk.shareable
                            ? ", and disks that are read-only or shared are not copied"
                            : ""),
            "make it available here, or give this host a rule for `disk`");
    } else if (const v1::DomainDisk* source = SourceDisk(request_, disk.target);
               here.block_device && source != nullptr && source->capacity() > here.size &&
               disk.format != "qcow2") {
      Block("DISK_DIFFERS", subject,
            fmt::format("{} has {} bytes here, the guest's disk has {}", disk.path, here.size,
                        source->capacity()),
            "it is another device: give this host a rule for `disk`");
    } else if (!disk.readonly && (here.block_device || here.sharing == Sharing::kUnknown)) {
      Warn("DISK_TAKEN_FOR_SHARED", subject,
           fmt::format("{} ({}) is taken for the same disk that the source has; nothing here can tell",
                       disk.path, here.block_device ? "a block device" : here.filesystem),
           "make sure that both hosts reach the same storage by it");
    }
  }

  void Copied(const NeededDisk& disk, const DiskFacts& here, const std::string& subject) {
    if (!request_.params.copy_storage()) {
      Block("DISK_NOT_SHARED", subject,
            here.exists
                ? fmt::format("{} is on a file system of this host alone ({}): it is not the source's disk",
                              disk.path, here.filesystem)
                : fmt::format("{} is not on this host", disk.path),
            "put it on storage that both hosts share, or let it be copied (--copy-storage)");
      return;
    }
    const v1::DomainDisk* source = SourceDisk(request_, disk.target);
    if (source == nullptr || source->capacity() == 0) {
      Block("DISK_NOT_SHARED", subject, "it would be copied, but the source does not say how big it is", "");
    } else if (!here.directory) {
      Block("DISK_DIRECTORY_MISSING", subject,
            fmt::format("the directory of {} is not on this host", disk.path),
            "create it, or give this host a rule for `disk`");
    } else if (here.directory_free + (here.exists ? here.size : 0) < source->capacity()) {
      Block("DISK_NO_SPACE", subject,
            fmt::format("it would be copied and has {} MiB, {} has {} MiB left", source->capacity() >> 20,
                        disk.path, here.directory_free >> 20),
            "free space there");
    } else {
      out_.push_back(
          MakeFinding(v1::INFO, "DISK_COPIED", subject,
                      fmt::format("it is copied to {} ({} MiB){}", disk.path, source->capacity() >> 20,
                                  here.exists ? ", over the file that is there" : ""),
                      ""));
    }
  }

  void Memory() {
    const uint64_t need = request_.domain.memory_bytes;
    if (facts_.hugepage_size > 0 || !facts_.hugepage_trouble.empty()) {
      if (!facts_.hugepage_trouble.empty()) {
        Block("HUGEPAGES_MISSING", host_, facts_.hugepage_trouble,
              "reserve them (vm.nr_hugepages), or choose another host");
      } else if (facts_.hugepages_free < (need + facts_.hugepage_size - 1) / facts_.hugepage_size) {
        Block("HUGEPAGES_MISSING", host_,
              fmt::format("the guest needs {} in huge pages of {} KiB, {} of them are free", FormatSize(need),
                          facts_.hugepage_size >> 10, facts_.hugepages_free),
              "reserve more (vm.nr_hugepages), or choose another host");
      }
    } else if (facts_.memory_available < need + kVmmOverhead) {
      Block("MEMORY_INSUFFICIENT", host_,
            fmt::format("the guest needs {}, {} MiB are available", FormatSize(need),
                        facts_.memory_available >> 20),
            "free memory on the host or choose another one");
    }
  }

  void Backends() {
    for (const DomainDevice& device : request_.domain.devices) {
      const std::string subject = fmt::format("{} {}", NameOf(device.type), device.name);
      if (device.vmm_listens)
        out_.push_back(MakeFinding(
            v1::INFO, "BACKEND_CONNECTS", subject,
            "its back-end connects to QEMU (mode='server'), so it cannot be looked at before", ""));
      const auto found = facts_.backends.find(device.name);
      if (found == facts_.backends.end()) continue;
      const auto& probed = found->second;
      if (probed.ok()) {
        out_.insert(out_.end(), probed->begin(), probed->end());
      } else {
        Block(absl::IsDeadlineExceeded(probed.status()) ? "BACKEND_SILENT" : "BACKEND_UNREACHABLE", subject,
              Message(probed.status()),
              "start the back-end there, or give this host a rule for `vhost-user`");
      }
    }
  }

  void Params() {
    if (!facts_.tunnel_trouble.empty())
      Block("TUNNEL_IMPOSSIBLE", host_, facts_.tunnel_trouble, "configure a shorter directory");
    // Linux knows zero-copy sending for IP sockets only (sock_setsockopt, SO_ZEROCOPY), and QEMU refuses to
    // begin without it.
    if (request_.params.zero_copy())
      Warn("ZERO_COPY_LEFT_OUT", "memory",
           "QEMU sends into a unix socket of Baton, for which Linux has no zero-copy; the migration goes on "
           "without it, "
           "whatever the MEMLOCK limit. In plaintext Baton itself passes the pages on without copying them",
           "");
    if (!request_.params.post_copy()) return;
    for (const DomainDevice& device : request_.domain.devices) {
      if (device.mediated)
        Warn("POSTCOPY_LEFT_OUT", fmt::format("{} {}", NameOf(device.type), device.name),
             "its back-end would have to wait for pages that have not come yet (vhost-user's PAGEFAULT), "
             "which "
             "a mediator does not do; the migration goes on without post-copy",
             "");
    }
    if (facts_.userfaultfd_restricted)
      Warn("POSTCOPY_MAY_FAIL", host_,
           "vm.unprivileged_userfaultfd is 0: a QEMU that does not run as root cannot take pages one by one",
           "sysctl vm.unprivileged_userfaultfd=1");
  }

  const DestinationRequest& request_;
  const DestinationFacts& facts_;
  const std::string host_;
  std::vector<v1::Finding> out_;
};

}  // namespace

std::vector<std::string> DisksToCopy(const DestinationRequest& request, const DestinationFacts& facts) {
  std::vector<std::string> out;
  auto needs = ReadDomainNeeds(request.xml);
  if (!needs.ok() || !request.params.copy_storage()) return out;
  for (const NeededDisk& disk : needs->disks) {
    const auto found = facts.disks.find(disk.target);
    if (found != facts.disks.end() && MustBeCopied(disk, found->second)) out.push_back(disk.target);
  }
  return out;
}

std::vector<v1::Finding> JudgeDestination(const DestinationRequest& request, const DestinationFacts& facts) {
  return Judge(request, facts).Findings();
}

}  // namespace baton::vmm
