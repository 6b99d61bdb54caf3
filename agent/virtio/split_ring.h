// The split virtqueue as an observer sees it: indices, invariants, and what can be said about requests that a
// dead back-end had taken. Pure: memory comes through MemoryView.
//
// Letters as in VIRTIO 1.x and in the messages here: n entries; A = avail->idx; U = used->idx; L = the
// back-end's next avail entry to fetch. All run freely modulo 65536. A - L are available and not fetched, L -
// U in flight.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "agent/virtio/memory_view.h"
#include "common/status.h"

namespace baton::virtio {

inline constexpr uint32_t kMaxRingSize = 32768;

// Guest physical addresses of a split ring of `size` entries.
struct SplitRing {
  uint16_t size = 0;
  uint64_t desc = 0;
  uint64_t avail = 0;
  uint64_t used = 0;
};

// Bytes of the three areas, with the event fields at their ends.
constexpr uint64_t SplitDescBytes(uint32_t n) { return uint64_t{16} * n; }
constexpr uint64_t SplitAvailBytes(uint32_t n) { return 6 + uint64_t{2} * n; }
constexpr uint64_t SplitUsedBytes(uint32_t n) { return 6 + uint64_t{8} * n; }

// A power of two up to 32768, and the alignments 16, 2 and 4. InvalidArgument says which value is wrong.
absl::Status CheckSplitGeometry(const SplitRing& ring);

struct SplitIndices {
  uint16_t avail = 0;
  uint16_t used = 0;
};

// Reads A and U. U is read first: while a guest runs A only grows, so A - U <= n can be checked on the pair.
absl::StatusOr<SplitIndices> ReadSplitIndices(const MemoryView& memory, const SplitRing& ring);

// (A-U) <= n, (L-U) <= n, (A-L) <= n. FailedPrecondition with reason STATE_MISMATCH names the one that broke.
absl::Status CheckSplitInvariants(uint16_t n, uint16_t last_avail, SplitIndices indices);

// The same, and nothing may be in flight: L == U.
absl::Status CheckSplitDrained(uint16_t n, uint16_t last_avail, SplitIndices indices);

// Requests in flight at a stop: every head < n, unique, and as many as L - U.
absl::Status CheckInflightHeads(uint16_t n, uint16_t last_avail, uint16_t used_idx,
                                const std::vector<uint16_t>& heads);

// Where a new back-end continues after one that died with requests in flight and kept no in-flight region.
struct SplitRecovery {
  // L for the new back-end; all requests from here on are (re)submitted.
  uint16_t base = 0;
  // Requests outstanding at the time: A - U.
  uint16_t outstanding = 0;
  // True: nothing was outstanding. False: outstanding requests are taken to be avail entries U..A-1, because
  // every completion still visible in the ring happened in order.
  bool exact = true;
};

// `allow_ordered` false: only the exact answer. INFLIGHT_UNKNOWN when the ring does not tell: completions
// were out of order (a slot of the avail ring may have been overwritten while an older request was in
// flight), or a head occurs twice. The guest may run meanwhile.
absl::StatusOr<SplitRecovery> RecoverSplit(const MemoryView& memory, const SplitRing& ring,
                                           bool allow_ordered);

}  // namespace baton::virtio
