#include "agent/virtio/split_ring.h"

#include <bit>

namespace baton::virtio {
namespace {

constexpr uint64_t kIdxOffset = 2;
constexpr uint64_t kRingOffset = 4;

struct UsedElem {
  uint32_t id;
  uint32_t len;
};
static_assert(sizeof(UsedElem) == 8);

absl::Status Mismatch(const std::string& what) {
  return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition, "{}", what);
}

absl::Status Unknown(const std::string& what) {
  return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition, "{}", what);
}

}  // namespace

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

absl::Status CheckInflightHeads(uint16_t n, uint16_t last_avail, uint16_t used_idx,
                                const std::vector<uint16_t>& heads) {
  uint16_t expected = static_cast<uint16_t>(last_avail - used_idx);
  if (heads.size() != expected) {
    return Mismatch(fmt::format("{} heads are in flight, but next entry to fetch {} and used->idx {} make {}",
                                heads.size(), last_avail, used_idx, expected));
  }
  std::vector<bool> seen(n, false);
  for (uint16_t head : heads) {
    if (head >= n) return Mismatch(fmt::format("head {} in flight in a ring of {}", head, n));
    if (seen[head]) return Mismatch(fmt::format("head {} is in flight twice", head));
    seen[head] = true;
  }
  return absl::OkStatus();
}

absl::StatusOr<SplitRecovery> RecoverSplit(const MemoryView& memory, const SplitRing& ring,
                                           bool allow_ordered) {
  RETURN_IF_ERROR(CheckSplitGeometry(ring));
  const uint16_t n = ring.size;
  ASSIGN_OR_RETURN(SplitIndices before, ReadSplitIndices(memory, ring));
  std::vector<uint16_t> avail(n);
  std::vector<UsedElem> used(n);
  RETURN_IF_ERROR(memory.Read(ring.avail + kRingOffset, avail.data(), size_t{n} * sizeof avail[0]));
  RETURN_IF_ERROR(memory.Read(ring.used + kRingOffset, used.data(), size_t{n} * sizeof used[0]));
  // The guest may have added requests while the ring was copied, and thereby overwritten the oldest slots:
  // only slots that are younger than the second look at A minus n are judged.
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
  if (outstanding == 0) return SplitRecovery{before.used, 0, true};
  if (!allow_ordered) {
    return Unknown(
        fmt::format("{} requests were in flight or waiting, and neither an in-flight region nor the rings "
                    "tell which of them were taken",
                    outstanding));
  }
  std::vector<bool> seen(n, false);
  for (uint16_t k = 0; k < outstanding; ++k) {
    uint16_t head = avail[static_cast<uint16_t>(before.used + k) % n];
    if (head >= n)
      return Mismatch(fmt::format("avail entry {} names head {} in a ring of {}", before.used + k, head, n));
    if (seen[head]) {
      return Unknown(
          fmt::format("head {} was made available twice without being used: an older request is in flight "
                      "whose slot was overwritten",
                      head));
    }
    seen[head] = true;
  }
  // The oldest slot is left out: the guest writes it before it raises avail->idx.
  for (uint16_t k = 1; k + later < n; ++k) {
    uint16_t slot = static_cast<uint16_t>(before.used - k) % n;
    if (used[slot].id != avail[slot]) {
      return Unknown(
          fmt::format("completion {} was for head {}, but the request made available at that place was head "
                      "{}: the back-end completes out of order",
                      static_cast<uint16_t>(before.used - k), used[slot].id, avail[slot]));
    }
  }
  return SplitRecovery{before.used, outstanding, false};
}

}  // namespace baton::virtio
