#include "agent/daemon/domain_host.h"

#include <grp.h>
#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <vector>

#include "common/config.h"

namespace baton::daemon {
namespace {

// qemu.conf: "+123" is a number for sure, "123" is a name if there is one.
std::optional<uint32_t> AsNumber(const std::string& text) {
  uint32_t value = 0;
  const char* begin = text.data() + (!text.empty() && text[0] == '+' ? 1 : 0);
  const char* end = text.data() + text.size();
  auto [at, error] = std::from_chars(begin, end, value);
  return error == std::errc() && at == end && begin != end ? std::optional(value) : std::nullopt;
}

std::optional<uint32_t> UserId(const std::string& name) {
  std::vector<char> buffer(16384);
  passwd entry{}, *found = nullptr;
  if (::getpwnam_r(name.c_str(), &entry, buffer.data(), buffer.size(), &found) == 0 && found)
    return found->pw_uid;
  return AsNumber(name);
}

std::optional<uint32_t> GroupId(const std::string& name) {
  std::vector<char> buffer(65536);
  group entry{}, *found = nullptr;
  if (::getgrnam_r(name.c_str(), &entry, buffer.data(), buffer.size(), &found) == 0 && found)
    return found->gr_gid;
  return AsNumber(name);
}

bool IsSession(const std::string& uri) { return uri.find("/session") != std::string::npos; }

std::string SocketOf(const std::string& uri) {
  if (size_t at = uri.find("socket="); at != std::string::npos) {
    std::string path = uri.substr(at + 7);
    return path.substr(0, path.find('&'));
  }
  std::string directory = "/run/libvirt";
  if (IsSession(uri)) {
    const char* runtime = std::getenv("XDG_RUNTIME_DIR");
    directory = std::string(runtime ? runtime : fmt::format("/run/user/{}", ::geteuid())) + "/libvirt";
  }
  // The one daemon, or the one of QEMU where libvirt is split into several.
  const std::string one = directory + "/libvirt-sock", split = directory + "/virtqemud-sock";
  return ::access(one.c_str(), F_OK) != 0 && ::access(split.c_str(), F_OK) == 0 ? split : one;
}

bool Below(const std::string& path, const std::string& directory) {
  if (path.compare(0, directory.size(), directory) != 0) return false;
  return path.size() == directory.size() || directory.back() == '/' || path[directory.size()] == '/';
}

}  // namespace

bool DeclaredShared(const std::string& path, const std::vector<std::string>& shared) {
  return std::any_of(shared.begin(), shared.end(),
                     [&](const std::string& directory) { return Below(path, directory); });
}

std::string QemuConfValue(const std::string& text, const std::string& field) {
  std::istringstream lines(text);
  std::string value;
  for (std::string line; std::getline(lines, line);) {
    const size_t begin = line.find_first_not_of(" \t");
    if (begin == std::string::npos || line.compare(begin, field.size(), field) != 0) continue;
    size_t at = line.find_first_not_of(" \t", begin + field.size());
    if (at == std::string::npos || line[at] != '=') continue;
    at = line.find_first_not_of(" \t", at + 1);
    if (at == std::string::npos) continue;
    const char quote = line[at];
    if (quote != '"' && quote != '\'') continue;
    const size_t end = line.find(quote, at + 1);
    if (end != std::string::npos) value = line.substr(at + 1, end - at - 1);
  }
  return value;
}

absl::StatusOr<v1::DomainHost> DescribeDomainHost(const LibvirtConfig& config) {
  v1::DomainHost host;
  host.set_socket(config.socket.empty() ? SocketOf(config.uri) : config.socket);
  if (IsSession(config.uri)) {
    host.set_qemu_uid(::geteuid());
    host.set_qemu_gid(::getegid());
    return host;
  }
  std::string conf;
  if (auto text = ReadFileLimited("/etc/libvirt/qemu.conf", 1 << 20); text.ok()) conf = *text;
  auto named = [&](const std::string& ours, const char* field, const char* fallback) {
    if (!ours.empty()) return ours;
    std::string theirs = QemuConfValue(conf, field);
    return theirs.empty() ? std::string(fallback) : theirs;
  };
  const std::string user = named(config.qemu_user, "user", "libvirt-qemu");
  const std::string group = named(config.qemu_group, "group", "kvm");
  const auto uid = UserId(user), gid = GroupId(group);
  if (!uid)
    return Error(absl::StatusCode::kNotFound,
                 "libvirt.qemu_user: there is no user '{}', under which libvirt would run QEMU", user);
  if (!gid)
    return Error(absl::StatusCode::kNotFound,
                 "libvirt.qemu_group: there is no group '{}', under which libvirt would run QEMU", group);
  host.set_qemu_uid(*uid);
  host.set_qemu_gid(*gid);
  return host;
}

bool DisksAreShared(const v1::Domain& domain, const v1::DomainTarget& target,
                    const std::vector<std::string>& shared) {
  bool any = false;
  for (const v1::DomainDevice& device : domain.devices()) {
    if (device.type() != "disk" || device.attachment() != "plain" || device.readonly()) continue;
    // A network disk has a name here, not a path: both hosts reach it, and libvirt knows that.
    if (device.source().empty() || device.source()[0] != '/') continue;
    const auto& copied = target.copied_disks();
    if (std::find(copied.begin(), copied.end(), device.name()) != copied.end()) continue;
    if (!DeclaredShared(device.source(), shared)) return false;
    any = true;
  }
  return any;
}

}  // namespace baton::daemon
