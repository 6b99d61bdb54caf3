#include "agent/stream/memory_frame.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "agent/stream/wire.h"

namespace baton::stream {
namespace {

constexpr size_t kMagicAt = 0, kTypeAt = 4, kFlagsAt = 5, kUnused1At = 6, kBlockAt = 8, kRoundAt = 12,
                 kOffsetAt = 16, kLengthAt = 24, kPayloadAt = 28, kUnused2At = 32, kHashAt = 40;
static_assert(kHashAt + 8 == kFrameHeaderSize);

template <typename... Args>
absl::Status BadFrame(fmt::format_string<Args...> format, Args&&... args) {
  return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss, "memory frame: {}",
               fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace

void EncodeFrameHeader(const FrameHeader& header, uint8_t* out) {
  StoreLe<uint32_t>(out + kMagicAt, kFrameMagic);
  out[kTypeAt] = static_cast<uint8_t>(header.type);
  out[kFlagsAt] = header.flags;
  StoreLe<uint16_t>(out + kUnused1At, 0);
  StoreLe<uint32_t>(out + kBlockAt, header.block);
  StoreLe<uint32_t>(out + kRoundAt, header.round);
  StoreLe<uint64_t>(out + kOffsetAt, header.offset);
  StoreLe<uint32_t>(out + kLengthAt, header.length);
  StoreLe<uint32_t>(out + kPayloadAt, header.payload);
  StoreLe<uint64_t>(out + kUnused2At, 0);
  StoreLe<uint64_t>(out + kHashAt, XXH3_64bits(out, kHashAt));
}

absl::StatusOr<FrameHeader> DecodeFrameHeader(const uint8_t* bytes, const FrameLimits& limits) {
  if (uint32_t magic = LoadLe<uint32_t>(bytes + kMagicAt); magic != kFrameMagic)
    return BadFrame("wrong magic {:#x}", magic);
  if (LoadLe<uint64_t>(bytes + kHashAt) != XXH3_64bits(bytes, kHashAt))
    return BadFrame("header does not match its checksum");
  FrameHeader header;
  header.type = static_cast<FrameType>(bytes[kTypeAt]);
  header.flags = bytes[kFlagsAt];
  header.block = LoadLe<uint32_t>(bytes + kBlockAt);
  header.round = LoadLe<uint32_t>(bytes + kRoundAt);
  header.offset = LoadLe<uint64_t>(bytes + kOffsetAt);
  header.length = LoadLe<uint32_t>(bytes + kLengthAt);
  header.payload = LoadLe<uint32_t>(bytes + kPayloadAt);
  if (LoadLe<uint16_t>(bytes + kUnused1At) != 0 || LoadLe<uint64_t>(bytes + kUnused2At) != 0) {
    return BadFrame("unused bytes are not zero");
  }
  if (header.block >= limits.block_sizes.size()) {
    return BadFrame("block {} of {}", header.block, limits.block_sizes.size());
  }
  if (header.length == 0 || (header.offset | header.length) % memory::kPageSize != 0) {
    return BadFrame("range {:#x}+{:#x} is empty or not page aligned", header.offset, header.length);
  }
  const uint64_t block_size = limits.block_sizes[header.block];
  if (header.offset >= block_size || header.length > block_size - header.offset) {
    return BadFrame("range {:#x}+{:#x} lies outside block {} of {:#x} bytes", header.offset, header.length,
                    header.block, block_size);
  }
  if (header.offset % kStripeSize + header.length > kStripeSize) {
    return BadFrame("range {:#x}+{:#x} crosses a stripe", header.offset, header.length);
  }
  if (uint32_t owner = ChannelOf(header.block, header.offset, limits.channels); owner != limits.channel) {
    return BadFrame("offset {:#x} of block {} belongs to channel {}, not {}", header.offset, header.block,
                    owner + 1, limits.channel + 1);
  }
  switch (header.type) {
    case FrameType::kData: {
      if (header.payload != header.length)
        return BadFrame("payload {} for a length of {}", header.payload, header.length);
      const uint8_t expected = limits.page_checksums ? kFlagPageChecksums : 0;
      if (header.flags != expected) return BadFrame("flags {:#x}, agreed were {:#x}", header.flags, expected);
      break;
    }
    case FrameType::kZero:
    case FrameType::kFree:
      if (header.payload != 0) return BadFrame("payload {} for a run", header.payload);
      if (header.flags != 0) return BadFrame("flags {:#x} for a run", header.flags);
      break;
    default:
      return BadFrame("type {}", static_cast<unsigned>(header.type));
  }
  return header;
}

}  // namespace baton::stream
