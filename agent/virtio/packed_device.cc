#include "agent/virtio/packed_device.h"

#include <algorithm>

#include "agent/virtio/split_ring.h"

namespace baton::virtio {
namespace {

constexpr uint64_t kFlagsOffset = 14;

}  // namespace

PackedDevice::PackedDevice(const QueueLayout& layout, const QueueOptions& options)
    : layout_(layout), options_(options), completions_(layout.size, options.Has(kFInOrder)) {}

absl::StatusOr<PackedDevice> PackedDevice::Create(const GuestMemory& memory, const QueueLayout& layout,
                                                  const QueueOptions& options, PackedBase base) {
  RETURN_IF_ERROR(CheckPackedGeometry({layout.size, layout.desc, layout.driver, layout.device}));
  RETURN_IF_ERROR(CheckPackedInvariants(layout.size, base));
  PackedDevice out(layout, options);
  RETURN_IF_ERROR(out.Remap(memory));
  out.next_avail_ = base.avail;
  out.next_used_ = base.used;
  out.unclaimed_ = static_cast<uint32_t>(Distance(base.used, base.avail, layout.size));
  out.SetOrdering(Ordering::kInOrder);
  out.RestoreMarks();
  // A predecessor that polled has left "disable" or an old event behind.
  RETURN_IF_ERROR(out.EnableKicks().status());
  return out;
}

absl::Status PackedDevice::Remap(const GuestMemory& memory) {
  uint8_t* desc = memory.At(layout_.desc, PackedDescBytes(layout_.size));
  const uint8_t* driver = memory.At(layout_.driver, kPackedEventBytes);
  uint8_t* device = memory.At(layout_.device, kPackedEventBytes);
  if (!desc || !driver || !device) {
    return Error(absl::StatusCode::kOutOfRange,
                 "a packed ring of {} at {:#x}, {:#x}, {:#x} is not in one piece of guest memory each",
                 layout_.size, layout_.desc, layout_.driver, layout_.device);
  }
  memory_ = &memory;
  desc_ = desc;
  driver_event_ = driver;
  device_event_ = device;
  return absl::OkStatus();
}

void PackedDevice::RestoreMarks() {
  // The driver looks at the first, which was not written: Publish makes a batch visible there by its last
  // store.
  PackedPosition at = next_used_;
  for (uint32_t k = 1; k < unclaimed_; ++k) {
    at = Advance(at, 1, layout_.size);
    uint8_t* word = desc_ + size_t{16} * at.idx + kFlagsOffset;
    const auto flags = Load<uint16_t>(word);
    if (IsPackedAvail(flags, at.wrap)) continue;
    Store<uint16_t>(word, static_cast<uint16_t>((flags & ~(kDescAvail | kDescUsed)) |
                                                (at.wrap ? kDescAvail : kDescUsed)));
    if (options_.log) options_.log->Wrote(layout_.desc + uint64_t{16} * at.idx, 16);
  }
}

bool PackedDevice::NextIsAvailable(PackedPosition at, uint16_t* flags) const {
  *flags = LoadAcquire<uint16_t>(DescAt(at.idx) + kFlagsOffset);
  return IsPackedAvail(*flags, at.wrap);
}

absl::StatusOr<uint16_t> PackedDevice::Available() const {
  PackedPosition at = next_avail_;
  uint16_t chains = 0;
  uint16_t flags = 0;
  for (uint32_t left = layout_.size - outstanding(); left && NextIsAvailable(at, &flags); ++chains) {
    // The rest of the chain was written before the flags of its first descriptor.
    for (;;) {
      --left;
      at = Advance(at, 1, layout_.size);
      if (!(flags & kDescNext)) break;
      if (!left) return Mismatch("a chain of a packed ring reaches into descriptors in flight");
      flags = Load<uint16_t>(DescAt(at.idx) + kFlagsOffset);
    }
  }
  return chains;
}

absl::Status PackedDevice::AddDescriptor(const PackedDesc& desc, ChainBuilder* builder) {
  if (!(desc.flags & kDescIndirect)) return builder->Add(desc.addr, desc.len, desc.flags & kDescWrite);
  if (!options_.Has(kFIndirectDesc)) {
    return Mismatch("a descriptor is indirect, which was not negotiated");
  }
  if (desc.flags & kDescNext) return Mismatch("a descriptor is indirect and has a successor");
  return builder->AddPackedTable(*memory_, desc.addr, desc.len, &table_);
}

absl::Status PackedDevice::Walk(uint16_t first_flags, Chain* chain) {
  ChainBuilder builder(chain, layout_.size);
  PackedPosition at = next_avail_;
  for (uint32_t left = layout_.size - outstanding(); left; --left) {
    auto desc = LoadDesc<PackedDesc>(DescAt(at.idx));
    // The first flags decided that the chain is available: those count, whatever stands there by now.
    if (chain->descriptors.empty()) desc.flags = first_flags;
    RETURN_IF_ERROR(AddDescriptor(desc, &builder));
    chain->descriptors.push_back(desc);
    if (!(desc.flags & kDescNext)) {
      chain->id = desc.id;
      chain->slots = static_cast<uint16_t>(chain->descriptors.size());
      return absl::OkStatus();
    }
    at = Advance(at, 1, layout_.size);
  }
  return Mismatch("a chain of a packed ring reaches into descriptors in flight");
}

absl::StatusOr<bool> PackedDevice::Pop(Chain* chain) {
  RETURN_IF_ERROR(broken_);
  if (unclaimed_) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "{} descriptors in flight at the start were not submitted again", unclaimed_);
  }
  uint16_t flags = 0;
  // With all descriptors in flight the one at the avail position is in flight itself, and means nothing.
  if (outstanding() >= layout_.size || !NextIsAvailable(next_avail_, &flags)) return false;
  broken_ = Walk(flags, chain);
  if (broken_.ok()) broken_ = completions_.Begin(chain);
  RETURN_IF_ERROR(broken_);
  next_avail_ = Advance(next_avail_, chain->slots, layout_.size);
  return true;
}

