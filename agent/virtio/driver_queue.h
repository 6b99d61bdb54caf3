// Driver side of a virtqueue of either kind.
//
//   queue.Add({{header, 16}}, {{data, 4096}, {status, 1}}, token);
//   queue.Publish();
//   if (queue.NeedsKick()) kick;
//   ...
//   for (;;) {
//     while (*queue.TakeUsed(&used)) complete(used.token, used.len);
//     if (!*queue.EnableCalls()) break;
//   }
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "agent/virtio/packed_driver.h"
#include "agent/virtio/split_driver.h"

namespace baton::virtio {

// Not thread-safe. `memory` must outlive it, and the buffers must stay until they are taken back. See
// split_driver.h for what a hostile device can do.
class DriverQueue {
 public:
  // A new ring: clears its memory. RING_PACKED decides which kind. `indirect` counts only with INDIRECT_DESC.
  // InvalidArgument: sizes, alignments. OutOfRange: not in guest memory.
  static absl::StatusOr<DriverQueue> Create(const GuestMemory& memory, const QueueLayout& layout,
                                            const QueueOptions& options, const IndirectArea& indirect = {}) {
    RETURN_IF_ERROR(CheckOrderFeatures(options.features, true));
    if (options.Has(kFRingPacked)) {
      ASSIGN_OR_RETURN(PackedDriver queue, PackedDriver::Create(memory, layout, options, indirect));
      return DriverQueue(std::move(queue));
    }
    ASSIGN_OR_RETURN(SplitDriver queue, SplitDriver::Create(memory, layout, options, indirect));
    return DriverQueue(std::move(queue));
  }

  // The driver's own state; the ring itself is in guest memory. Restore continues exactly there, with the
  // arguments that Create had; InvalidArgument if the bytes are not Save's.
  std::vector<uint8_t> Save() const {
    return std::visit([](const auto& queue) { return queue.Save(); }, queue_);
  }
  static absl::StatusOr<DriverQueue> Restore(const GuestMemory& memory, const QueueLayout& layout,
                                             const QueueOptions& options, const IndirectArea& indirect,
                                             std::span<const uint8_t> saved) {
    if (options.Has(kFRingPacked)) {
      ASSIGN_OR_RETURN(PackedDriver queue, PackedDriver::Restore(memory, layout, options, indirect, saved));
      return DriverQueue(std::move(queue));
    }
    ASSIGN_OR_RETURN(SplitDriver queue, SplitDriver::Restore(memory, layout, options, indirect, saved));
    return DriverQueue(std::move(queue));
  }

  // Writes a buffer into the ring: segments that the device reads, then segments that it writes. `token`
  // comes back with it. Uses an indirect table for two segments and more where there is one. Returns the
  // buffer's id (of a split ring its head). The device does not see it before Publish. ResourceExhausted: the
  // ring is full; take used buffers first.
  absl::StatusOr<uint16_t> Add(std::span<const Segment> readable, std::span<const Segment> writable,
                               uint64_t token) {
    return std::visit([&](auto& queue) { return queue.Add(readable, writable, token); }, queue_);
  }
  // Makes everything added available, at once.
  void Publish() {
    std::visit([](auto& queue) { queue.Publish(); }, queue_);
  }
  // Whether the device wants a kick for what was published, or for the driver's part in the PARTIAL_ORDER
  // handshake (so ask after TakeUsed, too), since the last time this was asked.
  bool NeedsKick() {
    return std::visit([](auto& queue) { return queue.NeedsKick(); }, queue_);
  }

  // Takes back the next used buffer; false if there is none. STATE_MISMATCH: the device has broken the ring;
  // the queue then repeats the error.
  absl::StatusOr<bool> TakeUsed(UsedBuffer* out) {
    return std::visit([&](auto& queue) { return queue.TakeUsed(out); }, queue_);
  }

  // Asks for interrupts from now on. True: buffers were used meanwhile; take them.
  absl::StatusOr<bool> EnableCalls() {
    return std::visit([](auto& queue) { return queue.EnableCalls(); }, queue_);
  }
  void DisableCalls() {
    std::visit([](auto& queue) { queue.DisableCalls(); }, queue_);
  }

  // Buffers added and not taken back; descriptors that Add can use.
  uint16_t outstanding() const {
    return std::visit([](const auto& queue) { return queue.outstanding(); }, queue_);
  }
  uint16_t free_slots() const {
    return std::visit([](const auto& queue) { return queue.free_slots(); }, queue_);
  }
  bool packed() const { return std::holds_alternative<PackedDriver>(queue_); }
  const SplitDriver* split() const { return std::get_if<SplitDriver>(&queue_); }

 private:
  explicit DriverQueue(SplitDriver queue) : queue_(std::move(queue)) {}
  explicit DriverQueue(PackedDriver queue) : queue_(std::move(queue)) {}

  std::variant<SplitDriver, PackedDriver> queue_;
};

}  // namespace baton::virtio
