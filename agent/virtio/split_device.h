// Device side of a split virtqueue (VIRTIO 1.x, 2.7).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "agent/virtio/chain.h"
#include "agent/virtio/completion_queue.h"
#include "agent/virtio/partial_order.h"
#include "agent/virtio/queue_options.h"
#include "agent/virtio/split_ring.h"
#include "common/status.h"

namespace baton::virtio {

// One thread. DeviceQueue (device_queue.h) is this or a PackedDevice, and documents what both do.
//
// Security model: the driver writes the ring while it is read. Every index is checked, every word is read
// once, and no walk is longer than the queue. After an error that names the ring (STATE_MISMATCH) the queue
// has not moved, and repeats it: the device must stop serving the ring (VIRTIO: DEVICE_NEEDS_RESET).
class SplitDevice {
 public:
  // `next_avail`: the vring base, L. The used index is read from the ring. If L is ahead of it, that many
  // requests are in flight, and Resubmit must be called for each before the first Pop.
  static absl::StatusOr<SplitDevice> Create(const GuestMemory& memory, const QueueLayout& layout,
                                            const QueueOptions& options, uint16_t next_avail);

  absl::StatusOr<bool> Pop(Chain* chain);
  absl::Status Resubmit(uint16_t head, std::span<const PackedDesc> descriptors, Chain* chain);
  bool Unpop(const Chain& chain);

  absl::Status Stage(uint16_t id, uint32_t len) { return completions_.Stage(id, len); }
  std::span<const Completion> staged() const { return completions_.staged(); }
  uint16_t Publish(uint16_t most = UINT16_MAX);
  bool NeedsCall();
  void SetOrdering(Ordering ordering);

  absl::StatusOr<bool> EnableKicks();
  void DisableKicks();

  // L, and the used index.
  uint32_t base() const { return next_avail_; }
  uint16_t used_index() const { return used_; }
  uint16_t in_flight() const { return static_cast<uint16_t>(next_avail_ - used_); }
  absl::StatusOr<uint16_t> Available() const;
  absl::Status Remap(const GuestMemory& memory);
  const CompletionQueue& completions() const { return completions_; }
  const SplitOrderDevice& order() const { return order_; }

 private:
  SplitDevice(const QueueLayout& layout, const QueueOptions& options);

  absl::Status Walk(uint16_t head, Chain* chain);
  // avail->idx, checked.
  absl::StatusOr<uint16_t> ReadAvail() const;
  void StepOrder();
  void StoreFlags();
  void Log(uint64_t offset, uint64_t size) {
    if (options_.log) options_.log->Wrote(layout_.device + offset, size);
  }
  bool event_idx() const { return options_.Has(kFEventIdx); }
  bool partial() const { return options_.Has(kFPartialOrder); }

  QueueLayout layout_;
  QueueOptions options_;
  const GuestMemory* memory_ = nullptr;
  const uint8_t* desc_ = nullptr;
  const uint8_t* avail_ = nullptr;
  uint8_t* used_ring_ = nullptr;

  uint16_t next_avail_ = 0;
  // avail->idx when it was last read; at or after next_avail_.
  uint16_t avail_seen_ = 0;
  // used->idx: nobody else writes it.
  uint16_t used_ = 0;
  // Requests in flight at start that Resubmit was not called for yet.
  uint16_t unclaimed_ = 0;
  // used_ when NeedsCall last looked; valid after the first look.
  uint16_t signalled_ = 0;
  bool signalled_valid_ = false;
  bool no_notify_ = false;
  bool order_changed_ = false;
  Ordering ordering_ = Ordering::kInOrder;
  SplitOrderDevice order_;
  CompletionQueue completions_;
  absl::Status broken_;
  std::vector<SplitDesc> table_;
};

}  // namespace baton::virtio
