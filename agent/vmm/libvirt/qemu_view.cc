#include "agent/vmm/libvirt/qemu_view.h"

#include <libvirt/libvirt-qemu.h>

#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>

#include "agent/vmm/libvirt/connection.h"
#include "common/log.h"

namespace baton::vmm {
namespace {

using nlohmann::json;

constexpr size_t kMaxDevices = 4096;
constexpr size_t kMaxReasons = 64;
constexpr size_t kMaxStatus = 64;
// The first that loses nothing of what a guest under TCG writes while it is copied.
constexpr int kRemembers = 9;

absl::StatusOr<json> Parse(const std::string& text, const char* what, json::value_t type) {
  json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded() || value.type() != type)
    return Error(absl::StatusCode::kInvalidArgument, "QEMU's answer to {} is not what it should be", what);
  return value;
}

bool Flag(const json& object, const char* key) {
  auto it = object.find(key);
  return it != object.end() && it->is_boolean() && it->get<bool>();
}

int Part(const json& object, const char* key) {
  auto it = object.find(key);
  return it != object.end() && it->is_number_integer() ? it->get<int>() : 0;
}

std::string Command(const char* name, const json& arguments = json::object()) {
  json command = {{"execute", name}};
  if (!arguments.empty()) command["arguments"] = arguments;
  return command.dump();
}

}  // namespace

absl::StatusOr<std::string> AskMonitor(virDomainPtr domain, const std::string& command) {
  char* raw = nullptr;
  if (virDomainQemuMonitorCommand(domain, command.c_str(), &raw, VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT) !=
      0)
    return LibvirtError("QEMU's monitor");
  std::unique_ptr<char, decltype(&std::free)> owned(raw, &std::free);
  ASSIGN_OR_RETURN(json answer, Parse(raw, "a command", json::value_t::object));
  if (auto error = answer.find("error"); error != answer.end()) {
    const bool unknown = error->value("class", "") == "CommandNotFound";
    return Error(unknown ? absl::StatusCode::kUnimplemented : absl::StatusCode::kFailedPrecondition,
                 "QEMU: {}", error->value("desc", "it gave no reason"));
  }
  return answer.contains("return") ? answer["return"].dump() : "{}";
}

absl::StatusOr<std::string> ReadQemuVersion(const std::string& text) {
  ASSIGN_OR_RETURN(json answer, Parse(text, "query-version", json::value_t::object));
  auto qemu = answer.find("qemu");
  if (qemu == answer.end() || !qemu->is_object())
    return absl::InvalidArgumentError("QEMU's answer to query-version names no version");
  return fmt::format("QEMU {}.{}.{}", Part(*qemu, "major"), Part(*qemu, "minor"), Part(*qemu, "micro"));
}

bool ForgetsWrites(const std::string& xml, const absl::StatusOr<std::string>& version) {
  // <domain type='qemu' …>: libvirt writes the attribute first, and always in these quotes.
  const bool emulated = xml.substr(0, xml.find('>')).find("'qemu'") != std::string::npos;
  if (!emulated) return false;
  if (!version.ok()) return true;
  auto answer = Parse(*version, "query-version", json::value_t::object);
  if (!answer.ok()) return true;
  auto qemu = answer->find("qemu");
  return qemu == answer->end() || !qemu->is_object() || Part(*qemu, "major") < kRemembers;
}

bool AskForgetsWrites(virDomainPtr domain, const std::string& xml) {
  if (!ForgetsWrites(xml, absl::UnavailableError("not asked"))) return false;
  return ForgetsWrites(xml, AskMonitor(domain, Command("query-version")));
}

absl::StatusOr<std::vector<std::string>> ReadBlockers(const std::string& text) {
  ASSIGN_OR_RETURN(json answer, Parse(text, "query-migrate", json::value_t::object));
  std::vector<std::string> out;
  auto reasons = answer.find("blocked-reasons");
  if (reasons == answer.end() || !reasons->is_array()) return out;
  for (const json& reason : *reasons) {
    if (reason.is_string() && out.size() < kMaxReasons) out.push_back(reason.get<std::string>());
  }
  return out;
}

