#include "agent/virtio/inflight.h"

#include <algorithm>
#include <cstring>

namespace baton::virtio {
namespace {

constexpr uint16_t kNextFlag = 1;

absl::Status NoRegion(const std::string& what) {
  return Error(absl::StatusCode::kInvalidArgument, "in-flight region: {}", what);
}

absl::Status CheckPartSize(std::span<const uint8_t> part, RingFormat format, uint16_t desc_num) {
  const uint64_t need = InflightPartBytes(format, desc_num);
  if (desc_num == 0 || desc_num > kMaxRingSize || part.size() < need) {
    return NoRegion(fmt::format("{} bytes for {} entries, {} needed", part.size(), desc_num, need));
  }
  return absl::OkStatus();
}

template <typename T>
void Put(std::span<uint8_t> part, size_t at, const T& value) {
  std::memcpy(part.data() + at, &value, sizeof value);
}

void WriteSplitRequests(std::span<uint8_t> part, const InflightSet& set) {
  uint64_t counter = 0;
  for (const InflightRequest& r : set.requests) {
    InflightSplitDesc desc{};
    desc.inflight = 1;
    desc.counter = ++counter;
    Put(part, sizeof(InflightSplitHeader) + sizeof desc * size_t{r.id}, desc);
  }
}

// Chains in consecutive entries from 0 on; what is left over is the free list.
void WritePackedRequests(std::span<uint8_t> part, uint16_t desc_num, const InflightSet& set) {
  uint16_t at = 0;
  uint64_t counter = 0;
  for (const InflightRequest& r : set.requests) {
    const uint16_t head = at;
    for (const InflightDesc& d : set.DescsOf(r)) {
      InflightPackedDesc entry{};
      if (at == head) {
        entry.inflight = 1;
        entry.last = static_cast<uint16_t>(head + r.num - 1);
        entry.num = r.num;
        entry.counter = ++counter;
      }
      entry.next = static_cast<uint16_t>(at + 1);
      entry.id = d.id;
      entry.flags = d.flags;
      entry.len = d.len;
      entry.addr = d.addr;
      Put(part, sizeof(InflightPackedHeader) + sizeof entry * size_t{at}, entry);
      ++at;
    }
  }
  InflightPackedHeader header{};
  header.version = kInflightVersion;
  header.desc_num = desc_num;
  header.free_head = header.old_free_head = at;
  header.used_idx = header.old_used_idx = set.used.idx;
  header.used_wrap_counter = header.old_used_wrap_counter = set.used.wrap;
  Put(part, 0, header);
}

}  // namespace

std::vector<uint16_t> InflightSet::Ids() const {
  std::vector<uint16_t> out;
  out.reserve(requests.size());
  for (const InflightRequest& r : requests) out.push_back(r.id);
  return out;
}

uint32_t InflightSet::slots() const {
  return static_cast<uint32_t>(format == RingFormat::kSplit ? requests.size() : descs.size());
}

InflightSet SetOf(const SplitPartState& state, uint16_t used_idx) {
  InflightSet set;
  set.format = RingFormat::kSplit;
  set.requests.reserve(state.heads.size());
  for (uint16_t head : state.heads) set.requests.push_back({head, 0, 0, state.desc[head].counter});
  set.used.idx = used_idx;
  set.avail.idx = static_cast<uint16_t>(used_idx + state.heads.size());
  set.repaired = static_cast<uint16_t>(state.repaired.size());
  return set;
}

InflightSet SetOf(const PackedPartState& state, uint16_t ring_size) {
  InflightSet set;
  set.format = RingFormat::kPacked;
  set.requests.reserve(state.heads.size());
  // As many as the chains have together, by AnalysePackedPart.
  set.descs.resize(state.desc_num - state.free_entries);
  uint32_t first = 0;
  for (uint16_t head : state.heads) {
    const InflightPackedDesc& h = state.desc[head];
    set.requests.push_back({state.desc[h.last].id, h.num, first, h.counter});
    uint16_t e = head;
    for (uint16_t k = 0; k < h.num; ++k) {
      const InflightPackedDesc& d = state.desc[e];
      set.descs[first++] = {d.addr, d.len, d.id, d.flags};
      e = d.next;
    }
  }
  set.used = state.used;
  set.avail = Advance(state.used, static_cast<uint16_t>(first), ring_size);
  if (state.commit) set.repaired = static_cast<uint16_t>(state.repaired.size());
  return set;
}

absl::StatusOr<InflightSet> ReadInflightSplit(std::span<const uint8_t> part, uint16_t ring_size,
                                              uint16_t used_idx, BatchRule rule) {
  ASSIGN_OR_RETURN(SplitPartState state, AnalyseSplitPart(part, ring_size, used_idx, rule));
  return SetOf(state, used_idx);
}

absl::StatusOr<InflightSet> ReadInflightPacked(std::span<const uint8_t> part, const MemoryView& memory,
                                               const PackedRing& ring) {
  ASSIGN_OR_RETURN(PackedPartState state, AnalysePackedPart(part, memory, ring));
  if (state.desc_num == 0) {
    return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                 "in-flight region: the back-end has not begun to use it");
  }
  InflightSet set = SetOf(state, ring.size);
  // The rest of CheckInflightSet holds by the analysis.
  if (set.HasDuplicates()) {
    return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                 "in-flight region: a request is in flight twice");
  }
  return set;
}

