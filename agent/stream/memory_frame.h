// The frames of channels 1..N: pages of guest memory. Pure.
//
//   offset size
//        0    4  magic 0x314d4642 ("BFM1")
//        4    1  type                               all integers little endian
//        5    1  flags
//        6    2  zero
//        8    4  block: index in PeerHello.blocks
//       12    4  round
//       16    8  offset in the block, bytes
//       24    4  length, bytes of guest memory
//       28    4  payload: bytes of data that follow (data: = length; runs: 0)
//       32    8  zero
//       40    8  XXH3-64 of bytes 0..39
//
// then, if flag kPageChecksums is set, a XXH3-64 for each page (length / 4096 × 8 bytes), then the data. A
// frame lies within one stripe of 2 MiB of its block, and a stripe always travels on the same channel: so an
// older copy of a page never overtakes a newer one, and two channels never write the same page.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "agent/memory/page_set.h"
#include "common/status.h"

namespace baton::stream {

inline constexpr size_t kFrameHeaderSize = 48;
inline constexpr uint32_t kFrameMagic = 0x314d4642;
inline constexpr uint64_t kStripeSize = 2u << 20;
inline constexpr uint64_t kPagesPerStripe = kStripeSize / memory::kPageSize;

enum class FrameType : uint8_t {
  kInvalid = 0,
  // `length` bytes of memory follow.
  kData = 1,
  // The range holds zeroes; nothing follows.
  kZero = 2,
  // The guest does not use the range: its content may become anything, best a hole. Nothing follows.
  kFree = 3,
  // Reserved for compressed data; refused in version 1.
  kCompressed = 4,
};

inline constexpr uint8_t kFlagPageChecksums = 1;

struct FrameHeader {
  FrameType type = FrameType::kInvalid;
  uint8_t flags = 0;
  uint32_t block = 0;
  uint32_t round = 0;
  uint64_t offset = 0;
  uint32_t length = 0;
  uint32_t payload = 0;

  uint64_t first_page() const { return offset / memory::kPageSize; }
  uint32_t pages() const { return length / static_cast<uint32_t>(memory::kPageSize); }
  bool operator==(const FrameHeader&) const = default;
};

using FrameHeaderBytes = std::array<uint8_t, kFrameHeaderSize>;

// Writes kFrameHeaderSize bytes to `out`. The header must be one that DecodeFrameHeader accepts.
void EncodeFrameHeader(const FrameHeader& header, uint8_t* out);

// What the receiver of one channel knows.
struct FrameLimits {
  std::vector<uint64_t> block_sizes;  // bytes
  uint32_t channels = 1;              // data channels of the migration
  uint32_t channel = 0;               // this one, counted from 0
  bool page_checksums = false;        // data frames must carry them, or must not
};

// Reads kFrameHeaderSize bytes. DataLoss (Reason PEER_PROTOCOL_ERROR) that says which field is wrong if
// anything is: magic, checksum, type, flags, unused bytes, alignment, a range outside its block or its
// stripe, a stripe of another channel, a payload that does not fit the type.
absl::StatusOr<FrameHeader> DecodeFrameHeader(const uint8_t* bytes, const FrameLimits& limits);

// The data channel (from 0) that carries a range of memory.
inline uint32_t ChannelOf(uint32_t block, uint64_t offset, uint32_t channels) {
  return static_cast<uint32_t>((block + offset / kStripeSize) % channels);
}

}  // namespace baton::stream
