// Where batond is and how the client proves who it is.
#pragma once

#include <absl/status/status.h>
#include <absl/status/statusor.h>

#include <chrono>
#include <string>

#include "common/clock.h"
#include "common/units.h"

namespace baton::client {

inline constexpr char kDefaultServer[] = "127.0.0.1:7400";
inline constexpr uint16_t kDefaultPort = 7400;

// Plain data; copyable.
struct ConnectionOptions {
  // "host:port", "host" (port 7400), "[v6]:port" or "unix:/path".
  std::string server = kDefaultServer;
  // PEM files; all three or none. With them the connection is mutual TLS, without it is plaintext, which is
  // allowed only on loopback addresses and unix sockets.
  std::string ca;
  std::string cert;
  std::string key;
  // The name that the server's certificate must carry, where it differs from the host in `server` (tunnels,
  // unix sockets).
  std::string tls_name;
  // How long calls wait for a server that is not there (yet): rides out a restart of batond.
  Duration connect_timeout = std::chrono::seconds(2);
  // Bound of one call; calls that wait for a VM or for checks have longer ones of their own.
  Duration request_timeout = std::chrono::seconds(30);
};

// What to dial. InvalidArgument if `server` is none of the forms above.
absl::StatusOr<Address> ParseServer(const std::string& server);

// Whether the options fit together: TLS files complete, no plaintext to another machine. The messages say
// which option is missing.
absl::Status CheckConnectionOptions(const ConnectionOptions& options);

}  // namespace baton::client
