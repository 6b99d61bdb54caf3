// Guest memory as a vector, starting at a guest physical address.
#pragma once

#include <vector>

#include "agent/virtio/memory_view.h"
#include "agent/virtio/split_ring.h"

namespace baton::virtio {

class FakeMemory : public MemoryView {
 public:
  FakeMemory(uint64_t gpa, size_t size) : gpa_(gpa), bytes_(size) {}
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override {
    if (gpa < gpa_ || gpa - gpa_ > bytes_.size() || size > bytes_.size() - (gpa - gpa_)) {
      return absl::OutOfRangeError("outside");
    }
    std::memcpy(out, bytes_.data() + (gpa - gpa_), size);
    return absl::OkStatus();
  }
  template <typename T>
  void Put(uint64_t gpa, T value) {
    std::memcpy(bytes_.data() + (gpa - gpa_), &value, sizeof value);
  }

 private:
  uint64_t gpa_;
  std::vector<uint8_t> bytes_;
};

// A split ring in such memory, driven by hand.
struct FakeSplitRing {
  explicit FakeSplitRing(uint16_t n) : memory(0x10000, 64 * size_t{n} + 4096) {
    ring.size = n;
    ring.desc = 0x10000;
    ring.avail = ring.desc + SplitDescBytes(n);
    ring.used = (ring.avail + SplitAvailBytes(n) + 3) / 4 * 4;
  }
  void Submit(uint16_t head) {
    memory.Put<uint16_t>(ring.avail + 4 + 2 * (avail % ring.size), head);
    memory.Put<uint16_t>(ring.avail + 2, ++avail);
  }
  void Complete(uint16_t head) {
    memory.Put<uint32_t>(ring.used + 4 + 8 * (used % ring.size), head);
    memory.Put<uint16_t>(ring.used + 2, ++used);
  }
  void SetIndices(uint16_t a, uint16_t u) {
    avail = a;
    used = u;
    memory.Put<uint16_t>(ring.avail + 2, a);
    memory.Put<uint16_t>(ring.used + 2, u);
  }
  SplitRing ring;
  FakeMemory memory;
  uint16_t avail = 0, used = 0;
};

}  // namespace baton::virtio
