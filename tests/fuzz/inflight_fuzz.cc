// A queue's part of an in-flight region of a split ring, as a hostile back-end left it: the reader's
// promises, the tracker that goes on with it, and the part that is written for another back-end. Input: ring
// size (2 bytes), used->idx (2 bytes), the part.
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

void Check(std::span<const uint8_t> input, uint16_t ring_size, uint16_t used, BatchRule rule) {
  const std::vector<uint8_t> part(input.begin(), input.end());
  auto set = ReadInflightSplit(part, ring_size, used, rule);
  if (!set.ok()) return;
  // Nothing more is available than in flight.
  Expect(CheckInflightSplit(ring_size, {.avail = set->last_avail(), .used = used}, *set).ok());
  if (ring_size == 0 || ring_size > kMaxRingSize) return;
  // Written for another back-end, it is found again.
  std::vector<uint8_t> other(InflightPartBytes(RingFormat::kSplit, ring_size));
  Expect(WriteInflight(other, ring_size, *set).ok());
  auto again = ReadInflightSplit(other, ring_size, used, BatchRule::kSingle);
  Expect(again.ok() && again->Ids() == set->Ids() && again->repaired == 0);
}

void Track(std::span<const uint8_t> part, uint16_t ring_size, uint16_t used) {
  std::vector<uint64_t> words((part.size() + 7) / 8);
  std::copy(part.begin(), part.end(), reinterpret_cast<uint8_t*>(words.data()));
  const std::span<uint8_t> bytes{reinterpret_cast<uint8_t*>(words.data()), part.size()};
  InflightTracker<> tracker;
  if (!tracker.Attach(RingFormat::kSplit, bytes, ring_size).ok()) return;
  auto set = tracker.RecoverSplit(used);
  auto read = ReadInflightSplit(bytes, ring_size, used);
  Expect(set.ok() == read.ok());
  if (!set.ok()) return;
  Expect(read->Ids() == set->Ids() && read->repaired == 0);
  for (uint16_t id : set->Ids()) Expect(!tracker.OnFetch(id).ok());
  const std::vector<uint16_t> ids = set->Ids();
  Expect(tracker.BeforePublish(std::span<const uint16_t>(ids)).ok());
  tracker.AfterPublish();
  Expect(tracker.in_flight() == 0);
  Expect(ReadInflightSplit(bytes, ring_size, static_cast<uint16_t>(used + ids.size()))->empty());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 4) return 0;
  uint16_t ring_size, used;
  std::memcpy(&ring_size, data, 2);
  std::memcpy(&used, data + 2, 2);
  const std::span<const uint8_t> part{data + 4, size - 4};
  Check(part, ring_size, used, BatchRule::kLinked);
  Check(part, ring_size, used, BatchRule::kSingle);
  Track(part, ring_size, used);
  (void)InferSplitStride(size, ring_size, used);
  return 0;
}
