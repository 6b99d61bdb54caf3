#include "agent/virtio/inflight.h"

#include <algorithm>
#include <cstring>

namespace baton::virtio {
namespace {

constexpr uint64_t Align64(uint64_t value) { return (value + 63) / 64 * 64; }

absl::Status Bad(const std::string& what) {
  return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition, "in-flight region: {}", what);
}

}  // namespace

absl::StatusOr<uint64_t> InferSplitStride(uint64_t mmap_size, uint16_t num_queues, uint16_t queue_size) {
  auto invalid = [](const std::string& what) {
    return absl::InvalidArgumentError("in-flight region: " + what);
  };
  if (num_queues == 0 || queue_size == 0) return invalid("no queues");
  if (mmap_size % num_queues) {
    return invalid(fmt::format("{} bytes cannot be divided among {} queues", mmap_size, num_queues));
  }
  uint64_t stride = mmap_size / num_queues;
  uint64_t plain = sizeof(InflightSplitHeader) + sizeof(InflightSplitDesc) * uint64_t{queue_size};
  if (stride != plain && stride != Align64(plain)) {
    return invalid(fmt::format("{} bytes a queue of {} entries is no known layout ({} or {})", stride,
                               queue_size, plain, Align64(plain)));
  }
  return stride;
}

absl::Status InitInflightSplit(std::span<uint8_t> part, uint16_t desc_num, uint16_t used_idx) {
  uint64_t need = sizeof(InflightSplitHeader) + sizeof(InflightSplitDesc) * uint64_t{desc_num};
  if (part.size() < need) {
    return Error(absl::StatusCode::kInvalidArgument, "in-flight region: {} bytes for {} entries, {} needed",
                 part.size(), desc_num, need);
  }
  std::memset(part.data(), 0, part.size());
  InflightSplitHeader header{
      .features = 0, .version = 1, .desc_num = desc_num, .last_batch_head = 0, .used_idx = used_idx};
  std::memcpy(part.data(), &header, sizeof header);
  return absl::OkStatus();
}

absl::StatusOr<InflightSet> ReadInflightSplit(std::span<const uint8_t> part, uint16_t ring_size,
                                              uint16_t used_idx) {
  InflightSplitHeader header;
  if (part.size() < sizeof header) return Bad(fmt::format("{} bytes are too few for a header", part.size()));
  std::memcpy(&header, part.data(), sizeof header);
  InflightSet out;
  out.last_avail = used_idx;
  if (header.version == 0) return out;
  if (header.version != 1) return Bad(fmt::format("unknown version {}", header.version));
  const uint16_t n = header.desc_num;
  if (n == 0) return out;
  if (part.size() < sizeof header + sizeof(InflightSplitDesc) * uint64_t{n}) {
    return Bad(fmt::format("desc_num {} does not fit into {} bytes", n, part.size()));
  }
  std::vector<InflightSplitDesc> desc(n);
  std::memcpy(desc.data(), part.data() + sizeof header, sizeof(InflightSplitDesc) * size_t{n});
  if (header.last_batch_head >= n)
    return Bad(fmt::format("last_batch_head {} of {}", header.last_batch_head, n));
  for (uint16_t i = 0; i < n; ++i) {
    if (desc[i].inflight > 1)
      return Bad(fmt::format("flag {} of entry {} is neither 0 nor 1", desc[i].inflight, i));
    if (desc[i].inflight && i >= ring_size)
      return Bad(fmt::format("entry {} is in flight in a ring of {}", i, ring_size));
  }
  // Completions published in the ring whose flags the back-end had no time to clear: the last batch, linked
  // from last_batch_head.
  const uint16_t published = static_cast<uint16_t>(used_idx - header.used_idx);
  if (published > ring_size) {
    return Bad(fmt::format("used_idx {} is {} behind the ring's {}, more than its {} entries",
                           header.used_idx, published, used_idx, ring_size));
  }
  uint16_t entry = header.last_batch_head;
  for (uint16_t k = 0; k < published; ++k) {
    if (entry >= n) return Bad(fmt::format("the list of the last batch leads to entry {} of {}", entry, n));
    out.repaired += desc[entry].inflight;
    desc[entry].inflight = 0;
    entry = desc[entry].next;
  }
  for (uint16_t i = 0; i < n; ++i) {
    if (desc[i].inflight) out.heads.push_back(i);
  }
  if (out.heads.size() > ring_size)
    return Bad(fmt::format("{} in flight in a ring of {}", out.heads.size(), ring_size));
  std::stable_sort(out.heads.begin(), out.heads.end(),
                   [&](uint16_t a, uint16_t b) { return desc[a].counter < desc[b].counter; });
  out.last_avail = static_cast<uint16_t>(used_idx + out.heads.size());
  return out;
}

}  // namespace baton::virtio
