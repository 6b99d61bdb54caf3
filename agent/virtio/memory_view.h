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
  // A range of guest memory where its bytes themselves can be had.
  struct Piece {
    uint64_t gpa = 0;
    uint64_t size = 0;
    const uint8_t* bytes = nullptr;

    // Those of [at, at + length); null unless all of them are in this piece.
    const uint8_t* At(uint64_t at, uint64_t length) const {
      const uint64_t offset = at - gpa;
      return at >= gpa && offset < size && length <= size - offset ? bytes + offset : nullptr;
    }
  };

  virtual ~MemoryView() = default;
  // Copies [gpa, gpa + size) to `out`. OutOfRange when any byte of it lies outside guest memory.
  virtual absl::Status Read(uint64_t gpa, void* out, size_t size) const = 0;

  // The piece with the byte at `gpa`, to be copied from once like what Read copies; an empty one where the
  // bytes cannot be had, and Read says why or has them. Valid as long as the view.
  virtual Piece PieceAt(uint64_t /*gpa*/) const { return {}; }

  // A little-endian u16 (hosts of this program are little-endian).
  absl::StatusOr<uint16_t> ReadU16(uint64_t gpa) const {
    uint16_t value = 0;
    RETURN_IF_ERROR(Read(gpa, &value, sizeof value));
    return value;
  }
};

// MemoryView::PieceAt for many pieces of the same size, whose addresses are mostly near each other: the view
// is asked once for all that are in the same piece, and one comparison finds out.
template <uint64_t kSize>
class PieceCache {
 public:
  // `memory` must outlive it.
  explicit PieceCache(const MemoryView& memory) : memory_(memory) {}
  // The bytes of [gpa, gpa + kSize) themselves, or null (see PieceAt).
  const uint8_t* At(uint64_t gpa) {
    if (gpa - begin_ >= starts_ && !Find(gpa)) return nullptr;
    return bytes_ + (gpa - begin_);
  }

 private:
  bool Find(uint64_t gpa) {
    const MemoryView::Piece piece = memory_.PieceAt(gpa);
    if (!piece.At(gpa, kSize)) return false;
    begin_ = piece.gpa;
    starts_ = piece.size - kSize + 1;
    bytes_ = piece.bytes;
    return true;
  }

  const MemoryView& memory_;
  uint64_t begin_ = 0;
  uint64_t starts_ = 0;  // from so many addresses kSize bytes are in the piece
  const uint8_t* bytes_ = nullptr;
};

}  // namespace baton::virtio
