#include "agent/virtio/inflight_layout.h"

#include <cstring>

#include "agent/virtio/split_ring.h"

namespace baton::virtio {
namespace {

constexpr uint64_t Align64(uint64_t value) { return (value + 63) / 64 * 64; }

// DPDK adds up a packed header's fields, without the padding at its end: 29 bytes. libvhost-user's 16 n + 2
// of a split region gives the same as 16 n + 16 for every n.
constexpr uint64_t kPackedHeaderFields = 29;

constexpr uint64_t RoundedStride(RingFormat format, uint32_t n) {
  return format == RingFormat::kSplit
             ? Align64(InflightPartBytes(format, n))
             : Align64(kPackedHeaderFields + sizeof(InflightPackedDesc) * uint64_t{n});
}

constexpr InflightTraits kTraits[] = {
    {.name = "unknown"},
    {.name = "specification",
     .split = true,
     .packed = true,
     .stop_base = BaseConvention::kAvail,
     .start_base = BaseConvention::kAvail},
    {.name = "libvhost-user",
     .split = true,
     .single_completions = true,
     .stop_base = BaseConvention::kAvail,
     .start_base = BaseConvention::kIgnored},
    {.name = "DPDK",
     .split = true,
     .packed = true,
     .single_completions = true,
     .stop_base = BaseConvention::kUsed,
     .start_base = BaseConvention::kUsed,
     .packed_base_is_16_bit = true},
    {.name = "SPDK",
     .split = true,
     .packed = true,
     .single_completions = true,
     .stop_base = BaseConvention::kUsed,
     .start_base = BaseConvention::kUsed,
     .packed_base_is_16_bit = true},
    {.name = "yc-libvhost-server",
     .split = true,
     .stop_base = BaseConvention::kUsed,
     .start_base = BaseConvention::kUsed},
};

absl::Status Invalid(const std::string& what) {
  return Error(absl::StatusCode::kInvalidArgument, "in-flight region: {}", what);
}

absl::Status CheckCounts(uint16_t num_queues, uint16_t queue_size) {
  if (num_queues == 0) return Invalid("no queues");
  if (queue_size == 0 || queue_size > kMaxRingSize) return Invalid(fmt::format("queues of {}", queue_size));
  return absl::OkStatus();
}

}  // namespace

const InflightTraits& TraitsOf(InflightKind kind) { return kTraits[static_cast<size_t>(kind)]; }

uint64_t InflightStride(InflightKind kind, RingFormat format, uint32_t n) {
  const InflightTraits& traits = TraitsOf(kind);
  if (!(format == RingFormat::kSplit ? traits.split : traits.packed)) return 0;
  return kind == InflightKind::kYc ? InflightPartBytes(format, n) : RoundedStride(format, n);
}

absl::StatusOr<uint64_t> InferInflightStride(RingFormat format, uint64_t mmap_size, uint16_t num_queues,
                                             uint16_t queue_size) {
  RETURN_IF_ERROR(CheckCounts(num_queues, queue_size));
  if (mmap_size % num_queues) {
    return Invalid(fmt::format("{} bytes cannot be divided among {} queues", mmap_size, num_queues));
  }
  const uint64_t stride = mmap_size / num_queues;
  const uint64_t rounded = RoundedStride(format, queue_size);
  const uint64_t plain = format == RingFormat::kSplit ? InflightPartBytes(format, queue_size) : rounded;
  if (stride != plain && stride != rounded) {
    return Invalid(fmt::format("{} bytes a queue of {} entries is no known layout ({} or {})", stride,
                               queue_size, plain, rounded));
  }
  return stride;
}

absl::StatusOr<InflightGeometry> CheckInflightGeometry(RingFormat format, uint64_t mmap_size,
                                                       uint64_t mmap_offset, uint16_t num_queues,
                                                       uint16_t queue_size, uint64_t file_size) {
  ASSIGN_OR_RETURN(uint64_t stride, InferInflightStride(format, mmap_size, num_queues, queue_size));
  if (mmap_offset > file_size || mmap_size > file_size - mmap_offset) {
    return Invalid(
        fmt::format("{} bytes at offset {} do not fit into a file of {}", mmap_size, mmap_offset, file_size));
  }
  // The trackers' 64-bit stores.
  if (mmap_offset % alignof(uint64_t))
    return Invalid(fmt::format("offset {} is not aligned to 8", mmap_offset));
  return InflightGeometry{format, mmap_size, mmap_offset, num_queues, queue_size, stride};
}

absl::StatusOr<InflightGeometry> MakeInflightGeometry(InflightKind kind, RingFormat format,
                                                      uint16_t num_queues, uint16_t queue_size) {
  RETURN_IF_ERROR(CheckCounts(num_queues, queue_size));
  const uint64_t stride = InflightStride(kind, format, queue_size);
  if (stride == 0) {
    return Invalid(fmt::format("a back-end of kind {} has none for {} rings", TraitsOf(kind).name,
                               format == RingFormat::kSplit ? "split" : "packed"));
  }
  return InflightGeometry{format, stride * num_queues, 0, num_queues, queue_size, stride};
}

absl::StatusOr<std::span<uint8_t>> InflightPart(const InflightGeometry& geometry, std::span<uint8_t> region,
                                                uint16_t index) {
  if (index >= geometry.num_queues || region.size() < geometry.stride * (uint64_t{index} + 1)) {
    return Error(absl::StatusCode::kOutOfRange,
                 "queue {} has no place in an in-flight region of {} queues and {} bytes", index,
                 geometry.num_queues, region.size());
  }
  return region.subspan(geometry.stride * index, geometry.stride);
}

absl::Status ProbeInflightRegion(const InflightGeometry& geometry, std::span<const uint8_t> region) {
  for (uint16_t i = 0; i < geometry.num_queues; ++i) {
    // Version and desc_num are at the same place in both formats.
    uint16_t words[2];
    const uint64_t at = geometry.stride * i + offsetof(InflightSplitHeader, version);
    if (region.size() < at + sizeof words) {
      return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                   "in-flight region: {} bytes end before queue {}", region.size(), i);
    }
    std::memcpy(words, region.data() + at, sizeof words);
    if (words[0] > kInflightVersion || (words[1] != 0 && words[1] != geometry.queue_size)) {
      return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                   "in-flight region: queue {} has version {} and {} entries, expected version 0 or 1 and {} "
                   "entries: the layout is not the one supposed",
                   i, words[0], words[1], geometry.queue_size);
    }
  }
  return absl::OkStatus();
}

}  // namespace baton::virtio
