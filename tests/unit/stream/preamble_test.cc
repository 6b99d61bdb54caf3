#include "agent/stream/preamble.h"

#include <gtest/gtest.h>

#include <thread>

#include "agent/stream/dial.h"
#include "tests/unit/stream/stream_testing.h"

namespace baton::stream {
namespace {

Preamble SamplePreamble() {
  Preamble preamble;
  preamble.kind = PreambleKind::kChannel;
  preamble.channel = 3;
  preamble.migration_id = "0b8f6a52-5d0e-4b53-9d3c-5f3c2f1f0a11";
  for (size_t i = 0; i < kTokenSize; ++i) preamble.token[i] = static_cast<uint8_t>(i * 7);
  return preamble;
}

PreambleBytes SampleBytes() { return EncodePreamble(SamplePreamble()).value(); }

TEST(Preamble, RoundTrip) {
  auto decoded = DecodePreamble(SampleBytes());
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(*decoded, SamplePreamble());

  Preamble query = SamplePreamble();
  query.kind = PreambleKind::kVerdictQuery;
  query.channel = 0;
  query.migration_id = std::string(kMaxMigrationId, 'x');
  EXPECT_EQ(*DecodePreamble(*EncodePreamble(query)), query);

  for (uint32_t service = 1; service <= kMaxTunnelService; ++service) {
    Preamble tunnel = SamplePreamble();
    tunnel.kind = PreambleKind::kTunnel;
    tunnel.channel = service;
    EXPECT_EQ(*DecodePreamble(*EncodePreamble(tunnel)), tunnel);
  }
}

// The layout is a contract between versions: these offsets never change.
TEST(Preamble, Layout) {
  PreambleBytes bytes = SampleBytes();
  EXPECT_EQ(std::memcmp(bytes.data(), "BATONPEE\x01\x00\x01\x00\x03\x00\x00\x00", 16), 0);
  EXPECT_EQ(std::memcmp(bytes.data() + 16, "0b8f6a52-5d0e-4b53-9d3c-5f3c2f1f0a11\0\0\0\0", 40), 0);
  EXPECT_EQ(bytes[56 + 31], static_cast<uint8_t>(31 * 7));
}

TEST(Preamble, EveryDamagedByteOutsideIdAndToken_IsRefused) {
  for (size_t at = 0; at < kPreambleSize; ++at) {
    // A changed id or token is another id or token, which the agent refuses; a channel may be another one.
    if ((at >= 16 && at < 16 + 36) || (at >= 56 && at < 88) || at == 12) continue;
    PreambleBytes bytes = SampleBytes();
    bytes[at] ^= 0x80;
    auto decoded = DecodePreamble(bytes);
    EXPECT_FALSE(decoded.ok()) << "byte " << at;
    EXPECT_EQ(ReasonOf(decoded.status()), v1::PEER_PROTOCOL_ERROR);
  }
}

TEST(Preamble, OtherVersion_IsRefusedWithBothVersions) {
  PreambleBytes bytes = SampleBytes();
  bytes[8] = 9;
  auto decoded = DecodePreamble(bytes);
  EXPECT_EQ(decoded.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(Message(decoded.status()).find("version 9"), std::string::npos);
}

TEST(Preamble, BadFields_CannotBeEncoded) {
  Preamble preamble = SamplePreamble();
  preamble.migration_id = "";
  EXPECT_FALSE(EncodePreamble(preamble).ok());
  preamble.migration_id = std::string(kMaxMigrationId + 1, 'x');
  EXPECT_FALSE(EncodePreamble(preamble).ok());
  preamble.migration_id = std::string("a\0b", 3);
  EXPECT_FALSE(EncodePreamble(preamble).ok());
  preamble = SamplePreamble();
  preamble.channel = kMaxDataChannels + 1;
  EXPECT_FALSE(EncodePreamble(preamble).ok());
  preamble = SamplePreamble();
  preamble.kind = PreambleKind::kVerdictQuery;
  EXPECT_FALSE(EncodePreamble(preamble).ok()) << "a query has channel 0";
  preamble = SamplePreamble();
  preamble.kind = PreambleKind::kTunnel;
  for (uint32_t channel : {0u, kMaxTunnelService + 1}) {
    preamble.channel = channel;
    EXPECT_FALSE(EncodePreamble(preamble).ok()) << "service " << channel;
  }
  preamble.kind = PreambleKind::kInvalid;
  EXPECT_FALSE(EncodePreamble(preamble).ok());
}

TEST(Token, SizeAndComparison) {
  EXPECT_FALSE(MakeToken("short").ok());
  Token a = MakeToken(std::string(32, 'a')).value();
  Token b = a;
  EXPECT_TRUE(TokensEqual(a, b));
  b[31] ^= 1;
  EXPECT_FALSE(TokensEqual(a, b));
}

TEST(ReadPreamble, TakesNotAByteMore) {
  auto [ours, theirs] = SocketPair();
  PreambleBytes bytes = SampleBytes();
  ASSERT_EQ(::write(theirs.get(), bytes.data(), 100), 100);
  std::thread rest([&, fd = theirs.get()] {
    ASSERT_EQ(::write(fd, bytes.data() + 100, 28), 28);
    ASSERT_EQ(::write(fd, "x", 1), 1);
  });
  auto read = ReadPreamble(ours.get(), Soon());
  rest.join();
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, bytes);
  char next = 0;
  EXPECT_EQ(::read(ours.get(), &next, 1), 1);
  EXPECT_EQ(next, 'x');
}

TEST(ReadPreamble, SilentOrEndingPeer_IsAnError) {
  auto [ours, theirs] = SocketPair();
  EXPECT_EQ(ReadPreamble(ours.get(), Deadline::After(std::chrono::milliseconds(20))).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  ASSERT_EQ(::write(theirs.get(), "BATON", 5), 5);
  theirs.reset();
  EXPECT_EQ(ReadPreamble(ours.get(), Soon()).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace baton::stream
