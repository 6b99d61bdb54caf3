#include "agent/vhost/quirks.h"

namespace baton::vhost {

Quirks QuirksOf(v1::BackendKind kind) {
  switch (kind) {
    case v1::QEMU_STORAGE_DAEMON:
      return {.name = "qemu-storage-daemon",
              .drains_on_disconnect = true,
              .window_recovery = true,
              .inflight = virtio::InflightKind::kUnknown};
    case v1::DPDK:
      return {.name = "DPDK",
              .drains_on_disconnect = false,
              .window_recovery = false,
              .inflight = virtio::InflightKind::kDpdk,
              .packets_in_order = true};
    case v1::SPDK:
      return {.name = "SPDK",
              .drains_on_disconnect = false,
              .window_recovery = false,
              .inflight = virtio::InflightKind::kSpdk};
    case v1::LIBVHOST_USER:
      return {.name = "libvhost-user",
              .drains_on_disconnect = false,
              .window_recovery = false,
              .inflight = virtio::InflightKind::kLibvhostUser};
    case v1::YC_LIBVHOST:
      return {.name = "yc-libvhost",
              .drains_on_disconnect = false,
              .window_recovery = false,
              .inflight = virtio::InflightKind::kYc,
              .bit_20 = true,
              .suspend_num = 1};
    case v1::LAB:
      return {.name = "lab",
              .drains_on_disconnect = false,
              .window_recovery = false,
              .inflight = virtio::InflightKind::kSpec,
              .bit_20 = true,
              .confirms_cancel = true,
              .replays_in_order = true,
              .pipelines = true};
    default:
      return {.name = "unknown", .drains_on_disconnect = false, .window_recovery = false};
  }
}

bool AllowWindowRecovery(const v1::Backend& backend) {
  if (backend.recovery() == v1::RECOVERY_EXACT) return false;
  if (backend.recovery() == v1::RECOVERY_ORDERED) return true;
  return QuirksOf(backend.kind()).window_recovery;
}

}  // namespace baton::vhost
