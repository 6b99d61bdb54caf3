#include "common/address.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <charconv>
#include <cstring>

#include "common/fd.h"

namespace baton {
namespace {

absl::Status Bad(const std::string& text, const std::string& why) {
  return Error(absl::StatusCode::kInvalidArgument, "address \"{}\": {}; expected host:port or unix:/path",
               text, why);
}

absl::Status InUse(const Address& address) {
  return Error(
      absl::StatusCode::kAlreadyExists,
      "cannot listen on {}: the address is in use by another process; stop it or choose another address",
      address.ToString());
}

absl::Status ProbeUnix(const Address& address) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path, address.path.c_str(), address.path.size() + 1);
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return ErrnoError(errno, "socket");
  int connected = ::connect(fd.get(), reinterpret_cast<sockaddr*>(&name), sizeof name);
  if (connected == 0 || errno == EAGAIN || errno == EINPROGRESS) return InUse(address);
  if (errno == ENOENT || errno == ECONNREFUSED) {
    std::string directory = address.path.substr(0, address.path.find_last_of('/'));
    if (directory.empty()) directory = "/";
    if (::access(directory.c_str(), W_OK | X_OK) != 0) {
      return ErrnoError(errno,
                        fmt::format("cannot listen on {}: directory {}", address.ToString(), directory));
    }
    return absl::OkStatus();
  }
  return ErrnoError(errno, fmt::format("cannot listen on {}", address.ToString()));
}

}  // namespace

bool Address::IsLocal() const {
  if (is_unix() || host == "localhost") return true;
  in_addr v4;
  if (::inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6;
  if (::inet_pton(AF_INET6, host.c_str(), &v6) == 1) return IN6_IS_ADDR_LOOPBACK(&v6);
  return false;
}

std::string Address::ToString() const {
  if (is_unix()) return "unix:" + path;
  if (host.find(':') != std::string::npos) return fmt::format("[{}]:{}", host, port);
  return fmt::format("{}:{}", host, port);
}

absl::StatusOr<Address> ParseAddress(const std::string& text) {
  Address address;
  if (text.rfind("unix:", 0) == 0) {
    address.path = text.substr(5);
    if (address.path.rfind("//", 0) == 0) address.path.erase(0, 2);
    if (address.path.empty() || address.path[0] != '/') return Bad(text, "the socket path must be absolute");
    if (address.path.size() >= sizeof(sockaddr_un::sun_path)) {
      return Bad(text, fmt::format("the socket path is longer than the {} bytes that a unix socket can have",
                                   sizeof(sockaddr_un::sun_path) - 1));
    }
    return address;
  }
  size_t colon = text.rfind(':');
  if (colon == std::string::npos) return Bad(text, "the port is missing");
  address.host = text.substr(0, colon);
  std::string port = text.substr(colon + 1);
  if (address.host.size() >= 2 && address.host.front() == '[' && address.host.back() == ']') {
    address.host = address.host.substr(1, address.host.size() - 2);
    in6_addr v6;
    if (::inet_pton(AF_INET6, address.host.c_str(), &v6) != 1) return Bad(text, "not an IPv6 address in [ ]");
  } else if (address.host.find(':') != std::string::npos) {
    return Bad(text, "an IPv6 address must stand in [ ]");
  }
  if (address.host.empty()) return Bad(text, "the host is missing (0.0.0.0 listens on every interface)");
  auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), address.port);
  if (error != std::errc() || end != port.data() + port.size()) {
    return Bad(text, fmt::format("\"{}\" is not a port between 0 and 65535", port));
  }
  return address;
}

absl::Status ProbeListen(const Address& address) {
  if (address.is_unix()) return ProbeUnix(address);
  if (address.port == 0) return absl::OkStatus();
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV | (address.host == "localhost" ? 0 : AI_NUMERICHOST);
  addrinfo* found = nullptr;
  if (::getaddrinfo(address.host.c_str(), std::to_string(address.port).c_str(), &hints, &found) != 0) {
    return absl::OkStatus();
  }
  absl::Status status;
  for (addrinfo* info = found; info != nullptr; info = info->ai_next) {
    UniqueFd fd(::socket(info->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!fd) continue;
    int on = 1;
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (::bind(fd.get(), info->ai_addr, info->ai_addrlen) == 0 && ::listen(fd.get(), 1) == 0) {
      status = absl::OkStatus();
      break;
    }
    if (errno == EADDRINUSE) {
      status = InUse(address);
      break;
    }
    if (errno == EADDRNOTAVAIL) {
      status = Error(absl::StatusCode::kNotFound, "cannot listen on {}: this machine has no such address",
                     address.ToString());
    } else {
      status = ErrnoError(errno, fmt::format("cannot listen on {}", address.ToString()));
    }
  }
  ::freeaddrinfo(found);
  return status;
}

}  // namespace baton
