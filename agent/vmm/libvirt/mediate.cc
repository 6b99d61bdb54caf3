// Putting Baton's mediators into a domain's XML; declared in rewrite.h.
#include <absl/strings/ascii.h>
#include <absl/strings/match.h>
#include <absl/strings/strip.h>

#include <algorithm>
#include <cctype>
#include <set>

#include "agent/vmm/libvirt/rewrite.h"
#include "agent/vmm/libvirt/xml_document.h"
#include "common/finding.h"
#include "common/unix_socket.h"
#include "common/vm_spec.h"

namespace baton::vmm {
namespace {

constexpr size_t kMaxMediatorName = 32;

std::string SocketOf(const std::string& directory, const std::string& name) {
  return fmt::format("{}/dev-{}.sock", directory, name);
}

// The name in a mediator's socket of that directory; empty if it is another path.
std::string NameInSocket(const std::string& directory, const std::string& path) {
  absl::string_view rest = path;
  if (!absl::ConsumePrefix(&rest, directory + "/dev-") || !absl::ConsumeSuffix(&rest, ".sock")) return "";
  return IsValidName(std::string(rest)) ? std::string(rest) : "";
}

// A mediator that is replaced (its shim died, or was upgraded) is there again within moments: QEMU must
// connect to it again by itself, and look often.
bool EnsureReconnect(pugi::xml_node source) {
  pugi::xml_node reconnect = source.child("reconnect");
  bool changed = false;
  if (!reconnect) {
    reconnect = source.append_child("reconnect");
    changed = true;
  }
  const auto ensure = [&](const char* name, const char* value, bool wrong) {
    if (!wrong) return;
    pugi::xml_attribute attribute = reconnect.attribute(name);
    if (!attribute) attribute = reconnect.append_attribute(name);
    attribute.set_value(value);
    changed = true;
  };
  ensure("enabled", "yes", std::string(reconnect.attribute("enabled").value()) != "yes");
  ensure("timeout", "1", reconnect.attribute("timeout").as_uint(0) == 0);
  return changed;
}

class Mediation {
 public:
  Mediation(const std::string& directory, MediatedXml* out) : directory_(directory), out_(out) {}

  absl::Status Device(const pugi::xml_node& node, const DomainDevice& device) {
    const std::string subject = fmt::format("{} {}", NameOf(device.type), device.name);
    if (device.vmm_listens) {
      Add(v1::WARNING, "VHOST_USER_SERVER", subject,
          fmt::format(
              "QEMU listens at {} and the back-end connects (mode='server'); a mediator connects to the "
              "back-end, which therefore has to listen",
              device.source),
          "let the back-end listen (in Open vSwitch a port of type dpdkvhostuser), and say mode='client' "
          "here; "
          "without a mediator it is moved with what QEMU itself can do");
      return absl::OkStatus();
    }
    pugi::xml_node source = node.child("source");
    const std::string path = source.attribute("path").value();
    if (path.empty()) {
      Add(v1::WARNING, "BACKEND_UNKNOWN", subject, "the XML does not name its back-end's socket",
          "give it a <source path='…'>");
      return absl::OkStatus();
    }
    MediatedDevice mediated;
    mediated.device = device;
    std::string name = NameInSocket(directory_, path);
    if (name.empty()) {
      name = Unique(MediatorName(device));
      mediated.backend = path;
      mediated.device.source = SocketOf(directory_, name);
      RETURN_IF_ERROR(CheckUnixPath(mediated.device.source));
      source.attribute("path").set_value(mediated.device.source.c_str());
      names_.insert(name);
    }
    if (!used_.insert(name).second)
      Add(v1::BLOCKER, "MEDIATOR_SHARED", subject,
          fmt::format("its mediator's socket {} is another device's as well", mediated.device.source),
          "give it the socket of its own back-end and mediate the XML again");
    mediated.device.mediated = true;
    if (EnsureReconnect(source))
      Add(v1::INFO, "RECONNECT_ADDED", subject,
          "QEMU is told to connect again when its back-end ends (<reconnect enabled='yes' timeout='1'/>)",
          "");
    out_->devices.push_back(std::move(mediated));
    return absl::OkStatus();
  }

