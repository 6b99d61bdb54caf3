// Rings in memory that the guest owns: whatever it writes, recovery answers within its promises or refuses.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <set>

#include "agent/virtio/packed_ring.h"
#include "agent/virtio/split_ring.h"

namespace {

class Bytes : public baton::virtio::MemoryView {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override {
    if (gpa > size_ || size > size_ - gpa) return absl::OutOfRangeError("outside");
    std::memcpy(out, data_ + gpa, size);
    return absl::OkStatus();
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace baton::virtio;
  if (size < 12) return 0;
  uint16_t n, last_avail;
  uint32_t packed;
  std::memcpy(&n, data, 2);
  std::memcpy(&last_avail, data + 2, 2);
  std::memcpy(&packed, data + 4, 4);
  // Mostly sizes that a small input can hold.
  if (data[8] & 1) n = static_cast<uint16_t>(1u << (n % 8));
  Bytes memory(data + 12, size - 12);
  SplitRing ring{n, 0, 0, 4 * ((SplitAvailBytes(n) + 3) / 4)};
  auto indices = ReadSplitIndices(memory, ring);
  if (indices.ok()) (void)CheckSplitInvariants(n, last_avail, *indices);
  auto recovered = RecoverSplit(memory, ring, (data[8] & 2) != 0);
  if (recovered.ok()) {
    std::set<uint16_t> unique(recovered->heads.begin(), recovered->heads.end());
    if (unique.size() != recovered->heads.size()) std::abort();
    if (recovered->heads.size() != static_cast<uint16_t>(indices->avail - indices->used)) std::abort();
    for (uint16_t head : unique) {
      if (head >= n) std::abort();
    }
  }
  PackedBase base = DecodePackedBase(packed);
  if (EncodePackedBase(base) != packed) std::abort();
  if (n && CheckPackedInvariants(n, base).ok() && Distance(base.used, base.avail, n) > n) std::abort();
  (void)ReadPackedFlags(memory, {n, 0, 0, 0}, last_avail);
  return 0;
}
