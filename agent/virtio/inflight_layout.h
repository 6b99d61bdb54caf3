// The in-flight region of vhost-user (INFLIGHT_SHMFD) byte by byte: shared memory in which a back-end notes
// what it has fetched and not yet completed, so that its successor can submit it again. Layouts of both ring
// formats, the kinds of back-ends that write them, and the geometry of a whole region. Pure: works on byte
// spans.
//
// A region is `num_queues` parts, one a queue, `stride` bytes apart. The specification (vhost-user.rst,
// "Inflight I/O tracking") gives the parts' layout and not the stride: that belongs to the back-end that made
// the region.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "common/status.h"

namespace baton::virtio {

enum class RingFormat : uint8_t { kSplit, kPacked };

inline constexpr uint16_t kInflightVersion = 1;

// Split rings: a header, then one entry for each descriptor of the ring; entry i belongs to the chain whose
// head is descriptor i.
struct InflightSplitHeader {
  uint64_t features;
  uint16_t version;  // 0: not initialised; 1
  uint16_t desc_num;
  uint16_t last_batch_head;  // head that was completed last; entries of one batch are linked by `next`
  uint16_t used_idx;         // used->idx as of the last batch whose flags have been cleared
};
struct InflightSplitDesc {
  uint8_t inflight;
  uint8_t padding[5];
  uint16_t next;
  uint64_t counter;  // order of fetching
};
static_assert(sizeof(InflightSplitHeader) == 16 && sizeof(InflightSplitDesc) == 16);
static_assert(offsetof(InflightSplitHeader, version) == 8 && offsetof(InflightSplitHeader, used_idx) == 14);
static_assert(offsetof(InflightSplitDesc, next) == 6 && offsetof(InflightSplitDesc, counter) == 8);

// Packed rings: 29 bytes of header, padded to 32, then `desc_num` entries. An entry holds a copy of one
// descriptor of a chain, because the ring's own slots are overwritten by completions out of order. Entries
// that are not in use form a list from free_head over `next`; its end is any value >= desc_num.
struct InflightPackedHeader {
  uint64_t features;
  uint16_t version;
  uint16_t desc_num;
  uint16_t free_head;
  uint16_t old_free_head;  // free_head before the batch or fetch that is under way
  uint16_t used_idx;
  uint16_t old_used_idx;  // the same of the used position
  uint8_t used_wrap_counter;
  uint8_t old_used_wrap_counter;
  uint8_t padding[10];
};
struct InflightPackedDesc {
  uint8_t inflight;  // of a head entry; the others keep 0
  uint8_t padding;
  uint16_t next;     // next entry of the chain, or of the free list
  uint16_t last;     // of a head entry: the chain's last entry
  uint16_t num;      // of a head entry: descriptors of the chain
  uint64_t counter;  // of a head entry: order of fetching
  uint16_t id;       // id, flags, len, addr: the descriptor as the driver wrote it
  uint16_t flags;
  uint32_t len;
  uint64_t addr;
};
static_assert(sizeof(InflightPackedHeader) == 32 && sizeof(InflightPackedDesc) == 32);
static_assert(offsetof(InflightPackedHeader, free_head) == 12 &&
              offsetof(InflightPackedHeader, used_idx) == 16 &&
              offsetof(InflightPackedHeader, used_wrap_counter) == 20 &&
              offsetof(InflightPackedHeader, old_used_wrap_counter) == 21 &&
              offsetof(InflightPackedHeader, padding) == 22);
static_assert(offsetof(InflightPackedDesc, counter) == 8 && offsetof(InflightPackedDesc, id) == 16 &&
              offsetof(InflightPackedDesc, len) == 20 && offsetof(InflightPackedDesc, addr) == 24);

// Bytes of a part that hold something.
constexpr uint64_t InflightPartBytes(RingFormat format, uint32_t n) {
  return format == RingFormat::kSplit
             ? sizeof(InflightSplitHeader) + sizeof(InflightSplitDesc) * uint64_t{n}
             : sizeof(InflightPackedHeader) + sizeof(InflightPackedDesc) * uint64_t{n};
}

// Kinds of back-ends as far as the region and the ring's base are concerned.
enum class InflightKind : uint8_t {
  kUnknown,
  kSpec,          // follows the words of the specification; Baton's lab device is one
  kLibvhostUser,  // QEMU's contrib/vhost-user-blk and others
  kDpdk,
  kSpdk,  // DPDK's region, with packed rings of its own
  kYc,    // yc-libvhost-server
};

// Which index GET_VRING_BASE answers with, and SET_VRING_BASE expects, while requests are in flight (n of
// them).
enum class BaseConvention : uint8_t {
  kNone,     // not known: nothing may be in flight
  kAvail,    // the next entry to fetch: used + n
  kUsed,     // the used index; the back-end adds n by itself
  kIgnored,  // the back-end works it out from region and ring, whatever it is told
};

// What is known of a kind (versions and sources: docs/backends.md).
struct InflightTraits {
  std::string_view name;
  bool split = false;
  bool packed = false;
  // Its recovery clears one entry of an unfinished batch (last_batch_head), not a linked list of them: who
  // writes a region for it completes one request at a time.
  bool single_completions = false;
  // Ring base at a stop with requests in flight, and at a start with requests in the region.
  BaseConvention stop_base = BaseConvention::kNone;
  BaseConvention start_base = BaseConvention::kNone;
  // GET_VRING_BASE of a packed ring carries the avail half only (DPDK).
  bool packed_base_is_16_bit = false;
};
const InflightTraits& TraitsOf(InflightKind kind);

// Bytes from one queue's part to the next in regions that this kind makes, for queues of `n` entries. 0: it
// makes none of this format.
uint64_t InflightStride(InflightKind kind, RingFormat format, uint32_t n);

// A whole region, as VhostUserInflight describes it.
struct InflightGeometry {
  RingFormat format = RingFormat::kSplit;
  uint64_t mmap_size = 0;
  uint64_t mmap_offset = 0;
  uint16_t num_queues = 0;
  uint16_t queue_size = 0;  // of the largest queue
  uint64_t stride = 0;
};

// The stride of a region that another made: it is divided evenly, and the stride is one of InflightStride's.
// InvalidArgument otherwise.
absl::StatusOr<uint64_t> InferInflightStride(RingFormat format, uint64_t mmap_size, uint16_t num_queues,
                                             uint16_t queue_size);

inline absl::StatusOr<uint64_t> InferSplitStride(uint64_t mmap_size, uint16_t num_queues,
                                                 uint16_t queue_size) {
  return InferInflightStride(RingFormat::kSplit, mmap_size, num_queues, queue_size);
}

// Checks everything that a peer says of a region before it is mapped or believed: `file_size` is st_size of
// its descriptor. (The file may shrink afterwards, which is the caller's to bear: F_SEAL_SHRINK, reads by
// pread, FragileMapping.) InvalidArgument names the value.
absl::StatusOr<InflightGeometry> CheckInflightGeometry(RingFormat format, uint64_t mmap_size,
                                                       uint64_t mmap_offset, uint16_t num_queues,
                                                       uint16_t queue_size, uint64_t file_size);

// The geometry of a region to make for a back-end of `kind`. InvalidArgument when the kind has none of this
// format or the numbers are impossible.
absl::StatusOr<InflightGeometry> MakeInflightGeometry(InflightKind kind, RingFormat format,
                                                      uint16_t num_queues, uint16_t queue_size);

// Queue `index`'s part of a mapped or copied region of this geometry. OutOfRange beyond the last queue or the
// bytes.
absl::StatusOr<std::span<uint8_t>> InflightPart(const InflightGeometry& geometry, std::span<uint8_t> region,
                                                uint16_t index);

// Judges a copy of a whole region whose maker is not known: with this geometry each part's header must say a
// version of 0 or 1 and a desc_num that is 0 or the queue size. INFLIGHT_UNKNOWN names the part that does
// not.
absl::Status ProbeInflightRegion(const InflightGeometry& geometry, std::span<const uint8_t> region);

}  // namespace baton::virtio
