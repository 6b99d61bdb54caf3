// One virtqueue as the lab guest's drivers use it: requests by tag, whatever the kind of ring.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <vector>

#include "agent/virtio/driver_queue.h"
#include "common/status.h"
#include "tests/lab/vm/block_workload.h"
#include "tests/lab/vm/frontend.h"
#include "tests/lab/vm/ram.h"

namespace baton::lab {

// Descriptors of an indirect table.
inline constexpr uint16_t kIndirectEntries = 4;

// Not thread-safe.
class Virtqueue {
 public:
  // A ring at `place`, with nothing in it until Reset or Load. `features`: as acknowledged. `indirect_gpa`:
  // for tables, 16 * kIndirectEntries bytes a ring entry.
  Virtqueue(const virtio::GuestMemory& memory, const RingPlace& place, uint64_t features,
            uint64_t indirect_gpa);

  // A fresh ring.
  absl::Status Reset();
  // Where the driver is, to go on in another process. Memory itself moves with the guest.
  nlohmann::json Save() const;
  // Throws what the JSON library throws.
  absl::Status Load(const nlohmann::json& state);

  // Makes a request available; pieces that the device reads come first. False: there is no room.
  bool Submit(uint32_t tag, std::span<const Piece> pieces);
  // Whether the device wants to be told of what was submitted since the last call.
  bool NeedsKick();
  // Takes every completion, then asks for an interrupt at the next one. The status is what the device did
  // wrong (an id that is not under way, an index out of range).
  absl::Status Reap(const std::function<void(uint32_t tag, uint32_t written)>& done);
  // What SET_VRING_BASE would say if nothing were in flight, as far as a VMM can know (QEMU's
  // virtio_queue_restore_last_avail_idx): the used index of a split ring; of a packed one the used position
  // of `last`, the base known last.
  uint32_t UsedBase(uint32_t last) const;

 private:
  const virtio::GuestMemory& memory_;
  const virtio::QueueLayout layout_;
  virtio::QueueOptions options_;
  const virtio::IndirectArea indirect_;
  std::optional<virtio::DriverQueue> queue_;
  bool submitted_ = false;  // and not published
  std::vector<virtio::Segment> segments_;
};

}  // namespace baton::lab
