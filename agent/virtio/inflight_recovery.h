// What the header and entries of one queue's in-flight part say together with the ring, after every check:
// shared by the readers (ReadInflightSplit, ReadInflightPacked) and the tracker that goes on writing the same
// part. They want a copy of the part, taken once: of the part itself nothing is read again.
//
// A device has hundreds of parts, and they are analysed while its guest stands still. So a state is reused
// from one part to the next: what its vectors have grown to is kept.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "agent/virtio/inflight_layout.h"
#include "agent/virtio/memory_view.h"
#include "agent/virtio/packed_ring.h"
#include "agent/virtio/ring_access.h"
#include "agent/virtio/vring_base.h"
#include "common/status.h"

namespace baton::virtio {

// How an unfinished batch of a split region is repaired: the recovery of the back-end that wrote it.
enum class BatchRule : uint8_t {
  kLinked,  // the specification: all entries of the batch, linked from last_batch_head
  kSingle,  // libvhost-user, DPDK: last_batch_head only; more than one published is INFLIGHT_UNKNOWN
};

// A head entry in flight, and when it was fetched.
struct AgedHead {
  uint64_t counter = 0;
  uint16_t entry = 0;
};

struct SplitPartState {
  uint16_t version = 0;
  // 0 when nobody has begun to use the part (also with a version of 1).
  uint16_t desc_num = 0;
  uint16_t last_batch_head = 0;
  // All entries, in the copy that was analysed and as they are there: repaired ones still have their flag.
  std::span<const InflightSplitDesc> desc;
  // Entries whose flag was set although the guest had seen the completion.
  std::vector<uint16_t> repaired;
  // Heads in flight, oldest first.
  std::vector<AgedHead> heads;
  // Space of the analysis.
  std::vector<AgedHead> sorting;
  std::vector<uint16_t> by_age;
  std::vector<uint8_t> done;
};

// `copy` must stay as it is and as long as the state is used, and be aligned to 8. INFLIGHT_UNKNOWN when any
// field contradicts another, or the ring; then the state means nothing.
absl::Status AnalyseSplitPart(std::span<const uint8_t> copy, uint16_t ring_size, uint16_t used_idx,
                              BatchRule rule, SplitPartState* state);

struct PackedPartState {
  uint16_t version = 0;
  // 0 when nobody has begun to use the part (also with a version of 1).
  uint16_t desc_num = 0;
  // The batch under way had been published: the current values hold. Otherwise the old ones do.
  bool commit = false;
  uint16_t free_head = 0;
  PackedPosition used;
  // All entries, in the copy that was analysed and as they are there: repaired ones still have their flag.
  std::span<const InflightPackedDesc> desc;
  // Entries on the free list whose flag was still set.
  std::vector<uint16_t> repaired;
  // Head entries in flight, oldest first.
  std::vector<AgedHead> heads;
  // Their chains' descriptors, in the same order: in `room`, or, where that is too small, in chain_space.
  std::span<PackedDesc> chains;
  // Entries on the free list.
  uint16_t free_entries = 0;
  // Where the chains are wanted, if anywhere; as many as the part has entries always fit.
  std::span<PackedDesc> room;
  // What is read next, if it has to come from the cache of another processor: it is asked for while this part
  // is followed, 32 bytes with each entry, which is how long the next part is if that is what it is. A hint;
  // nothing is read there.
  const uint8_t* ahead = nullptr;
  // Space of the analysis.
  std::vector<PackedDesc> chain_space;
  std::vector<AgedHead> sorting;
  std::vector<uint16_t> by_age;
  std::vector<uint8_t> taken;
};

// As AnalyseSplitPart.
absl::Status AnalysePackedPart(std::span<const uint8_t> copy, const MemoryView& memory,
                               const PackedRing& ring, PackedPartState* state);

// Writes the entries of a part that nobody has used yet: all free, linked in order.
absl::Status FormatPackedEntries(std::span<uint8_t> part, uint16_t desc_num);

}  // namespace baton::virtio
