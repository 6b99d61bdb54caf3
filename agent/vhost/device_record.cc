#include "agent/vhost/device_record.h"

#include <algorithm>

#include "agent/virtio/features.h"

namespace baton::vhost {
namespace {

absl::StatusOr<uint64_t> Translate(const DeviceRecord& record, uint32_t index, const char* what,
                                   uint64_t user_addr, uint64_t size) {
  auto gpa = record.memory.ToGpa(user_addr, size);
  if (gpa) return *gpa;
  return Error(absl::StatusCode::kInvalidArgument,
               "ring {}: {} of {} bytes at user address {:#x} is outside guest memory", index, what, size,
               user_addr);
}

absl::StatusOr<const VringRecord*> Complete(const DeviceRecord& record, uint32_t index) {
  auto it = record.vrings.find(index);
  if (it == record.vrings.end() || it->second.num == 0) {
    return Error(absl::StatusCode::kInvalidArgument, "ring {}: its size was never set", index);
  }
  if (!it->second.addr) {
    return Error(absl::StatusCode::kInvalidArgument, "ring {}: its addresses were never set", index);
  }
  return &it->second;
}

}  // namespace

bool DeviceRecord::packed() const { return features && (*features & virtio::kFRingPacked); }

bool DeviceRecord::any_started() const {
  // From the end: VMMs stop their rings from the first to the last.
  return std::any_of(vrings.rbegin(), vrings.rend(), [](const auto& entry) { return entry.second.started; });
}

absl::StatusOr<virtio::SplitRing> DeviceRecord::Split(uint32_t index) const {
  ASSIGN_OR_RETURN(const VringRecord* vring, Complete(*this, index));
  const VringAddr& addr = *vring->addr;
  const uint32_t n = vring->num;
  virtio::SplitRing ring;
  ring.size = static_cast<uint16_t>(n);
  ASSIGN_OR_RETURN(ring.desc,
                   Translate(*this, index, "descriptor table", addr.desc, virtio::SplitDescBytes(n)));
  ASSIGN_OR_RETURN(ring.avail, Translate(*this, index, "avail ring", addr.avail, virtio::SplitAvailBytes(n)));
  ASSIGN_OR_RETURN(ring.used, Translate(*this, index, "used ring", addr.used, virtio::SplitUsedBytes(n)));
  if (absl::Status ok = virtio::CheckSplitGeometry(ring); !ok.ok())
    return Annotate(ok, fmt::format("ring {}", index));
  return ring;
}

absl::StatusOr<virtio::PackedRing> DeviceRecord::Packed(uint32_t index) const {
  ASSIGN_OR_RETURN(const VringRecord* vring, Complete(*this, index));
  const VringAddr& addr = *vring->addr;
  virtio::PackedRing ring;
  ring.size = static_cast<uint16_t>(vring->num);
  ASSIGN_OR_RETURN(
      ring.desc, Translate(*this, index, "descriptor ring", addr.desc, virtio::PackedDescBytes(vring->num)));
  ASSIGN_OR_RETURN(ring.driver_event,
                   Translate(*this, index, "driver event area", addr.avail, virtio::kPackedEventBytes));
  ASSIGN_OR_RETURN(ring.device_event,
                   Translate(*this, index, "device event area", addr.used, virtio::kPackedEventBytes));
  if (absl::Status ok = virtio::CheckPackedGeometry(ring); !ok.ok())
    return Annotate(ok, fmt::format("ring {}", index));
  return ring;
}

}  // namespace baton::vhost
