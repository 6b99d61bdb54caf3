// Guest memory that this process has mapped, by guest physical address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "agent/virtio/memory_view.h"
#include "common/status.h"

namespace baton::virtio {

// Read and write access to mapped guest memory. Does not own the mappings: they must outlive this object and
// every queue made from it. Const functions may be called from any thread.
//
// Security model: see MemoryView; the pointers that At gives out point at bytes that the guest may change at
// any time.
class GuestMemory final : public MemoryView {
 public:
  // `size` bytes of guest physical memory from `gpa`, mapped at `host`.
  struct Region {
    uint64_t gpa = 0;
    uint64_t size = 0;
    uint8_t* host = nullptr;
  };

  GuestMemory() = default;

  // InvalidArgument if a region is empty, wraps around, overlaps another, or is mapped so that a guest
  // physical address aligned to 16 is not aligned to 16 here (the rings' atomic accesses need that).
  static absl::StatusOr<GuestMemory> Create(std::vector<Region> regions);

  // Where [gpa, gpa + size) is mapped; nullptr unless all of it lies inside one region. At(gpa, 0) is nullptr
  // unless gpa itself is inside.
  uint8_t* At(uint64_t gpa, uint64_t size) const {
    const Region* region = Find(gpa);
    if (!region || size > region->size - (gpa - region->gpa)) return nullptr;
    return region->host + (gpa - region->gpa);
  }

  // Where `gpa` is mapped, and in `*size` how many of the `*size` bytes from it are there in one piece (at
  // least 1). nullptr if gpa is outside, or *size is 0.
  uint8_t* Piece(uint64_t gpa, uint64_t* size) const;

  // Copies across regions that adjoin. OutOfRange, and nothing promised about `out`, when any byte is
  // outside.
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override;
  absl::Status Write(uint64_t gpa, const void* bytes, size_t size) const;

  // Sorted by address.
  const std::vector<Region>& regions() const { return regions_; }

 private:
  const Region* Find(uint64_t gpa) const;

  std::vector<Region> regions_;
};

}  // namespace baton::virtio
