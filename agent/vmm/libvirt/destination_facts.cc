// What this host has for a domain that is to come: the asking half of checks.h.
#include <fcntl.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <pugixml.hpp>

#include "agent/vmm/libvirt/checks.h"
#include "agent/vmm/libvirt/domain_needs.h"
#include "common/unix_socket.h"

namespace baton::vmm {
namespace {

// Of a probe of one back-end; several are looked at one after the other.
constexpr Duration kProbeTimeout = std::chrono::seconds(5);

struct FilesystemType {
  uint32_t magic;
  const char* name;
  Sharing sharing;
};
// statfs(2)'s f_type. Those that are not in the kernel's headers are from their own sources, as libvirt has
// them too.
constexpr FilesystemType kFilesystems[] = {
    {0xef53, "ext4", Sharing::kLocal},          {0x58465342, "xfs", Sharing::kLocal},
    {0x9123683e, "btrfs", Sharing::kLocal},     {0x01021994, "tmpfs", Sharing::kLocal},
    {0x794c7630, "overlayfs", Sharing::kLocal}, {0x2fc12fc1, "zfs", Sharing::kLocal},
    {0xf2f52010, "f2fs", Sharing::kLocal},      {0x858458f6, "ramfs", Sharing::kLocal},
    {0xca451a4e, "bcachefs", Sharing::kLocal},  {0x4d44, "vfat", Sharing::kLocal},
    {0x6969, "nfs", Sharing::kShared},          {0x00c36400, "ceph", Sharing::kShared},
    {0x01161970, "gfs2", Sharing::kShared},     {0x7461636f, "ocfs2", Sharing::kShared},
    {0xff534d42, "cifs", Sharing::kShared},     {0xfe534d42, "smb2", Sharing::kShared},
    {0x47504653, "gpfs", Sharing::kShared},     {0x5346414f, "afs", Sharing::kShared},
    {0x0bd00bd0, "lustre", Sharing::kShared},   {0x19830326, "beegfs", Sharing::kShared}};

std::string DirectoryOf(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "/" : parent;
}

DiskFacts LookAtDisk(const std::string& path) {
  DiskFacts facts;
  struct statfs fs {};
  const std::string directory = DirectoryOf(path);
  if (::statfs(directory.c_str(), &fs) == 0) {
    facts.directory = true;
    facts.directory_free = static_cast<uint64_t>(fs.f_bavail) * static_cast<uint64_t>(fs.f_bsize);
  }
  struct stat st {};
  if (::stat(path.c_str(), &st) != 0) {
    if (errno != ENOENT && errno != ENOTDIR) facts.trouble = std::strerror(errno);
  } else {
    facts.exists = true;
    facts.block_device = S_ISBLK(st.st_mode);
    facts.size = static_cast<uint64_t>(st.st_size);
    if (facts.block_device) {
      const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
      if (!fd || ::ioctl(fd.get(), BLKGETSIZE64, &facts.size) != 0) facts.trouble = std::strerror(errno);
      return facts;
    }
    if (!S_ISREG(st.st_mode)) facts.trouble = "it is neither a file nor a block device";
    if (::statfs(path.c_str(), &fs) != 0) facts.trouble = std::strerror(errno);
  }
  const auto magic = static_cast<uint32_t>(fs.f_type);
  facts.filesystem = fmt::format("type {:#x}", magic);
  for (const FilesystemType& type : kFilesystems) {
    if (type.magic != magic) continue;
    facts.filesystem = type.name;
    facts.sharing = type.sharing;
  }
  return facts;
}

uint64_t MemInfo(const std::string& field) {
  std::ifstream file("/proc/meminfo");
  std::string name;
  uint64_t kib = 0;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    if (words >> name >> kib && name == field + ":") return kib << 10;
  }
  return 0;
}

void LookAtHugepages(const DomainNeeds& needs, DestinationFacts& facts) {
  if (!needs.hugepages) return;
  facts.hugepage_size = needs.hugepage_size != 0 ? needs.hugepage_size : MemInfo("Hugepagesize");
  std::ifstream file(
      fmt::format("/sys/kernel/mm/hugepages/hugepages-{}kB/free_hugepages", facts.hugepage_size >> 10));
  if (!(file >> facts.hugepages_free))
    facts.hugepage_trouble = fmt::format("this host has no huge pages of {} KiB", facts.hugepage_size >> 10);
}

bool IsNetworkDevice(const std::string& name) {
  return name.find('/') == std::string::npos && name != "." && name != ".." &&
         ::access(("/sys/class/net/" + name).c_str(), F_OK) == 0;
}

bool UserfaultfdRestricted() {
  std::ifstream file("/proc/sys/vm/unprivileged_userfaultfd");
  int value = 1;
  return (file >> value) && value == 0;
}

// What libvirt is asked, at once and in one call: it owns all that it uses.
struct Asked {
  std::string uuid, name, arch, machine, type, emulator;
  DomainNeeds needs;
};

std::string LastError() { return Message(LibvirtError("")); }

void AskDomains(virConnectPtr c, const Asked& asked, DestinationFacts& facts) {
  int state = 0;
  if (const DomainPtr domain{virDomainLookupByUUIDString(c, asked.uuid.c_str())}) {
    facts.same_uuid_name = virDomainGetName(domain.get());
    if (virDomainGetState(domain.get(), &state, nullptr, 0) == 0) facts.same_uuid_state = state;
  } else {
    facts.same_uuid_absent = virGetLastErrorCode() == VIR_ERR_NO_DOMAIN;
  }
  if (const DomainPtr domain{virDomainLookupByName(c, asked.name.c_str())}) {
    if (UuidOf(domain.get()) != asked.uuid && virDomainGetState(domain.get(), &state, nullptr, 0) == 0)
      facts.same_name_state = state;
  }
}

// The path and the machine of an emulator's capabilities.
std::pair<std::string, std::string> ReadCapabilities(const char* xml) {
  pugi::xml_document document;
  if (!document.load_string(xml)) return {};
  const pugi::xml_node root = document.child("domainCapabilities");
  return {root.child("path").text().get(), root.child("machine").text().get()};
}

void AskEmulator(virConnectPtr c, const Asked& asked, DestinationFacts& facts) {
  const auto text = [](const std::string& s) { return s.empty() ? nullptr : s.c_str(); };
  using Text = std::unique_ptr<char, decltype(&std::free)>;
  const Text own(virConnectGetDomainCapabilities(c, text(asked.emulator), text(asked.arch),
                                                 text(asked.machine), text(asked.type), 0),
                 &std::free);
  if (!own) {
    facts.capabilities_trouble = LastError();
    return;
  }
  const auto [path, machine] = ReadCapabilities(own.get());
  facts.canonical_machine = machine;
  // libvirt tells the version of its default emulator only.
  const Text standard(
      virConnectGetDomainCapabilities(c, nullptr, text(asked.arch), nullptr, text(asked.type), 0),
      &std::free);
  unsigned long version = 0;
  if (standard && ReadCapabilities(standard.get()).first == path && virConnectGetVersion(c, &version) == 0)
    facts.emulator_version =
        fmt::format("{}.{}.{}", version / 1'000'000, version / 1'000 % 1'000, version % 1'000);
}

void AskCpu(virConnectPtr c, const Asked& asked, DestinationFacts& facts) {
  const std::string& mode = asked.needs.cpu_mode;
  facts.cpu_is_hosts = mode == "host-passthrough" || mode == "maximum";
  if (mode != "custom" || !facts.capabilities_trouble.empty()) return;
  const auto text = [](const std::string& s) { return s.empty() ? nullptr : s.c_str(); };
  // Asked to fail, libvirt names what is missing.
  const int result = virConnectCompareHypervisorCPU(
      c, text(asked.emulator), text(asked.arch), text(asked.machine), text(asked.type),
      asked.needs.cpu_xml.c_str(), VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE);
  if (result >= 0) {
    facts.cpu_fits = result != VIR_CPU_COMPARE_INCOMPATIBLE;
    return;
  }
  const virError* error = virGetLastError();
  if (error != nullptr && error->code == VIR_ERR_CPU_INCOMPATIBLE) facts.cpu_fits = false;
  facts.cpu_trouble = LastError();
}

void AskNetworks(virConnectPtr c, const Asked& asked, DestinationFacts& facts) {
  for (const std::string& name : asked.needs.networks) {
    const std::unique_ptr<virNetwork, void (*)(virNetworkPtr)> network(
        virNetworkLookupByName(c, name.c_str()), [](virNetworkPtr n) { virNetworkFree(n); });
    facts.networks[name] = !network                                 ? LastError()
                           : virNetworkIsActive(network.get()) == 1 ? ""
                                                                    : "it is not active";
  }
}

absl::StatusOr<DestinationFacts> AskDestination(virConnectPtr c, const Asked& asked) {
  DestinationFacts facts;
  AskDomains(c, asked, facts);
  AskEmulator(c, asked, facts);
  AskCpu(c, asked, facts);
  AskNetworks(c, asked, facts);
  return facts;
}

void LookAtBackends(const DestinationRequest& request, Deadline deadline, DestinationFacts& facts) {
  for (const DomainDevice& device : request.domain.devices) {
    const bool disk_or_nic = device.type == DeviceType::kDisk || device.type == DeviceType::kInterface;
    if (device.attachment == Attachment::kVdpa) {
      struct stat st {};
      const bool there = ::stat(device.source.c_str(), &st) == 0 && S_ISCHR(st.st_mode);
      facts.backends.emplace(device.name,
                             there ? absl::StatusOr<std::vector<v1::Finding>>(std::vector<v1::Finding>())
                                   : absl::NotFoundError(device.source + " is no device of this host"));
    } else if (device.attachment == Attachment::kVhostUser && disk_or_nic && !device.vmm_listens &&
               request.probe) {
      facts.backends.emplace(device.name,
                             request.probe(device, deadline.Min(Deadline::After(kProbeTimeout))));
    }
  }
}

}  // namespace

DestinationFacts GatherDestinationFacts(LibvirtConnection& connection, const DestinationRequest& request,
                                        Deadline deadline) {
  Asked asked{request.domain.uuid,
              request.domain.name,
              request.domain.arch,
              request.domain.machine,
              request.domain.type,
              request.domain.emulator,
              {}};
  if (auto needs = ReadDomainNeeds(request.xml); needs.ok()) asked.needs = *std::move(needs);
  DestinationFacts facts;
  auto answered = CallFor<DestinationFacts>(
      connection, "looking whether a domain may come",
      [asked](virConnectPtr c) { return AskDestination(c, asked); }, deadline);
  if (answered.ok()) {
    facts = *std::move(answered);
  } else {
    facts.libvirt_trouble = Message(answered.status());
  }
  char host[256] = "";
  if (::gethostname(host, sizeof host - 1) == 0) facts.host = host;
  facts.kvm_missing = request.domain.type == "kvm" && ::access("/dev/kvm", F_OK) != 0;
  for (const NeededDisk& disk : asked.needs.disks) facts.disks[disk.target] = LookAtDisk(disk.path);
  for (const std::string& name : asked.needs.bridges) {
    if (!IsNetworkDevice(name)) facts.missing_bridges.insert(name);
  }
  facts.memory_available = MemInfo("MemAvailable");
  LookAtHugepages(asked.needs, facts);
  facts.userfaultfd_restricted = UserfaultfdRestricted();
  if (const long cpus = ::sysconf(_SC_NPROCESSORS_ONLN); cpus > 0) facts.cpus = static_cast<uint32_t>(cpus);
  if (!request.tunnel_dir.empty()) {
    if (absl::Status fits = CheckUnixPath(request.tunnel_dir + "/libvirt"); !fits.ok())
      facts.tunnel_trouble = Message(fits);
  }
  LookAtBackends(request, deadline, facts);
  return facts;
}

}  // namespace baton::vmm