absl::StatusOr<InflightSet> InflightFromInOrderSplit(const MemoryView& memory, const SplitRing& ring,
                                                     uint16_t last_avail) {
  RETURN_IF_ERROR(CheckSplitGeometry(ring));
  ASSIGN_OR_RETURN(SplitIndices indices, ReadSplitIndices(memory, ring));
  RETURN_IF_ERROR(CheckSplitInvariants(ring.size, last_avail, indices));
  std::vector<uint16_t> avail(ring.size);
  RETURN_IF_ERROR(memory.Read(ring.avail + 4, avail.data(), size_t{ring.size} * 2));
  InflightSet set;
  set.used.idx = indices.used;
  set.avail.idx = last_avail;
  for (uint16_t i = indices.used; i != last_avail; ++i) {
    set.requests.push_back({avail[i % ring.size], 0, 0, set.requests.size() + 1});
  }
  RETURN_IF_ERROR(CheckInflightSplit(ring.size, indices, set));
  return set;
}

absl::StatusOr<InflightSet> InflightFromInOrderPacked(const MemoryView& memory, const PackedRing& ring,
                                                      PackedBase base) {
  RETURN_IF_ERROR(CheckPackedGeometry(ring));
  RETURN_IF_ERROR(CheckPackedInvariants(ring.size, base));
  std::vector<InflightDesc> slots(ring.size);
  RETURN_IF_ERROR(memory.Read(ring.desc, slots.data(), PackedDescBytes(ring.size)));
  InflightSet set;
  set.format = RingFormat::kPacked;
  set.used = base.used;
  set.avail = base.avail;
  uint16_t num = 0;
  PackedPosition at = base.used;
  for (int32_t left = Distance(base.used, base.avail, ring.size); left > 0; --left) {
    const InflightDesc& d = slots[at.idx];
    if (!IsPackedAvail(d.flags, at.wrap)) {
      return Mismatch(
          fmt::format("slot {} (wrap {}) between used and avail position is not available", at.idx, at.wrap));
    }
    set.descs.push_back(d);
    ++num;
    if (!(d.flags & kNextFlag)) {
      const uint32_t first = static_cast<uint32_t>(set.descs.size() - num);
      set.requests.push_back({d.id, num, first, set.requests.size() + 1});
      num = 0;
    }
    at = Advance(at, 1, ring.size);
  }
  if (num) return Mismatch(fmt::format("the avail position {} is inside a chain", base.avail.idx));
  RETURN_IF_ERROR(CheckInflightPacked(ring.size, set));
  return set;
}

absl::StatusOr<InflightSet> RewindSplit(const MemoryView& memory, const SplitRing& ring,
                                        const InflightSet& set, bool in_order, bool rewindable) {
  auto illegal = [](const std::string& what) {
    return Error(absl::StatusCode::kFailedPrecondition, "cannot rewind: {}", what);
  };
  if (set.format != RingFormat::kSplit) return illegal("the ring is packed");
  if (set.empty()) return set;
  if (!in_order) return illegal("without IN_ORDER avail entries in flight may have been overwritten");
  if (!rewindable) return illegal("requests in flight may have had an effect");
  ASSIGN_OR_RETURN(InflightSet entries, InflightFromInOrderSplit(memory, ring, set.last_avail()));
  if (entries.used.idx != set.used.idx || entries.Ids() != set.Ids()) {
    return illegal("the avail entries from used->idx on are not the requests in flight");
  }
  InflightSet out;
  out.used = out.avail = set.used;
  return out;
}

absl::Status InitInflightSplit(std::span<uint8_t> part, uint16_t desc_num, uint16_t used_idx) {
  InflightSet set;
  set.used.idx = set.avail.idx = used_idx;
  return WriteInflight(part, desc_num, set);
}

absl::Status InitInflightPacked(std::span<uint8_t> part, uint16_t desc_num, PackedPosition used) {
  InflightSet set;
  set.format = RingFormat::kPacked;
  set.used = set.avail = used;
  return WriteInflight(part, desc_num, set);
}

absl::Status WriteInflight(std::span<uint8_t> part, uint16_t desc_num, const InflightSet& set) {
  RETURN_IF_ERROR(CheckPartSize(part, set.format, desc_num));
  if (absl::Status ok = CheckInflightSet(desc_num, set); !ok.ok()) return NoRegion(Message(ok));
  std::memset(part.data(), 0, part.size());
  if (set.format == RingFormat::kPacked) {
    if (set.used.idx >= desc_num)
      return NoRegion(fmt::format("used position {} of {}", set.used.idx, desc_num));
    RETURN_IF_ERROR(FormatPackedEntries(part, desc_num));
    WritePackedRequests(part, desc_num, set);
    return absl::OkStatus();
  }
  WriteSplitRequests(part, set);
  InflightSplitHeader header{};
  header.version = kInflightVersion;
  header.desc_num = desc_num;
  header.used_idx = set.used.idx;
  Put(part, 0, header);
  return absl::OkStatus();
}

}  // namespace baton::virtio
