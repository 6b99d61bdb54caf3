// Bases and invariants of a stopped queue.
#include <array>
#include <vector>

#include "agent/virtio/inflight.h"

namespace baton::virtio {
namespace {

std::string Where(PackedPosition p) { return fmt::format("{} (wrap {})", p.idx, p.wrap ? 1 : 0); }

absl::Status CheckSavedChain(const InflightSet& set, const InflightRequest& r) {
  if (r.num == 0 || r.first > set.descs.size() || r.num > set.descs.size() - r.first) {
    return Mismatch(fmt::format("request {} has descriptors {} to {} of {}", r.id, r.first,
                                uint32_t{r.first} + r.num, set.descs.size()));
  }
  const auto chain = set.DescsOf(r);
  for (size_t k = 0; k < chain.size(); ++k) {
    if (((chain[k].flags & 1) == 0) != (k + 1 == chain.size())) {
      return Mismatch(fmt::format("the chain of request {} does not end with its last descriptor", r.id));
    }
  }
  if (chain.back().id != r.id) {
    return Mismatch(fmt::format("the chain of request {} bears the id {}", r.id, chain.back().id));
  }
  return absl::OkStatus();
}

}  // namespace

bool InflightSet::HasDuplicates() const {
  // One bit an id: this is done for thousands of requests while the guest stands still.
  std::array<uint64_t, 65536 / 64> seen{};
  for (const InflightRequest& r : requests) {
    uint64_t& word = seen[r.id / 64];
    const uint64_t bit = uint64_t{1} << (r.id % 64);
    if (word & bit) return true;
    word |= bit;
  }
  return false;
}

absl::Status CheckInflightSet(uint16_t n, const InflightSet& set) {
  if (set.size() > n)
    return Mismatch(fmt::format("{} requests are in flight in a ring of {}", set.size(), n));
  uint32_t next_desc = 0;
  for (size_t k = 0; k < set.size(); ++k) {
    const InflightRequest& r = set.requests[k];
    if (k > 0 && r.counter <= set.requests[k - 1].counter) {
      return Mismatch(fmt::format("requests {} and {} are not in the order of their counters",
                                  set.requests[k - 1].id, r.id));
    }
    if (set.format == RingFormat::kSplit) {
      if (r.id >= n) return Mismatch(fmt::format("head {} in flight in a ring of {}", r.id, n));
      continue;
    }
    if (r.first != next_desc)
      return Mismatch(fmt::format("the chain of request {} is out of its place", r.id));
    RETURN_IF_ERROR(CheckSavedChain(set, r));
    next_desc += r.num;
  }
  if (next_desc != set.descs.size() || next_desc > n) {
    return Mismatch(fmt::format("{} descriptors are saved, the requests have {}, the ring {}",
                                set.descs.size(), next_desc, n));
  }
  if (set.HasDuplicates()) return Mismatch("a request is in flight twice");
  return absl::OkStatus();
}

absl::Status CheckInflightSplit(uint16_t n, SplitIndices indices, const InflightSet& set) {
  if (set.format != RingFormat::kSplit) return Mismatch("the set is a packed ring's");
  if (set.used.idx != indices.used) {
    return Mismatch(
        fmt::format("the set was told with used->idx {}, which is {}", set.used.idx, indices.used));
  }
  RETURN_IF_ERROR(CheckSplitInvariants(n, set.last_avail(), indices));
  if (const uint16_t expected = static_cast<uint16_t>(set.last_avail() - indices.used);
      set.size() != expected) {
    return Mismatch(fmt::format("{} heads are in flight, but next entry to fetch {} and used->idx {} make {}",
                                set.size(), set.last_avail(), indices.used, expected));
  }
  return CheckInflightSet(n, set);
}

absl::Status CheckInflightPacked(uint16_t n, const InflightSet& set) {
  RETURN_IF_ERROR(CheckInflightSet(n, set));
  return CheckPackedPositions(n, set);
}

absl::Status CheckPackedPositions(uint16_t n, const InflightView& set) {
  if (set.format != RingFormat::kPacked) return Mismatch("the set is a split ring's");
  RETURN_IF_ERROR(CheckPackedInvariants(n, {set.avail, set.used}));
  const int32_t distance = Distance(set.used, set.avail, n);
  if (distance != static_cast<int32_t>(set.slots())) {
    return Mismatch(
        fmt::format("{} descriptors are in flight, but used position {} and avail position {} make {}",
                    set.slots(), Where(set.used), Where(set.avail), distance));
  }
  return absl::OkStatus();
}

absl::Status VerifyInflightSplit(const MemoryView& memory, const SplitRing& ring, SplitIndices shipped,
                                 const InflightSet& set) {
  if (absl::Status ok = CheckSplitGeometry(ring); !ok.ok()) return Mismatch(Message(ok));
  auto indices = ReadSplitIndices(memory, ring);
  if (!indices.ok()) return Mismatch(Message(indices.status()));
  if (indices->avail != shipped.avail) {
    return Mismatch(
        fmt::format("avail->idx is {} in the memory that arrived, {} at the source: a page was lost",
                    indices->avail, shipped.avail));
  }
  if (indices->used != shipped.used) {
    return Mismatch(
        fmt::format("used->idx is {} in the memory that arrived, {} at the source: a page was lost",
                    indices->used, shipped.used));
  }
  return CheckInflightSplit(ring.size, *indices, set);
}

absl::Status VerifyInflightPacked(const MemoryView& memory, const PackedRing& ring, const InflightSet& set) {
  if (absl::Status ok = CheckPackedGeometry(ring); !ok.ok()) return Mismatch(Message(ok));
  RETURN_IF_ERROR(CheckInflightPacked(ring.size, set));
  std::vector<InflightDesc> slots(ring.size);
  if (absl::Status ok = memory.Read(ring.desc, slots.data(), PackedDescBytes(ring.size)); !ok.ok()) {
    return Mismatch(Message(ok));
  }
  PackedPosition at = set.used;
  for (uint32_t k = 0; k < set.slots(); ++k, at = Advance(at, 1, ring.size)) {
    if (!IsPackedAvail(slots[at.idx].flags, at.wrap)) {
      return Mismatch(fmt::format(
          "slot {} is in flight, but not available in the memory that arrived: a page was lost", Where(at)));
    }
  }
  if (IsPackedUsed(slots[at.idx].flags, at.wrap)) {
    return Mismatch(
        fmt::format("slot {} is used in the memory that arrived, but not fetched: a page is of another "
                    "time than the device's state",
                    Where(at)));
  }
  return absl::OkStatus();
}

absl::StatusOr<uint16_t> NormaliseBase(uint32_t base, uint16_t used_idx, uint16_t in_flight) {
  const uint16_t next = static_cast<uint16_t>(used_idx + in_flight);
  if (base != next && base != used_idx) {
    return Mismatch(
        fmt::format("the back-end's base {} is neither used->idx {} nor {}, with {} requests in flight", base,
                    used_idx, next, in_flight));
  }
  return next;
}

absl::StatusOr<PackedBase> NormaliseBase(uint32_t base, bool only_16_bits, uint16_t n,
                                         const InflightView& set) {
  RETURN_IF_ERROR(CheckPackedPositions(n, set));
  PackedBase told = DecodePackedBase(base);
  if (only_16_bits) {
    if (base > 0xffff) return Mismatch(fmt::format("the back-end's base {:#x} has more than 16 bits", base));
    told.used = set.used;
  }
  if (!(told.used == set.used)) {
    return Mismatch(fmt::format("the back-end's used position {} is not the in-flight region's {}",
                                Where(told.used), Where(set.used)));
  }
  if (!(told.avail == set.avail) && !(told.avail == set.used)) {
    return Mismatch(fmt::format("the back-end's avail position {} is neither its used position {} nor {}",
                                Where(told.avail), Where(set.used), Where(set.avail)));
  }
  return PackedBase{set.avail, set.used};
}

absl::StatusOr<PackedBase> NormaliseDrainedBase(uint32_t base, bool only_16_bits, uint16_t n) {
  PackedBase told = DecodePackedBase(base);
  if (only_16_bits) {
    if (base > 0xffff) return Mismatch(fmt::format("the back-end's base {:#x} has more than 16 bits", base));
    told.used = told.avail;
  }
  RETURN_IF_ERROR(CheckPackedDrained(n, told));
  return told;
}

absl::StatusOr<uint32_t> BaseFor(InflightKind kind, uint16_t n, const InflightSet& set) {
  const bool split = set.format == RingFormat::kSplit;
  if (!split) RETURN_IF_ERROR(CheckInflightPacked(n, set));
  const BaseConvention convention = TraitsOf(kind).start_base;
  if (convention == BaseConvention::kNone && !set.empty()) {
    return Error(
        absl::StatusCode::kFailedPrecondition,
        "{} requests are in flight, and it is not known how this kind of back-end is told where to go on: "
        "set the back-end's kind, or let the device drain",
        set.size());
  }
  const PackedPosition avail = convention == BaseConvention::kAvail ? set.avail : set.used;
  return split ? uint32_t{avail.idx} : EncodePackedBase({avail, set.used});
}

}  // namespace baton::virtio
