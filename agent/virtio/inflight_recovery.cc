#include "agent/virtio/inflight_recovery.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
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

// All entries whose flag is set and that are not left out, with their ages. As a flag may be set or not as
// the completions went, the flags are gathered into words first: a branch for each would mostly be guessed
// wrong.
template <typename Desc, typename LeftOut>
absl::Status FindHeads(std::span<const Desc> desc, LeftOut left_out, std::vector<AgedHead>* heads) {
  std::array<uint64_t, kMaxRingSize / 64> words;
  const size_t n = desc.size(), whole = n / 8 * 8;
  uint8_t flags = 0;
  size_t set = 0;
  std::fill_n(words.begin(), (n + 63) / 64, 0);
  for (size_t i = 0; i < whole; i += 8) {
    const Desc* d = &desc[i];
    uint64_t byte = 0;
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      flags |= d[k].inflight;
      byte |= uint64_t{d[k].inflight} << k;
    }
    words[i / 64] |= byte << (i % 64);
  }
  for (size_t i = whole; i < n; ++i) {
    flags |= desc[i].inflight;
    words[i / 64] |= uint64_t{desc[i].inflight} << (i % 64);
  }
  if (flags > 1) {
    const auto bad = std::find_if(desc.begin(), desc.end(), [](const Desc& d) { return d.inflight > 1; });
    return BadPart(fmt::format("flag {} of entry {} is neither 0 nor 1", bad->inflight, bad - desc.begin()));
  }
  for (size_t w = 0; w < (n + 63) / 64; ++w) set += static_cast<size_t>(std::popcount(words[w]));
  heads->resize(set);
  AgedHead* to = heads->data();
  for (size_t w = 0; w < (n + 63) / 64; ++w) {
    for (uint64_t bits = words[w]; bits != 0; bits &= bits - 1) {
      const size_t i = w * 64 + static_cast<size_t>(std::countr_zero(bits));
      *to = {desc[i].counter, static_cast<uint16_t>(i)};
      to += !left_out(i);
    }
  }
  heads->resize(static_cast<size_t>(to - heads->data()));
  return absl::OkStatus();
}

absl::Status SameCounter(const AgedHead& a, const AgedHead& b) {
  return BadPart(
      fmt::format("entries {} and {} are in flight with the same counter {}", a.entry, b.entry, a.counter));
}

// Sorts heads whose ages lie close together, all within `places` from `first`: each to its place, and then
// those that there are.
absl::Status SortDense(uint64_t first, size_t places, std::vector<AgedHead>* heads,
                       std::vector<uint16_t>* by_age) {
  // One more than the entry, so that 0 is nobody.
  by_age->assign(places, 0);
  uint16_t* place = by_age->data();
  for (const AgedHead& head : *heads) {
    uint16_t& at = place[head.counter - first];
    if (at != 0) return SameCounter({head.counter, static_cast<uint16_t>(at - 1)}, head);
    at = static_cast<uint16_t>(head.entry + 1);
  }
  AgedHead* const begin = heads->data();
  // Of the places behind the last head there is none that is taken.
  for (size_t k = 0, to = 0; to < heads->size(); ++k) {
    begin[to] = {first + k, static_cast<uint16_t>(place[k] - 1)};
    to += place[k] != 0;
  }
  return absl::OkStatus();
}

// Any others: by the digits of their ages. Comparisons cost several times as much, and the guest stands still
// meanwhile.
absl::Status SortByDigits(uint64_t first, uint64_t last, std::vector<AgedHead>* heads,
                          std::vector<AgedHead>* sorting) {
  sorting->resize(heads->size());
  for (int shift = 0; shift < 64 && (last - first) >> shift != 0; shift += 8) {
    std::array<uint32_t, 256> place{};
    auto digit = [&](const AgedHead& head) { return (head.counter - first) >> shift & 0xff; };
    for (const AgedHead& head : *heads) ++place[digit(head)];
    std::exclusive_scan(place.begin(), place.end(), place.begin(), 0u);
    AgedHead* to = sorting->data();
    for (const AgedHead& head : *heads) to[place[digit(head)]++] = head;
    heads->swap(*sorting);
  }
  for (size_t k = 1; k < heads->size(); ++k) {
    const AgedHead &older = (*heads)[k - 1], &younger = (*heads)[k];
    if (older.counter >= younger.counter) return SameCounter(older, younger);
  }
  return absl::OkStatus();
}

