#include "agent/virtio/split_device.h"

#include <algorithm>

namespace baton::virtio {

SplitDevice::SplitDevice(const QueueLayout& layout, const QueueOptions& options)
    : layout_(layout), options_(options), completions_(layout.size, options.Has(kFInOrder)) {}

absl::StatusOr<SplitDevice> SplitDevice::Create(const GuestMemory& memory, const QueueLayout& layout,
                                                const QueueOptions& options, uint16_t next_avail) {
  RETURN_IF_ERROR(CheckSplitGeometry({layout.size, layout.desc, layout.driver, layout.device}));
  SplitDevice out(layout, options);
  RETURN_IF_ERROR(out.Remap(memory));
  out.next_avail_ = out.avail_seen_ = next_avail;
  out.used_ = Load<uint16_t>(out.used_ring_ + kRingIdx);
  const uint16_t avail = LoadAcquire<uint16_t>(out.avail_ + kRingIdx);
  RETURN_IF_ERROR(CheckSplitInvariants(layout.size, next_avail, {.avail = avail, .used = out.used_}));
  out.unclaimed_ = out.in_flight();
  if (out.partial()) {
    out.order_ = SplitOrderDevice((Load<uint16_t>(out.used_ring_) & kUsedInOrder) != 0,
                                  (LoadAcquire<uint16_t>(out.avail_) & kAvailInOrderAck) != 0);
    out.completions_.SetHold(out.order_.in_order());
  }
  // A predecessor that polled has left NO_NOTIFY or an old event behind.
  RETURN_IF_ERROR(out.EnableKicks().status());
  return out;
}

absl::Status SplitDevice::Remap(const GuestMemory& memory) {
  const uint32_t n = layout_.size;
  const uint8_t* desc = memory.At(layout_.desc, SplitDescBytes(n));
  const uint8_t* avail = memory.At(layout_.driver, SplitAvailBytes(n));
  uint8_t* used = memory.At(layout_.device, SplitUsedBytes(n));
  if (!desc || !avail || !used) {
    return Error(absl::StatusCode::kOutOfRange,
                 "a split ring of {} at {:#x}, {:#x}, {:#x} is not in one piece of guest memory each", n,
                 layout_.desc, layout_.driver, layout_.device);
  }
  memory_ = &memory;
  desc_ = desc;
  avail_ = avail;
  used_ring_ = used;
  return absl::OkStatus();
}

absl::StatusOr<uint16_t> SplitDevice::ReadAvail() const {
  const uint16_t avail = LoadAcquire<uint16_t>(avail_ + kRingIdx);
  RETURN_IF_ERROR(CheckSplitInvariants(layout_.size, next_avail_, {.avail = avail, .used = used_}));
  return avail;
}

absl::StatusOr<uint16_t> SplitDevice::Available() const {
  ASSIGN_OR_RETURN(const uint16_t avail, ReadAvail());
  return static_cast<uint16_t>(avail - next_avail_);
}

absl::Status SplitDevice::Walk(uint16_t head, Chain* chain) {
  const uint16_t n = layout_.size;
  ChainBuilder builder(chain, n);
  chain->id = head;
  chain->slots = 1;
  uint16_t index = head;
  for (uint32_t steps = 0; steps < n; ++steps) {
    if (index >= n) return Mismatch(fmt::format("a chain leads to descriptor {} in a ring of {}", index, n));
    const auto desc = LoadDesc<SplitDesc>(desc_ + size_t{16} * index);
    if (desc.flags & kDescIndirect) {
      if (!options_.Has(kFIndirectDesc)) {
        return Mismatch(fmt::format("descriptor {} is indirect, which was not negotiated", index));
      }
      if (desc.flags & kDescNext) {
        return Mismatch(fmt::format("descriptor {} is indirect and has a successor", index));
      }
      return builder.AddSplitTable(*memory_, desc.addr, desc.len, &table_);
    }
    RETURN_IF_ERROR(builder.Add(desc.addr, desc.len, desc.flags & kDescWrite));
    if (!(desc.flags & kDescNext)) return absl::OkStatus();
    index = desc.next;
  }
  return Mismatch(fmt::format("the chain of descriptor {} is a loop", head));
}

absl::StatusOr<bool> SplitDevice::Pop(Chain* chain) {
  RETURN_IF_ERROR(broken_);
  if (unclaimed_) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "{} requests in flight at the start were not submitted again", unclaimed_);
  }
  if (next_avail_ == avail_seen_) {
    // The driver kicks for its part of the handshake, too.
    if (partial()) StepOrder();
    auto avail = ReadAvail();
    if (!avail.ok()) return broken_ = avail.status();
    avail_seen_ = *avail;
    if (next_avail_ == avail_seen_) return false;
  }
  const uint16_t head =
      Load<uint16_t>(avail_ + kRingEntries + size_t{2} * (next_avail_ & (layout_.size - 1)));
  broken_ = Walk(head, chain);
  if (broken_.ok()) broken_ = completions_.Begin(chain);
  RETURN_IF_ERROR(broken_);
  ++next_avail_;
  return true;
}

