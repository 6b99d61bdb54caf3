#include "agent/vmm/libvirt/domain_needs.h"

#include <pugixml.hpp>
#include <sstream>

#include "agent/vmm/libvirt/xml_document.h"

namespace baton::vmm {
namespace {

std::string ValueOf(const pugi::xml_node& node, const char* name) { return node.attribute(name).value(); }

void AddDisk(const pugi::xml_node& node, DomainNeeds& needs) {
  const std::string type = ValueOf(node, "type");
  if (type != "file" && type != "block") return;
  NeededDisk disk;
  disk.block = type == "block";
  disk.target = ValueOf(node.child("target"), "dev");
  disk.path = ValueOf(node.child("source"), disk.block ? "dev" : "file");
  disk.format = ValueOf(node.child("driver"), "type");
  disk.readonly = node.child("readonly") || ValueOf(node, "device") == "cdrom";
  disk.shareable = static_cast<bool>(node.child("shareable"));
  // A drive without a medium needs nothing.
  if (!disk.path.empty()) needs.disks.push_back(std::move(disk));
}

void AddInterface(const pugi::xml_node& node, DomainNeeds& needs) {
  const std::string type = ValueOf(node, "type");
  const pugi::xml_node source = node.child("source");
  if (type == "bridge") needs.bridges.insert(ValueOf(source, "bridge"));
  if (type == "direct") needs.bridges.insert(ValueOf(source, "dev"));
  if (type == "network") needs.networks.insert(ValueOf(source, "network"));
}

uint64_t PageSize(const pugi::xml_node& page) {
  const std::string unit = page.attribute("unit").as_string("KiB");
  const uint64_t scale = unit[0] == 'G'   ? 1ull << 30
                         : unit[0] == 'M' ? 1ull << 20
                         : unit[0] == 'b' ? 1
                                          : 1ull << 10;
  return uint64_t{page.attribute("size").as_uint()} * scale;
}

}  // namespace

absl::StatusOr<DomainNeeds> ReadDomainNeeds(const std::string& xml) {
  XmlDocument document;
  RETURN_IF_ERROR(document.Load(xml));
  DomainNeeds needs;
  const pugi::xml_node domain = document.domain();
  for (const pugi::xml_node& node : domain.child("devices").children()) {
    const std::string name = node.name();
    if (name == "disk") AddDisk(node, needs);
    if (name == "interface") AddInterface(node, needs);
  }
  needs.bridges.erase("");
  needs.networks.erase("");
  if (const pugi::xml_node hugepages = domain.child("memoryBacking").child("hugepages")) {
    needs.hugepages = true;
    needs.hugepage_size = PageSize(hugepages.child("page"));
  }
  if (const pugi::xml_node cpu = domain.child("cpu")) {
    needs.cpu_mode = ValueOf(cpu, "mode");
    if (needs.cpu_mode.empty() && cpu.child("model")) needs.cpu_mode = "custom";
    std::ostringstream text;
    cpu.print(text, "", pugi::format_raw);
    needs.cpu_xml = text.str();
  }
  return needs;
}

}  // namespace baton::vmm
