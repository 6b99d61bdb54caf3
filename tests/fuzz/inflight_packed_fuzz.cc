// A queue's part of an in-flight region of a packed ring, as a hostile back-end left it, and the ring that a
// hostile guest keeps: the reader's promises, the tracker that goes on with both, and the part that is
// written for another back-end. Input: ring size (2 bytes), base (4 bytes), the ring's descriptors as far as
// there are bytes for them, the part.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "agent/virtio/inflight.h"
#include "agent/virtio/inflight_tracker.h"

namespace {

using namespace baton::virtio;

void Expect(bool ok) {
  if (!ok) std::abort();
}

// A ring at 0.
class Slots : public MemoryView {
 public:
  Slots(std::span<const uint8_t> bytes) : bytes_(bytes) {}
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override {
    if (gpa > bytes_.size() || size > bytes_.size() - gpa) return absl::OutOfRangeError("outside");
    std::memcpy(out, bytes_.data() + gpa, size);
    return absl::OkStatus();
  }

 private:
  std::span<const uint8_t> bytes_;
};

void Track(std::span<const uint8_t> part, const Slots& slots, const PackedRing& ring) {
  std::vector<uint64_t> words((part.size() + 7) / 8);
  std::copy(part.begin(), part.end(), reinterpret_cast<uint8_t*>(words.data()));
  const std::span<uint8_t> bytes{reinterpret_cast<uint8_t*>(words.data()), part.size()};
  InflightTracker<> tracker;
  if (!tracker.Attach(RingFormat::kPacked, bytes, ring.size).ok()) return;
  auto set = tracker.RecoverPacked(slots, ring, {0, true});
  if (!set.ok()) return;
  auto read = ReadInflightPacked(bytes, slots, ring);
  // Buffer ids may still collide: a tracker need not notice, a reader does.
  if (!read.ok()) return;
  Expect(read->Ids() == set->Ids() && read->descs == set->descs && read->repaired == 0);
  Expect(read->used == set->used && read->avail == set->avail);
  const std::vector<uint16_t> ids = set->Ids();
  Expect(tracker.BeforePublish(std::span<const uint16_t>(ids)).ok());
  tracker.AfterPublish();
  // The last counter there is cannot be followed by another.
  if (!set->empty() && set->requests.back().counter >= UINT64_MAX - 1) return;
  const InflightDesc desc[] = {{1, 2, 3, 0}};
  Expect(tracker.OnFetch(3, desc).ok());
  auto after = ReadInflightPacked(bytes, slots, ring);
  Expect(after.ok() && after->size() == 1 && after->used == set->avail);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 6) return 0;
  uint16_t ring_size;
  uint32_t base;
  std::memcpy(&ring_size, data, 2);
  std::memcpy(&base, data + 2, 4);
  std::span<const uint8_t> rest{data + 6, size - 6};
  const PackedRing ring{ring_size, 0, 1u << 20, (1u << 20) + 4};
  if (!CheckPackedGeometry(ring).ok()) return 0;
  const size_t ring_bytes = std::min<size_t>(rest.size(), PackedDescBytes(ring_size));
  const Slots slots(rest.first(ring_bytes));
  const std::span<const uint8_t> input = rest.subspan(ring_bytes);
  const std::vector<uint8_t> part(input.begin(), input.end());
  auto set = ReadInflightPacked(part, slots, ring);
  // What is expected next, at an address where nothing is ever mapped, changes nothing.
  InflightReader hinted;
  hinted.ExpectNext(reinterpret_cast<const uint8_t*>(uintptr_t{64}));
  const auto same = hinted.ReadPacked(part, slots, ring);
  Expect(same.ok() == set.ok() && (!same.ok() || hinted.Take() == *set));
  if (set.ok()) {
    Expect(CheckInflightPacked(ring_size, *set).ok());
    (void)VerifyInflightPacked(slots, ring, *set);
    auto normal = NormaliseBase(base, base <= 0xffff, ring_size, *set);
    if (normal.ok()) Expect(normal->avail == set->avail && normal->used == set->used);
    std::vector<uint8_t> other(InflightPartBytes(RingFormat::kPacked, ring_size));
    Expect(WriteInflight(other, ring_size, *set).ok());
    auto again = ReadInflightPacked(other, slots, ring);
    Expect(again.ok() && again->Ids() == set->Ids() && again->descs == set->descs &&
           again->used == set->used);
  }
  Track(part, slots, ring);
  auto in_order = InflightFromInOrderPacked(slots, ring, DecodePackedBase(base));
  if (in_order.ok()) Expect(CheckInflightPacked(ring_size, *in_order).ok());
  return 0;
}
