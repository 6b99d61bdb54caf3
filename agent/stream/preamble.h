// The first 128 bytes of every connection to a host's peer port: which migration the connection belongs to
// and the right to speak for it. Sent in the clear, before TLS, so that the agent can hand the socket to the
// shim it is meant for. Pure.
//
//   offset size
//        0    8  magic "BATONPEE"
//        8    2  version (1)                        all integers little endian
//       10    2  kind
//       12    4  channel: 0 control, 1..N data; of a tunnel the service
//       16   40  migration id, zero padded
//       56   32  one-time token
//       88   40  zero
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/status.h"

namespace baton::stream {

inline constexpr size_t kPreambleSize = 128;
inline constexpr uint16_t kProtocolVersion = 1;
inline constexpr size_t kMaxMigrationId = 40;
inline constexpr size_t kTokenSize = 32;
// Data channels of one migration; far above what any number of cores makes useful.
inline constexpr uint32_t kMaxDataChannels = 64;
// libvirt, vmm, nbd.
inline constexpr uint32_t kMaxTunnelService = 3;

using PreambleBytes = std::array<uint8_t, kPreambleSize>;
using Token = std::array<uint8_t, kTokenSize>;

enum class PreambleKind : uint16_t {
  kInvalid = 0,
  // A channel of a migration: 0 is control, the others are data.
  kChannel = 1,
  // Asks for the verdict of a migration whose connection was lost; only channel 0.
  kVerdictQuery = 2,
  // A connection of another program that is carried to the destination (agent/stream/tunnel.h); the channel
  // is the service, 1 to kMaxTunnelService.
  kTunnel = 3,
};

struct Preamble {
  uint16_t version = kProtocolVersion;
  PreambleKind kind = PreambleKind::kInvalid;
  uint32_t channel = 0;
  std::string migration_id;
  Token token{};

  bool operator==(const Preamble&) const = default;
};

// InvalidArgument if `preamble` could not be decoded again: bad kind, version or channel, id empty, longer
// than 40 bytes or with characters outside the printable ASCII range.
absl::StatusOr<PreambleBytes> EncodePreamble(const Preamble& preamble);

// Every field is checked, the unused bytes as well. InvalidArgument (Reason PEER_PROTOCOL_ERROR) says which
// one is wrong; a version this program does not speak is FailedPrecondition.
absl::StatusOr<Preamble> DecodePreamble(const PreambleBytes& bytes);

// Copies 32 bytes; InvalidArgument for any other length.
absl::StatusOr<Token> MakeToken(const std::string& bytes);

// Compares in constant time, so that a token cannot be guessed byte by byte.
bool TokensEqual(const Token& a, const Token& b);

}  // namespace baton::stream
