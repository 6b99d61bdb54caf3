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

// A packed part's set, but for its descriptors.
void FillAllButDescs(const PackedPartState& state, uint16_t ring_size, InflightSet* set) {
  set->format = RingFormat::kPacked;
  set->requests.resize(state.heads.size());
  InflightRequest* to = set->requests.data();
  uint32_t first = 0;
  for (const AgedHead& head : state.heads) {
    const uint16_t num = state.desc[head.entry].num;
    *to++ = {state.chains[first + num - 1].id, num, first, head.counter};
    first += num;
  }
  set->used = state.used;
  set->avail = Advance(state.used, static_cast<uint16_t>(first), ring_size);
  set->repaired = state.commit ? static_cast<uint16_t>(state.repaired.size()) : uint16_t{0};
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

void FillSet(const SplitPartState& state, uint16_t used_idx, InflightSet* set) {
  set->format = RingFormat::kSplit;
  set->requests.resize(state.heads.size());
  InflightRequest* to = set->requests.data();
  for (const AgedHead& head : state.heads) *to++ = {head.entry, 0, 0, head.counter};
  set->descs.clear();
  set->used = {used_idx, true};
  set->avail = {static_cast<uint16_t>(used_idx + state.heads.size()), true};
  set->repaired = static_cast<uint16_t>(state.repaired.size());
}

void FillSet(const PackedPartState& state, uint16_t ring_size, InflightSet* set) {
  FillAllButDescs(state, ring_size, set);
  set->descs.assign(state.chains.begin(), state.chains.end());
}

void InflightReader::Reserve(RingFormat format, uint16_t n) {
  set_.requests.resize(n);
  if (format == RingFormat::kSplit) {
    split_.heads.resize(n);
    split_.by_age.resize(n);
    return;
  }
  packed_.heads.resize(n);
  packed_.by_age.resize(n);
  packed_.taken.resize(n);
  seen_.resize(65536);
}

absl::StatusOr<InflightView> InflightReader::ReadSplit(std::span<const uint8_t> part, uint16_t ring_size,
                                                       uint16_t used_idx, BatchRule rule) {
  RETURN_IF_ERROR(AnalyseSplitPart(part, ring_size, used_idx, rule, &split_));
  FillSet(split_, used_idx, &set_);
  return InflightView(set_);
}

absl::StatusOr<InflightView> InflightReader::ReadPacked(std::span<const uint8_t> part,
                                                        const MemoryView& memory, const PackedRing& ring,
                                                        std::span<InflightDesc> room) {
  packed_.room = room;
  RETURN_IF_ERROR(AnalysePackedPart(part, memory, ring, &packed_));
  if (packed_.desc_num == 0) {
    return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                 "in-flight region: the back-end has not begun to use it");
  }
  FillAllButDescs(packed_, ring.size, &set_);
  // The rest of CheckInflightSet holds by the analysis.
  if (AnyIdTwice()) {
    return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                 "in-flight region: a request is in flight twice");
  }
  InflightView out(set_);
  out.descs = packed_.chains;
  return out;
}

InflightSet InflightReader::Take() {
  if (set_.format == RingFormat::kPacked) set_.descs.assign(packed_.chains.begin(), packed_.chains.end());
  return std::move(set_);
}

// InflightSet::HasDuplicates, with marks that are taken back one by one: a ring has few ids of all there
// could be.
bool InflightReader::AnyIdTwice() {
  seen_.resize(65536);
  uint8_t* const seen = seen_.data();
  uint8_t twice = 0;
  for (const InflightRequest& r : set_.requests) twice |= std::exchange(seen[r.id], uint8_t{1});
  for (const InflightRequest& r : set_.requests) seen[r.id] = 0;
  return twice != 0;
}

absl::StatusOr<InflightSet> ReadInflightSplit(std::span<const uint8_t> part, uint16_t ring_size,
                                              uint16_t used_idx, BatchRule rule) {
  InflightReader reader;
  RETURN_IF_ERROR(reader.ReadSplit(part, ring_size, used_idx, rule).status());
  return reader.Take();
}

absl::StatusOr<InflightSet> ReadInflightPacked(std::span<const uint8_t> part, const MemoryView& memory,
                                               const PackedRing& ring) {
  InflightReader reader;
  RETURN_IF_ERROR(reader.ReadPacked(part, memory, ring).status());
  return reader.Take();
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
