// The requests that a device has fetched and not completed: read from an in-flight region or an in-order
// ring, checked, and written into a region for another back-end. Pure: works on byte copies and MemoryView.
//
// Security model: a region is written by a back-end and may have been kept by a VMM, rings are written by the
// guest; every field is checked before it is used (counts, indices, flags, list lengths), and what is judged
// is a copy that was taken once.
//
// Exact or nothing: whatever cannot be told is INFLIGHT_UNKNOWN, never a guess.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "agent/virtio/inflight_layout.h"
#include "agent/virtio/inflight_recovery.h"
#include "agent/virtio/memory_view.h"
#include "agent/virtio/packed_ring.h"
#include "agent/virtio/ring_access.h"
#include "agent/virtio/split_ring.h"
#include "agent/virtio/vring_base.h"
#include "common/status.h"

namespace baton::virtio {

// One descriptor of a packed chain, as the driver wrote it into the ring.
using InflightDesc = PackedDesc;

struct InflightRequest {
  // Split: the head's index in the descriptor table. Packed: the buffer id.
  uint16_t id = 0;
  // Packed: the chain is descs[first, first + num) of the set. Split: 0, the chain stays in the descriptor
  // table.
  uint16_t num = 0;
  uint32_t first = 0;
  // Order of fetching; ascending within a set.
  uint64_t counter = 0;
  friend bool operator==(const InflightRequest&, const InflightRequest&) = default;
};

// Everything about one stopped queue that its successor needs. A value: it is shipped (proto), compared,
// replayed.
struct InflightSet {
  RingFormat format = RingFormat::kSplit;
  // Oldest first.
  std::vector<InflightRequest> requests;
  // Packed: the saved chains, in the order of `requests`.
  std::vector<InflightDesc> descs;
  // Split: the ring's used->idx (`idx`; `wrap` means nothing). Packed: the device's used position.
  PackedPosition used;
  // Split: next avail entry to fetch, used + requests (`idx`). Packed: next descriptor to fetch.
  PackedPosition avail;
  // Requests whose completion the guest has seen although their flag was still set; they are not in
  // `requests`.
  uint16_t repaired = 0;

  bool empty() const { return requests.empty(); }
  size_t size() const { return requests.size(); }
  // Split: the next avail entry to fetch.
  uint16_t last_avail() const { return avail.idx; }
  std::span<const InflightDesc> DescsOf(const InflightRequest& request) const {
    return {descs.data() + request.first, request.num};
  }
  // Heads or buffer ids, oldest first.
  std::vector<uint16_t> Ids() const;
  // A head or buffer id is there twice.
  bool HasDuplicates() const;
  // Descriptors in flight (split: requests).
  uint32_t slots() const;
  friend bool operator==(const InflightSet&, const InflightSet&) = default;
};

// What an InflightSet says, wherever its requests and descriptors are.
struct InflightView {
  RingFormat format = RingFormat::kSplit;
  std::span<const InflightRequest> requests;
  std::span<const InflightDesc> descs;
  PackedPosition used;
  PackedPosition avail;

  InflightView() = default;
  InflightView(const InflightSet& set)
      : format(set.format), requests(set.requests), descs(set.descs), used(set.used), avail(set.avail) {}

  bool empty() const { return requests.empty(); }
  size_t size() const { return requests.size(); }
  uint16_t last_avail() const { return avail.idx; }
  std::span<const InflightDesc> DescsOf(const InflightRequest& request) const {
    return descs.subspan(request.first, request.num);
  }
  uint32_t slots() const {
    return static_cast<uint32_t>(format == RingFormat::kSplit ? requests.size() : descs.size());
  }
};

// --- From a region ---

// What an analysed part says, as a set in the form that CheckInflightSet wants, but that a packed set may
// have an id twice.
void FillSet(const SplitPartState& state, uint16_t used_idx, InflightSet* set);
void FillSet(const PackedPartState& state, uint16_t ring_size, InflightSet* set);

// `part`: a copy of one queue's part, aligned to 8; `ring_size`: entries of the ring; `used_idx`: used->idx
// in guest memory. A part with version 0 gives an empty set. INFLIGHT_UNKNOWN when any field contradicts
// another.
absl::StatusOr<InflightSet> ReadInflightSplit(std::span<const uint8_t> part, uint16_t ring_size,
                                              uint16_t used_idx, BatchRule rule = BatchRule::kLinked);

// The same for a packed ring; `memory` and `ring` tell whether a batch that was under way had been published.
// A part with version 0 gives INFLIGHT_UNKNOWN: only the region knows a packed ring's used position.
absl::StatusOr<InflightSet> ReadInflightPacked(std::span<const uint8_t> part, const MemoryView& memory,
                                               const PackedRing& ring);

// The same for one part after the other: what the last one took is used again for the next. What is read is
// valid until the next call. One thread.
class InflightReader {
 public:
  // Makes room for parts of `n` entries, and touches it: later nothing waits for memory.
  void Reserve(RingFormat format, uint16_t n);
  absl::StatusOr<InflightView> ReadSplit(std::span<const uint8_t> part, uint16_t ring_size, uint16_t used_idx,
                                         BatchRule rule);
  // The descriptors are written to `room`, where they are to stay, if they fit (an entry of the part each).
  absl::StatusOr<InflightView> ReadPacked(std::span<const uint8_t> part, const MemoryView& memory,
                                          const PackedRing& ring, std::span<InflightDesc> room = {});
  // Where the copy of the next part will be made from (null: nothing is known), for the ReadPacked calls that
  // follow: PackedPartState::ahead.
  void ExpectNext(const uint8_t* part) { packed_.ahead = part; }
  // What was read last.
  InflightSet Take();