absl::Status PackedDevice::Resubmit(uint16_t id, std::span<const PackedDesc> descriptors, Chain* chain) {
  if (descriptors.empty() || descriptors.size() > unclaimed_) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "buffer {} of {} descriptors is submitted again, but {} descriptors are missing", id,
                 descriptors.size(), unclaimed_);
  }
  ChainBuilder builder(chain, layout_.size);
  for (const PackedDesc& desc : descriptors) {
    const bool last = &desc == &descriptors.back();
    if (last != !(desc.flags & kDescNext)) {
      return Mismatch(fmt::format("the saved descriptors of buffer {} are no chain", id));
    }
    RETURN_IF_ERROR(AddDescriptor(desc, &builder));
    chain->descriptors.push_back(desc);
  }
  chain->id = id;
  chain->slots = static_cast<uint16_t>(descriptors.size());
  RETURN_IF_ERROR(completions_.Begin(chain, options_.Has(kFInOrder)));
  unclaimed_ -= chain->slots;
  // Until everything recovered is used, nobody knows what was used after it.
  completions_.SetHold(options_.Has(kFInOrder));
  return absl::OkStatus();
}

bool PackedDevice::Unpop(const Chain& chain) {
  if (!completions_.Undo(chain)) return false;
  // Back by k is forward by n - k and around once more.
  const auto back = static_cast<uint16_t>(layout_.size - chain.slots);
  next_avail_ = Advance(next_avail_, back, layout_.size);
  next_avail_.wrap = !next_avail_.wrap;
  return true;
}

