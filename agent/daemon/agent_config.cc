#include "agent/daemon/agent_config.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>

#include "common/config.h"
#include "common/durable_file.h"
#include "common/vm_spec.h"

namespace baton::daemon {
namespace {

constexpr char kDefaultQemu[] = "/usr/bin/qemu-system-x86_64";
// A socket's path has at most 107 bytes (unix(7)); a VM with a short name must at least be possible. Longer
// names are checked when their VM starts.
constexpr size_t kMaxRunDir = 107 - (sizeof("/vms/v/console.sock") - 1);

// "/", a migration's id (at most 40 characters), "/libvirt".
constexpr size_t kMaxSocketDir = 107 - 1 - 40 - 8;

// baton-shim is installed beside baton-agent, and built beside it.
std::string DefaultShim() {
  std::error_code error;
  std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? "/usr/bin/baton-shim" : (self.parent_path() / "baton-shim").string();
}

void ReadTls(ConfigReader& reader, TlsPaths* tls) {
  reader.Path("ca", &tls->ca);
  reader.Path("cert", &tls->cert);
  reader.Path("key", &tls->key);
  if (tls->any() && (tls->ca.empty() || tls->cert.empty() || tls->key.empty()))
    reader.Problem("", "needs ca, cert and key together");
}

void ReadPeer(ConfigReader& reader, PeerConfig* peer) {
  reader.Endpoint("listen", &peer->listen, kRequired);
  reader.Text("advertise", &peer->advertise);
  reader.Bool("tls", &peer->require_tls);
  ReadTls(reader, &peer->tls);
  if (peer->require_tls && !peer->tls.any())
    reader.Problem("tls", "is on, but there are no ca, cert and key");
  if (!peer->require_tls && reader.Has("listen") && !peer->listen.IsLocal())
    reader.Problem("tls", "may be off only where `listen` is a loopback address or a unix socket");
  if (peer->advertise.empty()) {
    if (peer->listen.unix_path.empty() && (peer->listen.host.empty() || peer->listen.host == "0.0.0.0" ||
                                           peer->listen.host == "::" || peer->listen.port == 0)) {
      reader.Problem("",
                     "the field 'advertise' is missing; `listen` is no address that other hosts could dial");
    } else {
      peer->advertise = peer->listen.ToString();
    }
  } else if (auto parsed = ParseAddress(peer->advertise); !parsed.ok()) {
    reader.Problem("advertise", Message(parsed.status()));
  }
}

void ReadQemu(ConfigReader& reader, QemuBinary* qemu) {
  reader.Path("path", &qemu->path, kRequired);
  reader.TextList("args", &qemu->args);
  reader.TextMap("env", &qemu->env);
}

void CheckDeviceKey(ConfigReader& reader, const std::string& key) {
  size_t slash = key.find('/');
  std::string device = slash == std::string::npos ? key : key.substr(slash + 1);
  bool good = key == "*" ||
              (IsValidName(device) && (slash == std::string::npos || IsValidName(key.substr(0, slash))));
  if (!good) reader.Problem("", "is not a device's name, nor vm/device, nor \"*\"");
}

void CheckBackend(ConfigReader& reader, const std::string& key, const v1::Backend& backend) {
  if (backend.socket().empty()) reader.Problem("", "the field 'socket' is missing");
  CheckDeviceKey(reader, key);
}

template <typename Hook>
void ReadHook(ConfigReader& reader, Hook* hook) {
  reader.TextList("command", &hook->command, kRequired);
  reader.Time("timeout", &hook->timeout);
  if (hook->command.empty()) return;
  if (hook->command[0].empty() || hook->command[0][0] != '/')
    reader.Problem("command", fmt::format("'{}' is not an absolute path", hook->command[0]));
}

void ReadLibvirtUri(ConfigReader& reader, const std::string& field, const std::string& text,
                    std::string* uri) {
  if (text == "auto") {
    // Where libvirt is installed its sockets are in this directory, or will be (systemd starts it on demand).
    *uri = ::access("/run/libvirt", F_OK) == 0 ? "qemu:///system" : "";
  } else if (text == "off" || text.find("://") != std::string::npos) {
    *uri = text == "off" ? "" : text;
  } else {
    reader.Problem(field, fmt::format("'{}' is neither auto nor off nor a URI like qemu:///system", text));
  }
}

// A word or a URI, or a map with that and what moving domains needs.
void ReadLibvirt(ConfigReader& root, LibvirtConfig* out) {
  std::string uri = "auto";
  if (!root.IsMap("libvirt")) {
    root.Text("libvirt", &uri);
    return ReadLibvirtUri(root, "libvirt", uri, &out->uri);
  }
  root.Map("libvirt", [&](ConfigReader& libvirt) {
    libvirt.Text("uri", &uri);
    ReadLibvirtUri(libvirt, "uri", uri, &out->uri);
    libvirt.Path("socket", &out->socket);
    libvirt.Path("socket_dir", &out->socket_dir);
    if (out->socket_dir.size() > kMaxSocketDir)
      libvirt.Problem(
          "socket_dir",
          fmt::format("longer than {} characters; sockets below it would have no valid path", kMaxSocketDir));
    libvirt.Text("qemu_user", &out->qemu_user);
    libvirt.Text("qemu_group", &out->qemu_group);
    libvirt.TextList("shared", &out->shared);
    for (const std::string& path : out->shared)
      if (path.empty() || path[0] != '/')
        libvirt.Problem("shared", fmt::format("'{}' is not an absolute path", path));
    libvirt.MapList("rules", [&](ConfigReader& reader) {
      vmm::RewriteRule rule;
      std::string kind;
      if (reader.Text("kind", &kind, kRequired)) {
        if (auto parsed = vmm::ParseRewriteKind(kind); parsed.ok()) {
          rule.kind = *parsed;
        } else {
          reader.Problem("kind", Message(parsed.status()));
        }
      }
      reader.Text("from", &rule.from);
      reader.Text("to", &rule.to, kRequired);
      out->rules.push_back(std::move(rule));
    });
  });
}

void ReadConfig(ConfigReader& root, AgentConfig* out) {
  root.Text("name", &out->name, kRequired);
  if (!out->name.empty() && !IsValidName(out->name))
    root.Problem("name", fmt::format("'{}' is not a name ({})", out->name, kNameRule));
  root.Endpoint("batond", &out->batond, kRequired);
  root.Map("tls", [&](ConfigReader& tls) {
    ReadTls(tls, &out->session_tls);
    tls.Text("server_name", &out->session_server_name);
  });
  if (root.Has("batond") && !out->batond.IsLocal() && !out->session_tls.any())
    root.Problem("batond", "is not on this machine, so `tls` with ca, cert and key is needed");
  for (auto [field, value] : {std::pair{"run_dir", &out->run_dir}, std::pair{"state_dir", &out->state_dir},
                              std::pair{"memory_dir", &out->memory_dir}})
    if (root.Path(field, value) && value->find_first_of(",\n") != std::string::npos)
      root.Problem(field, "may contain neither commas nor line breaks");
  if (out->run_dir.size() > kMaxRunDir)
    root.Problem(
        "run_dir",
        fmt::format("longer than {} characters; sockets below it would have no valid path", kMaxRunDir));
  root.Map(
      "peer", [&](ConfigReader& peer) { ReadPeer(peer, &out->peer); }, kRequired);
  Address metrics;
  if (root.Endpoint("metrics", &metrics)) {
    if (!metrics.unix_path.empty()) root.Problem("metrics", "must be host:port");
    out->metrics = metrics;
  }
  root.NamedMaps("qemu",
                 [&](const std::string& name, ConfigReader& qemu) { ReadQemu(qemu, &out->qemu[name]); });
  if (!root.Has("qemu")) out->qemu["default"].path = kDefaultQemu;
  if (out->qemu.count("default") == 0) root.Problem("qemu", "the entry 'default' is missing");
  root.Bool("kvm", &out->kvm);
  root.NamedMaps("backends", [&](const std::string& name, ConfigReader& backend) {
    ReadBackend(backend, &out->backends[name]);
    CheckBackend(backend, name, out->backends[name]);
  });
  BackendHook hook;
  if (root.Map("backend_hook", [&](ConfigReader& reader) { ReadHook(reader, &hook); }))
    out->backend_hook = hook;
  root.NamedMaps("fences", [&](const std::string& name, ConfigReader& fence) {
    ReadHook(fence, &out->fences[name]);
    CheckDeviceKey(fence, name);
  });
  root.Choice<std::string>("dirty_tracking",
                           {{"auto", "auto"}, {"uffd", "uffd"}, {"soft-dirty", "soft-dirty"}},
                           &out->dirty_tracking);
  ReadLibvirt(root, &out->libvirt);
  out->shim = DefaultShim();
  root.Path("shim", &out->shim);
  root.Map("log", [&](ConfigReader& log) {
    log.Choice<std::string>(
        "level",
        {{"trace", "trace"}, {"debug", "debug"}, {"info", "info"}, {"warn", "warn"}, {"error", "error"}},
        &out->log_level);
    log.Bool("json", &out->log_json);
  });
}

absl::StatusOr<AgentConfig> FromDocument(ConfigDocument doc) {
  AgentConfig config;
  ConfigReader root = doc.Root();
  ReadConfig(root, &config);
  RETURN_IF_ERROR(doc.Finish(root));
  return config;
}

// A directory that exists or can be made, and in which a file can really be written.
absl::Status CheckDirectory(const std::string& field, const std::string& path) {
  if (absl::Status status = MakeDirectories(path); !status.ok())
    return Annotate(status, fmt::format("{} cannot be used", field));
  std::string probe = fmt::format("{}/.write-test-{}", path, ::getpid());
  absl::Status status = WriteFileDurable(probe, std::string(4096, 'x'));
  ::unlink(probe.c_str());
  if (status.ok()) return status;
  return WithReason(Error(status.code(), "{} {} cannot be written: {}", field, path, Message(status)),
                    v1::STATE_WRITE_FAILED);
}

absl::Status CheckProgram(const std::string& field, const std::string& path, const std::string& remedy) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0)
    return Annotate(ErrnoError(errno, path), fmt::format("{}: {}", field, remedy));
  if (!S_ISREG(info.st_mode) || ::access(path.c_str(), X_OK) != 0)
    return Error(absl::StatusCode::kPermissionDenied, "{}: {}: is not a program that may be executed", field,
                 path);
  return absl::OkStatus();
}

