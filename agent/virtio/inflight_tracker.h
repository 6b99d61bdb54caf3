// The writer of one queue's part of an in-flight region: a device tells it what it fetches and completes, so
// that whoever opens the part after it was killed at any instruction finds exactly the requests that the
// guest has not seen completed. Split and packed rings; batches; IN_ORDER (name every request that the batch
// completes, not only the one that the used element names).
//
//   InflightTracker<> tracker;
//   RETURN_IF_ERROR(tracker.Attach(RingFormat::kSplit, part, ring_size));
//   ASSIGN_OR_RETURN(InflightSet again, tracker.RecoverSplit(used_idx));  // submit these first
//   ...
//   RETURN_IF_ERROR(tracker.OnFetch(chain));  // before the request has any effect
//   ...
//   RETURN_IF_ERROR(tracker.BeforePublish(queue.staged()));
//   queue.Publish();         // exactly this batch, visible by one store
//   tracker.AfterPublish();  // before the guest is notified, and before the next fetch
//
// Survives the death of the process (the memory is shared), not of the host. One thread serves a queue; the
// part must stay mapped while the tracker lives, and nobody else may write it meanwhile.
//
// The stores and their order are those of vhost-user.rst with one addition. There, the used position of a
// packed ring (index, wrap counter) and its older copy are stored one after the other, and a death in between
// leaves the index of one lap with the wrap counter of another. The four lie in one aligned 64-bit word, and
// are stored at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "agent/virtio/chain.h"
#include "agent/virtio/completion_queue.h"
#include "agent/virtio/inflight.h"
#include "agent/virtio/inflight_layout.h"
#include "agent/virtio/inflight_recovery.h"
#include "common/status.h"

namespace baton::virtio {

// What a tracker has just stored: crash points, in the order of their stores.
enum class TrackerStep : uint8_t {
  kCounter,       // fetch: the order of the request
  kInflight,      // fetch: its flag (packed: still revoked by old_free_head)
  kEntry,         // fetch, packed: one descriptor saved
  kFreeHead,      // fetch, packed: free_head moved on
  kFetched,       // fetch, packed: old_free_head moved on, the request counts
  kLinked,        // complete: entry linked into the batch or the free list
  kBatchHead,     // complete: it heads the list
  kUsedPosition,  // complete, packed: the used position of the batch
  kCleared,       // published: one flag cleared
  kOldFreeHead,   // published, packed
  kSettled,       // published: used_idx, or old used position; nothing is under way
  kRecovering,    // any store of Recover or of initialising
};

// The hook of a device that is not being tested. A test's hook is called after each single store, and may
// leave the tracker there for good (throw, or kill the process).
struct NoTrackerHook {
  void operator()(TrackerStep) const {}
};

template <typename Hook = NoTrackerHook>
class InflightTracker {
 public:
  explicit InflightTracker(Hook hook = {}) : hook_(std::move(hook)) {}

  // Begins to use `part`. `single_completions` (InflightTraits): a batch of more than one is refused, because
  // a successor of that kind would not understand it. InvalidArgument when the part is too small or not
  // aligned to 8. Call RecoverSplit or RecoverPacked next.
  absl::Status Attach(RingFormat format, std::span<uint8_t> part, uint16_t ring_size,
                      bool single_completions = false);
  void Detach() { part_ = {}; }
  bool attached() const { return !part_.empty(); }

  // Repairs the part and says what to submit again, oldest first, before anything new is fetched; fetching
  // goes on at the set's `avail`. A part with version 0 is initialised for `ring_size` entries: nothing in
  // flight, used position as given. May be called again after a death within it. INFLIGHT_UNKNOWN as
  // ReadInflight*, and nothing is changed.
  absl::StatusOr<InflightSet> RecoverSplit(uint16_t used_idx);
  absl::StatusOr<InflightSet> RecoverPacked(const MemoryView& memory, const PackedRing& ring,
                                            PackedPosition used_if_fresh);

  // A request was taken from the ring: `id` is the head (split) or the buffer id (packed), `descs` its
  // descriptors in ring order (packed only). FailedPrecondition when the id is out of range or already in
  // flight: the driver is at fault, the request must not be served.
  absl::Status OnFetch(uint16_t id, std::span<const InflightDesc> descs = {});

  absl::Status OnFetch(const Chain& chain) { return OnFetch(chain.id, chain.descriptors); }

  // The requests `ids` will be published next, together. FailedPrecondition (nothing is stored) when one is
  // not in flight or named twice, or a batch is under way.
  absl::Status BeforePublish(std::span<const uint16_t> ids) {
    return Begin(ids.size(), [ids](size_t i) { return ids[i]; });
  }
  // What a queue has staged.
  absl::Status BeforePublish(std::span<const Completion> staged) {
    return Begin(staged.size(), [staged](size_t i) { return staged[i].id; });
  }

