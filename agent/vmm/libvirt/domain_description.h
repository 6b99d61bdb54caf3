// What a libvirt domain is made of, read from its XML. Pure: no connection, no file is touched.
//
// The XML is libvirt's own (virDomainGetXMLDesc), or a file that an operator wrote. It is parsed with bounds
// on size and number of devices, and nothing of it is used as a path or a command here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"

namespace baton::vmm {

// How a device reaches what stands behind it.
enum class Attachment {
  kPlain,        // QEMU does it itself: a file, a network disk, a tap without vhost
  kVhostUser,    // a user space back-end on a unix socket
  kVdpa,         // /dev/vhost-vdpa-N
  kVhostKernel,  // vhost-net, vhost-vsock
  kPassthrough,  // a host device: VFIO, NVMe, USB, SCSI, a TPM
};

enum class DeviceType { kDisk, kInterface, kHostdev, kFilesystem, kVsock, kShmem, kTpm, kRng, kBalloon };

struct DomainDevice {
  DeviceType type = DeviceType::kDisk;
  Attachment attachment = Attachment::kPlain;
  // Name of the target ("vda", "vnet0"), else libvirt's alias, else "disk0", "interface1" in document order.
  std::string name;
  std::string alias;
  // "virtio", "e1000", "sata" … as libvirt has it.
  std::string model;
  // Socket, device node, file, network, bridge: whatever the other side is called.
  std::string source;
  std::string mac;
  // Queues of a virtio device where the XML says so, else 0.
  uint32_t queues = 0;
  uint32_t queue_size = 0;
  // Disks. `shared`: several domains may write it. `network`: reached over a network, so both hosts can.
  bool readonly = false;
  bool shared = false;
  bool network = false;
  // vhost-user: the socket is one of Baton's mediators.
  bool mediated = false;
  // vhost-user NICs: QEMU listens (`mode='server'`), the back-end connects.
  bool vmm_listens = false;
};

// How the guest's memory is backed.
struct MemoryBacking {
  // "anonymous", "file", "memfd" (libvirt's words).
  std::string source = "anonymous";
  bool shared = false;
  bool hugepages = false;
  bool locked = false;
  // NUMA cells with a memory access of their own count: shared only if all of them are.
};

struct DomainDescription {
  std::string name;
  std::string uuid;
  uint32_t vcpus = 0;
  uint64_t memory_bytes = 0;
  std::string type;      // "kvm", "qemu"
  std::string arch;      // "x86_64"
  std::string machine;   // "pc-q35-7.2"
  std::string emulator;  // path of QEMU
  std::string cpu;       // "host-passthrough", "host-model", or the model's name; empty: QEMU's default
  MemoryBacking memory;
  std::vector<DomainDevice> devices;
};

inline constexpr size_t kMaxDomainXml = size_t{4} << 20;
inline constexpr size_t kMaxDomainDevices = 4096;

// `mediator_dir`: directory below which Baton's mediators listen, or empty. InvalidArgument says what is
// wrong and where.
absl::StatusOr<DomainDescription> ParseDomain(const std::string& xml, const std::string& mediator_dir = "");

// What the domain lacks for Baton to do all that it can, each as a sentence with its remedy; empty if
// nothing.
std::vector<std::string> Shortcomings(const DomainDescription& domain);

// "vhost-user", "vdpa", … for people and for the API.
const char* NameOf(Attachment attachment);
const char* NameOf(DeviceType type);

}  // namespace baton::vmm
