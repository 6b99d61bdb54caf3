// The packed virtqueue as an observer sees it. Pure: memory comes through MemoryView.
#pragma once

#include <cstdint>

#include "agent/virtio/memory_view.h"
#include "agent/virtio/vring_base.h"
#include "common/status.h"

namespace baton::virtio {

// Guest physical addresses of a packed ring: descriptors, and the event suppression areas of driver and
// device (in vhost-user messages they travel in the avail and used fields).
struct PackedRing {
  uint16_t size = 0;
  uint64_t desc = 0;
  uint64_t driver_event = 0;
  uint64_t device_event = 0;
};

constexpr uint64_t PackedDescBytes(uint32_t n) { return uint64_t{16} * n; }
inline constexpr uint64_t kPackedEventBytes = 4;

// 1 to 32768 entries (any number), alignments 16, 4 and 4. InvalidArgument says which value is wrong.
absl::Status CheckPackedGeometry(const PackedRing& ring);

// Positions within the ring, avail not before used and at most one lap ahead. STATE_MISMATCH names the value.
absl::Status CheckPackedInvariants(uint16_t n, PackedBase base);

// The same, and nothing in flight: avail == used.
absl::Status CheckPackedDrained(uint16_t n, PackedBase base);

// Flags of the descriptor at `index`.
absl::StatusOr<uint16_t> ReadPackedFlags(const MemoryView& memory, const PackedRing& ring, uint16_t index);

// Available: AVAIL bit equals the wrap counter and USED differs. Used: both bits equal the wrap counter.
constexpr bool IsPackedAvail(uint16_t flags, bool wrap) {
  return ((flags >> 7 & 1) != 0) == wrap && ((flags >> 15 & 1) != 0) != wrap;
}
constexpr bool IsPackedUsed(uint16_t flags, bool wrap) {
  return ((flags >> 7 & 1) != 0) == wrap && ((flags >> 15 & 1) != 0) == wrap;
}

}  // namespace baton::virtio
