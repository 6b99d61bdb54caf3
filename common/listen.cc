#include "common/listen.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

#include "common/fd.h"

namespace baton {
namespace {

absl::Status InUse(const Address& address) {
  return Error(
      absl::StatusCode::kAlreadyExists,
      "cannot listen on {}: the address is in use by another process; stop it or choose another address",
      address.ToString());
}

absl::Status ProbeUnix(const Address& address) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  if (address.unix_path.size() >= sizeof name.sun_path) {
    return Error(absl::StatusCode::kInvalidArgument, "cannot listen on {}: the path is longer than {} bytes",
                 address.ToString(), sizeof name.sun_path - 1);
  }
  std::memcpy(name.sun_path, address.unix_path.c_str(), address.unix_path.size() + 1);
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return ErrnoError(errno, "socket");
  int connected = ::connect(fd.get(), reinterpret_cast<sockaddr*>(&name), sizeof name);
  if (connected == 0 || errno == EAGAIN || errno == EINPROGRESS) return InUse(address);
  if (errno == ENOENT || errno == ECONNREFUSED) {
    std::string directory = address.unix_path.substr(0, address.unix_path.find_last_of('/'));
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

absl::Status ProbeListen(const Address& address) {
  if (!address.unix_path.empty()) return ProbeUnix(address);
  if (address.port == 0) return absl::OkStatus();
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV | (address.host == "localhost" ? 0 : AI_NUMERICHOST);
  addrinfo* found = nullptr;
  if (::getaddrinfo(address.host.empty() ? nullptr : address.host.c_str(),
                    std::to_string(address.port).c_str(), &hints, &found) != 0) {
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
