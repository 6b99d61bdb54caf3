// What a driver side has made available and not yet taken back. Common to split and packed rings.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "agent/virtio/chain.h"
#include "common/status.h"

namespace baton::virtio {

// A buffer that the device has returned.
struct UsedBuffer {
  // As given to Add.
  uint64_t token = 0;
  uint16_t id = 0;
  // Bytes that the device says it wrote; of a buffer without a used element of its own all of its room.
  uint32_t len = 0;
  // Returned within a batch, without a used element of its own.
  bool skipped = false;
};

// Where a driver keeps indirect tables: one of `entries` descriptors for each entry of the ring, from `gpa`
// on, 16 * entries * ring size bytes of guest memory that the driver owns. No indirect descriptors if entries
// is 0.
struct IndirectArea {
  uint64_t gpa = 0;
  uint16_t entries = 0;
};

// One thread. Constant time per buffer, no allocation after construction.
class DriverRequests {
 public:
  explicit DriverRequests(uint16_t n) : requests_(n), order_(n) {}

  // Buffer `id` (not outstanding) was written into the ring. `writable`: the device's room. `last`: whatever
  // the ring needs to free it.
  void Begin(uint16_t id, uint64_t token, uint32_t writable, uint16_t slots, uint16_t last);
  // The device may see everything begun so far.
  void Published() { visible_ = begun_; }

  // The device says that it used `id`, or, with `in_order`, everything up to and including `id`. At most
  // `most` buffers can have been returned. STATE_MISMATCH if that cannot be.
  absl::Status Claim(uint32_t id, uint32_t len, bool in_order, uint32_t most);
  // The next buffer of what was claimed; `slots` and `last` are Begin's. False when there is none.
  bool Take(UsedBuffer* out, uint16_t* slots, uint16_t* last);

  // What was taken is exactly what was made available first.
  bool prefix() const { return taken_ == highest_; }
  uint16_t outstanding() const { return static_cast<uint16_t>(begun_ - taken_); }
  uint16_t visible_outstanding() const { return static_cast<uint16_t>(visible_ - taken_); }
  bool claimed() const { return claim_ != claim_end_; }

  // Whether restored state is one that calls could have led to. Marks in `seen` (by id) what is outstanding,
  // and sums up its slots.
  bool Consistent(std::vector<bool>* seen, uint32_t* slots) const;
  // Begin's `slots` and `last` of `id`.
  uint16_t SlotsOf(uint16_t id) const { return requests_[id].slots; }
  uint16_t LastOf(uint16_t id) const { return requests_[id].last; }

 private:
  friend class DriverState;
  struct Request {
    uint64_t token = 0;
    uint64_t sequence = 0;
    uint32_t writable = 0;
    uint16_t slots = 0;
    uint16_t last = 0;
    uint64_t outstanding = 0;
  };

  std::vector<Request> requests_;
  // Ids by sequence number modulo n. Only read where the outstanding numbers are consecutive.
  std::vector<uint16_t> order_;
  uint64_t begun_ = 0;
  uint64_t visible_ = 0;
  uint64_t taken_ = 0;
  // One more than the highest sequence number taken.
  uint64_t highest_ = 0;
  // Sequence numbers claimed; the last one is claim_id_, and has claim_len_ bytes.
  uint64_t claim_ = 0;
  uint64_t claim_end_ = 0;
  uint16_t claim_id_ = 0;
  uint32_t claim_len_ = 0;
};

// A driver's private state as bytes: the lab guest saves and loads itself. Not a wire format: both ends are
// the same program.
class DriverState {
 public:
  DriverState() = default;
  explicit DriverState(std::span<const uint8_t> bytes) : bytes_(bytes.begin(), bytes.end()) {}

  template <typename T>
  void Put(const T& value) {
    static_assert(std::has_unique_object_representations_v<T>);
    const auto* from = reinterpret_cast<const uint8_t*>(&value);
    bytes_.insert(bytes_.end(), from, from + sizeof value);
  }
  template <typename T>
  void Put(const std::vector<T>& values) {
    for (const T& value : values) Put(value);
  }
  void Put(bool value) { Put(uint8_t{value}); }
  void Put(const DriverRequests& requests);

  // False, for good, once the bytes do not suffice.
  template <typename T>
  bool Get(T* value) {
    if (bytes_.size() - at_ < sizeof *value) return false;
    std::memcpy(value, bytes_.data() + at_, sizeof *value);
    at_ += sizeof *value;
    return true;
  }
  // As many as `values` holds.
  template <typename T>
  bool Get(std::vector<T>* values) {
    for (T& value : *values) {
      if (!Get(&value)) return false;
    }
    return true;
  }
  bool Get(bool* value) {
    uint8_t byte = 0;
    if (!Get(&byte)) return false;
    *value = byte != 0;
    return true;
  }
  bool Get(DriverRequests* requests);

  bool AtEnd() const { return at_ == bytes_.size(); }
  std::vector<uint8_t> Take() { return std::move(bytes_); }

 private:
  std::vector<uint8_t> bytes_;
  size_t at_ = 0;
};

// Writes the indirect table of ring entry `id`. False if the segments do not fit or there is no area: then
// the ring's own descriptors are to be used.
template <typename Desc>
bool WriteIndirect(const GuestMemory& memory, const IndirectArea& area, uint16_t id,
                   std::span<const Segment> readable, std::span<const Segment> writable, uint64_t* gpa) {
  const size_t count = readable.size() + writable.size();
  if (count < 2 || count > area.entries) return false;
  *gpa = area.gpa + uint64_t{16} * area.entries * id;
  for (size_t i = 0; i < count; ++i) {
    const bool writes = i >= readable.size();
    const Segment& segment = writes ? writable[i - readable.size()] : readable[i];
    Desc desc{};
    desc.addr = segment.gpa;
    desc.len = segment.len;
    desc.flags = writes ? kDescWrite : 0;
    if constexpr (requires { desc.next; }) {
      if (i + 1 < count) {
        desc.flags |= kDescNext;
        desc.next = static_cast<uint16_t>(i + 1);
      }
    }
    if (!memory.Write(*gpa + 16 * i, &desc, sizeof desc).ok()) return false;
  }
  return true;
}

// Checks what Add is given: something, and no more than 2^32 - 1 bytes to write.
absl::Status CheckAdd(std::span<const Segment> readable, std::span<const Segment> writable);
// Bytes of `segments`.
uint64_t TotalBytes(std::span<const Segment> segments);

}  // namespace baton::virtio
