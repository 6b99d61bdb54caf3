// What requests in flight are, as far as submitting them a second time is concerned: read from guest memory.
//
// Security model: header and segments are the guest's. Each value is read once; a request that cannot be
// read, or of a type that is not known, is of the class that allows nothing.
#pragma once

#include <absl/container/inlined_vector.h>

#include <cstdint>
#include <span>

#include "baton/v1/vm_spec.pb.h"

namespace baton::virtio {

// Types of virtio-blk requests (VIRTIO 5.2.6).
inline constexpr uint32_t kBlkIn = 0;
inline constexpr uint32_t kBlkOut = 1;
inline constexpr uint32_t kBlkFlush = 4;
inline constexpr uint32_t kBlkGetId = 8;
inline constexpr uint32_t kBlkGetLifetime = 10;
inline constexpr uint32_t kBlkDiscard = 11;
inline constexpr uint32_t kBlkWriteZeroes = 13;
inline constexpr uint32_t kBlkSecureErase = 14;
inline constexpr uint32_t kBlkZoneAppend = 15;
inline constexpr uint32_t kBlkZoneReport = 16;
inline constexpr uint32_t kBlkZoneOpen = 18;
inline constexpr uint32_t kBlkZoneClose = 20;
inline constexpr uint32_t kBlkZoneFinish = 22;
inline constexpr uint32_t kBlkZoneReset = 24;
inline constexpr uint32_t kBlkZoneResetAll = 26;

enum class RequestClass : uint8_t {
  // Changes nothing but the guest's own buffer.
  kRead,
  // May be done twice: what it leaves is undefined until it is completed (and flushed), and the same
  // afterwards.
  kIdempotentWrite,
  // Doing it twice differs from doing it once, or it is not known what it does.
  kNotIdempotent,
};

// Sectors of 512 bytes, [first, end).
struct Extent {
  uint64_t first = 0;
  uint64_t end = 0;
  bool Overlaps(const Extent& other) const { return first < other.end && other.first < end; }
  friend bool operator==(const Extent&, const Extent&) = default;
};

struct BlkRequest {
  RequestClass cls = RequestClass::kNotIdempotent;
  uint32_t type = 0xffffffff;
  // What it reads or writes. Sorted by nothing; of a discard or write-zeroes one a segment, at most
  // kMaxExtents, beyond which one extent spans them all. Nearly every request has just one.
  absl::InlinedVector<Extent, 1> extents;

  bool writes() const { return cls != RequestClass::kRead; }
  bool flush() const { return type == kBlkFlush; }
};

// The class of a request of this type.
constexpr RequestClass BlkClassOf(uint32_t type) {
  switch (type) {
    case kBlkIn:
    case kBlkGetId:
    case kBlkGetLifetime:
    case kBlkZoneReport:
      return RequestClass::kRead;
    case kBlkOut:
    case kBlkFlush:
    case kBlkDiscard:
    case kBlkWriteZeroes:
    case kBlkSecureErase:
      return RequestClass::kIdempotentWrite;
    default:
      return RequestClass::kNotIdempotent;
  }
}

// What ClassifyBlk wants to see of a request: header, and the segments of a discard. Of a request with more
// segments than that, all the disk counts as touched.
inline constexpr size_t kBlkHeaderBytes = 16;
inline constexpr size_t kMaxExtents = 256;
inline constexpr size_t kBlkHeadBytes = kBlkHeaderBytes + 16 * kMaxExtents;

// `head`: a copy of the first bytes of the request's device-readable part, all of it or kBlkHeadBytes; and
// the bytes of both parts, the header and the status byte included.
BlkRequest ClassifyBlk(std::span<const uint8_t> head, uint64_t readable_bytes, uint64_t writable_bytes);

// Whether two requests touch the same sector and one of them writes. What is not idempotent conflicts with
// all.
bool Conflicts(const BlkRequest& a, const BlkRequest& b);

// What is in flight in a queue or a device, for the decision whether it may be handed off (handoff.h).
struct ClassesPresent {
  bool reads = false;
  bool writes = false;
  bool not_idempotent = false;
  // Only what may be lost or done twice without harm, as network frames and buffers.
  bool harmless = false;

  void Add(RequestClass cls) {
    reads |= cls == RequestClass::kRead;
    writes |= cls == RequestClass::kIdempotentWrite;
    not_idempotent |= cls == RequestClass::kNotIdempotent;
  }
  ClassesPresent& operator|=(const ClassesPresent& other);
  bool none() const { return !reads && !writes && !not_idempotent && !harmless; }
};

// Requests in flight of a device of `device_class`, whatever they are in detail: a network device's are
// harmless; of a class whose requests Baton cannot read (file systems, SCSI, unknown) they are not
// idempotent.
ClassesPresent ClassesOf(v1::DeviceClass device_class, size_t in_flight);

}  // namespace baton::virtio
