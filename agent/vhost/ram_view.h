// The guest memory that this process has mapped, as the pure code reads it.
#pragma once

#include <cstring>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/virtio/memory_view.h"

namespace baton::vhost {

// `ram` must outlive the view, which goes by the layout that it has now: tens of thousands of small reads
// while the guest stands still must not each ask for it anew.
class RamView final : public virtio::MemoryView {
 public:
  explicit RamView(const memory::GuestRam& ram) {
    for (const memory::GpaRange& range : ram.layout())
      pieces_.push_back({range.gpa, range.size, ram.blocks()[range.block].base() + range.offset});
  }
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override {
    const uint8_t* at = RamView::PieceAt(gpa).At(gpa, size);
    if (!at)
      return Error(absl::StatusCode::kOutOfRange, "[{:#x}, {:#x}) is not guest memory", gpa, gpa + size);
    std::memcpy(out, at, size);
    return absl::OkStatus();
  }
  Piece PieceAt(uint64_t gpa) const override {
    for (const Piece& piece : pieces_) {
      if (piece.At(gpa, 1)) return piece;
    }
    return {};
  }

 private:
  std::vector<Piece> pieces_;
};

}  // namespace baton::vhost