// Sorts the heads, oldest first. Two of the same age have no order, and an age after which no other can come
// is none.
template <typename State>
absl::Status SortHeads(State* state) {
  std::vector<AgedHead>& heads = state->heads;
  if (heads.empty()) return absl::OkStatus();
  uint64_t first = std::numeric_limits<uint64_t>::max(), last = 0;
  for (const AgedHead& head : heads) {
    first = std::min(first, head.counter);
    last = std::max(last, head.counter);
  }
  // What a ring has in flight is mostly near each other; but one request may be stuck while others come and
  // go.
  RETURN_IF_ERROR(last - first < 8 * heads.size() ? SortDense(first, last - first + 1, &heads, &state->by_age)
                                                  : SortByDigits(first, last, &heads, &state->sorting));
  if (last == std::numeric_limits<uint64_t>::max())
    return BadPart(fmt::format("the counter of entry {} is at its end", heads.back().entry));
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

// An entry of the free list, or of a chain.
constexpr uint8_t kTaken = 1;

// Asks for memory piece by piece. All at once they would only wait for each other: a processor has few places
// for what is on its way, and the analysis has misses of its own.
class Ahead {
 public:
  explicit Ahead(const uint8_t* at) : at_(at) {}
  void AskForMore() {
    if (!at_) return;
    __builtin_prefetch(at_);
    at_ += sizeof(InflightPackedDesc);
  }

 private:
  const uint8_t* at_;
};

// Follows the free list. Flags on it are those of a batch that was published, or of a fetch that was not
// finished: they do not count.
absl::Status WalkFreeList(PackedPartState* state, Ahead* ahead) {
  for (uint16_t e = state->free_head; e < state->desc_num; e = state->desc[e].next) {
    if (state->taken[e] == kTaken) return BadPart(fmt::format("the free list comes back to entry {}", e));
    state->taken[e] = kTaken;
    ++state->free_entries;
    ahead->AskForMore();
    if (state->desc[e].inflight) state->repaired.push_back(e);
  }
  return absl::OkStatus();
}

// The descriptor of an entry, as it was in the ring: the same 16 bytes, in another order.
void CopyDesc(const InflightPackedDesc& from, PackedDesc* to) {
  typedef uint32_t Words __attribute__((vector_size(16)));
  static_assert(offsetof(PackedDesc, len) == 8 && offsetof(PackedDesc, id) == 12 &&
                offsetof(PackedDesc, flags) == 14 && offsetof(InflightPackedDesc, flags) == 18);
  Words words;
  std::memcpy(&words, &from.id, sizeof words);
  words = __builtin_shufflevector(words, words, 2, 3, 1, 0);
  std::memcpy(static_cast<void*>(to), &words, sizeof words);
}

// What is wrong with the chain at `head`, which came to entry `e`.
absl::Status BadChain(const PackedPartState& state, uint16_t head, uint16_t e) {
  const InflightPackedDesc& h = state.desc[head];
  if (h.num == 0 || h.num > state.desc_num)
    return BadPart(fmt::format("the chain at entry {} has {} descriptors", head, h.num));
  if (e >= state.desc_num || state.taken[e] == kTaken) {
    return BadPart(fmt::format("the chain at entry {} leads to entry {}, which is not its own", head, e));
  }
  return BadPart(fmt::format("the chain at entry {} ends elsewhere than after {} descriptors", head, h.num));
}

// Follows the chains of all heads, whose entries must be their own, and takes their descriptors.
absl::Status TakeChains(const MemoryView& memory, Ahead ahead, PackedPartState* state) {
  // Room for all entries that are not free; as no entry is taken twice, the chains cannot have more.
  const size_t in_use = state->desc_num - state->free_entries;
  if (state->room.size() < in_use) state->chain_space.resize(in_use);
  state->chains = (state->room.size() < in_use ? std::span(state->chain_space) : state->room).first(in_use);
  // Whoever reads the chains looks at what they begin with next. That is in the cache of another processor,
  // and comes while the rest is followed.
  PieceCache<1> first_bytes(memory);
  const InflightPackedDesc* const desc = state->desc.data();
  const uint16_t n = state->desc_num;
  uint8_t* const taken = state->taken.data();
  PackedDesc* to = state->chains.data();
  for (const AgedHead& head : state->heads) {
    uint32_t e = head.entry, left = desc[e].num;
    if (left == 0 || left > n) return BadChain(*state, head.entry, head.entry);
    if (const uint8_t* first = first_bytes.At(desc[e].addr)) __builtin_prefetch(first);
    for (;;) {
      if (e >= n || taken[e] == kTaken) return BadChain(*state, head.entry, static_cast<uint16_t>(e));
      const InflightPackedDesc& d = desc[e];
      const bool ends = --left == 0;
      ahead.AskForMore();
      if (!(d.flags & kDescNext)) {
        if (!ends) return BadChain(*state, head.entry, static_cast<uint16_t>(e));
        taken[e] = kTaken;
        CopyDesc(d, to++);
        break;
      }
      if (ends) return BadChain(*state, head.entry, static_cast<uint16_t>(e));
      taken[e] = kTaken;
      CopyDesc(d, to++);
      e = d.next;
    }
    if (e != desc[head.entry].last) {
      return BadPart(
          fmt::format("the chain at entry {} ends at {}, not at {}", head.entry, e, desc[head.entry].last));
    }
  }
  const auto in_flight = static_cast<size_t>(to - state->chains.data());
  if (in_flight == state->chains.size()) return absl::OkStatus();
  return BadPart(fmt::format("{} entries are in use and {} free, of {}", in_flight, state->free_entries, n));
}

}  // namespace