  // The guest can see them. Must follow the publishing before anything else is fetched.
  void AfterPublish();

  uint16_t in_flight() const { return in_flight_; }

 private:
  static constexpr uint16_t kNone = std::numeric_limits<uint16_t>::max();

  // The aligned word of a packed header at offset 16.
  struct Positions {
    uint16_t used_idx, old_used_idx;
    uint8_t used_wrap, old_used_wrap, padding[2];
  };
  static_assert(sizeof(Positions) == 8);

  InflightSplitHeader& split() { return *reinterpret_cast<InflightSplitHeader*>(part_.data()); }
  InflightSplitDesc& split_desc(uint16_t i) {
    return reinterpret_cast<InflightSplitDesc*>(part_.data() + sizeof(InflightSplitHeader))[i];
  }
  InflightPackedHeader& packed() { return *reinterpret_cast<InflightPackedHeader*>(part_.data()); }
  InflightPackedDesc& packed_desc(uint16_t i) {
    return reinterpret_cast<InflightPackedDesc*>(part_.data() + sizeof(InflightPackedHeader))[i];
  }
  // One store, visible to other processes in program order: compilers and processors keep releases in order.
  template <typename T>
  void Store(T& field, T value, TrackerStep step) {
    std::atomic_ref<T>(field).store(value, std::memory_order_release);
    hook_(step);
  }
  void StorePositions(PackedPosition used, PackedPosition old, TrackerStep step) {
    const Positions p{used.idx, old.idx, used.wrap, old.wrap, {}};
    uint64_t word;
    std::memcpy(&word, &p, sizeof word);
    std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(part_.data() + 16))
        .store(word, std::memory_order_release);
    hook_(step);
  }
  absl::Status Refuse(const char* what, uint16_t id) const {
    return Error(absl::StatusCode::kFailedPrecondition, "in-flight tracker: request {} {}", id, what);
  }
  absl::Status FetchSplit(uint16_t id);
  absl::Status FetchPacked(uint16_t id, std::span<const InflightDesc> descs);
  template <typename IdAt>
  absl::Status Begin(size_t count, const IdAt& id_at);
  void Forget();
  void Expect(uint16_t desc_num);

  Hook hook_;
  RingFormat format_ = RingFormat::kSplit;
  std::span<uint8_t> part_;
  uint16_t ring_size_ = 0;
  bool single_ = false;
  uint16_t desc_num_ = 0;
  uint64_t counter_ = 1;
  uint16_t in_flight_ = 0;
  // This process's view; the part is only written, because a peer could have changed it.
  // By id: kNone, or the entry that tracks it (split: the id itself).
  std::vector<uint16_t> entry_of_;
  // Between BeforePublish and AfterPublish: its entries.
  std::vector<uint16_t> batch_;
  // Split.
  uint16_t used_idx_ = 0, batch_head_ = 0;
  // Packed.
  PackedPosition used_;
  uint16_t free_head_ = 0, free_entries_ = 0;
  std::vector<uint16_t> next_, last_, num_;  // by entry
};

// --- implementation ---

template <typename Hook>
absl::Status InflightTracker<Hook>::Attach(RingFormat format, std::span<uint8_t> part, uint16_t ring_size,
                                           bool single_completions) {
  if (ring_size == 0 || ring_size > kMaxRingSize || part.size() < InflightPartBytes(format, ring_size) ||
      reinterpret_cast<uintptr_t>(part.data()) % alignof(uint64_t)) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "in-flight tracker: a part of {} bytes cannot serve a ring of {}", part.size(), ring_size);
  }
  format_ = format;
  part_ = part;
  ring_size_ = ring_size;
  single_ = single_completions;
  Forget();
  return absl::OkStatus();
}

template <typename Hook>
void InflightTracker<Hook>::Forget() {
  desc_num_ = in_flight_ = 0;
  counter_ = 1;
  entry_of_.clear();
  batch_.clear();
}

template <typename Hook>
void InflightTracker<Hook>::Expect(uint16_t desc_num) {
  desc_num_ = desc_num;
  entry_of_.assign(desc_num, kNone);
  batch_.reserve(desc_num);
}

