// A queue's part of an in-flight region, as a hostile back-end left it.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <set>

#include "agent/virtio/inflight.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 4) return 0;
  uint16_t ring_size, used;
  std::memcpy(&ring_size, data, 2);
  std::memcpy(&used, data + 2, 2);
  auto set = baton::virtio::ReadInflightSplit({data + 4, size - 4}, ring_size, used);
  if (set.ok()) {
    // What is promised of an answer.
    const std::vector<uint16_t> heads = set->Ids();
    std::set<uint16_t> unique(heads.begin(), heads.end());
    if (unique.size() != heads.size() || heads.size() > ring_size) std::abort();
    for (uint16_t head : heads) {
      if (head >= ring_size) std::abort();
    }
  }
  (void)baton::virtio::InferSplitStride(size, ring_size, used);
  return 0;
}
