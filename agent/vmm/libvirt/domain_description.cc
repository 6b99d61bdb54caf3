#include "agent/vmm/libvirt/domain_description.h"

#include <absl/strings/match.h>
#include <absl/strings/numbers.h>

#include <algorithm>
#include <map>
#include <pugixml.hpp>

namespace baton::vmm {
namespace {

std::string Text(const pugi::xml_node& node) { return node.text().as_string(); }
std::string Attr(const pugi::xml_node& node, const char* name) { return node.attribute(name).as_string(); }
bool Is(const pugi::xml_node& node, const char* name, const std::string& value) {
  return Attr(node, name) == value;
}

absl::Status Bad(const std::string& what) {
  return Error(absl::StatusCode::kInvalidArgument, "domain XML: {}", what);
}

absl::StatusOr<uint32_t> Number(const std::string& text, uint32_t limit, const std::string& what) {
  uint32_t value = 0;
  if (text.empty()) return 0u;
  if (!absl::SimpleAtoi(text, &value) || value > limit)
    return Bad(fmt::format("{} \"{}\" is no number up to {}", what, text, limit));
  return value;
}

// libvirt's scaled integers: KiB unless a unit is given (docs/formatdomain, "Memory Allocation").
absl::StatusOr<uint64_t> Bytes(const pugi::xml_node& node) {
  static const std::map<std::string, uint64_t> kUnits = {
      {"b", 1},          {"bytes", 1},        {"KB", 1000},
      {"k", 1ull << 10}, {"KiB", 1ull << 10}, {"MB", 1000000},
      {"M", 1ull << 20}, {"MiB", 1ull << 20}, {"GB", 1000000000},
      {"G", 1ull << 30}, {"GiB", 1ull << 30}, {"TB", 1000000000000},
      {"T", 1ull << 40}, {"TiB", 1ull << 40}};
  const std::string unit = node.attribute("unit").as_string("KiB");
  auto scale = kUnits.find(unit);
  uint64_t value = 0;
  if (scale == kUnits.end() || !absl::SimpleAtoi(Text(node), &value) ||
      value > (uint64_t{1} << 52) / scale->second)
    return Bad(fmt::format("<{}> is \"{} {}\", which is no amount of memory", node.name(), Text(node), unit));
  return value * scale->second;
}

bool Below(const std::string& path, const std::string& directory) {
  return !directory.empty() && absl::StartsWith(path, directory.back() == '/' ? directory : directory + "/");
}

absl::Status ReadQueues(const pugi::xml_node& driver, DomainDevice& device) {
  ASSIGN_OR_RETURN(device.queues, Number(Attr(driver, "queues"), 65535, "queues"));
  std::string size = Attr(driver, "queue_size");
  if (size.empty()) size = Attr(driver, "rx_queue_size");
  ASSIGN_OR_RETURN(device.queue_size, Number(size, 32768, "queue size"));
  return absl::OkStatus();
}

absl::Status ReadDisk(const pugi::xml_node& node, DomainDevice& device) {
  const pugi::xml_node source = node.child("source");
  const std::string type = Attr(node, "type");
  device.name = Attr(node.child("target"), "dev");
  device.model = Attr(node.child("target"), "bus");
  device.readonly = !node.child("readonly").empty() || Is(node, "device", "cdrom");
  device.shared = !node.child("shareable").empty();
  if (type == "vhostuser") {
    device.attachment = Attachment::kVhostUser;
    device.source = Attr(source, "path");
  } else if (type == "vhostvdpa") {
    device.attachment = Attachment::kVdpa;
    device.source = Attr(source, "dev");
  } else if (type == "nvme") {
    device.attachment = Attachment::kPassthrough;
    device.source = "nvme";
  } else if (type == "network") {
    device.network = true;
    device.source = Attr(source, "protocol") + ":" + Attr(source, "name");
  } else if (type == "volume") {
    device.source = Attr(source, "pool") + "/" + Attr(source, "volume");
  } else {
    device.source = Attr(source, type == "block" ? "dev" : "file");
    if (device.source.empty()) device.source = Attr(source, "dir");
  }
  if (Is(node, "device", "lun")) device.attachment = Attachment::kPassthrough;
  return ReadQueues(node.child("driver"), device);
}

absl::Status ReadInterface(const pugi::xml_node& node, DomainDevice& device) {
  const pugi::xml_node source = node.child("source"), driver = node.child("driver");
  const std::string type = Attr(node, "type");
  device.name = Attr(node.child("target"), "dev");
  device.model = Attr(node.child("model"), "type");
  device.mac = Attr(node.child("mac"), "address");
  for (const char* name : {"path", "dev", "bridge", "network", "name"}) {
    device.source = Attr(source, name);
    if (!device.source.empty()) break;
  }
  if (type == "vhostuser") {
    device.attachment = Attachment::kVhostUser;
    device.vmm_listens = Is(source, "mode", "server");
  } else if (type == "vdpa") {
    device.attachment = Attachment::kVdpa;
  } else if (type == "hostdev") {
    device.attachment = Attachment::kPassthrough;
    device.source = Attr(source.child("address"), "type");
  } else if (type != "user" && type != "udp" && type != "mcast" && type != "server" && type != "client") {
    // A tap: libvirt gives a virtio NIC vhost-net where the host has it unless the driver says "qemu".
    if (absl::StartsWith(device.model, "virtio") && !Is(driver, "name", "qemu"))
      device.attachment = Attachment::kVhostKernel;
  }
  return ReadQueues(driver, device);
}

void ReadHostdev(const pugi::xml_node& node, DomainDevice& device) {
  device.attachment = Attachment::kPassthrough;
  device.model = Attr(node, "type");
  const pugi::xml_node address = node.child("source").child("address");
  device.source = Attr(address, "uuid");
  if (device.source.empty() && device.model == "pci")
    device.source = fmt::format("{}:{}:{}.{}", Attr(address, "domain"), Attr(address, "bus"),
                                Attr(address, "slot"), Attr(address, "function"));
}

void ReadFilesystem(const pugi::xml_node& node, DomainDevice& device) {
  device.name = Attr(node.child("target"), "dir");
  device.model = node.child("driver").attribute("type").as_string("path");
  device.source = Attr(node.child("source"), "dir");
  device.readonly = !node.child("readonly").empty();
  if (device.model != "virtiofs") return;
  device.attachment = Attachment::kVhostUser;
  if (device.source.empty()) device.source = Attr(node.child("source"), "socket");
}

// What libvirt calls the element, and how it is read.
absl::StatusOr<bool> ReadDevice(const pugi::xml_node& node, DomainDevice& device) {
  const std::string name = node.name();
  if (name == "disk") {
    device.type = DeviceType::kDisk;
    RETURN_IF_ERROR(ReadDisk(node, device));
  } else if (name == "interface") {
    device.type = DeviceType::kInterface;
    RETURN_IF_ERROR(ReadInterface(node, device));
  } else if (name == "hostdev") {
    device.type = DeviceType::kHostdev;
    ReadHostdev(node, device);
  } else if (name == "filesystem") {
    device.type = DeviceType::kFilesystem;
    ReadFilesystem(node, device);
  } else if (name == "vsock") {
    device.type = DeviceType::kVsock;
    device.attachment = Attachment::kVhostKernel;
    device.model = Attr(node, "model");
    device.source = Attr(node.child("cid"), "address");
  } else if (name == "shmem") {
    device.type = DeviceType::kShmem;
    device.name = Attr(node, "name");
    device.model = Attr(node.child("model"), "type");
    device.source = Attr(node.child("server"), "path");
  } else if (name == "tpm") {
    device.type = DeviceType::kTpm;
    device.model = Attr(node.child("backend"), "type");
    device.source = Attr(node.child("backend").child("device"), "path");
    if (device.model == "passthrough") device.attachment = Attachment::kPassthrough;
  } else if (name == "rng") {
    device.type = DeviceType::kRng;
    device.model = Attr(node.child("backend"), "model");
    device.source = Text(node.child("backend"));
  } else if (name == "memballoon") {
    device.type = DeviceType::kBalloon;
    device.model = Attr(node, "model");
    if (device.model == "none") return false;
  } else {
    return false;
  }
  return true;
}

}  // namespace

const char* NameOf(Attachment attachment) {
  switch (attachment) {
    case Attachment::kPlain:
      return "plain";
    case Attachment::kVhostUser:
      return "vhost-user";
    case Attachment::kVdpa:
      return "vdpa";
    case Attachment::kVhostKernel:
      return "vhost";
    case Attachment::kPassthrough:
      return "passthrough";
  }
  return "unknown";
}

const char* NameOf(DeviceType type) {
  switch (type) {
    case DeviceType::kDisk:
      return "disk";
    case DeviceType::kInterface:
      return "interface";
    case DeviceType::kHostdev:
      return "hostdev";
    case DeviceType::kFilesystem:
      return "filesystem";
    case DeviceType::kVsock:
      return "vsock";
    case DeviceType::kShmem:
      return "shmem";
    case DeviceType::kTpm:
      return "tpm";
    case DeviceType::kRng:
      return "rng";
    case DeviceType::kBalloon:
      return "balloon";
  }
  return "unknown";
}

absl::StatusOr<DomainDescription> ParseDomain(const std::string& xml, const std::string& mediator_dir) {
  if (xml.size() > kMaxDomainXml)
    return Bad(fmt::format("{} bytes are more than {}", xml.size(), kMaxDomainXml));
  pugi::xml_document document;
  // No DOCTYPE, no external entities: pugixml resolves none.
  const pugi::xml_parse_result parsed = document.load_buffer(xml.data(), xml.size());
  if (!parsed) return Bad(fmt::format("{} at byte {}", parsed.description(), parsed.offset));
  const pugi::xml_node root = document.child("domain");
  if (!root) return Bad("there is no <domain>");
  DomainDescription domain;
  domain.name = Text(root.child("name"));
  domain.uuid = Text(root.child("uuid"));
  if (domain.name.empty()) return Bad("<name> is missing");
  domain.type = Attr(root, "type");
  // `current` is what is plugged; the text is the most that can be.
  const pugi::xml_node vcpu = root.child("vcpu");
  const std::string current = Attr(vcpu, "current");
  ASSIGN_OR_RETURN(domain.vcpus, Number(current.empty() ? Text(vcpu) : current, 1 << 16, "vcpu"));
  if (pugi::xml_node memory = root.child("memory")) {
    ASSIGN_OR_RETURN(domain.memory_bytes, Bytes(memory));
  }
  const pugi::xml_node type = root.child("os").child("type");
  domain.arch = Attr(type, "arch");
  domain.machine = Attr(type, "machine");
  const pugi::xml_node cpu = root.child("cpu");
  domain.cpu = Text(cpu.child("model"));
  if (std::string mode = Attr(cpu, "mode"); !mode.empty() && mode != "custom") domain.cpu = mode;

  const pugi::xml_node backing = root.child("memoryBacking");
  if (std::string source = Attr(backing.child("source"), "type"); !source.empty())
    domain.memory.source = source;
  domain.memory.hugepages = !backing.child("hugepages").empty();
  domain.memory.locked = !backing.child("locked").empty();
  domain.memory.shared = Is(backing.child("access"), "mode", "shared");
  const pugi::xml_node numa = cpu.child("numa");
  if (numa) {
    const bool otherwise = domain.memory.shared;
    domain.memory.shared =
        std::all_of(numa.children("cell").begin(), numa.children("cell").end(), [&](const auto& cell) {
          const std::string access = Attr(cell, "memAccess");
          return access.empty() ? otherwise : access == "shared";
        });
  }

  const pugi::xml_node devices = root.child("devices");
  domain.emulator = Text(devices.child("emulator"));
  std::map<DeviceType, int> counts;
  for (const pugi::xml_node& node : devices.children()) {
    DomainDevice device;
    ASSIGN_OR_RETURN(const bool wanted, ReadDevice(node, device));
    if (!wanted) continue;
    if (domain.devices.size() == kMaxDomainDevices)
      return Bad(fmt::format("more than {} devices", kMaxDomainDevices));
    const int number = counts[device.type]++;
    device.alias = Attr(node.child("alias"), "name");
    if (device.name.empty()) device.name = device.alias;
    if (device.name.empty()) device.name = NameOf(device.type) + std::to_string(number);
    device.mediated = device.attachment == Attachment::kVhostUser && Below(device.source, mediator_dir);
    domain.devices.push_back(std::move(device));
  }
  return domain;
}

std::vector<std::string> Shortcomings(const DomainDescription& domain) {
  std::vector<std::string> out;
  bool vhost_user = false;
  for (const DomainDevice& device : domain.devices) {
    const std::string what = fmt::format("{} {}", NameOf(device.type), device.name);
    switch (device.attachment) {
      case Attachment::kVhostUser:
        vhost_user = true;
        if (!device.mediated)
          out.push_back(
              fmt::format("{} reaches its back-end {} without Baton: no hand-off of requests in flight, no "
                          "bound on its stop, no "
                          "reconnect when the back-end restarts",
                          what, device.source));
        break;
      case Attachment::kVdpa:
        out.push_back(fmt::format("{} is the vDPA device {}, which QEMU moves only if it can suspend it",
                                  what, device.source));
        break;
      case Attachment::kPassthrough:
        out.push_back(fmt::format("{} is a host device and cannot be moved: detach it first", what));
        break;
      case Attachment::kPlain:
      case Attachment::kVhostKernel:
        break;
    }
  }
  if (vhost_user && !domain.memory.shared)
    out.push_back(
        "its memory is not shared, so its vhost-user devices cannot work: <memoryBacking> needs <access "
        "mode='shared'/>");
  return out;
}

}  // namespace baton::vmm
