#include "agent/virtio/packed_driver.h"

#include "agent/virtio/packed_ring.h"
#include "agent/virtio/split_ring.h"

namespace baton::virtio {
namespace {

constexpr uint64_t kDescFlagsOffset = 14;

}  // namespace

PackedDriver::PackedDriver(const QueueLayout& layout, const QueueOptions& options,
                           const IndirectArea& indirect)
    : layout_(layout),
      options_(options),
      indirect_(indirect),
      requests_(layout.size),
      free_ids_(layout.size) {
  if (!options.Has(kFIndirectDesc)) indirect_.entries = 0;
}

absl::Status PackedDriver::Map(const GuestMemory& memory) {
  memory_ = &memory;
  desc_ = memory.At(layout_.desc, PackedDescBytes(layout_.size));
  driver_event_ = memory.At(layout_.driver, kPackedEventBytes);
  device_event_ = memory.At(layout_.device, kPackedEventBytes);
  if (desc_ && driver_event_ && device_event_) return absl::OkStatus();
  return Error(absl::StatusCode::kOutOfRange,
               "a packed ring of {} at {:#x}, {:#x}, {:#x} is not in one piece of guest memory each",
               layout_.size, layout_.desc, layout_.driver, layout_.device);
}

absl::StatusOr<PackedDriver> PackedDriver::Create(const GuestMemory& memory, const QueueLayout& layout,
                                                  const QueueOptions& options, const IndirectArea& indirect) {
  RETURN_IF_ERROR(CheckPackedGeometry({layout.size, layout.desc, layout.driver, layout.device}));
  PackedDriver out(layout, options, indirect);
  RETURN_IF_ERROR(out.Map(memory));
  const uint16_t n = layout.size;
  std::memset(out.desc_, 0, PackedDescBytes(n));
  std::memset(out.driver_event_, 0, kPackedEventBytes);
  std::memset(memory.At(layout.device, kPackedEventBytes), 0, kPackedEventBytes);
  for (uint32_t i = 0; i < n; ++i) out.free_ids_[i] = static_cast<uint16_t>(n - 1 - i);
  out.free_id_count_ = n;
  out.free_slots_ = n;
  return out;
}

std::vector<uint8_t> PackedDriver::Save() const {
  DriverState state;
  state.Put(layout_.size);
  state.Put(requests_);
  state.Put(free_ids_);
  for (uint16_t value :
       {free_id_count_, free_slots_, next_avail_.idx, next_used_.idx, held_.idx, held_flags_}) {
    state.Put(value);
  }
  for (bool value : {next_avail_.wrap, next_used_.wrap, held_.wrap, holding_, flush_.batches()}) {
    state.Put(value);
  }
  state.Put(pending_);
  state.Put(moved_);
  return state.Take();
}

absl::StatusOr<PackedDriver> PackedDriver::Restore(const GuestMemory& memory, const QueueLayout& layout,
                                                   const QueueOptions& options, const IndirectArea& indirect,
                                                   std::span<const uint8_t> saved) {
  RETURN_IF_ERROR(CheckPackedGeometry({layout.size, layout.desc, layout.driver, layout.device}));
  PackedDriver out(layout, options, indirect);
  RETURN_IF_ERROR(out.Map(memory));
  DriverState state(saved);
  uint16_t size = 0;
  bool flushed = false;
  bool ok = state.Get(&size) && size == layout.size && state.Get(&out.requests_) && state.Get(&out.free_ids_);
  for (uint16_t* value : {&out.free_id_count_, &out.free_slots_, &out.next_avail_.idx, &out.next_used_.idx,
                          &out.held_.idx, &out.held_flags_}) {
    ok = ok && state.Get(value);
  }
  for (bool* value :
       {&out.next_avail_.wrap, &out.next_used_.wrap, &out.held_.wrap, &out.holding_, &flushed}) {
    ok = ok && state.Get(value);
  }
  ok = ok && state.Get(&out.pending_) && state.Get(&out.moved_);
  if (!ok || !state.AtEnd() || !out.Consistent()) {
    return Error(absl::StatusCode::kInvalidArgument, "the saved state is not of this packed driver");
  }
  out.flush_ = FlushState(flushed);
  return out;
}

bool PackedDriver::Consistent() const {
  const uint16_t n = layout_.size;
  std::vector<bool> seen;
  uint32_t slots = 0;
  if (!requests_.Consistent(&seen, &slots) || free_slots_ > n || slots + free_slots_ != n) return false;
  if (free_id_count_ > n || free_id_count_ + uint32_t{requests_.outstanding()} != n) return false;
  for (uint16_t id : std::span<const uint16_t>(free_ids_).first(free_id_count_)) {
    if (id >= n || seen[id]) return false;
    seen[id] = true;
  }
  if (next_avail_.idx >= n || next_used_.idx >= n || held_.idx >= n) return false;
  return Advance(next_used_, static_cast<uint16_t>(slots), n) == next_avail_ && pending_ <= slots &&
         holding_ == (pending_ != 0);
}

void PackedDriver::Put(uint64_t addr, uint32_t len, uint16_t id, uint16_t flags) {
  uint8_t* at = desc_ + size_t{16} * next_avail_.idx;
  flags |= next_avail_.wrap ? kDescAvail : kDescUsed;
  Store<uint64_t>(at, addr);
  Store<uint32_t>(at + 8, len);
  Store<uint16_t>(at + 12, id);
  if (holding_) {
    Store<uint16_t>(at + kDescFlagsOffset, flags);
  } else {
    holding_ = true;
    held_ = next_avail_;
    held_flags_ = flags;
  }
  next_avail_ = Advance(next_avail_, 1, layout_.size);
  ++pending_;
}

absl::StatusOr<uint16_t> PackedDriver::Add(std::span<const Segment> readable,
                                           std::span<const Segment> writable, uint64_t token) {
  RETURN_IF_ERROR(broken_);
  RETURN_IF_ERROR(CheckAdd(readable, writable));
  const size_t count = readable.size() + writable.size();
  const uint16_t id = free_id_count_ ? free_ids_[free_id_count_ - 1] : 0;
  uint16_t slots = 1;
  uint64_t table = 0;
  if (free_slots_ && WriteIndirect<PackedDesc>(*memory_, indirect_, id, readable, writable, &table)) {
    Put(table, static_cast<uint32_t>(16 * count), id, kDescIndirect);
  } else {
    if (count > free_slots_) {
      return Error(absl::StatusCode::kResourceExhausted, "{} descriptors needed, {} free", count,
                   free_slots_);
    }
    slots = static_cast<uint16_t>(count);
    for (size_t i = 0; i < count; ++i) {
      const bool writes = i >= readable.size();
      const Segment& segment = writes ? writable[i - readable.size()] : readable[i];
      const auto flags = static_cast<uint16_t>((writes ? kDescWrite : 0) | (i + 1 < count ? kDescNext : 0));
      Put(segment.gpa, segment.len, id, flags);
    }
  }
  --free_id_count_;
  free_slots_ = static_cast<uint16_t>(free_slots_ - slots);
  requests_.Begin(id, token, static_cast<uint32_t>(TotalBytes(writable)), slots, id);
  return id;
}

void PackedDriver::Publish() {
  if (!holding_) return;
  // The device waits at this descriptor: with its flags everything after it becomes visible.
  StoreRelease<uint16_t>(desc_ + size_t{16} * held_.idx + kDescFlagsOffset, held_flags_);
  holding_ = false;
  moved_ += pending_;
  pending_ = 0;
  requests_.Published();
}

bool PackedDriver::NeedsKick() {
  const uint32_t moved = moved_;
  moved_ = 0;
  if (!moved) return false;
  if (moved > layout_.size) return true;
  FullFence();
  const auto event = LoadAcquire<uint32_t>(device_event_);
  const auto flags = static_cast<uint16_t>(event >> 16 & 3);
  if (flags == kEventDisable) return false;
  if (flags != kEventDesc || !event_idx()) return true;
  // Nothing is pending here but what was published: descriptors added since are behind the position.
  PackedPosition at = next_avail_;
  if (pending_) at = held_;
  return PassedPackedEvent(static_cast<uint16_t>(event), at.idx, at.wrap, static_cast<uint16_t>(moved),
                           layout_.size);
}

bool PackedDriver::NextIsUsed(uint16_t* flags) const {
  *flags = LoadAcquire<uint16_t>(desc_ + size_t{16} * next_used_.idx + kDescFlagsOffset);
  return IsPackedUsed(*flags, next_used_.wrap);
}

absl::StatusOr<bool> PackedDriver::TakeUsed(UsedBuffer* out) {
  RETURN_IF_ERROR(broken_);
  const bool partial = options_.Has(kFPartialOrder);
  if (!requests_.claimed()) {
    uint16_t flags = 0;
    if (!NextIsUsed(&flags)) return false;
    const uint8_t* at = desc_ + size_t{16} * next_used_.idx;
    const bool flush = (flags & kDescFlush) != 0;
    const bool in_order = partial ? flush && flush_.batches() : options_.Has(kFInOrder);
    broken_ = requests_.Claim(Load<uint16_t>(at + 12), Load<uint32_t>(at + 8), in_order, layout_.size);
    RETURN_IF_ERROR(broken_);
    flush_.Used(flush);
  }
  uint16_t slots = 0;
  uint16_t unused = 0;
  requests_.Take(out, &slots, &unused);
  next_used_ = Advance(next_used_, slots, layout_.size);
  free_slots_ = static_cast<uint16_t>(free_slots_ + slots);
  free_ids_[free_id_count_++] = out->id;
  if (partial && !requests_.claimed() && flush_.batches() && !requests_.prefix()) {
    return broken_ = Mismatch("the device flagged FLUSH, but buffers before are not used");
  }
  return true;
}

absl::StatusOr<bool> PackedDriver::EnableCalls() {
  RETURN_IF_ERROR(broken_);
  const auto at = static_cast<uint16_t>(next_used_.idx | (next_used_.wrap ? 0x8000 : 0));
  const uint32_t event = event_idx() ? at | uint32_t{kEventDesc} << 16 : uint32_t{kEventEnable} << 16;
  StoreRelease<uint32_t>(driver_event_, event);
  FullFence();
  uint16_t flags = 0;
  return requests_.claimed() || NextIsUsed(&flags);
}

void PackedDriver::DisableCalls() { StoreRelease<uint32_t>(driver_event_, uint32_t{kEventDisable} << 16); }

}  // namespace baton::virtio