uint16_t PackedDevice::Publish(uint16_t most) {
  std::span<const Completion> staged = completions_.staged();
  staged = staged.first(std::min<size_t>(staged.size(), most));
  if (staged.empty()) return 0;
  const uint16_t n = layout_.size;
  const PackedPosition begin = next_used_;
  uint8_t* first_at = nullptr;
  uint64_t first_word = 0;
  PackedPosition last = begin;
  uint64_t published = completions_.published();
  uint64_t highest = completions_.highest();
  for (size_t i = 0; i < staged.size(); ++i) {
    last = next_used_;
    uint32_t slots = 0;
    // A descriptor stands at the place of the first buffer of its batch and names the last (2.8.13).
    bool batches = options_.Has(kFInOrder);
    if (partial()) {
      batches = flush_.batches() && staged[i].sequence == published;
    }
    for (;; ++i) {
      slots += staged[i].slots;
      ++published;
      highest = std::max(highest, staged[i].sequence + 1);
      if (!batches || !staged[i].full || i + 1 == staged.size()) break;
      if (partial() && staged[i + 1].sequence != published) break;
    }
    uint16_t flags = next_used_.wrap ? kDescAvail | kDescUsed : 0;
    if (staged[i].len) flags |= kDescWrite;
    if (partial()) {
      const bool flush = completions_.prefix_after(published, highest);
      if (flush) flags |= kDescFlush;
      flush_.Used(flush);
    }
    uint8_t* at = desc_ + size_t{16} * next_used_.idx + 8;
    const uint64_t word = uint64_t{staged[i].len} | uint64_t{staged[i].id} << 32 | uint64_t{flags} << 48;
    if (!first_at) {
      first_at = at;
      first_word = word;
    } else {
      Store<uint64_t>(at, word);
    }
    next_used_ = Advance(next_used_, static_cast<uint16_t>(slots), n);
    moved_ += slots;
  }
  // The driver waits at the first descriptor: with its flags the whole batch becomes visible. Length, id and
  // flags by one store, so that a device that dies here leaves the driver's descriptor or its own, and
  // nothing between.
  StoreRelease<uint64_t>(first_at, first_word);
  const auto count = static_cast<uint16_t>(staged.size());
  completions_.Published(count);
  if (options_.log) LogDescriptors(begin, last);
  if (partial()) SetOrdering(ordering_);
  return count;
}

void PackedDevice::LogDescriptors(PackedPosition from, PackedPosition to) {
  if (from.wrap == to.wrap) {
    options_.log->Wrote(layout_.desc + uint64_t{16} * from.idx, uint64_t{16} * (to.idx - from.idx + 1u));
    return;
  }
  options_.log->Wrote(layout_.desc + uint64_t{16} * from.idx, uint64_t{16} * (layout_.size - from.idx));
  options_.log->Wrote(layout_.desc, uint64_t{16} * (to.idx + 1u));
}

void PackedDevice::SetOrdering(Ordering ordering) {
  ordering_ = ordering;
  if (!partial()) return;
  if (ordering == Ordering::kAsCompleted) {
    completions_.SetHold(false);
  } else if (completions_.staged().empty() && completions_.prefix() && !unclaimed_) {
    completions_.SetHold(true);
  }
}

bool PackedDevice::NeedsCall() {
  const uint32_t moved = moved_;
  const bool valid = signalled_valid_;
  if (valid && !moved) return false;
  moved_ = 0;
  signalled_valid_ = true;
  if (!valid || moved > layout_.size) return true;
  FullFence();
  const auto event = LoadAcquire<uint32_t>(driver_event_);
  const auto flags = static_cast<uint16_t>(event >> 16 & 3);
  if (flags == kEventDisable) return false;
  if (flags != kEventDesc || !event_idx()) return true;
  return PassedPackedEvent(static_cast<uint16_t>(event), next_used_.idx, next_used_.wrap,
                           static_cast<uint16_t>(moved), layout_.size);
}

void PackedDevice::StoreEvent(uint16_t off_wrap, uint16_t flags) {
  StoreRelease<uint32_t>(device_event_, uint32_t{off_wrap} | uint32_t{flags} << 16);
  if (options_.log) options_.log->Wrote(layout_.device, kPackedEventBytes);
}

absl::StatusOr<bool> PackedDevice::EnableKicks() {
  const auto at = static_cast<uint16_t>(next_avail_.idx | (next_avail_.wrap ? 0x8000 : 0));
  StoreEvent(event_idx() ? at : 0, event_idx() ? kEventDesc : kEventEnable);
  FullFence();
  uint16_t flags = 0;
  return outstanding() < layout_.size && NextIsAvailable(next_avail_, &flags);
}

void PackedDevice::DisableKicks() { StoreEvent(0, kEventDisable); }

}  // namespace baton::virtio