template <typename Hook>
absl::StatusOr<InflightSet> InflightTracker<Hook>::RecoverSplit(uint16_t used_idx) {
  const BatchRule rule = single_ ? BatchRule::kSingle : BatchRule::kLinked;
  const std::vector<uint8_t> copy(part_.begin(), part_.end());
  SplitPartState state;
  RETURN_IF_ERROR(AnalyseSplitPart(copy, ring_size_, used_idx, rule, &state));
  Forget();
  InflightSplitHeader& header = split();
  if (state.desc_num == 0) {
    // The version comes last: until then a successor begins anew.
    Store(header.version, uint16_t{0}, TrackerStep::kRecovering);
    for (uint16_t i = 0; i < ring_size_; ++i) split_desc(i) = {};
    header.features = 0;
    Store(header.last_batch_head, uint16_t{0}, TrackerStep::kRecovering);
    Store(header.desc_num, ring_size_, TrackerStep::kRecovering);
    Store(header.used_idx, used_idx, TrackerStep::kRecovering);
    Store(header.version, kInflightVersion, TrackerStep::kRecovering);
    Expect(ring_size_);
  } else {
    Expect(state.desc_num);
    for (uint16_t entry : state.repaired) {
      Store(split_desc(entry).inflight, uint8_t{0}, TrackerStep::kRecovering);
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);
    Store(header.used_idx, used_idx, TrackerStep::kRecovering);
  }
  for (const AgedHead& head : state.heads) entry_of_[head.entry] = head.entry;
  in_flight_ = static_cast<uint16_t>(state.heads.size());
  if (in_flight_) counter_ = state.heads.back().counter + 1;
  used_idx_ = used_idx;
  batch_head_ = state.last_batch_head;
  InflightSet set;
  FillSet(state, used_idx, &set);
  return set;
}

template <typename Hook>
absl::StatusOr<InflightSet> InflightTracker<Hook>::RecoverPacked(const MemoryView& memory,
                                                                 const PackedRing& ring,
                                                                 PackedPosition used_if_fresh) {
  if (ring.size != ring_size_ || used_if_fresh.idx >= ring_size_) {
    return Error(absl::StatusCode::kInvalidArgument, "in-flight tracker: position {} of a ring of {}",
                 used_if_fresh.idx, ring_size_);
  }
  std::vector<uint8_t> copy(part_.begin(), part_.end());
  PackedPartState state;
  RETURN_IF_ERROR(AnalysePackedPart(copy, memory, ring, &state));
  Forget();
  InflightPackedHeader& header = packed();
  if (state.desc_num == 0) {
    Store(header.version, uint16_t{0}, TrackerStep::kRecovering);
    RETURN_IF_ERROR(FormatPackedEntries(part_, ring_size_));
    Store(header.free_head, uint16_t{0}, TrackerStep::kRecovering);
    Store(header.old_free_head, uint16_t{0}, TrackerStep::kRecovering);
    StorePositions(used_if_fresh, used_if_fresh, TrackerStep::kRecovering);
    Store(header.desc_num, ring_size_, TrackerStep::kRecovering);
    Store(header.version, kInflightVersion, TrackerStep::kRecovering);
    copy.assign(part_.begin(), part_.end());
    RETURN_IF_ERROR(AnalysePackedPart(copy, memory, ring, &state));
  } else {
    // Each store leaves a state from which the same is concluded again: old_free_head counts once the
    // positions agree, so it comes before them, and free_head, which does not count then, after them.
    for (uint16_t entry : state.repaired) {
      Store(packed_desc(entry).inflight, uint8_t{0}, TrackerStep::kRecovering);
    }
    if (state.commit) Store(header.old_free_head, state.free_head, TrackerStep::kRecovering);
    StorePositions(state.used, state.used, TrackerStep::kRecovering);
    Store(header.free_head, state.free_head, TrackerStep::kRecovering);
  }
  Expect(state.desc_num);
  used_ = state.used;
  free_head_ = state.free_head;
  free_entries_ = state.free_entries;
  next_.resize(desc_num_);
  last_.resize(desc_num_);
  num_.resize(desc_num_);
  for (uint16_t i = 0; i < desc_num_; ++i) {
    next_[i] = state.desc[i].next;
    last_[i] = state.desc[i].last;
    num_[i] = state.desc[i].num;
  }
  for (const AgedHead& head : state.heads) {
    const uint16_t id = state.desc[state.desc[head.entry].last].id;
    if (id >= entry_of_.size()) entry_of_.resize(id + size_t{1}, kNone);
    entry_of_[id] = head.entry;
  }
  in_flight_ = static_cast<uint16_t>(state.heads.size());
  if (in_flight_) counter_ = state.heads.back().counter + 1;
  InflightSet set;
  FillSet(state, ring_size_, &set);
  return set;
}

template <typename Hook>
absl::Status InflightTracker<Hook>::OnFetch(uint16_t id, std::span<const InflightDesc> descs) {
  if (id >= entry_of_.size()) {
    // Of a split ring the id is an index; of a packed one it may be any 16 bits.
    if (format_ == RingFormat::kSplit || !desc_num_) return Refuse("is beyond the ring", id);
    entry_of_.resize(id + size_t{1}, kNone);
  }
  if (entry_of_[id] != kNone) return Refuse("is in flight already", id);
  if (!batch_.empty()) return Refuse("was fetched while a batch was being published", id);
  return format_ == RingFormat::kSplit ? FetchSplit(id) : FetchPacked(id, descs);
}

