#include "agent/virtio/packed_ring.h"

#include "agent/virtio/split_ring.h"

namespace baton::virtio {
absl::Status CheckPackedGeometry(const PackedRing& ring) {
  auto invalid = [](const std::string& what) { return absl::InvalidArgumentError(what); };
  if (ring.size == 0 || ring.size > kMaxRingSize) {
    return invalid(fmt::format("packed ring size {} is not from 1 to 32768", ring.size));
  }
  if (ring.desc % 16) return invalid(fmt::format("descriptor ring at {:#x} is not aligned to 16", ring.desc));
  if (ring.driver_event % 4) {
    return invalid(fmt::format("driver event area at {:#x} is not aligned to 4", ring.driver_event));
  }
  if (ring.device_event % 4) {
    return invalid(fmt::format("device event area at {:#x} is not aligned to 4", ring.device_event));
  }
  return absl::OkStatus();
}

absl::Status CheckPackedInvariants(uint16_t n, PackedBase base) {
  if (base.avail.idx >= n)
    return Mismatch(fmt::format("avail position {} in a packed ring of {}", base.avail.idx, n));
  if (base.used.idx >= n)
    return Mismatch(fmt::format("used position {} in a packed ring of {}", base.used.idx, n));
  if (Distance(base.used, base.avail, n) < 0) {
    return Mismatch(
        fmt::format("avail position {} (wrap {}) is not within one lap after used position {} (wrap {})",
                    base.avail.idx, base.avail.wrap, base.used.idx, base.used.wrap));
  }
  return absl::OkStatus();
}

absl::Status CheckPackedDrained(uint16_t n, PackedBase base) {
  RETURN_IF_ERROR(CheckPackedInvariants(n, base));
  if (!(base.avail == base.used)) {
    return Mismatch(fmt::format(
        "{} descriptors are in flight: avail position {} (wrap {}), used position {} (wrap {})",
        Distance(base.used, base.avail, n), base.avail.idx, base.avail.wrap, base.used.idx, base.used.wrap));
  }
  return absl::OkStatus();
}

absl::StatusOr<uint16_t> ReadPackedFlags(const MemoryView& memory, const PackedRing& ring, uint16_t index) {
  if (index >= ring.size) {
    return Error(absl::StatusCode::kOutOfRange, "descriptor {} in a packed ring of {}", index, ring.size);
  }
  return memory.ReadU16(ring.desc + uint64_t{16} * index + 14);
}

}  // namespace baton::virtio
