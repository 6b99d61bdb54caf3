// Read access to guest memory by guest physical address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/status.h"

namespace baton::virtio {

// Security model: the guest owns this memory and writes it while we look. Code above this interface therefore
// copies what it needs with one Read and judges the copy; nothing is read twice to be checked and then used.
class MemoryView {
 public:
  virtual ~MemoryView() = default;
  // Copies [gpa, gpa + size) to `out`. OutOfRange when any byte of it lies outside guest memory.
  virtual absl::Status Read(uint64_t gpa, void* out, size_t size) const = 0;

  // The bytes themselves, to be copied once like those of Read; null where they cannot be had, and Read says
  // why or has them.
  virtual const uint8_t* Mapped(uint64_t /*gpa*/, size_t /*size*/) const { return nullptr; }

  // A little-endian u16 (hosts of this program are little-endian).
  absl::StatusOr<uint16_t> ReadU16(uint64_t gpa) const {
    uint16_t value = 0;
    RETURN_IF_ERROR(Read(gpa, &value, sizeof value));
    return value;
  }
};

}  // namespace baton::virtio
