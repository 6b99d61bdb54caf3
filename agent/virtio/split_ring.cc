#include "agent/virtio/split_ring.h"

#include <algorithm>
#include <bit>
#include <climits>

namespace baton::virtio {
namespace {

constexpr uint64_t kIdxOffset = 2;
constexpr uint64_t kRingOffset = 4;

struct UsedElem {
  uint32_t id;
  uint32_t len;
};
static_assert(sizeof(UsedElem) == 8);

absl::Status Unknown(const std::string& what) {
  return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition, "{}", what);
}

struct RingCopy {
  std::vector<uint16_t> avail;
  std::vector<UsedElem> used;
};

// What the window shows of one head. Positions count from the window's start.
struct HeadHistory {
  int submitted = 0;       // avail entries in the window
  int completed = 0;       // used entries in the window
  int last_submitted = 0;  // position of the last avail entry
  // Highest value, over its completions, of "submissions up to and including this position, minus earlier
  // completions". In truth, counted from the ring's beginning, it never exceeds 1.
  int peak = INT_MIN;
};

// The window holds `completed` used entries before U and the avail entries beside them, and `outstanding`
// avail entries from U on.
absl::StatusOr<std::vector<uint16_t>> OutstandingHeads(const RingCopy& copy, uint16_t n, uint16_t used_idx,
                                                       uint16_t completed, uint16_t outstanding) {
  std::vector<HeadHistory> history(n);
  for (int position = 0; position < completed + outstanding; ++position) {
    const size_t slot = static_cast<uint16_t>(used_idx - completed + position) % n;
    const uint16_t submitted = copy.avail[slot];
    if (submitted >= n)
      return Mismatch(fmt::format("an avail entry names head {} in a ring of {}", submitted, n));
    ++history[submitted].submitted;
    history[submitted].last_submitted = position;
    if (position >= completed) continue;
    const uint32_t done = copy.used[slot].id;
    if (done >= n) return Mismatch(fmt::format("a used entry names head {} in a ring of {}", done, n));
    HeadHistory& h = history[done];
    h.peak = std::max(h.peak, h.submitted - h.completed);
    ++h.completed;
  }
  // D, the difference before the window, is at most 1 - peak (see above), at most 1 - (submitted - completed)
  // because a head is outstanding at most once, and 1 at all; and at least completed - submitted.
  int sum_upper = 0, sum_lower = 0;
  std::vector<int> upper(n, 0), lower(n, 0);
  for (uint16_t head = 0; head < n; ++head) {
    const HeadHistory& h = history[head];
    if (h.submitted == 0 && h.completed == 0) continue;
    upper[head] = std::min(1, 1 - (h.submitted - h.completed));
    if (h.peak != INT_MIN) upper[head] = std::min(upper[head], 1 - h.peak);
    lower[head] = h.completed - h.submitted;
    if (lower[head] > upper[head]) {
      return Unknown(
          fmt::format("head {} was submitted {} and completed {} times in the visible window, which no order "
                      "explains",
                      head, h.submitted, h.completed));
    }
    sum_upper += upper[head];
    sum_lower += lower[head];
  }
  if (sum_upper != 0 && sum_lower != 0) {
    return Unknown(fmt::format(
        "{} requests were in flight or waiting, and the completions in the visible window are out of "
        "order in more than one possible way",
        outstanding));
  }
  const std::vector<int>& before = sum_upper == 0 ? upper : lower;
  std::vector<uint16_t> heads;
  for (uint16_t head = 0; head < n; ++head) {
    const HeadHistory& h = history[head];
    if (before[head] + h.submitted - h.completed == 1) heads.push_back(head);
  }
  if (heads.size() != outstanding) {
    return Unknown(fmt::format("{} requests were in flight or waiting, but the visible window explains {}",
                               outstanding, heads.size()));
  }
  std::stable_sort(heads.begin(), heads.end(), [&](uint16_t a, uint16_t b) {
    return history[a].last_submitted < history[b].last_submitted;
  });
  return heads;
}

}  // namespace

absl::Status Mismatch(const std::string& what) {
  return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition, "{}", what);
}

absl::Status CheckSplitGeometry(const SplitRing& ring) {
  auto invalid = [](const std::string& what) { return absl::InvalidArgumentError(what); };
  if (ring.size == 0 || ring.size > kMaxRingSize || !std::has_single_bit(uint32_t{ring.size})) {
    return invalid(fmt::format("ring size {} is not a power of two from 1 to 32768", ring.size));
  }
  if (ring.desc % 16)
    return invalid(fmt::format("descriptor table at {:#x} is not aligned to 16", ring.desc));
  if (ring.avail % 2) return invalid(fmt::format("avail ring at {:#x} is not aligned to 2", ring.avail));
  if (ring.used % 4) return invalid(fmt::format("used ring at {:#x} is not aligned to 4", ring.used));
  return absl::OkStatus();
}

