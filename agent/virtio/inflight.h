// The in-flight region of vhost-user (INFLIGHT_SHMFD), split rings: shared memory in which a back-end notes
// what it has fetched and not yet completed, so that its successor can submit it again. Pure: works on byte
// copies.
//
// Security model: the region is written by the back-end and may have been kept by a VMM; every field is
// checked before it is used (counts, indices, flags, list lengths), and a region is copied once before it is
// judged.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "common/status.h"

namespace baton::virtio {

// Layout as in vhost-user.rst ("Inflight I/O tracking").
struct InflightSplitHeader {
  uint64_t features;
  uint16_t version;  // 0: not initialised; 1
  uint16_t desc_num;
  uint16_t last_batch_head;
  uint16_t used_idx;
};
struct InflightSplitDesc {
  uint8_t inflight;
  uint8_t padding[5];
  uint16_t next;
  uint64_t counter;
};
static_assert(sizeof(InflightSplitHeader) == 16 && sizeof(InflightSplitDesc) == 16);

// Bytes from one queue's part of the region to the next are not in the specification; they belong to the
// back-end that made the region. libvhost-user and DPDK round 16 + 16 n up to 64, yc-libvhost does not round.
// Returns the stride if the region is divided evenly and the stride is one of these; InvalidArgument
// otherwise.
absl::StatusOr<uint64_t> InferSplitStride(uint64_t mmap_size, uint16_t num_queues, uint16_t queue_size);

// Writes "initialised, nothing in flight" into one queue's part. `used_idx` must be the ring's used->idx: a
// region created for a ring that already ran and left at 0 makes back-ends forget descriptor 0 at the first
// recovery. `part` must hold 16 + 16 * desc_num bytes.
absl::Status InitInflightSplit(std::span<uint8_t> part, uint16_t desc_num, uint16_t used_idx);

// What a recovering back-end will make of a queue's part.
struct InflightSet {
  // Heads to submit again, oldest first.
  std::vector<uint16_t> heads;
  // A head whose completion was published, but whose flag had not been cleared, is not in `heads`.
  uint16_t repaired = 0;
  // Next avail entry to fetch: used->idx + heads.
  uint16_t last_avail = 0;
};

// `part`: a copy of one queue's part; `ring_size`: entries of the ring; `used_idx`: used->idx in guest
// memory. A part with version 0 gives an empty set. INFLIGHT_UNKNOWN when any field contradicts another.
absl::StatusOr<InflightSet> ReadInflightSplit(std::span<const uint8_t> part, uint16_t ring_size,
                                              uint16_t used_idx);

}  // namespace baton::virtio
