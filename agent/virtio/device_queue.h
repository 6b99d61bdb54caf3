// Device side of a virtqueue of either kind.
//
//   DeviceQueue queue = *DeviceQueue::Create(memory, layout, {.features = acked}, base);
//   for (const auto& lost : recovered) { queue.Resubmit(lost.id, lost.descriptors, &chain); ... }
//   while (*queue.Pop(&chain)) { tracker.OnFetch(chain); start the request; }
//   ...
//   queue.Stage(id, bytes_written);              // for each request that is done, in any order
//   tracker.BeforePublish(queue.staged());
//   queue.Publish();                             // the driver sees them
//   tracker.AfterPublish(...);
//   if (queue.NeedsCall()) raise the interrupt;
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <variant>

#include "agent/virtio/packed_device.h"
#include "agent/virtio/split_device.h"

namespace baton::virtio {

// Not thread-safe: one thread serves a queue. `memory` must outlive it. Which kind it is is decided at Create
// by RING_PACKED; calls branch once on it. See split_device.h for what a hostile driver can do.
class DeviceQueue {
 public:
  // `base`: a vring base, as SET_VRING_BASE carries it (vring_base.h); of a split ring the low 16 bits, which
  // are the next entry to *fetch* (VIRTIO's L, not the convention in which a back-end reports the used
  // index). Enables kicks, whatever the ring's last device left behind. After this the caller should look for
  // buffers and raise the interrupt once: kicks and calls of the time before may be lost. InvalidArgument:
  // sizes, alignments. OutOfRange: not in guest memory. STATE_MISMATCH: the base does not fit what the ring
  // holds.
  static absl::StatusOr<DeviceQueue> Create(const GuestMemory& memory, const QueueLayout& layout,
                                            const QueueOptions& options, uint32_t base) {
    RETURN_IF_ERROR(CheckOrderFeatures(options.features, true));
    if (options.Has(kFRingPacked)) {
      ASSIGN_OR_RETURN(PackedDevice queue,
                       PackedDevice::Create(memory, layout, options, DecodePackedBase(base)));
      return DeviceQueue(std::move(queue));
    }
    ASSIGN_OR_RETURN(SplitDevice queue,
                     SplitDevice::Create(memory, layout, options, static_cast<uint16_t>(base)));
    return DeviceQueue(std::move(queue));
  }

  // Fetches the next available buffer into `chain`; false when there is none. With PARTIAL_ORDER, false is
  // also the moment to Publish what may have been staged (the driver has acknowledged). STATE_MISMATCH: the
  // driver has broken the ring. FailedPrecondition: requests in flight at the start have not been
  // resubmitted.
  absl::StatusOr<bool> Pop(Chain* chain) {
    return std::visit([&](auto& queue) { return queue.Pop(chain); }, queue_);
  }

  // Takes over a request that was in flight when the queue was created, as an in-flight region tells it: of a
  // split ring the head, whose descriptors are still in the table; of a packed ring the buffer id and the
  // descriptors that were saved, because the ring's may be overwritten. Oldest first. The chain is in flight
  // then as if popped.
  absl::Status Resubmit(uint16_t id, std::span<const PackedDesc> descriptors, Chain* chain) {
    return std::visit([&](auto& queue) { return queue.Resubmit(id, descriptors, chain); }, queue_);
  }

  // Gives back the chain that was popped last (a network device that needs more room than is there). False,
  // and no effect, if it is not that one. Several go back in reverse order.
  bool Unpop(const Chain& chain) {
    return std::visit([&](auto& queue) { return queue.Unpop(chain); }, queue_);
  }

  // The request of buffer `id` is done; the device wrote `len` bytes into its writable part. With IN_ORDER it
  // is held until everything before it is done. InvalidArgument if `id` is not in flight or `len` too large.
  absl::Status Stage(uint16_t id, uint32_t len) {
    return std::visit([&](auto& queue) { return queue.Stage(id, len); }, queue_);
  }
  // What the next Publish returns to the driver, in this order; without what is held. Valid until the next
  // call that is not const.
  std::span<const Completion> staged() const {
    return std::visit([](const auto& queue) { return queue.staged(); }, queue_);
  }
  // Returns staged() to the driver, all at once: of a split ring one store of the index, of a packed ring the
  // flags of the first descriptor, are last and release everything before. With `most`, only the first so
  // many (in-flight regions of some kinds cannot tell a batch). Returns how many.
  uint16_t Publish(uint16_t most = UINT16_MAX) {
    return std::visit([&](auto& queue) { return queue.Publish(most); }, queue_);
  }
  // Whether the driver wants an interrupt for what was published since the last time this was asked. True the
  // first time. Includes the full fence between publishing and reading the driver's wish.
  bool NeedsCall() {
    return std::visit([](auto& queue) { return queue.NeedsCall(); }, queue_);
  }

  // Asks for kicks from now on. True: buffers arrived meanwhile, for which no kick will come; Pop them.
  absl::StatusOr<bool> EnableKicks() {
    return std::visit([](auto& queue) { return queue.EnableKicks(); }, queue_);
  }
  // Asks for no kicks, while the device polls.
  void DisableKicks() {
    std::visit([](auto& queue) { queue.DisableKicks(); }, queue_);
  }

  // PARTIAL_ORDER only (docs/partial-order.md); kInOrder at the start. After a change: publish staged(), then
  // ask NeedsCall.
  void SetOrdering(Ordering ordering) {
    std::visit([&](auto& queue) { queue.SetOrdering(ordering); }, queue_);
  }

  // Where a successor continues, as a vring base: of a split ring the next entry to fetch (with in_flight()
  // requests before it), of a packed ring both positions.
  uint32_t base() const {
    return std::visit([](const auto& queue) { return queue.base(); }, queue_);
  }
  // Buffers fetched and not published, those held or staged included.
  uint16_t in_flight() const {
    return std::visit([](const auto& queue) { return queue.in_flight(); }, queue_);
  }
  // Buffers available and not fetched, counted in the ring. STATE_MISMATCH if it is broken.
  absl::StatusOr<uint16_t> Available() const {
    return std::visit([](const auto& queue) { return queue.Available(); }, queue_);
  }

  // Guest memory was mapped anew; the addresses of the ring are the same. On OutOfRange nothing has changed.
  absl::Status Remap(const GuestMemory& memory) {
    return std::visit([&](auto& queue) { return queue.Remap(memory); }, queue_);
  }

  bool packed() const { return std::holds_alternative<PackedDevice>(queue_); }
  const SplitDevice* split() const { return std::get_if<SplitDevice>(&queue_); }
  const PackedDevice* packed_ring() const { return std::get_if<PackedDevice>(&queue_); }

 private:
  explicit DeviceQueue(SplitDevice queue) : queue_(std::move(queue)) {}
  explicit DeviceQueue(PackedDevice queue) : queue_(std::move(queue)) {}

  std::variant<SplitDevice, PackedDevice> queue_;
};

}  // namespace baton::virtio
