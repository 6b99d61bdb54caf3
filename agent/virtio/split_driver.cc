#include "agent/virtio/split_driver.h"

#include "agent/virtio/split_ring.h"

namespace baton::virtio {

SplitDriver::SplitDriver(const QueueLayout& layout, const QueueOptions& options, const IndirectArea& indirect)
    : layout_(layout), options_(options), indirect_(indirect), requests_(layout.size), next_(layout.size) {
  if (!options.Has(kFIndirectDesc)) indirect_.entries = 0;
}

absl::Status SplitDriver::Map(const GuestMemory& memory) {
  const uint32_t n = layout_.size;
  memory_ = &memory;
  desc_ = memory.At(layout_.desc, SplitDescBytes(n));
  avail_ = memory.At(layout_.driver, SplitAvailBytes(n));
  used_ring_ = memory.At(layout_.device, SplitUsedBytes(n));
  if (desc_ && avail_ && used_ring_) return absl::OkStatus();
  return Error(absl::StatusCode::kOutOfRange,
               "a split ring of {} at {:#x}, {:#x}, {:#x} is not in one piece of guest memory each", n,
               layout_.desc, layout_.driver, layout_.device);
}

absl::StatusOr<SplitDriver> SplitDriver::Create(const GuestMemory& memory, const QueueLayout& layout,
                                                const QueueOptions& options, const IndirectArea& indirect) {
  RETURN_IF_ERROR(CheckSplitGeometry({layout.size, layout.desc, layout.driver, layout.device}));
  SplitDriver out(layout, options, indirect);
  RETURN_IF_ERROR(out.Map(memory));
  const uint16_t n = layout.size;
  std::memset(out.desc_, 0, SplitDescBytes(n));
  std::memset(out.avail_, 0, SplitAvailBytes(n));
  std::memset(memory.At(layout.device, SplitUsedBytes(n)), 0, SplitUsedBytes(n));
  for (uint32_t i = 0; i < n; ++i) out.next_[i] = static_cast<uint16_t>((i + 1) % n);
  out.free_tail_ = static_cast<uint16_t>(n - 1);
  out.free_count_ = n;
  return out;
}

std::vector<uint8_t> SplitDriver::Save() const {
  DriverState state;
  state.Put(layout_.size);
  state.Put(requests_);
  state.Put(next_);
  for (uint16_t value :
       {free_head_, free_tail_, free_count_, next_avail_, published_, kicked_, next_used_, used_seen_}) {
    state.Put(value);
  }
  for (bool value : {in_order_seen_, no_interrupt_, order_changed_, order_.acked()}) state.Put(value);
  return state.Take();
}

absl::StatusOr<SplitDriver> SplitDriver::Restore(const GuestMemory& memory, const QueueLayout& layout,
                                                 const QueueOptions& options, const IndirectArea& indirect,
                                                 std::span<const uint8_t> saved) {
  RETURN_IF_ERROR(CheckSplitGeometry({layout.size, layout.desc, layout.driver, layout.device}));
  SplitDriver out(layout, options, indirect);
  RETURN_IF_ERROR(out.Map(memory));
  DriverState state(saved);
  uint16_t size = 0;
  bool acked = false;
  bool ok = state.Get(&size) && size == layout.size && state.Get(&out.requests_) && state.Get(&out.next_);
  for (uint16_t* value : {&out.free_head_, &out.free_tail_, &out.free_count_, &out.next_avail_,
                          &out.published_, &out.kicked_, &out.next_used_, &out.used_seen_}) {
    ok = ok && state.Get(value);
  }
  for (bool* value : {&out.in_order_seen_, &out.no_interrupt_, &out.order_changed_, &acked}) {
    ok = ok && state.Get(value);
  }
  if (!ok || !state.AtEnd() || !out.Consistent())
    return Error(absl::StatusCode::kInvalidArgument, "the saved state is not of this split driver");
  out.order_ = SplitOrderDriver(acked);
  return out;
}

bool SplitDriver::Consistent() const {
  const uint16_t n = layout_.size;
  std::vector<bool> outstanding;
  uint32_t slots = 0;
  if (!requests_.Consistent(&outstanding, &slots) || free_count_ > n || slots + free_count_ != n)
    return false;
  auto diff = [](uint16_t a, uint16_t b) { return static_cast<uint16_t>(a - b); };
  if (diff(next_avail_, next_used_) != requests_.outstanding() ||
      diff(published_, next_used_) != requests_.visible_outstanding() ||
      diff(used_seen_, next_used_) > requests_.visible_outstanding()) {
    return false;
  }
  // Every descriptor is in one chain or in the free list.
  std::vector<bool> seen(n, false);
  auto walk = [&](uint16_t first, uint32_t count, uint16_t last) {
    uint16_t index = first;
    for (uint32_t k = 0; k < count; ++k) {
      if (index >= n || seen[index]) return false;
      seen[index] = true;
      if (k + 1 == count) return index == last;
      index = next_[index];
    }
    return true;
  };
  if (!walk(free_head_, free_count_, free_tail_)) return false;
  for (uint32_t head = 0; head < n; ++head) {
    const auto id = static_cast<uint16_t>(head);
    if (outstanding[head] && !walk(id, requests_.SlotsOf(id), requests_.LastOf(id))) return false;
  }
  return true;
}

absl::StatusOr<uint16_t> SplitDriver::Add(std::span<const Segment> readable,
                                          std::span<const Segment> writable, uint64_t token) {
  RETURN_IF_ERROR(broken_);
  RETURN_IF_ERROR(CheckAdd(readable, writable));
  const size_t count = readable.size() + writable.size();
  const uint16_t head = free_head_;
  uint16_t last = head;
  uint16_t slots = 1;
  uint64_t table = 0;
  if (free_count_ && WriteIndirect<SplitDesc>(*memory_, indirect_, head, readable, writable, &table)) {
    const SplitDesc desc{table, static_cast<uint32_t>(16 * count), kDescIndirect, 0};
    std::memcpy(desc_ + size_t{16} * head, &desc, sizeof desc);
  } else {
    if (count > free_count_) {
      return Error(absl::StatusCode::kResourceExhausted, "{} descriptors needed, {} free", count,
                   free_count_);
    }
    slots = static_cast<uint16_t>(count);
    uint16_t index = head;
    for (size_t i = 0; i < count; ++i) {
      const bool writes = i >= readable.size();
      const Segment& segment = writes ? writable[i - readable.size()] : readable[i];
      SplitDesc desc{segment.gpa, segment.len, writes ? kDescWrite : uint16_t{0}, 0};
      if (i + 1 < count) {
        desc.flags |= kDescNext;
        desc.next = next_[index];
      }
      std::memcpy(desc_ + size_t{16} * index, &desc, sizeof desc);
      last = index;
      index = next_[index];
    }
  }
  free_head_ = next_[last];
  free_count_ = static_cast<uint16_t>(free_count_ - slots);
  Store<uint16_t>(avail_ + kRingEntries + size_t{2} * (next_avail_ & (layout_.size - 1)), head);
  ++next_avail_;
  requests_.Begin(head, token, static_cast<uint32_t>(TotalBytes(writable)), slots, last);
  return head;
}

void SplitDriver::Publish() {
  if (published_ == next_avail_) return;
  published_ = next_avail_;
  StoreRelease<uint16_t>(avail_ + kRingIdx, published_);
  requests_.Published();
}

bool SplitDriver::NeedsKick() {
  const uint16_t old = kicked_;
  const bool order_changed = order_changed_;
  kicked_ = published_;
  order_changed_ = false;
  if (order_changed) return true;
  if (old == published_) return false;
  FullFence();
  if (event_idx()) {
    const auto event = LoadAcquire<uint16_t>(used_ring_ + kRingEntries + size_t{8} * layout_.size);
    return PassedEvent(event, published_, old);
  }
  return !(LoadAcquire<uint16_t>(used_ring_ + kRingFlags) & kUsedNoNotify);
}

absl::Status SplitDriver::ReadUsed() {
  in_order_seen_ = (LoadAcquire<uint16_t>(used_ring_ + kRingFlags) & kUsedInOrder) != 0;
  const auto used = LoadAcquire<uint16_t>(used_ring_ + kRingIdx);
  const auto returned = static_cast<uint16_t>(used - next_used_);
  if (returned > requests_.visible_outstanding()) {
    return Mismatch(fmt::format("used->idx {} is {} entries after {}, but {} buffers are available", used,
                                returned, next_used_, requests_.visible_outstanding()));
  }
  used_seen_ = used;
  return absl::OkStatus();
}

absl::StatusOr<bool> SplitDriver::TakeUsed(UsedBuffer* out) {
  RETURN_IF_ERROR(broken_);
  const bool partial = options_.Has(kFPartialOrder);
  if (!requests_.claimed()) {
    if (next_used_ == used_seen_) {
      if (broken_ = ReadUsed(); !broken_.ok()) return broken_;
      if (next_used_ == used_seen_) {
        if (partial) FollowOrder();
        return false;
      }
    }
    const uint8_t* element = used_ring_ + kRingEntries + size_t{8} * (next_used_ & (layout_.size - 1));
    const bool in_order = partial ? order_.batches() : options_.Has(kFInOrder);
    broken_ = requests_.Claim(Load<uint32_t>(element), Load<uint32_t>(element + 4), in_order,
                              static_cast<uint16_t>(used_seen_ - next_used_));
    RETURN_IF_ERROR(broken_);
  }
  uint16_t slots = 0;
  uint16_t last = 0;
  requests_.Take(out, &slots, &last);
  ++next_used_;
  if (free_count_ == 0) {
    free_head_ = out->id;
  } else {
    next_[free_tail_] = out->id;
  }
  free_tail_ = last;
  free_count_ = static_cast<uint16_t>(free_count_ + slots);
  if (partial && next_used_ == used_seen_) FollowOrder();
  return true;
}

void SplitDriver::FollowOrder() {
  if (!order_.Follow(in_order_seen_)) return;
  order_changed_ = true;
  StoreFlags();
}

void SplitDriver::StoreFlags() {
  uint16_t flags = no_interrupt_ ? kAvailNoInterrupt : 0;
  if (order_.acked()) flags |= kAvailInOrderAck;
  StoreRelease<uint16_t>(avail_ + kRingFlags, flags);
}

absl::StatusOr<bool> SplitDriver::EnableCalls() {
  RETURN_IF_ERROR(broken_);
  no_interrupt_ = false;
  StoreFlags();
  if (event_idx()) {
    Store<uint16_t>(avail_ + kRingEntries + size_t{2} * layout_.size, next_used_);
  }
  FullFence();
  if (requests_.claimed() || next_used_ != used_seen_) return true;
  if (broken_ = ReadUsed(); !broken_.ok()) return broken_;
  return next_used_ != used_seen_;
}

void SplitDriver::DisableCalls() {
  // With EVENT_IDX the flag must stay 0 (VIRTIO 2.7.7.1), and an event that is not moved on suppresses.
  if (event_idx() || no_interrupt_) return;
  no_interrupt_ = true;
  StoreFlags();
}

}  // namespace baton::virtio