  // Names that mediators of this domain have already are taken.
  void Reserve(const DomainDescription& domain) {
    for (const DomainDevice& device : domain.devices) {
      if (const std::string name = NameInSocket(directory_, device.source); !name.empty())
        names_.insert(name);
    }
  }

  void Whole(const DomainDescription& domain) {
    for (const DomainDevice& device : domain.devices) {
      const std::string subject = fmt::format("{} {}", NameOf(device.type), device.name);
      if (device.attachment == Attachment::kPassthrough)
        Add(v1::WARNING, "DEVICE_NOT_MIGRATABLE", subject,
            "it is a host device: the domain cannot be moved with it", "detach it before a move");
      if (device.attachment == Attachment::kVhostUser && device.type == DeviceType::kFilesystem)
        Add(v1::WARNING, "FILESYSTEM_NOT_MEDIATED", subject,
            "its back-end virtiofsd has files open for the guest, which no mediator can carry", "");
    }
    const bool any =
        std::any_of(domain.devices.begin(), domain.devices.end(),
                    [](const DomainDevice& device) { return device.attachment == Attachment::kVhostUser; });
    if (any && !domain.memory.shared)
      Add(v1::BLOCKER, "MEMORY_NOT_SHARED", "memory",
          "vhost-user back-ends reach the guest's memory only if it is shared, and it is not",
          "add <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>");
  }

 private:
  void Add(v1::Severity severity, const std::string& code, const std::string& subject,
           const std::string& message, const std::string& remedy) {
    out_->findings.push_back(MakeFinding(severity, code, subject, message, remedy));
  }

  std::string Unique(const std::string& name) {
    if (names_.count(name) == 0) return name;
    for (int i = 2;; ++i) {
      std::string other = fmt::format("{}-{}", name, i);
      if (names_.count(other) == 0) return other;
    }
  }

  const std::string& directory_;
  MediatedXml* out_;
  std::set<std::string> names_;  // taken
  std::set<std::string> used_;   // by devices seen so far
};

}  // namespace

std::string MediatorName(const DomainDevice& device) {
  std::string name = device.name;
  // ParseDomain's stand-in for a NIC without a name; libvirt will call it net0 as well.
  absl::string_view number = name;
  if (device.type == DeviceType::kInterface && absl::ConsumePrefix(&number, "interface") && !number.empty() &&
      std::all_of(number.begin(), number.end(), absl::ascii_isdigit))
    name = "net" + std::string(number);
  std::string out;
  for (char c : name) {
    c = absl::ascii_tolower(static_cast<unsigned char>(c));
    out += absl::ascii_isalnum(static_cast<unsigned char>(c)) ? c : '-';
  }
  while (!out.empty() && out.front() == '-') out.erase(0, 1);
  if (out.size() > kMaxMediatorName) out.resize(kMaxMediatorName);
  while (!out.empty() && out.back() == '-') out.pop_back();
  return out.empty() ? NameOf(device.type) : out;
}

absl::StatusOr<MediatedXml> MediateXml(const std::string& xml, const std::string& mediator_dir) {
  std::string directory = mediator_dir;
  while (directory.size() > 1 && directory.back() == '/') directory.pop_back();
  ASSIGN_OR_RETURN(const DomainDescription domain, ParseDomain(xml, directory));
  XmlDocument document;
  RETURN_IF_ERROR(document.Load(xml));
  MediatedXml out;
  Mediation mediation(directory, &out);
  mediation.Reserve(domain);
  // The description lists disks and interfaces in the order of their elements.
  for (const DeviceType type : {DeviceType::kDisk, DeviceType::kInterface}) {
    auto device = domain.devices.begin();
    for (const pugi::xml_node& node : document.domain().child("devices").children(NameOf(type))) {
      device =
          std::find_if(device, domain.devices.end(), [&](const DomainDevice& d) { return d.type == type; });
      if (device == domain.devices.end())
        return Error(absl::StatusCode::kInternal, "domain XML: its devices were counted in two ways");
      if (device->attachment == Attachment::kVhostUser) RETURN_IF_ERROR(mediation.Device(node, *device));
      ++device;
    }
  }
  mediation.Whole(domain);
  std::stable_sort(out.findings.begin(), out.findings.end(),
                   [](const v1::Finding& a, const v1::Finding& b) { return a.severity() > b.severity(); });
  out.xml = document.Text();
  return out;
}

}  // namespace baton::vmm