absl::Status AnalyseSplitPart(std::span<const uint8_t> copy, uint16_t ring_size, uint16_t used_idx,
                              BatchRule rule, SplitPartState* state) {
  InflightSplitHeader header;
  state->desc = {};
  state->last_batch_head = 0;
  state->repaired.clear();
  RETURN_IF_ERROR(TakePart(copy, ring_size, &header, &state->desc));
  state->version = header.version;
  state->desc_num = header.desc_num;
  const uint16_t n = header.desc_num;
  if (n == 0) {
    state->heads.clear();
    return absl::OkStatus();
  }
  if (header.last_batch_head >= n) {
    return BadPart(fmt::format("last_batch_head {} of {}", header.last_batch_head, n));
  }
  state->last_batch_head = header.last_batch_head;
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
  std::vector<uint8_t>& done = state->done;
  if (published) done.assign(n, 0);
  uint16_t entry = header.last_batch_head;
  for (uint16_t k = 0; k < published; ++k) {
    if (entry >= n)
      return BadPart(fmt::format("the list of the last batch leads to entry {} of {}", entry, n));
    if (done[entry]) return BadPart(fmt::format("the list of the last batch comes back to entry {}", entry));
    done[entry] = 1;
    if (state->desc[entry].inflight) state->repaired.push_back(entry);
    entry = state->desc[entry].next;
  }
  RETURN_IF_ERROR(published ? FindHeads(
                                  state->desc, [&](size_t i) { return done[i] != 0; }, &state->heads)
                            : FindHeads(
                                  state->desc, [](size_t) { return false; }, &state->heads));
  if (!state->heads.empty() && state->heads.back().entry >= ring_size) {
    return BadPart(
        fmt::format("entry {} is in flight in a ring of {}", state->heads.back().entry, ring_size));
  }
  return SortHeads(state);
}

absl::Status AnalysePackedPart(std::span<const uint8_t> copy, const MemoryView& memory,
                               const PackedRing& ring, PackedPartState* state) {
  InflightPackedHeader header;
  state->desc = {};
  state->commit = false;
  state->free_head = 0;
  state->used = {};
  state->free_entries = 0;
  state->repaired.clear();
  RETURN_IF_ERROR(TakePart(copy, ring.size, &header, &state->desc));
  state->version = header.version;
  state->desc_num = header.desc_num;
  if (header.desc_num == 0) {
    state->heads.clear();
    state->chains = {};
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(SettleBatch(header, memory, ring, state));
  state->taken.assign(state->desc_num, 0);
  Ahead ahead(state->ahead);
  RETURN_IF_ERROR(WalkFreeList(state, &ahead));
  RETURN_IF_ERROR(FindHeads(
      state->desc, [&](size_t i) { return state->taken[i] == kTaken; }, &state->heads));
  RETURN_IF_ERROR(SortHeads(state));
  RETURN_IF_ERROR(TakeChains(memory, ahead, state));
  if (state->chains.size() > ring.size) {
    return BadPart(
        fmt::format("{} descriptors are in flight in a ring of {}", state->chains.size(), ring.size));
  }
  return absl::OkStatus();
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