absl::StatusOr<std::string> ReadMigrationStatus(const std::string& text) {
  ASSIGN_OR_RETURN(json answer, Parse(text, "query-migrate", json::value_t::object));
  auto status = answer.find("status");
  if (status == answer.end()) return std::string();
  if (!status->is_string() || status->get_ref<const std::string&>().size() > kMaxStatus)
    return absl::InvalidArgumentError("QEMU's answer to query-migrate has a status that is none");
  return status->get<std::string>();
}

absl::StatusOr<std::string> AskMigrationStatus(virDomainPtr domain) {
  ASSIGN_OR_RETURN(const std::string migrate, AskMonitor(domain, Command("query-migrate")));
  return ReadMigrationStatus(migrate);
}

absl::StatusOr<std::map<std::string, std::string>> ReadVirtioPaths(const std::string& text) {
  ASSIGN_OR_RETURN(json answer, Parse(text, "x-query-virtio", json::value_t::array));
  std::map<std::string, std::string> out;
  static const std::string kPrefix = "/machine/peripheral/";
  for (const json& item : answer) {
    auto path = item.is_object() ? item.find("path") : item.end();
    if (!item.is_object() || path == item.end() || !path->is_string() || out.size() == kMaxDevices) continue;
    const std::string whole = path->get<std::string>();
    if (whole.compare(0, kPrefix.size(), kPrefix) != 0) continue;
    const size_t end = whole.find('/', kPrefix.size());
    out[whole] = whole.substr(kPrefix.size(), end == std::string::npos ? end : end - kPrefix.size());
  }
  return out;
}

absl::StatusOr<VirtioView> ReadVirtioStatus(const std::string& text) {
  ASSIGN_OR_RETURN(json answer, Parse(text, "x-query-virtio-status", json::value_t::object));
  VirtioView view;
  view.started = Flag(answer, "started");
  view.vhost_started = Flag(answer, "vhost-started");
  auto features = answer.find("guest-features");
  if (features == answer.end() || !features->is_object()) return view;
  for (const char* group : {"dev-features", "transports"}) {
    auto names = features->find(group);
    if (names == features->end() || !names->is_array()) continue;
    for (const json& name : *names) {
      if (!name.is_string() || view.guest_features.size() >= 128) continue;
      // "VIRTIO_BLK_F_FLUSH: Flush command supported"
      const std::string whole = name.get<std::string>();
      view.guest_features.push_back(whole.substr(0, whole.find(':')));
    }
  }
  return view;
}

absl::StatusOr<QemuView> AskQemuForMigration(virDomainPtr domain) {
  QemuView view;
  ASSIGN_OR_RETURN(const std::string version, AskMonitor(domain, Command("query-version")));
  ASSIGN_OR_RETURN(view.version, ReadQemuVersion(version));
  ASSIGN_OR_RETURN(const std::string migrate, AskMonitor(domain, Command("query-migrate")));
  ASSIGN_OR_RETURN(view.blockers, ReadBlockers(migrate));
  return view;
}

absl::StatusOr<QemuView> AskQemu(virDomainPtr domain) {
  ASSIGN_OR_RETURN(QemuView view, AskQemuForMigration(domain));
  auto list = AskMonitor(domain, Command("x-query-virtio"));
  if (absl::IsUnimplemented(list.status())) return view;  // QEMU before 7.2
  RETURN_IF_ERROR(list.status());
  ASSIGN_OR_RETURN(auto paths, ReadVirtioPaths(*list));
  for (const auto& [path, id] : paths) {
    auto status = AskMonitor(domain, Command("x-query-virtio-status", {{"path", path}}));
    if (!status.ok()) {
      // Unplugged meanwhile.
      if (absl::IsFailedPrecondition(status.status())) continue;
      return status.status();
    }
    ASSIGN_OR_RETURN(VirtioView device, ReadVirtioStatus(*status));
    // Only balloons have the property; others answer with an error.
    auto hint = AskMonitor(
        domain, Command("qom-get", {{"path", "/machine/peripheral/" + id}, {"property", "free-page-hint"}}));
    device.free_page_hint = hint.ok() && *hint == "true";
    view.devices.emplace(id, std::move(device));
  }
  return view;
}

}  // namespace baton::vmm
