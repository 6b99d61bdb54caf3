// The guest memory that this process has mapped, as the pure code reads it.
#pragma once

#include <cstring>

#include "agent/memory/guest_ram.h"
#include "agent/virtio/memory_view.h"

namespace baton::vhost {

// `ram` must have its layout, and outlive the view.
class RamView final : public virtio::MemoryView {
 public:
  explicit RamView(const memory::GuestRam& ram) : ram_(ram) {}
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override {
    const uint8_t* at = ram_.At(gpa, size);
    if (!at)
      return Error(absl::StatusCode::kOutOfRange, "[{:#x}, {:#x}) is not guest memory", gpa, gpa + size);
    std::memcpy(out, at, size);
    return absl::OkStatus();
  }

 private:
  const memory::GuestRam& ram_;
};

}  // namespace baton::vhost
