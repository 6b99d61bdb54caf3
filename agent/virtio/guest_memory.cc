#include "agent/virtio/guest_memory.h"

#include <algorithm>

namespace baton::virtio {

absl::StatusOr<GuestMemory> GuestMemory::Create(std::vector<Region> regions) {
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.gpa < b.gpa; });
  for (size_t i = 0; i < regions.size(); ++i) {
    const Region& region = regions[i];
    if (region.size == 0 || !region.host || region.gpa + (region.size - 1) < region.gpa) {
      return Error(absl::StatusCode::kInvalidArgument,
                   "guest memory: {} bytes at {:#x} are no region of memory", region.size, region.gpa);
    }
    if ((reinterpret_cast<uintptr_t>(region.host) ^ region.gpa) & 15) {
      return Error(absl::StatusCode::kInvalidArgument,
                   "guest memory: the region at {:#x} is not mapped with its own alignment", region.gpa);
    }
    if (i && region.gpa - regions[i - 1].gpa < regions[i - 1].size) {
      return Error(absl::StatusCode::kInvalidArgument, "guest memory: regions at {:#x} and {:#x} overlap",
                   regions[i - 1].gpa, region.gpa);
    }
  }
  GuestMemory out;
  out.regions_ = std::move(regions);
  return out;
}

const GuestMemory::Region* GuestMemory::Find(uint64_t gpa) const {
  // The last region that starts at or before gpa.
  auto it = std::upper_bound(regions_.begin(), regions_.end(), gpa,
                             [](uint64_t value, const Region& region) { return value < region.gpa; });
  if (it == regions_.begin()) return nullptr;
  --it;
  return gpa - it->gpa < it->size ? &*it : nullptr;
}

uint8_t* GuestMemory::Piece(uint64_t gpa, uint64_t* size) const {
  const Region* region = *size ? Find(gpa) : nullptr;
  if (!region) return nullptr;
  const uint64_t offset = gpa - region->gpa;
  *size = std::min(*size, region->size - offset);
  return region->host + offset;
}

absl::Status GuestMemory::Read(uint64_t gpa, void* out, size_t size) const {
  auto* to = static_cast<uint8_t*>(out);
  while (size) {
    uint64_t piece = size;
    const uint8_t* from = Piece(gpa, &piece);
    if (!from) return Error(absl::StatusCode::kOutOfRange, "no guest memory at {:#x}", gpa);
    std::memcpy(to, from, piece);
    gpa += piece;
    to += piece;
    size -= piece;
  }
  return absl::OkStatus();
}

absl::Status GuestMemory::Write(uint64_t gpa, const void* bytes, size_t size) const {
  const auto* from = static_cast<const uint8_t*>(bytes);
  while (size) {
    uint64_t piece = size;
    uint8_t* to = Piece(gpa, &piece);
    if (!to) return Error(absl::StatusCode::kOutOfRange, "no guest memory at {:#x}", gpa);
    std::memcpy(to, from, piece);
    gpa += piece;
    from += piece;
    size -= piece;
  }
  return absl::OkStatus();
}

}  // namespace baton::virtio
