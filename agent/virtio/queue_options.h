// What a queue is made from, on either side.
#pragma once

#include <cstdint>

#include "agent/virtio/features.h"

namespace baton::virtio {

// Guest physical addresses of a ring of `size` entries, by VIRTIO's names for both kinds: descriptor area,
// driver area (avail ring, or driver event suppression), device area (used ring, or device event
// suppression).
struct QueueLayout {
  uint16_t size = 0;
  uint64_t desc = 0;
  uint64_t driver = 0;
  uint64_t device = 0;
};

// Told about every byte of a ring that the device side writes: the dirty log of a back-end. Called after the
// bytes are written, a few times for a batch.
class WriteLog {
 public:
  virtual ~WriteLog() = default;
  virtual void Wrote(uint64_t gpa, uint64_t size) = 0;
};

struct QueueOptions {
  // Acknowledged features; of interest are INDIRECT_DESC, EVENT_IDX, RING_PACKED, IN_ORDER, PARTIAL_ORDER.
  uint64_t features = 0;
  // Device side only; may be nullptr; must outlive the queue.
  WriteLog* log = nullptr;

  bool Has(uint64_t feature) const { return (features & feature) != 0; }
};

}  // namespace baton::virtio
