// Names to socket addresses, bounded in time. Internal to the stream.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <string>
#include <vector>

#include "common/clock.h"
#include "common/status.h"

namespace baton::stream {

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
};

// All stream addresses of `host` with `port`, in the order to try them; at least one. Numeric addresses are
// not looked up. NotFound if the name has none, DeadlineExceeded if the name service is too slow.
absl::StatusOr<std::vector<SocketAddress>> Resolve(const std::string& host, uint16_t port, Deadline deadline);

}  // namespace baton::stream
