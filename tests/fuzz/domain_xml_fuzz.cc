// Any bytes are refused as a domain's XML, or are one that is rewritten and mediated, stays one, and does not
// change when the same is done again.
#include <cstdint>
#include <cstdlib>

#include "agent/vmm/libvirt/rewrite.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace baton::vmm;
  using Kind = RewriteRule::Kind;
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  // What is no XML in detail (a reference to character 0) may be lost once.
  auto cleaned = RewriteForDestination(bytes, {});
  const std::string xml = cleaned.ok() ? cleaned->xml : bytes;
  const std::string directory = "/run/baton/vms/web1";
  auto domain = ParseDomain(xml, directory);
  const std::vector<RewriteRule> rules = {{Kind::kDisk, "/images", "/b"},     {Kind::kDisk, "/", "/c"},
                                          {Kind::kBridge, "br0", "br1"},      {Kind::kNetwork, "", "net"},
                                          {Kind::kVhostUser, "/run", "/var"}, {Kind::kEmulator, "", "/q"},
                                          {Kind::kListen, "", "::"}};
  auto same = RewriteForDestination(xml, {});
  auto rewritten = RewriteForDestination(xml, rules);
  if (same.ok() != rewritten.ok()) std::abort();
  if (same.ok()) {
    auto again = RewriteForDestination(same->xml, {});
    if (!again.ok() || again->xml != same->xml || !again->changes.empty()) std::abort();
  }
  auto mediated = MediateXml(xml, directory);
  // The reader skips comments and declarations, which have to be well-formed where they are kept.
  if (mediated.ok() != (domain.ok() && same.ok())) std::abort();
  if (!mediated.ok()) return 0;
  auto parsed = ParseDomain(mediated->xml, directory);
  if (!parsed.ok() || parsed->devices.size() != domain->devices.size()) std::abort();
  size_t seen = 0;
  for (const DomainDevice& device : parsed->devices) {
    const bool disk_or_nic = device.type == DeviceType::kDisk || device.type == DeviceType::kInterface;
    seen +=
        disk_or_nic && device.attachment == Attachment::kVhostUser && device.mediated && !device.vmm_listens;
  }
  if (seen < mediated->devices.size()) std::abort();
  auto again = MediateXml(mediated->xml, directory);
  if (!again.ok() || again->xml != mediated->xml || again->devices.size() != mediated->devices.size())
    std::abort();
  return 0;
}
