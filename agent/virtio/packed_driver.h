// Driver side of a packed virtqueue (VIRTIO 1.x, 2.8).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "agent/virtio/driver_requests.h"
#include "agent/virtio/partial_order.h"
#include "agent/virtio/queue_options.h"
#include "agent/virtio/vring_base.h"
#include "common/status.h"

namespace baton::virtio {

// One thread. DriverQueue (driver_queue.h) is this or a SplitDriver, and documents what both do; so does
// split_driver.h on hostile devices.
class PackedDriver {
 public:
  static absl::StatusOr<PackedDriver> Create(const GuestMemory& memory, const QueueLayout& layout,
                                             const QueueOptions& options, const IndirectArea& indirect);
  static absl::StatusOr<PackedDriver> Restore(const GuestMemory& memory, const QueueLayout& layout,
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
  uint16_t free_slots() const { return free_slots_; }

 private:
  PackedDriver(const QueueLayout& layout, const QueueOptions& options, const IndirectArea& indirect);

  absl::Status Map(const GuestMemory& memory);
  // Whether restored state is one that calls could have led to.
  bool Consistent() const;
  // Writes a descriptor at the avail position and moves on. The flags of the first one since the last Publish
  // are kept back.
  void Put(uint64_t addr, uint32_t len, uint16_t id, uint16_t flags);
  // Flags of the descriptor at the used position, if the device has used it.
  bool NextIsUsed(uint16_t* flags) const;
  bool event_idx() const { return options_.Has(kFEventIdx); }

  QueueLayout layout_;
  QueueOptions options_;
  IndirectArea indirect_;
  const GuestMemory* memory_ = nullptr;
  uint8_t* desc_ = nullptr;
  uint8_t* driver_event_ = nullptr;
  const uint8_t* device_event_ = nullptr;

  DriverRequests requests_;
  // A stack of free buffer ids; the first free_id_count_ count.
  std::vector<uint16_t> free_ids_;
  uint16_t free_id_count_ = 0;
  uint16_t free_slots_ = 0;
  PackedPosition next_avail_;
  PackedPosition next_used_;
  // Where the flags `held_flags_` belong that Publish will write, if holding_.
  PackedPosition held_;
  uint16_t held_flags_ = 0;
  bool holding_ = false;
  // Descriptors made available since the last Publish; and since NeedsKick last looked.
  uint32_t pending_ = 0;
  uint32_t moved_ = 0;
  FlushState flush_;
  absl::Status broken_;
};

}  // namespace baton::virtio
