// A ring in memory of its own, with room for indirect tables and buffers, for tests of both sides.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "agent/virtio/device_queue.h"
#include "agent/virtio/driver_queue.h"

namespace baton::virtio {

class RingLab {
 public:
  static constexpr uint64_t kBase = 0x100000;
  static constexpr uint16_t kIndirectEntries = 8;

  explicit RingLab(uint16_t n, uint64_t buffer_bytes = 1 << 16) {
    auto align = [](uint64_t value) { return (value + 63) / 64 * 64; };
    layout.size = n;
    layout.desc = kBase;
    layout.driver = layout.desc + align(uint64_t{16} * n);
    layout.device = layout.driver + align(6 + uint64_t{2} * n);
    indirect = {layout.device + align(6 + uint64_t{8} * n), kIndirectEntries};
    buffers = indirect.gpa + uint64_t{16} * kIndirectEntries * n;
    size_ = (buffers + buffer_bytes - kBase + 63) / 64 * 64;
    Map();
  }

  // The same guest memory at other addresses of this process, as after a migration. `before` keeps the old
  // mapping until the queues have left it.
  void Move() {
    before = std::move(bytes_);
    Map();
    std::memcpy(bytes_[0].bytes, before[0].bytes, size_);
  }

  uint8_t* At(uint64_t gpa) { return memory.At(gpa, 1); }

  struct alignas(64) Line {
    uint8_t bytes[64] = {};
  };
  std::unique_ptr<Line[]> before;

  QueueLayout layout;
  IndirectArea indirect;
  uint64_t buffers = 0;
  GuestMemory memory;

 private:
  void Map() {
    bytes_ = std::make_unique<Line[]>(size_ / sizeof(Line));
    memory = GuestMemory::Create({{kBase, size_, bytes_[0].bytes}}).value();
  }

  uint64_t size_ = 0;
  std::unique_ptr<Line[]> bytes_;
};

}  // namespace baton::virtio
