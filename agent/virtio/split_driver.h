// Driver side of a split virtqueue (VIRTIO 1.x, 2.7).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "agent/virtio/driver_requests.h"
#include "agent/virtio/partial_order.h"
#include "agent/virtio/queue_options.h"
#include "common/status.h"

namespace baton::virtio {

// One thread. DriverQueue (driver_queue.h) is this or a PackedDriver, and documents what both do.
//
// Security model: the device writes the used ring and could write anything else; nothing that the driver
// relies on is read back from shared memory, and what the device returns is checked.
class SplitDriver {
 public:
  static absl::StatusOr<SplitDriver> Create(const GuestMemory& memory, const QueueLayout& layout,
                                            const QueueOptions& options, const IndirectArea& indirect);
  static absl::StatusOr<SplitDriver> Restore(const GuestMemory& memory, const QueueLayout& layout,
                                             const QueueOptions& options, const IndirectArea& indirect,
                                             std::span<const uint8_t> saved);
  std::vector<uint8_t> Save() const;

  absl::StatusOr<uint16_t> Add(std::span<const Segment> readable, std::span<const Segment> writable,
                               uint64_t token);
  void Publish();
  bool NeedsKick();
  absl::StatusOr<bool> TakeUsed(UsedBuffer* out);
  absl::StatusOr<bool> EnableCalls();
  void DisableCalls();

  uint16_t outstanding() const { return requests_.outstanding(); }
  uint16_t free_slots() const { return free_count_; }
  const SplitOrderDriver& order() const { return order_; }

 private:
  SplitDriver(const QueueLayout& layout, const QueueOptions& options, const IndirectArea& indirect);

  absl::Status Map(const GuestMemory& memory);
  // Whether restored state is one that calls could have led to.
  bool Consistent() const;
  // used->flags and used->idx, in this order, checked.
  absl::Status ReadUsed();
  void FollowOrder();
  void StoreFlags();
  bool event_idx() const { return options_.Has(kFEventIdx); }

  QueueLayout layout_;
  QueueOptions options_;
  IndirectArea indirect_;
  const GuestMemory* memory_ = nullptr;
  uint8_t* desc_ = nullptr;
  uint8_t* avail_ = nullptr;
  const uint8_t* used_ring_ = nullptr;

  DriverRequests requests_;
  // Of each descriptor its successor in the free list or in its chain. The free list is a queue: as long as
  // buffers come back in order, descriptors are used in ring order, as IN_ORDER asks (2.7.9).
  std::vector<uint16_t> next_;
  uint16_t free_head_ = 0;
  uint16_t free_tail_ = 0;
  uint16_t free_count_ = 0;
  // Next avail entry to write; what the device may see of it; and at the last look whether to kick.
  uint16_t next_avail_ = 0;
  uint16_t published_ = 0;
  uint16_t kicked_ = 0;
  // Next used entry to take; used->idx and its IN_ORDER flag as last read.
  uint16_t next_used_ = 0;
  uint16_t used_seen_ = 0;
  bool in_order_seen_ = false;
  bool no_interrupt_ = false;
  bool order_changed_ = false;
  SplitOrderDriver order_;
  absl::Status broken_;
};

}  // namespace baton::virtio