 private:
  bool AnyIdTwice();

  SplitPartState split_;
  PackedPartState packed_;
  InflightSet set_;  // of a packed ring without the descriptors
  std::vector<uint8_t> seen_;
};

// --- From the ring ---

// Requests in flight in a ring with IN_ORDER, by which they are the avail entries used->idx .. last_avail
// - 1. `last_avail`: the device's answer in the convention "next entry to fetch", or avail->idx when the
// device is gone: then what it had not fetched counts as in flight, too, which is the same to its successor.
// STATE_MISMATCH when indices or entries are impossible.
absl::StatusOr<InflightSet> InflightFromInOrderSplit(const MemoryView& memory, const SplitRing& ring,
                                                     uint16_t last_avail);

// The same for a packed ring: the chains between used and avail position of `base`.
absl::StatusOr<InflightSet> InflightFromInOrderPacked(const MemoryView& memory, const PackedRing& ring,
                                                      PackedBase base);

// Takes back what was fetched, so that the requests of `set` are available again and none is in flight. Legal
// only where the avail entries from used->idx on still name exactly these requests in this order, which
// without IN_ORDER a completion out of order may have overwritten (the STOP thread's example), and where no
// request has begun to have an effect: `rewindable` is what the device class says of them (net receive
// buffers). FailedPrecondition says why not.
absl::StatusOr<InflightSet> RewindSplit(const MemoryView& memory, const SplitRing& ring,
                                        const InflightSet& set, bool in_order, bool rewindable);

// --- Into a region ---

// Writes "initialised, nothing in flight" into one queue's part. `used_idx` must be the ring's used->idx: a
// region created for a ring that already ran and left at 0 makes back-ends forget descriptor 0 at the first
// recovery (SPDK #3766). `part` must hold InflightPartBytes; the rest of it becomes zero.
absl::Status InitInflightSplit(std::span<uint8_t> part, uint16_t desc_num, uint16_t used_idx);
// The same; `used` is the ring's current used position: SPDK starts a packed ring at the region's position,
// whatever SET_VRING_BASE said.
absl::Status InitInflightPacked(std::span<uint8_t> part, uint16_t desc_num, PackedPosition used);

// Writes `set` into one queue's part, counters renumbered from 1 in the same order (yc-libvhost takes a
// region whose counters are all 0 for a fresh one). Any recovery, batched or single, then finds exactly this
// set. InvalidArgument when the set does not fit into `desc_num` entries or is not well-formed.
absl::Status WriteInflight(std::span<uint8_t> part, uint16_t desc_num, const InflightSet& set);

// --- Bases ---

// What GET_VRING_BASE answered for a split ring with `in_flight` requests, as "next entry to fetch". The
// answer may follow either convention, whatever the kind: used + in_flight or used. STATE_MISMATCH for any
// other.
absl::StatusOr<uint16_t> NormaliseBase(uint32_t base, uint16_t used_idx, uint16_t in_flight);

// The same for a packed ring of n entries: `set` as read from the region, of which CheckPackedPositions is
// asked here. The used half of the answer must be the region's used position, unless `only_16_bits`, where it
// is taken from the region. STATE_MISMATCH.
absl::StatusOr<PackedBase> NormaliseBase(uint32_t base, bool only_16_bits, uint16_t n,
                                         const InflightView& set);

// A packed ring without a region, which must be drained: with `only_16_bits` the used position is taken to be
// the avail position (right only if nothing is in flight). STATE_MISMATCH when avail != used.
absl::StatusOr<PackedBase> NormaliseDrainedBase(uint32_t base, bool only_16_bits, uint16_t n);

// What SET_VRING_BASE must say so that a back-end of `kind`, given a region with `set`, goes on rightly. With
// an empty set all conventions agree. FailedPrecondition for a kind whose convention is not known when `set`
// is not empty.
absl::StatusOr<uint32_t> BaseFor(InflightKind kind, uint16_t n, const InflightSet& set);

// --- Invariants, before commit at the source and again on the memory that arrived ---

// 5.11 of VIRTIO's arithmetic: A - U, L - U, A - L <= n; as many requests as L - U; heads below n and unique.
// `set.used` must be the `used` of `indices`. STATE_MISMATCH names what broke.
absl::Status CheckInflightSplit(uint16_t n, SplitIndices indices, const InflightSet& set);

// Distance from used to avail position is the sum of the chains' lengths and at most n.
absl::Status CheckPackedPositions(uint16_t n, const InflightView& set);
// And the set's own form.
absl::Status CheckInflightPacked(uint16_t n, const InflightSet& set);

// The set's own form: counters ascending, ids unique, chains within `descs`, last descriptor carries the id,
// NEXT on all but the last. STATE_MISMATCH.
absl::Status CheckInflightSet(uint16_t n, const InflightSet& set);

// Reads avail->idx and used->idx from the memory that arrived and compares them with what the source shipped
// (a difference means that a dirty page was lost), then CheckInflightSplit and CheckSplitInvariants.
// STATE_MISMATCH.
absl::Status VerifyInflightSplit(const MemoryView& memory, const SplitRing& ring, SplitIndices shipped,
                                 const InflightSet& set);

// CheckInflightPacked, and in memory every slot from used to avail position still bears the driver's mark
// (available) and the slot at the avail position is not marked used: a lost page would show an older lap.
// STATE_MISMATCH.
absl::Status VerifyInflightPacked(const MemoryView& memory, const PackedRing& ring, const InflightSet& set);

}  // namespace baton::virtio