absl::StatusOr<SplitIndices> ReadSplitIndices(const MemoryView& memory, const SplitRing& ring) {
  SplitIndices out;
  ASSIGN_OR_RETURN(out.used, memory.ReadU16(ring.used + kIdxOffset));
  ASSIGN_OR_RETURN(out.avail, memory.ReadU16(ring.avail + kIdxOffset));
  return out;
}

absl::Status CheckSplitInvariants(uint16_t n, uint16_t last_avail, SplitIndices i) {
  auto diff = [](uint16_t a, uint16_t b) { return static_cast<uint16_t>(a - b); };
  if (diff(i.avail, i.used) > n) {
    return Mismatch(fmt::format("avail->idx {} is {} entries after used->idx {}, more than the ring's {}",
                                i.avail, diff(i.avail, i.used), i.used, n));
  }
  if (diff(last_avail, i.used) > n) {
    return Mismatch(
        fmt::format("the next entry to fetch, {}, is {} entries after used->idx {}, more than the ring's {}",
                    last_avail, diff(last_avail, i.used), i.used, n));
  }
  if (diff(i.avail, last_avail) > n) {
    return Mismatch(
        fmt::format("avail->idx {} is {} entries after the next entry to fetch, {}, more than the ring's {}",
                    i.avail, diff(i.avail, last_avail), last_avail, n));
  }
  return absl::OkStatus();
}

absl::Status CheckSplitDrained(uint16_t n, uint16_t last_avail, SplitIndices i) {
  RETURN_IF_ERROR(CheckSplitInvariants(n, last_avail, i));
  if (last_avail != i.used) {
    return Mismatch(fmt::format("{} requests are in flight: next entry to fetch {}, used->idx {}",
                                static_cast<uint16_t>(last_avail - i.used), last_avail, i.used));
  }
  return absl::OkStatus();
}

absl::StatusOr<SplitRecovery> RecoverSplit(const MemoryView& memory, const SplitRing& ring,
                                           bool allow_window) {
  RETURN_IF_ERROR(CheckSplitGeometry(ring));
  const uint16_t n = ring.size;
  ASSIGN_OR_RETURN(SplitIndices before, ReadSplitIndices(memory, ring));
  RingCopy copy{std::vector<uint16_t>(n), std::vector<UsedElem>(n)};
  RETURN_IF_ERROR(memory.Read(ring.avail + kRingOffset, copy.avail.data(), size_t{n} * sizeof copy.avail[0]));
  RETURN_IF_ERROR(memory.Read(ring.used + kRingOffset, copy.used.data(), size_t{n} * sizeof copy.used[0]));
  // The guest may have added requests while the ring was copied, and thereby overwritten the oldest slots:
  // only slots that are younger than the second look at A minus n are judged, and not the very oldest, which
  // the guest writes before it raises A.
  ASSIGN_OR_RETURN(SplitIndices now, ReadSplitIndices(memory, ring));
  if (now.used != before.used) {
    return Unknown(
        fmt::format("used->idx moved from {} to {} although no back-end runs", before.used, now.used));
  }
  const uint16_t outstanding = static_cast<uint16_t>(before.avail - before.used);
  const uint16_t later = static_cast<uint16_t>(now.avail - now.used);
  if (outstanding > n || later > n) {
    return Mismatch(fmt::format("avail->idx {} is {} entries after used->idx {}, more than the ring's {}",
                                now.avail, later, now.used, n));
  }
  if (outstanding == 0) return SplitRecovery{before.used, {}, true, false};
  if (!allow_window) {
    return Unknown(fmt::format(
        "{} requests were in flight or waiting, and there is no in-flight region that tells which",
        outstanding));
  }
  const uint16_t completed = later < n ? static_cast<uint16_t>(n - 1 - later) : 0;
  ASSIGN_OR_RETURN(std::vector<uint16_t> heads,
                   OutstandingHeads(copy, n, before.used, completed, outstanding));
  SplitRecovery out{before.used, std::move(heads), false, false};
  for (uint16_t k = 0; k < outstanding; ++k) {
    out.rewrite |= out.heads[k] != copy.avail[static_cast<uint16_t>(before.used + k) % n];
  }
  return out;
}

}  // namespace baton::virtio
