#include "agent/vhost/quirks.h"

namespace baton::vhost {

Quirks QuirksOf(v1::BackendKind kind) {
  switch (kind) {
    case v1::QEMU_STORAGE_DAEMON:
      return {"qemu-storage-daemon", true, true, virtio::InflightKind::kUnknown};
    case v1::DPDK:
      return {"DPDK", false, false, virtio::InflightKind::kDpdk};
    case v1::SPDK:
      return {"SPDK", false, false, virtio::InflightKind::kSpdk};
    case v1::LIBVHOST_USER:
      return {"libvhost-user", false, false, virtio::InflightKind::kLibvhostUser};
    case v1::LAB:
      return {"lab", false, false, virtio::InflightKind::kSpec};
    default:
      return {"unknown", false, false, virtio::InflightKind::kUnknown};
  }
}

bool AllowWindowRecovery(const v1::Backend& backend) {
  if (backend.recovery() == v1::RECOVERY_EXACT) return false;
  if (backend.recovery() == v1::RECOVERY_ORDERED) return true;
  return QuirksOf(backend.kind()).window_recovery;
}

}  // namespace baton::vhost
