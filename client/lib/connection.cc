#include "client/lib/connection.h"

#include "common/status.h"

namespace baton::client {

absl::StatusOr<Address> ParseServer(const std::string& server) {
  std::string text = server;
  bool bare_v6 = !text.empty() && text.back() == ']';
  if (text.find("://") != std::string::npos && text.rfind("unix:", 0) != 0) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "server '{}': no URL scheme belongs here; write HOST:PORT", server);
  }
  if (!text.empty() && (bare_v6 || text.find(':') == std::string::npos))
    text += fmt::format(":{}", kDefaultPort);
  auto address = ParseAddress(text);
  if (!address.ok()) return Annotate(address.status(), "server");
  if (address->unix_path.empty() && address->port == 0) {
    return Error(absl::StatusCode::kInvalidArgument, "server '{}': 0 is not a port to connect to", server);
  }
  if (address->unix_path.empty() && address->host.empty()) {
    return Error(absl::StatusCode::kInvalidArgument, "server '{}': the host is missing; write HOST:PORT",
                 server);
  }
  return address;
}

absl::Status CheckConnectionOptions(const ConnectionOptions& options) {
  ASSIGN_OR_RETURN(Address address, ParseServer(options.server));
  int given = !options.ca.empty() + !options.cert.empty() + !options.key.empty();
  if (given == 0) {
    if (address.IsLocal()) return absl::OkStatus();
    return Error(absl::StatusCode::kInvalidArgument,
                 "server '{}' is on another machine, and that needs TLS: give --ca, --cert and --key",
                 options.server);
  }
  if (given != 3) {
    return Error(absl::StatusCode::kInvalidArgument, "--ca, --cert and --key belong together; missing:{}{}{}",
                 options.ca.empty() ? " --ca" : "", options.cert.empty() ? " --cert" : "",
                 options.key.empty() ? " --key" : "");
  }
  return absl::OkStatus();
}

}  // namespace baton::client