absl::Status SplitDevice::Resubmit(uint16_t head, std::span<const PackedDesc>, Chain* chain) {
  if (!unclaimed_) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "head {} is submitted again, but no request is missing", head);
  }
  RETURN_IF_ERROR(Walk(head, chain));
  RETURN_IF_ERROR(completions_.Begin(chain, options_.Has(kFInOrder) || order_.in_order()));
  --unclaimed_;
  return absl::OkStatus();
}

bool SplitDevice::Unpop(const Chain& chain) {
  if (!completions_.Undo(chain)) return false;
  --next_avail_;
  return true;
}

uint16_t SplitDevice::Publish(uint16_t most) {
  std::span<const Completion> staged = completions_.staged();
  staged = staged.first(std::min<size_t>(staged.size(), most));
  if (staged.empty()) return 0;
  const uint16_t mask = layout_.size - 1;
  const bool batches = partial() ? order_.batches() : options_.Has(kFInOrder);
  for (size_t first = 0; first < staged.size(); ++first) {
    // An element stands at the place of the first buffer of its batch and names the last (VIRTIO 2.7.9).
    const uint64_t slot = static_cast<uint16_t>(used_ + first) & mask;
    while (batches && staged[first].full && first + 1 < staged.size()) ++first;
    uint8_t* element = used_ring_ + kRingEntries + 8 * slot;
    Store<uint32_t>(element, staged[first].id);
    Store<uint32_t>(element + 4, staged[first].len);
  }
  const auto count = static_cast<uint16_t>(staged.size());
  const uint16_t begin = used_ & mask;
  used_ = static_cast<uint16_t>(used_ + count);
  StoreRelease<uint16_t>(used_ring_ + kRingIdx, used_);
  completions_.Published(count);
  if (options_.log) {
    const uint32_t straight = std::min<uint32_t>(count, uint32_t{layout_.size} - begin);
    Log(kRingEntries + uint64_t{8} * begin, uint64_t{8} * straight);
    if (straight < count) Log(kRingEntries, uint64_t{8} * (count - straight));
    Log(kRingFlags, 4);
  }
  // Not where it would stage what is held: a tracker must see that first.
  if (partial() && order_.state() != SplitOrderDevice::State::kReleasing) StepOrder();
  return count;
}

void SplitDevice::SetOrdering(Ordering ordering) {
  ordering_ = ordering;
  if (partial()) StepOrder();
}

void SplitDevice::StepOrder() {
  const bool acked = (LoadAcquire<uint16_t>(avail_) & kAvailInOrderAck) != 0;
  const bool prefix = completions_.prefix() && completions_.staged().empty() && !unclaimed_;
  if (order_.Step(acked, ordering_, prefix)) {
    order_changed_ = true;
    StoreFlags();
  }
  completions_.SetHold(order_.in_order());
}

void SplitDevice::StoreFlags() {
  uint16_t flags = no_notify_ ? kUsedNoNotify : 0;
  if (partial() && order_.asserted()) flags |= kUsedInOrder;
  StoreRelease<uint16_t>(used_ring_ + kRingFlags, flags);
  Log(kRingFlags, 2);
}

bool SplitDevice::NeedsCall() {
  const uint16_t old = signalled_;
  const bool valid = signalled_valid_;
  const bool order_changed = order_changed_;
  if (valid && old == used_ && !order_changed) return false;
  signalled_ = used_;
  signalled_valid_ = true;
  order_changed_ = false;
  // Whoever was here before may have raised an interrupt that never arrived: the first is always raised.
  if (!valid || order_changed) return true;
  FullFence();
  if (event_idx()) {
    const uint16_t event = LoadAcquire<uint16_t>(avail_ + kRingEntries + size_t{2} * layout_.size);
    return PassedEvent(event, used_, old);
  }
  return !(LoadAcquire<uint16_t>(avail_ + kRingFlags) & kAvailNoInterrupt);
}

absl::StatusOr<bool> SplitDevice::EnableKicks() {
  no_notify_ = false;
  StoreFlags();
  if (event_idx()) {
    const uint64_t offset = kRingEntries + uint64_t{8} * layout_.size;
    Store<uint16_t>(used_ring_ + offset, next_avail_);
    Log(offset, 2);
  }
  FullFence();
  ASSIGN_OR_RETURN(const uint16_t avail, ReadAvail());
  return avail != next_avail_;
}

void SplitDevice::DisableKicks() {
  // With EVENT_IDX the flag must stay 0 (VIRTIO 2.7.10.2), and an event that is not moved on suppresses.
  if (event_idx() || no_notify_) return;
  no_notify_ = true;
  StoreFlags();
}

}  // namespace baton::virtio
