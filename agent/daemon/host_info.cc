#include "agent/daemon/host_info.h"

#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>

#include "agent/memory/dirty_source.h"
#include "common/config.h"
#include "common/log.h"
#include "common/version.h"

namespace baton::daemon {
namespace {

uint64_t MemoryField(const std::string& name) {
  auto text = ReadFileLimited("/proc/meminfo", 65536);
  if (!text.ok()) return 0;
  size_t at = text->find(name + ":");
  return at == std::string::npos ? 0 : std::strtoull(text->c_str() + at + name.size() + 1, nullptr, 10) << 10;
}

}  // namespace

uint64_t MemoryAvailable() { return MemoryField("MemAvailable"); }

uint64_t DiskFree(const std::string& path) {
  struct statvfs info {};
  if (::statvfs(path.c_str(), &info) != 0) return 0;
  return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

v1::Host DescribeHost(const AgentConfig& config, QemuInfo& qemu, Deadline deadline) {
  v1::Host host;
  host.set_name("hosts/" + config.name);
  host.set_peer_address(config.peer.advertise);
  host.set_agent_version(kVersion);
  host.set_cpus(std::thread::hardware_concurrency());
  host.set_memory_total(MemoryField("MemTotal"));
  host.set_memory_free(MemoryAvailable());
  utsname name{};
  if (::uname(&name) == 0) host.set_kernel(fmt::format("{} {}", name.sysname, name.release));
  for (const auto& [key, binary] : config.qemu) {
    auto facts = qemu.Of(binary, deadline);
    if (facts.ok()) {
      (*host.mutable_vmms())[key] = VersionNumber(facts->version);
    } else {
      LOG_WARN("qemu.{} cannot be used: {}", key, Message(facts.status()));
    }
  }
  auto tracking = memory::ProbeDirtyTracking();
  if (tracking.ok()) {
    host.add_capabilities(*tracking);
  } else {
    LOG_WARN("VMs cannot leave this host: {}", Message(tracking.status()));
  }
  if (config.kvm) host.add_capabilities("kvm");
  return host;
}

DestinationFacts GatherDestinationFacts(const AgentConfig& config, QemuInfo& qemu, const v1::VmSpec& spec,
                                        Deadline deadline) {
  DestinationFacts facts;
  facts.host = config.name;
  facts.memory_available = MemoryAvailable();
  facts.memory_dir_free = DiskFree(config.memory_dir);
  facts.state_dir_free = DiskFree(config.state_dir);
  facts.cpus = std::thread::hardware_concurrency();
  facts.kvm = config.kvm;
  facts.peer_tls = config.peer.tls.any();
  facts.require_tls = config.peer.require_tls;
  auto binary = config.qemu.find(spec.qemu().empty() ? "default" : spec.qemu());
  if (binary == config.qemu.end()) {
    facts.qemu = Error(absl::StatusCode::kNotFound, "no QEMU named '{}' in the configuration", spec.qemu());
  } else {
    facts.qemu = qemu.Of(binary->second, deadline);
  }
  for (const std::string& file : {spec.boot().kernel(), spec.boot().initrd()}) {
    if (!file.empty() && ::access(file.c_str(), R_OK) != 0) facts.missing_files.push_back(file);
  }
  return facts;
}

}  // namespace baton::daemon
