#include "agent/virtio/inflight_recovery.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <numeric>

#include "agent/virtio/split_ring.h"

namespace baton::virtio {
namespace {

absl::Status BadPart(const std::string& what) {
  return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition, "in-flight region: {}", what);
}

// Header and entries of a part, and what both formats share. desc_num is 0 when nobody uses the part.
template <typename Header, typename Desc>
absl::Status TakePart(std::span<const uint8_t> copy, uint16_t ring_size, Header* header,
                      std::span<const Desc>* desc) {
  if (copy.size() < sizeof *header)
    return BadPart(fmt::format("{} bytes are too few for a header", copy.size()));
  std::memcpy(header, copy.data(), sizeof *header);
  if (header->version > kInflightVersion) return BadPart(fmt::format("unknown version {}", header->version));
  if (header->version == 0) header->desc_num = 0;
  const uint16_t n = header->desc_num;
  if (n == 0) return absl::OkStatus();
  if (n > kMaxRingSize || copy.size() < sizeof *header + sizeof(Desc) * uint64_t{n}) {
    return BadPart(fmt::format("desc_num {} does not fit into {} bytes", n, copy.size()));
  }
  if (n < ring_size) return BadPart(fmt::format("desc_num {} for a ring of {}", n, ring_size));
  const uint8_t* at = copy.data() + sizeof *header;
  if (reinterpret_cast<uintptr_t>(at) % alignof(Desc))
    return absl::InternalError("an unaligned copy of a part");
  *desc = {reinterpret_cast<const Desc*>(at), n};
  return absl::OkStatus();
}

absl::Status BadFlag(uint8_t flag, uint16_t entry) {
  return BadPart(fmt::format("flag {} of entry {} is neither 0 nor 1", flag, entry));
}

// Sorts the heads, oldest first. Two of the same age have no order, and an age after which no other can come
// is none.
template <typename Desc>
absl::Status SortHeads(std::span<const Desc> desc, std::vector<uint16_t>* heads) {
  auto older = [&](uint16_t a, uint16_t b) { return desc[a].counter < desc[b].counter; };
  // By the digits of the age, counted from the oldest: what a ring has in flight is mostly near each other,
  // so that two passes do. Comparisons cost several times as much, and the guest stands still meanwhile.
  uint64_t first = std::numeric_limits<uint64_t>::max(), last = 0;
  for (uint16_t head : *heads) {
    first = std::min(first, desc[head].counter);
    last = std::max(last, desc[head].counter);
  }
  std::vector<uint16_t> sorted(heads->size());
  for (int shift = 0; shift < 64 && !heads->empty() && (last - first) >> shift != 0; shift += 8) {
    std::array<uint32_t, 256> place{};
    auto digit = [&](uint16_t head) { return (desc[head].counter - first) >> shift & 0xff; };
    for (uint16_t head : *heads) ++place[digit(head)];
    std::exclusive_scan(place.begin(), place.end(), place.begin(), 0u);
    for (uint16_t head : *heads) sorted[place[digit(head)]++] = head;
    heads->swap(sorted);
  }
  for (size_t k = 1; k < heads->size(); ++k) {
    if (!older((*heads)[k - 1], (*heads)[k])) {
      return BadPart(fmt::format("entries {} and {} are in flight with the same counter {}", (*heads)[k - 1],
                                 (*heads)[k], desc[(*heads)[k]].counter));
    }
  }
  if (!heads->empty() && desc[heads->back()].counter == std::numeric_limits<uint64_t>::max()) {
    return BadPart(fmt::format("the counter of entry {} is at its end", heads->back()));
  }
  return absl::OkStatus();
}

// Which of a packed header's pairs of values hold.
absl::Status SettleBatch(const InflightPackedHeader& header, const MemoryView& memory, const PackedRing& ring,
                         PackedPartState* state) {
  if (header.old_used_wrap_counter > 1 || header.used_wrap_counter > 1) {
    return BadPart(
        fmt::format("wrap counters {} and {}", header.used_wrap_counter, header.old_used_wrap_counter));
  }
  const PackedPosition now{header.used_idx, header.used_wrap_counter != 0};
  const PackedPosition old{header.old_used_idx, header.old_used_wrap_counter != 0};
  if (old.idx >= ring.size)
    return BadPart(fmt::format("old used position {} in a ring of {}", old.idx, ring.size));
  state->used = old;
  state->free_head = header.old_free_head;
  if (now == old) return absl::OkStatus();
  if (now.idx == old.idx && header.free_head == header.old_free_head) {
    // Back-ends that store the older position in two steps may have died between index and wrap counter. With
    // the whole ring in flight it was a batch of a whole lap, though, and they died between free_head and
    // position: as if under way.
    uint32_t in_flight = 0;
    for (const InflightPackedDesc& d : state->desc) in_flight += d.inflight ? d.num : 0;
    if (in_flight < ring.size) {
      state->commit = true;
      state->used = now;
      return absl::OkStatus();
    }
  }
  // As the driver left it, if the device has not written it: then nothing of the batch was published, and the
  // new values may be half-written.
  ASSIGN_OR_RETURN(uint16_t flags, ReadPackedFlags(memory, ring, old.idx));
  if (IsPackedAvail(flags, old.wrap)) return absl::OkStatus();
  const bool whole_lap = now.idx == old.idx;
  if (now.idx >= ring.size || (!whole_lap && Distance(old, now, ring.size) <= 0)) {
    return BadPart(fmt::format("used position {} (wrap {}) does not follow {} (wrap {}) in a ring of {}",
                               now.idx, now.wrap, old.idx, old.wrap, ring.size));
  }
  state->commit = true;
  state->used = now;
  state->free_head = header.free_head;
  return absl::OkStatus();
}

// What an entry belongs to.
enum class Place : uint8_t { kNone, kFree, kChain };

// Follows the free list. Flags on it are those of a batch that was published, or of a fetch that was not
// finished: they do not count.
absl::Status WalkFreeList(PackedPartState* state, std::vector<Place>* places) {
  for (uint16_t e = state->free_head; e < state->desc_num; e = state->desc[e].next) {
    if ((*places)[e] != Place::kNone) return BadPart(fmt::format("the free list comes back to entry {}", e));
    (*places)[e] = Place::kFree;
    ++state->free_entries;
    if (state->desc[e].inflight) state->repaired.push_back(e);
  }
  return absl::OkStatus();
}

absl::Status CheckPackedChain(const PackedPartState& state, uint16_t head, std::vector<Place>* places) {
  const InflightPackedDesc& h = state.desc[head];
  if (h.num == 0 || h.num > state.desc_num) {
    return BadPart(fmt::format("the chain at entry {} has {} descriptors", head, h.num));
  }
  uint16_t e = head;
  for (uint16_t k = 1;; ++k) {
    if (e >= state.desc_num || (*places)[e] != Place::kNone) {
      return BadPart(fmt::format("the chain at entry {} leads to entry {}, which is not its own", head, e));
    }
    (*places)[e] = Place::kChain;
    const bool last = k == h.num;
    if (((state.desc[e].flags & 1) == 0) != last) {
      return BadPart(
          fmt::format("the chain at entry {} ends elsewhere than after {} descriptors", head, h.num));
    }
    if (last) break;
    e = state.desc[e].next;
  }
  if (e != h.last) {
    return BadPart(fmt::format("the chain at entry {} ends at {}, not at {}", head, e, h.last));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SplitPartState> AnalyseSplitPart(std::span<const uint8_t> copy, uint16_t ring_size,
                                                uint16_t used_idx, BatchRule rule) {
  InflightSplitHeader header;
  SplitPartState state;
  RETURN_IF_ERROR(TakePart(copy, ring_size, &header, &state.desc));
  state.version = header.version;
  state.desc_num = header.desc_num;
  const uint16_t n = header.desc_num;
  if (n == 0) return state;
  if (header.last_batch_head >= n) {
    return BadPart(fmt::format("last_batch_head {} of {}", header.last_batch_head, n));
  }
  state.last_batch_head = header.last_batch_head;
  // Completions published in the ring whose flags the back-end had no time to clear: the last batch, linked
  // from last_batch_head.
  const uint16_t published = static_cast<uint16_t>(used_idx - header.used_idx);
  if (published > ring_size) {
    return BadPart(fmt::format("used_idx {} is {} behind the ring's {}, more than its {} entries",
                               header.used_idx, published, used_idx, ring_size));
  }
  if (rule == BatchRule::kSingle && published > 1) {
    return BadPart(
        fmt::format("used_idx {} is {} behind the ring's {}, but the back-end completes one at a time",
                    header.used_idx, published, used_idx));
  }
  std::vector<bool> done(published ? n : 0);
  uint16_t entry = header.last_batch_head;
  for (uint16_t k = 0; k < published; ++k) {
    if (entry >= n)
      return BadPart(fmt::format("the list of the last batch leads to entry {} of {}", entry, n));
    if (done[entry]) return BadPart(fmt::format("the list of the last batch comes back to entry {}", entry));
    done[entry] = true;
    if (state.desc[entry].inflight) state.repaired.push_back(entry);
    entry = state.desc[entry].next;
  }
  state.heads.reserve(n);
  for (uint16_t i = 0; i < n; ++i) {
    const uint8_t flag = state.desc[i].inflight;
    if (flag == 0) continue;
    if (flag != 1) return BadFlag(flag, i);
    if (!done.empty() && done[i]) continue;
    if (i >= ring_size) return BadPart(fmt::format("entry {} is in flight in a ring of {}", i, ring_size));
    state.heads.push_back(i);
  }
  RETURN_IF_ERROR(SortHeads(state.desc, &state.heads));
  return state;
}

absl::StatusOr<PackedPartState> AnalysePackedPart(std::span<const uint8_t> copy, const MemoryView& memory,
                                                  const PackedRing& ring) {
  InflightPackedHeader header;
  PackedPartState state;
  RETURN_IF_ERROR(TakePart(copy, ring.size, &header, &state.desc));
  state.version = header.version;
  state.desc_num = header.desc_num;
  if (header.desc_num == 0) return state;
  RETURN_IF_ERROR(SettleBatch(header, memory, ring, &state));
  std::vector<Place> places(state.desc_num);
  RETURN_IF_ERROR(WalkFreeList(&state, &places));
  uint32_t in_flight = 0;
  state.heads.reserve(state.desc_num);
  for (uint16_t i = 0; i < state.desc_num; ++i) {
    const uint8_t flag = state.desc[i].inflight;
    if (flag == 0) continue;
    if (flag != 1) return BadFlag(flag, i);
    if (places[i] == Place::kFree) continue;
    RETURN_IF_ERROR(CheckPackedChain(state, i, &places));
    in_flight += state.desc[i].num;
    state.heads.push_back(i);
  }
  if (in_flight > ring.size) {
    return BadPart(fmt::format("{} descriptors are in flight in a ring of {}", in_flight, ring.size));
  }
  if (in_flight + state.free_entries != state.desc_num) {
    return BadPart(fmt::format("{} entries are in use and {} free, of {}", in_flight, state.free_entries,
                               state.desc_num));
  }
  RETURN_IF_ERROR(SortHeads(state.desc, &state.heads));
  return state;
}

absl::Status FormatPackedEntries(std::span<uint8_t> part, uint16_t desc_num) {
  if (part.size() < InflightPartBytes(RingFormat::kPacked, desc_num)) {
    return Error(absl::StatusCode::kInvalidArgument, "in-flight region: {} bytes for {} entries", part.size(),
                 desc_num);
  }
  uint8_t* at = part.data() + sizeof(InflightPackedHeader);
  for (uint16_t i = 0; i < desc_num; ++i, at += sizeof(InflightPackedDesc)) {
    InflightPackedDesc desc{};
    desc.next = static_cast<uint16_t>(i + 1);
    std::memcpy(at, &desc, sizeof desc);
  }
  return absl::OkStatus();
}

}  // namespace baton::virtio
