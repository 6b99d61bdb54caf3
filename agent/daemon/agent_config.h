// The configuration of baton-agent: what its YAML file may say, with defaults filled in (docs/operations.md).
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "agent/vmm/libvirt/rewrite.h"
#include "baton/v1/vm_spec.pb.h"
#include "common/clock.h"
#include "common/status.h"
#include "common/units.h"

namespace baton::daemon {

// A QEMU that VM specs may name.
struct QemuBinary {
  std::string path;
  std::vector<std::string> args;           // put before all others: -L …
  std::map<std::string, std::string> env;  // QEMU_MODULE_DIR …
};

// PEM files; either none or all three.
struct TlsPaths {
  std::string ca;
  std::string cert;
  std::string key;
  bool any() const { return !ca.empty() || !cert.empty() || !key.empty(); }
};

struct PeerConfig {
  Address listen;
  // What other hosts dial; default is `listen` if that names an address.
  std::string advertise;
  // On: migrations to and from this host must use TLS.
  bool require_tls = false;
  TlsPaths tls;
};

struct BackendHook {
  // Program and first arguments; the action (create, remove) is appended.
  std::vector<std::string> command;
  Duration timeout = std::chrono::seconds(10);
};

// Keeps what a stopped back-end had in flight from having an effect later (docs/backends.md).
struct FenceHook {
  // Program and first arguments; the action (fence, unfence) is appended.
  std::vector<std::string> command;
  Duration timeout = std::chrono::seconds(10);
};

// The libvirt of this host, and how domains come to it (docs/libvirt.md).
struct LibvirtConfig {
  // Of the daemon whose domains belong to this host; empty: none.
  std::string uri;
  // Its socket, to which the tunnels of migrations lead; empty: where libvirt has it for `uri`.
  std::string socket;
  // Where the sockets of migrations and mediators are made for QEMU's user, who must be able to pass its
  // parents; the same on all hosts.
  std::string socket_dir = "/run/baton-libvirt";
  // Under which libvirt runs QEMU; empty: as its qemu.conf says, else libvirt-qemu and kvm.
  std::string qemu_user;
  std::string qemu_group;
  // What is called otherwise here than at other hosts.
  std::vector<vmm::RewriteRule> rules;
  // Paths whose files are the same at all hosts although libvirt cannot see that.
  std::vector<std::string> shared;
};

struct AgentConfig {
  // Name of this host: hosts/{name}.
  std::string name;
  Address batond;
  TlsPaths session_tls;
  // Name in batond's certificate where it differs from the host of `batond`.
  std::string session_server_name;
  std::string run_dir = "/run/baton";
  std::string state_dir = "/var/lib/baton";
  std::string memory_dir = "/dev/shm/baton";
  PeerConfig peer;
  std::optional<Address> metrics;
  // By the name that a spec uses; "default" is the one for specs that name none.
  std::map<std::string, QemuBinary> qemu;
  bool kvm = false;
  // Back-ends of this host, by "vm/device", "device" or "*"; {vm} and {device} in socket paths are replaced.
  std::map<std::string, v1::Backend> backends;
  std::optional<BackendHook> backend_hook;
  // By "vm/device", "device" or "*".
  std::map<std::string, FenceHook> fences;
  std::string dirty_tracking = "auto";
  LibvirtConfig libvirt;
  // Path of baton-shim.
  std::string shim;
  std::string log_level = "info";
  bool log_json = false;
};

// Reads the file; InvalidArgument with "file:line: field: problem" lines.
absl::StatusOr<AgentConfig> ReadAgentConfig(const std::string& path);
// The same for text.
absl::StatusOr<AgentConfig> ParseAgentConfig(const std::string& text, const std::string& name);

// Looks at the machine: directories can be made and written, the shim and the QEMU binaries can be executed,
// certificate files can be read. Creates the directories. Each problem has its own message with the field
// that names it; the first one is returned.
absl::Status CheckAgentEnvironment(const AgentConfig& config);

// Where the files of a VM are.
struct VmPaths {
  std::string run_dir;      // <run_dir>/vms/<vm>
  std::string state_dir;    // <state_dir>/vms/<vm>
  std::string memory;       // <memory_dir>/<vm>.ram
  std::string control;      // <run_dir>/vms/<vm>/shim.sock
  std::string conf;         // <state_dir>/vms/<vm>/shim.conf
  std::string journal;      // <state_dir>/vms/<vm>/journal
  std::string shim_log;     // <run_dir>/vms/<vm>/shim.log
  std::string console;      // <run_dir>/vms/<vm>/console.sock
  std::string console_log;  // <run_dir>/vms/<vm>/console.log
};
VmPaths PathsOf(const AgentConfig& config, const std::string& vm);
// Of a libvirt domain: the same, with the state below <state_dir>/domains; there is no memory file.
VmPaths DomainPathsOf(const AgentConfig& config, const std::string& uuid);

}  // namespace baton::daemon
