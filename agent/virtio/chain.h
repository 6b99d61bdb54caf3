// A buffer that the driver made available: a chain of descriptors, checked and resolved.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <vector>

#include "agent/virtio/guest_memory.h"
#include "agent/virtio/ring_access.h"
#include "common/status.h"

namespace baton::virtio {

// A piece of a buffer, in guest physical memory.
struct Segment {
  uint64_t gpa = 0;
  uint32_t len = 0;
  friend bool operator==(const Segment&, const Segment&) = default;
};

// Descriptors of one chain, those of an indirect table included: VIRTIO allows the queue size; QEMU 1024
// whatever the queue size, and Linux makes indirect tables by the device's seg_max rather than by the queue.
constexpr uint32_t MaxChain(uint16_t queue_size) { return queue_size > 1024 ? queue_size : 1024; }

// Reusable: popping into the same Chain allocates nothing once its vectors have grown.
struct Chain {
  // What the used element will name: the head descriptor of a split ring, the buffer id of a packed one.
  uint16_t id = 0;
  // Slots it takes in the ring: of the avail ring of a split ring 1, of a packed ring its descriptors.
  uint16_t slots = 0;
  // Order of fetching in this queue object, from 0.
  uint64_t sequence = 0;
  // The first `readable` segments are read by the device, the others written. Descriptors of no bytes are
  // left out.
  std::vector<Segment> segments;
  uint32_t readable = 0;
  uint64_t readable_bytes = 0;
  uint64_t writable_bytes = 0;
  // Packed rings: the ring's descriptors as they were fetched, for an in-flight region, which keeps them
  // because the slots may be overwritten.
  std::vector<PackedDesc> descriptors;

  std::span<const Segment> Readable() const { return {segments.data(), readable}; }
  std::span<const Segment> Writable() const { return std::span<const Segment>(segments).subspan(readable); }
};

// Appends where the segments are mapped; a segment across adjoining regions becomes several. OutOfRange when
// any byte lies outside guest memory.
absl::Status AppendIovecs(const GuestMemory& memory, std::span<const Segment> segments,
                          std::vector<iovec>* out);

// Copies up to `size` bytes of the segments' bytes from `offset` on; returns how many there were. OutOfRange
// as above.
absl::StatusOr<size_t> CopyFromSegments(const GuestMemory& memory, std::span<const Segment> segments,
                                        uint64_t offset, void* out, size_t size);
absl::StatusOr<size_t> CopyToSegments(const GuestMemory& memory, std::span<const Segment> segments,
                                      uint64_t offset, const void* bytes, size_t size);

// The rules that every chain obeys, applied one descriptor after the other (VIRTIO 2.7.4.2, 2.7.5.1): what
// the device writes comes after what it reads, at most MaxChain descriptors, at most 2^32 bytes.
class ChainBuilder {
 public:
  // Clears `chain`, which must outlive the builder.
  ChainBuilder(Chain* chain, uint16_t queue_size);

  absl::Status Add(uint64_t addr, uint32_t len, bool device_writes);

  // Adds an indirect table of `bytes` at `addr`. Split tables are linked by `next` from entry 0 (2.7.5.3); of
  // packed tables every entry counts (2.8.8). `scratch` is a buffer that the caller keeps.
  absl::Status AddSplitTable(const GuestMemory& memory, uint64_t addr, uint32_t bytes,
                             std::vector<SplitDesc>* scratch);
  absl::Status AddPackedTable(const GuestMemory& memory, uint64_t addr, uint32_t bytes,
                              std::vector<PackedDesc>* scratch);

 private:
  Chain* const chain_;
  const uint32_t limit_;
  uint32_t count_ = 0;
};

}  // namespace baton::virtio
