#include "agent/stream/preamble.h"

#include <algorithm>

#include "agent/stream/wire.h"

namespace baton::stream {
namespace {

constexpr char kMagic[8] = {'B', 'A', 'T', 'O', 'N', 'P', 'E', 'E'};
constexpr size_t kVersionAt = 8, kKindAt = 10, kChannelAt = 12, kIdAt = 16, kTokenAt = 56, kUnusedAt = 88;
static_assert(kIdAt + kMaxMigrationId == kTokenAt && kTokenAt + kTokenSize == kUnusedAt);

bool IsIdCharacter(uint8_t c) { return c > 0x20 && c < 0x7f; }

absl::Status BadPreamble(const std::string& why) {
  return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument, "preamble: {}", why);
}

// The rules that both directions share.
absl::Status Check(const Preamble& preamble) {
  switch (preamble.kind) {
    case PreambleKind::kChannel:
      if (preamble.channel > kMaxDataChannels) {
        return BadPreamble(
            fmt::format("channel {} is above the limit of {}", preamble.channel, kMaxDataChannels));
      }
      break;
    case PreambleKind::kVerdictQuery:
      if (preamble.channel != 0)
        return BadPreamble(fmt::format("verdict query on channel {}", preamble.channel));
      break;
    case PreambleKind::kTunnel:
      if (preamble.channel == 0 || preamble.channel > kMaxTunnelService)
        return BadPreamble(fmt::format("unknown service {} of a tunnel", preamble.channel));
      break;
    default:
      return BadPreamble(fmt::format("unknown kind {}", static_cast<unsigned>(preamble.kind)));
  }
  if (preamble.migration_id.empty()) return BadPreamble("migration id is empty");
  if (preamble.migration_id.size() > kMaxMigrationId) {
    return BadPreamble(fmt::format("migration id is longer than {} bytes", kMaxMigrationId));
  }
  for (char c : preamble.migration_id) {
    if (!IsIdCharacter(static_cast<uint8_t>(c)))
      return BadPreamble("migration id holds a character outside ASCII's printable range");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PreambleBytes> EncodePreamble(const Preamble& preamble) {
  if (preamble.version == 0) return BadPreamble("version 0");
  RETURN_IF_ERROR(Check(preamble));
  PreambleBytes bytes{};
  std::memcpy(bytes.data(), kMagic, sizeof(kMagic));
  StoreLe<uint16_t>(&bytes[kVersionAt], preamble.version);
  StoreLe<uint16_t>(&bytes[kKindAt], static_cast<uint16_t>(preamble.kind));
  StoreLe<uint32_t>(&bytes[kChannelAt], preamble.channel);
  std::copy(preamble.migration_id.begin(), preamble.migration_id.end(), &bytes[kIdAt]);
  std::copy(preamble.token.begin(), preamble.token.end(), &bytes[kTokenAt]);
  return bytes;
}

absl::StatusOr<Preamble> DecodePreamble(const PreambleBytes& bytes) {
  if (std::memcmp(bytes.data(), kMagic, sizeof(kMagic)) != 0)
    return BadPreamble("wrong magic: not a Baton peer");
  Preamble preamble;
  preamble.version = LoadLe<uint16_t>(&bytes[kVersionAt]);
  if (preamble.version != kProtocolVersion) {
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kFailedPrecondition,
                 "preamble: the peer speaks protocol version {}, this program speaks {}", preamble.version,
                 kProtocolVersion);
  }
  preamble.kind = static_cast<PreambleKind>(LoadLe<uint16_t>(&bytes[kKindAt]));
  preamble.channel = LoadLe<uint32_t>(&bytes[kChannelAt]);
  const auto id = bytes.begin() + kIdAt, id_limit = id + kMaxMigrationId;
  const auto id_end = std::find(id, id_limit, 0);
  if (std::any_of(id_end, id_limit, [](uint8_t b) { return b != 0; }))
    return BadPreamble("migration id is not zero padded");
  preamble.migration_id.assign(id, id_end);
  std::copy_n(&bytes[kTokenAt], kTokenSize, preamble.token.begin());
  if (std::any_of(bytes.begin() + kUnusedAt, bytes.end(), [](uint8_t b) { return b != 0; })) {
    return BadPreamble("unused bytes are not zero");
  }
  RETURN_IF_ERROR(Check(preamble));
  return preamble;
}

absl::StatusOr<Token> MakeToken(const std::string& bytes) {
  if (bytes.size() != kTokenSize) {
    return Error(absl::StatusCode::kInvalidArgument, "a token has {} bytes, not {}", kTokenSize,
                 bytes.size());
  }
  Token token;
  std::copy(bytes.begin(), bytes.end(), token.begin());
  return token;
}

bool TokensEqual(const Token& a, const Token& b) {
  uint8_t difference = 0;
  for (size_t i = 0; i < kTokenSize; ++i) difference = static_cast<uint8_t>(difference | (a[i] ^ b[i]));
  return difference == 0;
}

}  // namespace baton::stream
