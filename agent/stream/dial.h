// Opening and accepting the connections of a migration.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "agent/stream/channel.h"
#include "agent/stream/message_channel.h"
#include "agent/stream/preamble.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::stream {

struct DialOptions {
  // The destination agent's peer port: "host:port", "[v6]:port" or "unix:/path".
  std::string address;
  std::string migration_id;
  Token token{};
  // Channels 1..data_channels beside channel 0; at least 1 (ignored but by DialPeer).
  uint32_t data_channels = 1;
  // Null: plaintext.
  std::shared_ptr<const TlsContext> tls;
  // Name or IP address that the destination's certificate must carry; empty takes the host of `address`, and
  // any certificate of the CA for unix sockets.
  std::string expected_host;
};

struct PeerConnections {
  std::unique_ptr<MessageChannel> control;
  std::vector<std::unique_ptr<Channel>> data;
};

// Connects channel 0 and all data channels, sends their preambles and runs the TLS handshakes. Errors carry
// Reason PEER_CONNECTION_FAILED and name the address.
absl::StatusOr<PeerConnections> DialPeer(const DialOptions& options, Deadline deadline);

// Connects channel 0 alone, where no memory follows (the devices of a domain that libvirt moves).
absl::StatusOr<std::unique_ptr<MessageChannel>> DialControl(const DialOptions& options, Deadline deadline);

// Connects once to ask for a verdict.
absl::StatusOr<std::unique_ptr<MessageChannel>> DialVerdictQuery(const DialOptions& options,
                                                                 Deadline deadline);

// Connects once for a service of a tunnel (agent/stream/tunnel.h); the exit's answer is yet to be read.
// `on_socket` is told of each socket before it is waited for: shutdown(2) of a duplicate ends that wait, and
// the handshake's.
absl::StatusOr<std::unique_ptr<Channel>> DialTunnel(const DialOptions& options, uint32_t service,
                                                    Deadline deadline,
                                                    const std::function<void(int fd)>& on_socket);

// Agent: reads the preamble of an accepted connection, not a byte more. The socket may be blocking or not.
absl::StatusOr<PreambleBytes> ReadPreamble(int fd, Deadline deadline);

// Shim: makes a channel of a connection whose preamble has been read. With `tls` the handshake as server;
// `expected_host` as in MakeTlsChannel().
absl::StatusOr<std::unique_ptr<Channel>> AcceptChannel(UniqueFd socket, std::shared_ptr<const TlsContext> tls,
                                                       const std::string& expected_host, Deadline deadline);

}  // namespace baton::stream
