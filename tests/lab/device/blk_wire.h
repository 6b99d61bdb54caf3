// A block device's requests as they lie in guest memory, and getting at them. Internal to the block model.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "agent/virtio/features.h"
#include "tests/lab/device/device_model.h"

namespace baton::lab::blk {

inline constexpr uint64_t kSector = 512;
inline constexpr uint32_t kMaxSegments = 128;
inline constexpr uint32_t kMaxDiscardSectors = 1u << 22;
inline constexpr uint32_t kMaxDiscardSegments = 16;

// Features (VIRTIO 1.x 5.2.3).
inline constexpr uint64_t kFSegMax = virtio::Bit(2), kFBlkSize = virtio::Bit(6), kFFlush = virtio::Bit(9),
                          kFConfigWce = virtio::Bit(11), kFMq = virtio::Bit(12), kFDiscard = virtio::Bit(13),
                          kFWriteZeroes = virtio::Bit(14), kFZoned = virtio::Bit(17);
enum Type : uint32_t {
  kIn = 0,
  kOut = 1,
  kFlush = 4,
  kGetId = 8,
  kDiscard = 11,
  kWriteZeroes = 13,
  kZoneAppend = 15,
  kZoneReport = 16,
  kZoneReset = 24,
};
enum Status : uint8_t { kOk = 0, kIoErr = 1, kUnsupp = 2, kZoneInvalidCmd = 3 };
inline constexpr uint32_t kUnmap = 1;
inline constexpr size_t kIdBytes = 20;
// Offsets within the config space (VIRTIO 1.x 5.2.4).
inline constexpr uint32_t kWritebackAt = 32;

struct RequestHeader {
  uint32_t type;
  uint32_t reserved;
  uint64_t sector;
};
struct ZoneReportHeader {
  uint64_t zones;
  uint8_t reserved[56];
};
struct ZoneDescriptor {
  uint64_t capacity, start, write_pointer;
  uint8_t type, state;
  uint8_t reserved[38];
};
static_assert(sizeof(ZoneReportHeader) == 64 && sizeof(ZoneDescriptor) == 64);

// Copies up to `size` bytes from `offset` of the chain's readable part; false if there are fewer.
inline bool CopyOut(const IoRequest& io, uint64_t offset, void* out, size_t size) {
  auto* to = static_cast<uint8_t*>(out);
  for (const IoSegment& s : io.readable) {
    if (offset >= s.len) {
      offset -= s.len;
      continue;
    }
    const size_t part = std::min<uint64_t>(size, s.len - offset);
    std::memcpy(to, s.data + offset, part);
    to += part;
    size -= part;
    offset = 0;
    if (size == 0) return true;
  }
  return size == 0;
}

// Copies into the writable part; returns what fitted.
inline size_t CopyIn(const IoRequest& io, uint64_t offset, const void* in, size_t size) {
  const auto* from = static_cast<const uint8_t*>(in);
  size_t copied = 0;
  for (const IoSegment& s : io.writable) {
    if (offset >= s.len) {
      offset -= s.len;
      continue;
    }
    const size_t part = std::min<uint64_t>(size - copied, s.len - offset);
    std::memcpy(s.data + offset, from + copied, part);
    copied += part;
    offset = 0;
    if (copied == size) break;
  }
  return copied;
}

inline bool TakesSpace(uint32_t type) {
  return type == kOut || type == kDiscard || type == kWriteZeroes || type == kZoneAppend;
}
inline bool IsIdempotent(uint32_t type) { return type != kZoneAppend && type != kZoneReset; }

}  // namespace baton::lab::blk
