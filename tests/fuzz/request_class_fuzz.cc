// Requests in flight as a hostile guest wrote them: what they are read as, and the order in which they are
// replayed. Input: number of requests (1 byte, at most 16), guest memory from address 0, where a split ring
// of 16 begins.
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
  explicit Memory(std::span<const uint8_t> bytes) : bytes_(bytes) {}
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override {
    if (gpa > bytes_.size() || size > bytes_.size() - gpa) return absl::OutOfRangeError("outside");
    std::memcpy(out, bytes_.data() + gpa, size);
    return absl::OkStatus();
  }

 private:
  std::span<const uint8_t> bytes_;
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
  const Memory memory({data + 1, size - 1});
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
    const ClassesPresent read = ReadClasses(memory, 0, 16, *set, baton::v1::BLK);
    Expect(read.reads == classes.reads && read.writes == classes.writes &&
           read.not_idempotent == classes.not_idempotent);
    for (const BlkRequest& r : requests) {
      for (const Extent& e : r.extents) Expect(e.first <= e.end);
      Expect(r.extents.size() <= kMaxExtents);
    }
    Replay(requests);
  }
  return 0;
}
