#include "agent/virtio/request_class.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace baton::virtio {
namespace {

constexpr uint64_t kLastSector = std::numeric_limits<uint64_t>::max();
constexpr Extent kWholeDisk{0, kLastSector};

struct BlkHeader {
  uint32_t type;
  uint32_t reserved;
  uint64_t sector;
};
struct BlkSegment {
  uint64_t sector;
  uint32_t num;
  uint32_t flags;
};
static_assert(sizeof(BlkHeader) == kBlkHeaderBytes && sizeof(BlkSegment) == 16);

// Up to the end of the address space, and no further: a device refuses the rest.
Extent Sectors(uint64_t first, uint64_t count) {
  return {first, count > kLastSector - first ? kLastSector : first + count};
}

// A sector that is touched in part is touched.
uint64_t SectorsOf(uint64_t bytes) { return bytes / 512 + (bytes % 512 != 0); }

absl::InlinedVector<Extent, 1> SegmentExtents(std::span<const uint8_t> head, uint64_t readable_bytes) {
  const uint64_t count = (readable_bytes - kBlkHeaderBytes) / sizeof(BlkSegment);
  if (count > kMaxExtents || head.size() < kBlkHeaderBytes + count * sizeof(BlkSegment)) return {kWholeDisk};
  absl::InlinedVector<Extent, 1> out;
  for (uint64_t k = 0; k < count; ++k) {
    BlkSegment segment;
    std::memcpy(&segment, head.data() + kBlkHeaderBytes + k * sizeof segment, sizeof segment);
    out.push_back(Sectors(segment.sector, segment.num));
  }
  return out;
}

}  // namespace

BlkRequest ClassifyBlk(std::span<const uint8_t> head, uint64_t readable_bytes, uint64_t writable_bytes) {
  BlkRequest out;
  BlkHeader header;
  if (head.size() < sizeof header || readable_bytes < sizeof header) return out;
  std::memcpy(&header, head.data(), sizeof header);
  out.type = header.type;
  out.cls = BlkClassOf(header.type);
  switch (header.type) {
    case kBlkIn:
      // The last byte is the status.
      out.extents = {Sectors(header.sector, SectorsOf(writable_bytes > 0 ? writable_bytes - 1 : 0))};
      break;
    case kBlkOut:
      out.extents = {Sectors(header.sector, SectorsOf(readable_bytes - sizeof header))};
      break;
    case kBlkZoneReport:
      // What it says changes with every write; it has no extent that could be told from its header.
      out.extents = {kWholeDisk};
      break;
    case kBlkDiscard:
    case kBlkWriteZeroes:
    case kBlkSecureErase:
      out.extents = SegmentExtents(head, readable_bytes);
      break;
    default:
      break;
  }
  return out;
}

bool Conflicts(const BlkRequest& a, const BlkRequest& b) {
  if (a.cls == RequestClass::kNotIdempotent || b.cls == RequestClass::kNotIdempotent) return true;
  if (!a.writes() && !b.writes()) return false;
  return std::any_of(a.extents.begin(), a.extents.end(), [&](const Extent& x) {
    return std::any_of(b.extents.begin(), b.extents.end(), [&](const Extent& y) { return x.Overlaps(y); });
  });
}

ClassesPresent& ClassesPresent::operator|=(const ClassesPresent& other) {
  reads |= other.reads;
  writes |= other.writes;
  not_idempotent |= other.not_idempotent;
  harmless |= other.harmless;
  return *this;
}

ClassesPresent ClassesOf(v1::DeviceClass device_class, size_t in_flight) {
  ClassesPresent out;
  if (in_flight == 0) return out;
  if (device_class == v1::NET) {
    out.harmless = true;
  } else {
    out.not_idempotent = true;
  }
  return out;
}

}  // namespace baton::virtio
