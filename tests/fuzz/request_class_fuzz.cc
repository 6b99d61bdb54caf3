// Requests in flight as a hostile guest wrote them: what they are read as, and the order in which they are
// replayed. Input: number of requests (1 byte, at most 16), guest memory from address 0, where a split ring
// of 16 begins.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "agent/virtio/blk_in_flight.h"
#include "agent/virtio/replay_order.h"

namespace {

using namespace baton::virtio;

void Expect(bool ok) {
  if (!ok) std::abort();
}

class Memory : public MemoryView {
 public:
  // `mapped`: its bytes themselves can be had, too.
  Memory(std::span<const uint8_t> bytes, bool mapped) : bytes_(bytes), mapped_(mapped) {}
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override {
    if (gpa > bytes_.size() || size > bytes_.size() - gpa) return absl::OutOfRangeError("outside");
    std::memcpy(out, bytes_.data() + gpa, size);
    return absl::OkStatus();
  }
  Piece PieceAt(uint64_t gpa) const override {
    return mapped_ && gpa < bytes_.size() ? Piece{0, bytes_.size(), bytes_.data()} : Piece{};
  }

 private:
  std::span<const uint8_t> bytes_;
  const bool mapped_;
};

// Everything gets its turn, and nothing before what it conflicts with.
void Replay(const std::vector<BlkRequest>& requests) {
  ReplayOrder order(requests);
  std::vector<bool> done(requests.size());
  std::vector<size_t> running;
  for (size_t left = requests.size(); left; --left) {
    for (size_t i; order.Next(&i);) {
      for (size_t k = 0; k < i; ++k) Expect(done[k] || !Conflicts(requests[k], requests[i]));
      running.push_back(i);
    }
    Expect(!running.empty());
    // The youngest first: as far from the order as a device may be.
    const size_t i = running.back();
    running.pop_back();
    done[i] = true;
    order.Completed(i);
  }
  Expect(order.done() && order.MayStart(BlkRequest()));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  const Memory memory({data + 1, size - 1}, false), mapped({data + 1, size - 1}, true);
  InflightSet split, packed;
  packed.format = RingFormat::kPacked;
  for (uint16_t head = 0; head < data[0] % 17; ++head) {
    split.requests.push_back({head, 0, 0, head + uint64_t{1}});
    InflightDesc desc;
    if (!memory.Read(uint64_t{16} * head, &desc, sizeof desc).ok()) continue;
    packed.requests.push_back({head, 1, static_cast<uint32_t>(packed.descs.size()), head + uint64_t{1}});
    packed.descs.push_back(desc);
  }
  for (const InflightSet* set : {&split, &packed}) {
    const auto requests = ReadBlkRequests(memory, 0, 16, *set);
    Expect(requests.size() == set->size());
    ClassesPresent classes;
    for (const BlkRequest& r : requests) classes.Add(r.cls);
    std::vector<GuestSpan> wanted;
    (void)ReadBlkRequests(memory, 0, 16, *set, &wanted);
    // The short way for plain requests of mapped memory says the same as the long one.
    for (const Memory* view : {&memory, &mapped}) {
      std::vector<GuestSpan> buffers;
      const ClassesPresent read = ReadClasses(*view, 0, 16, *set, baton::v1::BLK, &buffers);
      Expect(read.reads == classes.reads && read.writes == classes.writes &&
             read.not_idempotent == classes.not_idempotent);
      Expect(std::equal(
          buffers.begin(), buffers.end(), wanted.begin(), wanted.end(),
          [](const GuestSpan& a, const GuestSpan& b) { return a.gpa == b.gpa && a.size == b.size; }));
    }
    for (const BlkRequest& r : requests) {
      for (const Extent& e : r.extents) Expect(e.first <= e.end);
      Expect(r.extents.size() <= kMaxExtents);
    }
    Replay(requests);
  }
  return 0;
}