absl::Status CheckReadable(const std::string& field, const std::string& path) {
  if (path.empty() || ::access(path.c_str(), R_OK) == 0) return absl::OkStatus();
  return Annotate(ErrnoError(errno, path), field);
}

}  // namespace

absl::StatusOr<AgentConfig> ReadAgentConfig(const std::string& path) {
  ASSIGN_OR_RETURN(ConfigDocument doc, ConfigDocument::FromFile(path));
  return FromDocument(std::move(doc));
}

absl::StatusOr<AgentConfig> ParseAgentConfig(const std::string& text, const std::string& name) {
  ASSIGN_OR_RETURN(ConfigDocument doc, ConfigDocument::FromText(text, name));
  return FromDocument(std::move(doc));
}

absl::Status CheckAgentEnvironment(const AgentConfig& config) {
  RETURN_IF_ERROR(CheckDirectory("run_dir", config.run_dir));
  RETURN_IF_ERROR(CheckDirectory("state_dir", config.state_dir));
  RETURN_IF_ERROR(CheckDirectory("memory_dir", config.memory_dir));
  RETURN_IF_ERROR(CheckProgram("shim", config.shim, "install baton-shim or set `shim` to its path"));
  for (const auto& [name, qemu] : config.qemu)
    RETURN_IF_ERROR(
        CheckProgram("qemu." + name, qemu.path, "install QEMU (qemu-system-x86) or set its `path`"));
  for (const auto& [field, tls] :
       {std::pair{"tls", config.session_tls}, std::pair{"peer", config.peer.tls}}) {
    RETURN_IF_ERROR(CheckReadable(fmt::format("{}.ca", field), tls.ca));
    RETURN_IF_ERROR(CheckReadable(fmt::format("{}.cert", field), tls.cert));
    RETURN_IF_ERROR(CheckReadable(fmt::format("{}.key", field), tls.key));
  }
  for (const auto& [key, fence] : config.fences)
    RETURN_IF_ERROR(
        CheckProgram(fmt::format("fences.{}.command", key), fence.command[0], "the fence must exist"));
  if (config.backend_hook)
    RETURN_IF_ERROR(
        CheckProgram("backend_hook.command", config.backend_hook->command[0], "the hook must exist"));
  return absl::OkStatus();
}

namespace {

VmPaths PathsBelow(const AgentConfig& config, const std::string& kind, const std::string& vm) {
  VmPaths paths;
  paths.run_dir = config.run_dir + "/vms/" + vm;
  paths.state_dir = config.state_dir + "/" + kind + "/" + vm;
  paths.memory = config.memory_dir + "/" + vm + ".ram";
  paths.control = paths.run_dir + "/shim.sock";
  paths.conf = paths.state_dir + "/shim.conf";
  paths.journal = paths.state_dir + "/journal";
  paths.shim_log = paths.run_dir + "/shim.log";
  paths.console = paths.run_dir + "/console.sock";
  paths.console_log = paths.run_dir + "/console.log";
  return paths;
}

}  // namespace

VmPaths PathsOf(const AgentConfig& config, const std::string& vm) { return PathsBelow(config, "vms", vm); }

VmPaths DomainPathsOf(const AgentConfig& config, const std::string& uuid) {
  return PathsBelow(config, "domains", uuid);
}

}  // namespace baton::daemon
