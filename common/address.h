// Addresses that programs listen on and dial: "host:port", "[v6]:port" or "unix:/path".
#pragma once

#include <cstdint>
#include <string>

#include "common/status.h"

namespace baton {

// A parsed address. A value type.
struct Address {
  std::string host;   // without brackets; empty for unix sockets
  uint16_t port = 0;  // 0 lets the kernel choose when listening
  std::string path;   // of the unix socket, or empty

  bool is_unix() const { return !path.empty(); }
  // Traffic to it cannot leave this machine: a unix socket, 127.0.0.0/8, ::1 or the name "localhost". Other
  // names are not resolved: what they point to may change after the check.
  bool IsLocal() const;
  // "host:port", "[v6]:port" or "unix:/path"; what gRPC takes.
  std::string ToString() const;
};

// InvalidArgument, with the text and what is wrong with it, if `text` is none of the three forms.
absl::StatusOr<Address> ParseAddress(const std::string& text);

// Whether a server could listen on `address` now. AlreadyExists if it is in use (a unix socket with a
// listener; one without is a leftover and is no obstacle), PermissionDenied, NotFound (no such local address
// or directory). Names other than "localhost" and port 0 are not probed. The answer may change before the
// real bind: it serves the error message, not correctness.
absl::Status ProbeListen(const Address& address);

}  // namespace baton