template <typename Hook>
absl::Status InflightTracker<Hook>::FetchSplit(uint16_t id) {
  InflightSplitDesc& desc = split_desc(id);
  Store(desc.counter, counter_++, TrackerStep::kCounter);
  Store(desc.inflight, uint8_t{1}, TrackerStep::kInflight);
  entry_of_[id] = id;
  ++in_flight_;
  return absl::OkStatus();
}

template <typename Hook>
absl::Status InflightTracker<Hook>::FetchPacked(uint16_t id, std::span<const InflightDesc> descs) {
  if (descs.empty() || descs.size() > free_entries_) return Refuse("has more descriptors than are left", id);
  if (descs.back().id != id) return Refuse("does not bear its id in its last descriptor", id);
  const uint16_t head = free_head_;
  InflightPackedDesc& h = packed_desc(head);
  Store(h.num, uint16_t{0}, TrackerStep::kEntry);
  Store(h.counter, counter_++, TrackerStep::kCounter);
  Store(h.inflight, uint8_t{1}, TrackerStep::kInflight);
  num_[head] = 0;
  for (const InflightDesc& d : descs) {
    const uint16_t at = free_head_;
    if (&d == &descs.back()) {
      Store(h.last, at, TrackerStep::kEntry);
      last_[head] = at;
    }
    Store(h.num, ++num_[head], TrackerStep::kEntry);
    InflightPackedDesc& entry = packed_desc(at);
    Store(entry.addr, d.addr, TrackerStep::kEntry);
    Store(entry.len, d.len, TrackerStep::kEntry);
    Store(entry.flags, d.flags, TrackerStep::kEntry);
    Store(entry.id, d.id, TrackerStep::kEntry);
    free_head_ = next_[at];
    Store(packed().free_head, free_head_, TrackerStep::kFreeHead);
  }
  Store(packed().old_free_head, free_head_, TrackerStep::kFetched);
  free_entries_ = static_cast<uint16_t>(free_entries_ - descs.size());
  entry_of_[id] = head;
  ++in_flight_;
  return absl::OkStatus();
}

template <typename Hook>
template <typename IdAt>
absl::Status InflightTracker<Hook>::Begin(size_t count, const IdAt& id_at) {
  if (count == 0) return absl::OkStatus();
  if (!batch_.empty()) return Refuse("is to be published while another batch is", id_at(0));
  if (single_ && count > 1) return Refuse("must be published by itself", id_at(0));
  for (size_t i = 0; i < count; ++i) {
    const uint16_t id = id_at(i);
    const uint16_t entry = id < entry_of_.size() ? entry_of_[id] : kNone;
    if (entry == kNone) {
      for (size_t k = 0; k < i; ++k) entry_of_[id_at(k)] = batch_[k];
      batch_.clear();
      return Refuse("is not in flight", id);
    }
    batch_.push_back(entry);
    entry_of_[id] = kNone;
  }
  if (format_ == RingFormat::kSplit) {
    for (uint16_t head : batch_) {
      Store(split_desc(head).next, batch_head_, TrackerStep::kLinked);
      Store(split().last_batch_head, head, TrackerStep::kBatchHead);
      batch_head_ = head;
    }
    return absl::OkStatus();
  }
  PackedPosition next = used_;
  for (uint16_t head : batch_) {
    Store(packed_desc(last_[head]).next, free_head_, TrackerStep::kLinked);
    next_[last_[head]] = free_head_;
    Store(packed().free_head, head, TrackerStep::kBatchHead);
    free_head_ = head;
    next = Advance(next, num_[head], ring_size_);
  }
  StorePositions(next, used_, TrackerStep::kUsedPosition);
  used_ = next;
  return absl::OkStatus();
}

template <typename Hook>
void InflightTracker<Hook>::AfterPublish() {
  if (batch_.empty()) return;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (uint16_t entry : batch_) {
    uint8_t& flag = format_ == RingFormat::kSplit ? split_desc(entry).inflight : packed_desc(entry).inflight;
    Store(flag, uint8_t{0}, TrackerStep::kCleared);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (format_ == RingFormat::kSplit) {
    used_idx_ = static_cast<uint16_t>(used_idx_ + batch_.size());
    Store(split().used_idx, used_idx_, TrackerStep::kSettled);
  } else {
    for (uint16_t entry : batch_) free_entries_ = static_cast<uint16_t>(free_entries_ + num_[entry]);
    // Before the positions: once these agree, a recovery takes old_free_head for the truth.
    Store(packed().old_free_head, free_head_, TrackerStep::kOldFreeHead);
    StorePositions(used_, used_, TrackerStep::kSettled);
  }
  in_flight_ = static_cast<uint16_t>(in_flight_ - batch_.size());
  batch_.clear();
}

}  // namespace baton::virtio
