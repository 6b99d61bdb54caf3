// The split virtqueue as an observer sees it: indices, invariants, and what can be said about requests that a
// dead back-end had taken. Pure: memory comes through MemoryView.
//
// Letters as in VIRTIO 1.x and in the messages here: n entries; A = avail->idx; U = used->idx; L = the
// back-end's next avail entry to fetch. All run freely modulo 65536. A - L are available and not fetched, L -
// U in flight.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
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

// STATE_MISMATCH: what was found cannot be the state of a ring.
absl::Status Mismatch(const std::string& what);

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

// Where a new back-end continues after one that died with requests in flight and kept no in-flight region.
struct SplitRecovery {
  // L for the new back-end.
  uint16_t base = 0;
  // Heads to submit (again): those in flight and those never fetched, oldest first. A - U of them.
  std::vector<uint16_t> heads;
  // True: nothing was outstanding. False: `heads` was worked out from the visible part of both rings, under
  // the assumption that RecoverSplit names.
  bool exact = true;
  // The avail entries from `base` on are not `heads`: they must be written there before a back-end starts.
  // Legal while no back-end runs: the driver only writes entries from A on, and never reads one.
  bool rewrite = false;
};

// Which requests are outstanding after a back-end died, while the guest may run on.
//
// Counting tells how many (A - U), but not which: with completions out of order the last A - U avail entries
// are not the outstanding ones. For each head, though, its submissions and completions alternate, and the
// next submission of a head always has a higher index than its last completion. Over the window in which both
// rings are visible (the last n - 1 entries) that bounds, for each head, how far its submissions before the
// window were ahead of its completions before it. The sum of these differences over all heads is zero by
// construction, so where the bounds add up to zero every one of them is met, and the outstanding heads follow
// without a guess.
//
// The assumption: no request stayed in flight while the ring went once around (it would be in neither
// window). With `allow_window` false only the empty set is an answer. INFLIGHT_UNKNOWN says why the rings do
// not tell.
absl::StatusOr<SplitRecovery> RecoverSplit(const MemoryView& memory, const SplitRing& ring,
                                           bool allow_window);

}  // namespace baton::virtio
