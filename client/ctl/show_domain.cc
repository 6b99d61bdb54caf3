#include "client/ctl/show_domain.h"

#include <fmt/format.h>

#include "client/ctl/text.h"
#include "client/lib/units.h"

namespace baton::client {
namespace {

std::string AttachmentOf(const v1::DomainDevice& device) {
  return device.mediated() ? "mediated" : device.attachment();
}

std::string GuestDriver(const v1::Domain& domain, const v1::DomainDevice& device) {
  if (!domain.has_vmm_asked() || device.alias().empty()) return "";
  if (device.vhost_started()) return "running on vhost";
  return device.started() ? "running" : "";
}

std::string DomainList(const std::string& title,
                       const google::protobuf::RepeatedPtrField<std::string>& lines) {
  if (lines.empty()) return "";
  std::string out = title + ":\n";
  for (const auto& line : lines) out += Harmless("  " + line) + "\n";
  return out;
}

}  // namespace

uint64_t MemoryOf(const v1::Vm& vm) {
  return vm.has_domain() ? vm.domain().memory_bytes() : vm.spec().memory_bytes();
}

uint32_t VcpusOf(const v1::Vm& vm) { return vm.has_domain() ? vm.domain().vcpus() : vm.spec().vcpus(); }

std::string DriverOf(const v1::Vm& vm) {
  if (!vm.has_domain() || vm.name() == "vms/" + vm.domain().name()) return vm.driver();
  return fmt::format("{} ({})", vm.driver(), Harmless(vm.domain().name()));
}

std::vector<std::string> DomainDeviceNames(const v1::Domain& domain) {
  std::vector<std::string> out;
  for (const auto& device : domain.devices()) {
    const bool plain = device.attachment() == "plain";
    if (plain && device.type() != "disk" && device.type() != "interface" && device.type() != "filesystem")
      continue;
    out.push_back(device.name() + (plain ? "" : "(" + AttachmentOf(device) + ")"));
  }
  return out;
}

std::string DescribeDomain(const v1::Domain& domain) {
  std::string out = "Domain:\n";
  auto line = [&](const std::string& label, const std::string& value) {
    if (!value.empty()) out += Harmless(fmt::format("  {:<15} {}", label + ":", value)) + "\n";
  };
  line("Name", domain.name() + (domain.persistent() ? "" : " (transient)"));
  line("UUID", domain.uuid());
  line("QEMU", domain.vmm_version());
  line("Machine", domain.machine() + (domain.arch().empty() ? "" : ", " + domain.arch()));
  line("CPU", domain.cpu());
  line("Memory backing", domain.memory_backing());
  out += "Devices:\n";
  Table devices({"TYPE", "NAME", "ATTACHED", "MODEL", "SOURCE", "GUEST DRIVER"});
  for (const auto& d : domain.devices())
    devices.AddRow({d.type(), d.name(), AttachmentOf(d), d.model(), d.source(), GuestDriver(domain, d)});
  std::string table = domain.devices().empty() ? "none\n" : devices.Render();
  for (size_t begin = 0; begin < table.size();) {
    const size_t end = table.find('\n', begin);
    out += "  " + table.substr(begin, end - begin) + "\n";
    begin = end + 1;
  }
  out += DomainList("QEMU would not move it now", domain.migration_blockers());
  out += DomainList("What it misses", domain.shortcomings());
  return out;
}

}  // namespace baton::client
