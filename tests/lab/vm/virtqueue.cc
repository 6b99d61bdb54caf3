#include "tests/lab/vm/virtqueue.h"

#include "agent/virtio/features.h"
#include "agent/virtio/vring_base.h"

namespace baton::lab {

using nlohmann::json;

Virtqueue::Virtqueue(const virtio::GuestMemory& memory, const RingPlace& place, uint64_t features,
                     uint64_t indirect_gpa)
    : memory_(memory),
      layout_{place.size, place.desc, place.driver, place.device},
      indirect_{indirect_gpa,
                (features & virtio::kFIndirectDesc) != 0 ? kIndirectEntries : static_cast<uint16_t>(0)} {
  options_.features = features;
}

absl::Status Virtqueue::Reset() {
  ASSIGN_OR_RETURN(queue_, virtio::DriverQueue::Create(memory_, layout_, options_, indirect_));
  return queue_->EnableCalls().status();
}

json Virtqueue::Save() const { return queue_->Save(); }

absl::Status Virtqueue::Load(const json& state) {
  const auto bytes = state.get<std::vector<uint8_t>>();
  ASSIGN_OR_RETURN(queue_, virtio::DriverQueue::Restore(memory_, layout_, options_, indirect_, bytes));
  // The guest may have been stopped between adding requests and publishing them.
  submitted_ = true;
  return absl::OkStatus();
}

bool Virtqueue::Submit(uint32_t tag, std::span<const Piece> pieces) {
  segments_.clear();
  size_t readable = 0;
  for (const Piece& piece : pieces) {
    segments_.push_back({piece.gpa, piece.size});
    if (!piece.device_writes) readable = segments_.size();
  }
  const std::span<const virtio::Segment> all(segments_);
  if (!queue_->Add(all.first(readable), all.subspan(readable), tag).ok()) return false;
  submitted_ = true;
  return true;
}

bool Virtqueue::NeedsKick() {
  if (std::exchange(submitted_, false)) queue_->Publish();
  return queue_->NeedsKick();
}

absl::Status Virtqueue::Reap(const std::function<void(uint32_t, uint32_t)>& done) {
  for (;;) {
    virtio::UsedBuffer used;
    for (;;) {
      ASSIGN_OR_RETURN(bool taken, queue_->TakeUsed(&used));
      if (!taken) break;
      done(static_cast<uint32_t>(used.token), used.len);
    }
    ASSIGN_OR_RETURN(bool more, queue_->EnableCalls());
    if (!more) return absl::OkStatus();
  }
}

uint32_t Virtqueue::UsedBase(uint32_t last) const {
  if (!options_.Has(virtio::kFRingPacked)) {
    auto used = memory_.ReadU16(layout_.device + 2);
    return used.ok() ? *used : 0;
  }
  const virtio::PackedBase base = virtio::DecodePackedBase(last);
  return virtio::EncodePackedBase({base.used, base.used});
}

}  // namespace baton::lab
