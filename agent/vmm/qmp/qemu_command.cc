#include "agent/vmm/qmp/qemu_command.h"

#include <algorithm>
#include <cstdio>

#include "common/unix_socket.h"
#include "common/vm_spec.h"

namespace baton::vmm {
namespace {

// Guest physical slots on the root bus. Fixed by position, so that both hosts of a migration agree, and apart
// from each other, so that a VM that gains a NIC keeps the addresses of its disks. q35 itself uses 0x00 and
// 0x1f.
constexpr int kFirstDeviceSlot = 0x04;
constexpr int kLastDeviceSlot = 0x1c;
constexpr int kBalloonSlot = 0x1d;

// In QEMU's option syntax a comma ends a value unless it is doubled.
std::string Escape(const std::string& value) {
  std::string out;
  for (char c : value) {
    out += c;
    if (c == ',') out += ',';
  }
  return out;
}

absl::Status AddDevice(const QemuCommand& command, const v1::DeviceSpec& device, int slot, bool first_disk,
                       std::vector<std::string>& argv) {
  std::string socket = DeviceSocketPath(command.run_dir, device.name());
  RETURN_IF_ERROR(CheckUnixPath(socket));
  uint32_t queues = device.num_queues();
  uint32_t size = device.queue_size();
  std::string chardev = "char-" + device.name();
  // QEMU comes back by itself when the shim that listens there is replaced.
  argv.insert(argv.end(),
              {"-chardev", fmt::format("socket,id={},path={},{}", chardev, Escape(socket),
                                       command.reconnect_ms ? "reconnect-ms=200" : "reconnect=1")});
  switch (device.class_()) {
    case v1::BLK: {
      std::string text = fmt::format(
          "vhost-user-blk-pci,id=dev-{},chardev={},num-queues={},queue-size={},disable-legacy=on,bus=pcie.0,"
          "addr={:#x}",
          device.name(), chardev, queues, size, slot);
      if (first_disk) text += ",bootindex=1";
      argv.insert(argv.end(), {"-device", text});
      return absl::OkStatus();
    }
    case v1::NET: {
      // Less is refused by virtio-net's rx_queue_size and tx_queue_size.
      size = std::max(size, 256u);
      argv.insert(argv.end(), {"-netdev", fmt::format("vhost-user,id=net-{},chardev={},queues={}",
                                                      device.name(), chardev, queues)});
      std::string text = fmt::format(
          "virtio-net-pci,id=dev-{},netdev=net-{},mac={},rx_queue_size={},tx_queue_size={},disable-legacy=on,"
          "romfile=,bus=pcie.0,addr={:#x}",
          device.name(), device.name(), device.mac(), size, size, slot);
      if (queues > 1) text += ",mq=on";
      if (!command.kvm) {
        // Without KVM, QEMU 7.2 crashes when a guest uses MSI-X on a vhost-user NIC: virtio_pci_vector_unmask
        // goes on to KVM's irqfds, because vhost_net_start has switched masking by notifier off.
        text += ",vectors=0";
      } else if (queues > 1) {
        // One for each queue, one for configuration changes, one for the control queue.
        text += fmt::format(",vectors={}", 2 * queues + 2);
      }
      argv.insert(argv.end(), {"-device", text});
      return absl::OkStatus();
    }
    default:
      return Error(absl::StatusCode::kInvalidArgument, "device {}: its class is neither blk nor net",
                   device.name());
  }
}

// QEMU's balloon keeps its hints to itself, so the device is Baton's, behind QEMU's generic vhost-user
// device. virtio-id 5 is the balloon (VIRTIO 1.x, 5).
absl::Status AddHintBalloon(const QemuCommand& command, std::vector<std::string>& argv) {
  const std::string socket = DeviceSocketPath(command.run_dir, kHintBalloonName);
  RETURN_IF_ERROR(CheckUnixPath(socket));
  argv.insert(argv.end(),
              {"-chardev",
               fmt::format("socket,id=char-{},path={},{}", kHintBalloonName, Escape(socket),
                           command.reconnect_ms ? "reconnect-ms=200" : "reconnect=1"),
               "-device",
               fmt::format("{},id=dev-{},chardev=char-{},virtio-id=5,num_vqs={},vq_size={},config_size={},"
                           "disable-legacy=on,bus=pcie.0,addr={:#x}",
                           kGenericDevice, kHintBalloonName, kHintBalloonName, kHintBalloonQueues,
                           kHintBalloonQueueSize, kHintBalloonConfig, kBalloonSlot)});
  return absl::OkStatus();
}

}  // namespace

std::string QmpSocketPath(const std::string& run_dir) { return run_dir + "/qmp.sock"; }
std::string ConsoleSocketPath(const std::string& run_dir) { return run_dir + "/console.sock"; }
std::string DeviceSocketPath(const std::string& run_dir, const std::string& device) {
  return run_dir + "/dev-" + device + ".sock";
}

absl::StatusOr<std::vector<std::string>> BuildQemuCommand(const QemuCommand& command) {
  v1::VmSpec spec = command.spec;
  FillVmSpecDefaults(&spec);
  RETURN_IF_ERROR(ValidateVmSpec(spec));
  if (spec.devices_size() > kLastDeviceSlot - kFirstDeviceSlot + 1) {
    return Error(absl::StatusCode::kInvalidArgument, "devices: {} of them, at most {} fit on the root bus",
                 spec.devices_size(), kLastDeviceSlot - kFirstDeviceSlot + 1);
  }
  std::string console_log =
      command.console_log.empty() ? command.run_dir + "/console.log" : command.console_log;
  RETURN_IF_ERROR(CheckUnixPath(QmpSocketPath(command.run_dir)));
  RETURN_IF_ERROR(CheckUnixPath(ConsoleSocketPath(command.run_dir)));

  std::vector<std::string> argv{command.qemu_path};
  argv.insert(argv.end(), command.qemu_args.begin(), command.qemu_args.end());
  argv.insert(argv.end(), {"-name", Escape(spec.name()) + ",debug-threads=on", "-nodefaults",
                           "-no-user-config", "-msg", "timestamp=on", "-S"});
  // QEMU ≥ 8.1 takes x-ignore-shared only for a named file; the shim has made it.
  argv.insert(argv.end(), {"-object", fmt::format("memory-backend-file,id=mem,size={},share=on,mem-path={}",
                                                  spec.memory_bytes(), Escape(command.memory_path))});
  argv.insert(
      argv.end(),
      {"-machine", spec.machine() + ",memory-backend=mem", "-accel", command.kvm ? "kvm" : "tcg", "-m",
       fmt::format("size={}k", spec.memory_bytes() >> 10), "-smp", std::to_string(spec.vcpus())});
  if (!spec.cpu().empty()) argv.insert(argv.end(), {"-cpu", spec.cpu()});
  argv.insert(argv.end(), {"-display", "none", "-vga", "none"});
  argv.insert(argv.end(), {"-chardev",
                           fmt::format("socket,id=console,path={},server=on,wait=off,logfile={},logappend=on",
                                       Escape(ConsoleSocketPath(command.run_dir)), Escape(console_log)),
                           "-serial", "chardev:console"});
  std::string qmp = command.qmp_fd >= 0 ? fmt::format("fd={}", command.qmp_fd)
                                        : fmt::format("path={}", Escape(QmpSocketPath(command.run_dir)));
  argv.insert(argv.end(), {"-chardev", fmt::format("socket,id=qmp,{},server=on,wait=off", qmp), "-mon",
                           "chardev=qmp,mode=control"});
  if (!spec.boot().kernel().empty()) {
    argv.insert(argv.end(), {"-kernel", spec.boot().kernel()});
    if (!spec.boot().initrd().empty()) argv.insert(argv.end(), {"-initrd", spec.boot().initrd()});
    if (!spec.boot().cmdline().empty()) argv.insert(argv.end(), {"-append", spec.boot().cmdline()});
  }
  bool disk_seen = false;
  for (int i = 0; i < spec.devices_size(); ++i) {
    bool disk = spec.devices(i).class_() == v1::BLK;
    RETURN_IF_ERROR(AddDevice(command, spec.devices(i), kFirstDeviceSlot + i, disk && !disk_seen, argv));
    disk_seen |= disk;
  }
  if (spec.balloon()) {
    argv.insert(argv.end(), {"-device", fmt::format("virtio-balloon-pci,id=balloon,free-page-reporting=on,"
                                                    "disable-legacy=on,bus=pcie.0,addr={:#x}",
                                                    kBalloonSlot)});
  }
  if (spec.free_page_hints()) RETURN_IF_ERROR(AddHintBalloon(command, argv));
  argv.insert(argv.end(), spec.extra_args().begin(), spec.extra_args().end());
  if (command.incoming) argv.insert(argv.end(), {"-incoming", "defer"});
  return argv;
}

absl::StatusOr<QemuVersion> ParseQemuVersion(const std::string& first_line) {
  static constexpr char kMark[] = "version ";
  size_t at = first_line.find(kMark);
  QemuVersion version;
  if (at == std::string::npos || std::sscanf(first_line.c_str() + at + sizeof(kMark) - 1, "%d.%d",
                                             &version.major, &version.minor) != 2) {
    return Error(absl::StatusCode::kInvalidArgument, "'{}' is not the version of a QEMU", first_line);
  }
  return version;
}

}  // namespace baton::vmm
