#include "agent/vhost/quirks.h"

namespace baton::vhost {

Quirks QuirksOf(v1::BackendKind kind) {
  switch (kind) {
    case v1::QEMU_STORAGE_DAEMON:
      return {"qemu-storage-daemon", true, true};
    case v1::DPDK:
      return {"DPDK", false, false};
    case v1::SPDK:
      return {"SPDK", false, false};
    case v1::LIBVHOST_USER:
      return {"libvhost-user", false, false};
    case v1::LAB:
      return {"lab", false, false};
    default:
      return {"unknown", false, false};
  }
}

bool AllowWindowRecovery(const v1::Backend& backend) {
  if (backend.recovery() == v1::RECOVERY_EXACT) return false;
  if (backend.recovery() == v1::RECOVERY_ORDERED) return true;
  return QuirksOf(backend.kind()).window_recovery;
}

}  // namespace baton::vhost
