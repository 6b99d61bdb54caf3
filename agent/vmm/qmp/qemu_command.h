// QEMU's command line for a VM spec. Pure: the same spec gives the same guest hardware on every host, which
// is what lets a guest move. Host-specific are only paths and the accelerator.
#pragma once

#include <string>
#include <vector>

#include "baton/v1/vm_spec.pb.h"
#include "common/status.h"

namespace baton::vmm {

// The type of QEMU's generic vhost-user device. QEMU 7.2 has none; 10.0 has it, but refuses to give it to a
// guest and cannot migrate it.
inline constexpr char kGenericDevice[] = "vhost-user-device-pci";
// What Baton's balloon is made of (agent/vhost/balloon_backend.h).
inline constexpr int kHintBalloonQueues = 4, kHintBalloonQueueSize = 128, kHintBalloonConfig = 16;

struct QemuCommand {
  v1::VmSpec spec;
  // Path of the binary, and arguments it always needs (-L …).
  std::string qemu_path = "qemu-system-x86_64";
  std::vector<std::string> qemu_args;
  // Directory of the sockets: qmp.sock, console.sock, dev-NAME.sock.
  std::string run_dir;
  // File that backs guest memory; must exist with the spec's size.
  std::string memory_path;
  // Everything the guest prints on its serial console; empty: run_dir/console.log.
  std::string console_log;
  bool kvm = false;
  // Wait for a migration (-incoming defer).
  bool incoming = false;
  // Descriptor number, in QEMU, of a socket that listens at qmp.sock already; -1: QEMU makes the socket.
  int qmp_fd = -1;
  // QEMU knows reconnect-ms (9.2 and later), which replaces reconnect.
  bool reconnect_ms = false;
};

// Where things are in a VM's runtime directory.
std::string QmpSocketPath(const std::string& run_dir);
std::string ConsoleSocketPath(const std::string& run_dir);
// The socket at which QEMU expects the device's back-end, i.e. where its mediator listens.
std::string DeviceSocketPath(const std::string& run_dir, const std::string& device);

// The argument vector. The guest is always created stopped (-S); `cont` starts it. InvalidArgument names the
// field of the spec, or the socket path that is too long.
absl::StatusOr<std::vector<std::string>> BuildQemuCommand(const QemuCommand& command);

// "QEMU emulator version 7.2.22 (Debian …)" → {7, 2}; InvalidArgument if it is none.
struct QemuVersion {
  int major = 0;
  int minor = 0;
};
absl::StatusOr<QemuVersion> ParseQemuVersion(const std::string& first_line);

}  // namespace baton::vmm
