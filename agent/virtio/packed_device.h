// Device side of a packed virtqueue (VIRTIO 1.x, 2.8).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "agent/virtio/chain.h"
#include "agent/virtio/completion_queue.h"
#include "agent/virtio/packed_ring.h"
#include "agent/virtio/partial_order.h"
#include "agent/virtio/queue_options.h"
#include "agent/virtio/vring_base.h"
#include "common/status.h"

namespace baton::virtio {

// One thread. DeviceQueue (device_queue.h) is this or a SplitDevice, and documents what both do; so does
// split_device.h on hostile drivers.
class PackedDevice {
 public:
  // `base`: where the next available and the next used descriptor are. The descriptors between the two belong
  // to requests in flight, and Resubmit must be called for them, all in all, before the first Pop.
  static absl::StatusOr<PackedDevice> Create(const GuestMemory& memory, const QueueLayout& layout,
                                             const QueueOptions& options, PackedBase base);

  absl::StatusOr<bool> Pop(Chain* chain);
  absl::Status Resubmit(uint16_t id, std::span<const PackedDesc> descriptors, Chain* chain);
  bool Unpop(const Chain& chain);

  absl::Status Stage(uint16_t id, uint32_t len) { return completions_.Stage(id, len); }
  std::span<const Completion> staged() const { return completions_.staged(); }
  uint16_t Publish(uint16_t most = UINT16_MAX);
  bool NeedsCall();
  void SetOrdering(Ordering ordering);

  absl::StatusOr<bool> EnableKicks();
  void DisableKicks();

  // Both positions, as GET_VRING_BASE reports them.
  uint32_t base() const { return EncodePackedBase(position()); }
  PackedBase position() const { return {next_avail_, next_used_}; }
  uint16_t in_flight() const { return completions_.in_flight(); }
  absl::StatusOr<uint16_t> Available() const;
  absl::Status Remap(const GuestMemory& memory);
  const CompletionQueue& completions() const { return completions_; }

 private:
  PackedDevice(const QueueLayout& layout, const QueueOptions& options);

  const uint8_t* DescAt(uint16_t index) const { return desc_ + size_t{16} * index; }
  // Descriptors between the used and the avail position.
  uint32_t outstanding() const { return completions_.in_flight_slots() + unclaimed_; }
  // Marks the descriptors in flight as available again. A predecessor that died while it wrote a batch has
  // left later ones of it marked as used, and the driver would believe them as soon as it comes there.
  void RestoreMarks();
  // Flags of the descriptor at the avail position, if it is available.
  bool NextIsAvailable(PackedPosition at, uint16_t* flags) const;
  absl::Status Walk(uint16_t first_flags, Chain* chain);
  absl::Status AddDescriptor(const PackedDesc& desc, ChainBuilder* builder);
  void StoreEvent(uint16_t off_wrap, uint16_t flags);
  void LogDescriptors(PackedPosition from, PackedPosition to);
  bool event_idx() const { return options_.Has(kFEventIdx); }
  bool partial() const { return options_.Has(kFPartialOrder); }

  QueueLayout layout_;
  QueueOptions options_;
  const GuestMemory* memory_ = nullptr;
  uint8_t* desc_ = nullptr;
  const uint8_t* driver_event_ = nullptr;
  uint8_t* device_event_ = nullptr;

  PackedPosition next_avail_;
  PackedPosition next_used_;
  // Descriptors in flight at the start that Resubmit was not called for yet.
  uint32_t unclaimed_ = 0;
  // Descriptors used since NeedsCall last looked.
  uint32_t moved_ = 0;
  bool signalled_valid_ = false;
  Ordering ordering_ = Ordering::kInOrder;
  FlushState flush_;
  CompletionQueue completions_;
  absl::Status broken_;
  std::vector<PackedDesc> table_;
};

}  // namespace baton::virtio
