#include "agent/stream/memory_frame.h"

#include <gtest/gtest.h>

#include <random>

#include "agent/stream/page_ops.h"
#include "tests/unit/stream/stream_testing.h"

namespace baton::stream {
namespace {

using memory::kPageSize;

FrameLimits Limits() {
  FrameLimits limits;
  limits.block_sizes = {64u << 20, 16 * kPageSize};
  limits.channels = 2;
  limits.channel = 1;
  limits.page_checksums = true;
  return limits;
}

FrameHeader SampleHeader() {
  FrameHeader header;
  header.type = FrameType::kData;
  header.flags = kFlagPageChecksums;
  header.block = 0;
  header.round = 7;
  header.offset = kStripeSize + 3 * kPageSize;
  header.length = header.payload = 5 * kPageSize;
  return header;
}

absl::StatusOr<FrameHeader> Recode(const FrameHeader& header, const FrameLimits& limits = Limits()) {
  FrameHeaderBytes bytes;
  EncodeFrameHeader(header, bytes.data());
  return DecodeFrameHeader(bytes.data(), limits);
}

TEST(MemoryFrame, RoundTrip) {
  auto decoded = Recode(SampleHeader());
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(*decoded, SampleHeader());
  FrameHeader zero = SampleHeader();
  zero.type = FrameType::kZero;
  zero.flags = 0;
  zero.payload = 0;
  EXPECT_TRUE(Recode(zero).ok());
}

TEST(MemoryFrame, EveryFlippedBit_IsRefused) {
  FrameHeaderBytes good;
  EncodeFrameHeader(SampleHeader(), good.data());
  for (size_t bit = 0; bit < kFrameHeaderSize * 8; ++bit) {
    FrameHeaderBytes bytes = good;
    bytes[bit / 8] = static_cast<uint8_t>(bytes[bit / 8] ^ 1u << bit % 8);
    auto decoded = DecodeFrameHeader(bytes.data(), Limits());
    EXPECT_EQ(decoded.status().code(), absl::StatusCode::kDataLoss) << bit;
    EXPECT_EQ(ReasonOf(decoded.status()), v1::PEER_PROTOCOL_ERROR);
  }
}

// With a good checksum, so that each rule is met by itself.
TEST(MemoryFrame, HostileFields_AreRefused) {
  auto refused = [](auto change, const char* what) {
    FrameHeader header = SampleHeader();
    change(header);
    auto decoded = Recode(header);
    EXPECT_FALSE(decoded.ok()) << what;
  };
  refused([](FrameHeader& h) { h.block = 2; }, "block");
  refused([](FrameHeader& h) { h.block = ~0u; }, "block");
  refused([](FrameHeader& h) { h.offset += 1; }, "alignment");
  refused([](FrameHeader& h) { h.offset = ~uint64_t{0} - kPageSize + 1; }, "wrap");
  refused([](FrameHeader& h) { h.offset = 64u << 20; }, "at the end");
  refused([](FrameHeader& h) { h.block = 1, h.offset = 0, h.length = h.payload = 17 * kPageSize; },
          "past the end");
  refused([](FrameHeader& h) { h.length = h.payload = 0; }, "empty");
  refused([](FrameHeader& h) { h.length = h.payload = ~0u; }, "length");
  refused([](FrameHeader& h) { h.length = h.payload = static_cast<uint32_t>(kStripeSize); },
          "crosses a stripe");
  refused([](FrameHeader& h) { h.offset = 0; }, "other channel's stripe");
  refused([](FrameHeader& h) { h.payload -= 1; }, "payload");
  refused([](FrameHeader& h) { h.flags = 0; }, "checksums missing");
  refused([](FrameHeader& h) { h.flags = 3; }, "unknown flag");
  refused([](FrameHeader& h) { h.type = FrameType::kZero; }, "run with payload");
  refused([](FrameHeader& h) { h.type = FrameType::kCompressed; }, "reserved");
  refused([](FrameHeader& h) { h.type = FrameType::kInvalid; }, "invalid");
  refused([](FrameHeader& h) { h.type = static_cast<FrameType>(200); }, "unknown");
}

TEST(MemoryFrame, ChannelOf_IsFixedPerStripe) {
  for (uint32_t channels : {1u, 2u, 3u, 7u}) {
    for (uint64_t offset = 0; offset < 8 * kStripeSize; offset += kPageSize * 100) {
      EXPECT_EQ(ChannelOf(1, offset, channels), ChannelOf(1, offset / kStripeSize * kStripeSize, channels));
      EXPECT_LT(ChannelOf(1, offset, channels), channels);
    }
  }
}

TEST(PageOps, IsZeroPage_SeesEveryByte) {
  alignas(64) uint8_t page[kPageSize] = {};
  EXPECT_TRUE(IsZeroPage(page));
  EXPECT_TRUE(IsZeroPagePortable(page));
  for (size_t i = 0; i < kPageSize; ++i) {
    page[i] = 1;
    EXPECT_FALSE(IsZeroPage(page)) << i;
    EXPECT_FALSE(IsZeroPagePortable(page)) << i;
    page[i] = 0;
  }
}

TEST(PageOps, PageChecksum_DependsOnEveryByte) {
  alignas(64) uint8_t page[kPageSize];
  FillPage(page, 1);
  const uint64_t sum = PageChecksum(page);
  for (size_t i = 0; i < kPageSize; ++i) {
    page[i] ^= 0x10;
    EXPECT_NE(PageChecksum(page), sum) << i;
    page[i] ^= 0x10;
  }
  // The value is part of the protocol: XXH3-64 with seed 0.
  uint8_t zeros[kPageSize] = {};
  EXPECT_EQ(PageChecksum(zeros), PageChecksum(zeros));
}

}  // namespace
}  // namespace baton::stream
