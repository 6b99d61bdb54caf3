#include "agent/stream/dial.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "agent/stream/resolve.h"
#include "agent/stream/socket_io.h"
#include "common/units.h"
#include "common/unix_socket.h"

namespace baton::stream {
namespace {

// Told of each socket that is about to be connected.
using SocketHook = std::function<void(int fd)>;

absl::StatusOr<UniqueFd> ConnectTo(const SocketAddress& to, const std::string& name, Deadline deadline,
                                   const SocketHook& on_socket) {
  UniqueFd fd(::socket(to.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return ErrnoError(errno, "socket");
  if (on_socket) on_socket(fd.get());
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&to.storage), to.length) != 0) {
    if (errno != EINPROGRESS && errno != EINTR) return SocketError(errno, name);
    if (absl::Status ready = WaitSocket(fd.get(), POLLOUT, deadline, name); !ready.ok()) {
      return Error(ready.code(), "{}: does not answer", name);
    }
    int error = 0;
    socklen_t length = sizeof(error);
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
    if (error != 0) return Error(absl::StatusCode::kUnavailable, "{}: {}", name, std::strerror(error));
  }
  return fd;
}

// What dialling needs to know again and again.
struct Target {
  Address address;
  std::vector<SocketAddress> resolved;  // empty for unix sockets
  std::string expected_host;
};

absl::StatusOr<Target> MakeTarget(const DialOptions& options, Deadline deadline) {
  Target target;
  ASSIGN_OR_RETURN(target.address, ParseAddress(options.address));
  if (target.address.unix_path.empty()) {
    ASSIGN_OR_RETURN(target.resolved, Resolve(target.address.host, target.address.port, deadline));
  }
  target.expected_host = options.expected_host.empty() ? target.address.host : options.expected_host;
  return target;
}

// The first address that answers is tried first for the channels that follow.
absl::StatusOr<UniqueFd> Connect(Target& target, Deadline deadline, const SocketHook& on_socket) {
  if (!target.address.unix_path.empty()) {
    ASSIGN_OR_RETURN(UniqueFd fd, ConnectUnix(target.address.unix_path, deadline));
    if (on_socket) on_socket(fd.get());
    return fd;
  }
  absl::Status first_error;
  for (size_t i = 0; i < target.resolved.size(); ++i) {
    auto fd = ConnectTo(target.resolved[i], target.address.ToString(), deadline, on_socket);
    if (fd.ok()) {
      std::swap(target.resolved[0], target.resolved[i]);
      return fd;
    }
    if (first_error.ok()) first_error = fd.status();
  }
  return first_error;
}

absl::StatusOr<std::unique_ptr<Channel>> DialChannel(Target& target, const DialOptions& options,
                                                     PreambleKind kind, uint32_t channel, Deadline deadline,
                                                     const SocketHook& on_socket = {}) {
  ASSIGN_OR_RETURN(PreambleBytes preamble,
                   EncodePreamble({kProtocolVersion, kind, channel, options.migration_id, options.token}));
  ASSIGN_OR_RETURN(UniqueFd fd, Connect(target, deadline, on_socket));
  UniqueFd for_tls = options.tls ? fd.Duplicate() : UniqueFd();
  if (options.tls && !for_tls) return ErrnoError(errno, "duplicate a socket");
  ASSIGN_OR_RETURN(auto plain, MakePlainChannel(std::move(fd)));
  RETURN_IF_ERROR(plain->Write(preamble.data(), preamble.size(), deadline));
  if (!options.tls) return plain;
  return MakeTlsChannel(std::move(for_tls), options.tls, TlsRole::kClient, target.expected_host, deadline);
}

absl::Status ConnectionError(const absl::Status& status, const DialOptions& options) {
  return WithReason(Annotate(status, fmt::format("connecting to the destination at {}", options.address)),
                    v1::PEER_CONNECTION_FAILED);
}

}  // namespace

absl::StatusOr<PeerConnections> DialPeer(const DialOptions& options, Deadline deadline) {
  if (options.data_channels == 0 || options.data_channels > kMaxDataChannels) {
    return Error(absl::StatusCode::kInvalidArgument, "{} data channels; 1 to {} are possible",
                 options.data_channels, kMaxDataChannels);
  }
  auto target = MakeTarget(options, deadline);
  if (!target.ok()) return ConnectionError(target.status(), options);
  PeerConnections connections;
  for (uint32_t i = 0; i <= options.data_channels; ++i) {
    auto channel = DialChannel(*target, options, PreambleKind::kChannel, i, deadline);
    if (!channel.ok()) return ConnectionError(channel.status(), options);
    if (i == 0) {
      connections.control = std::make_unique<MessageChannel>(std::move(channel).value());
    } else {
      connections.data.push_back(std::move(channel).value());
    }
  }
  return connections;
}

namespace {

absl::StatusOr<std::unique_ptr<MessageChannel>> DialMessages(const DialOptions& options, PreambleKind kind,
                                                             Deadline deadline) {
  auto target = MakeTarget(options, deadline);
  if (!target.ok()) return ConnectionError(target.status(), options);
  auto channel = DialChannel(*target, options, kind, 0, deadline);
  if (!channel.ok()) return ConnectionError(channel.status(), options);
  return std::make_unique<MessageChannel>(std::move(channel).value());
}

}  // namespace

absl::StatusOr<std::unique_ptr<MessageChannel>> DialControl(const DialOptions& options, Deadline deadline) {
  return DialMessages(options, PreambleKind::kChannel, deadline);
}

absl::StatusOr<std::unique_ptr<MessageChannel>> DialVerdictQuery(const DialOptions& options,
                                                                 Deadline deadline) {
  return DialMessages(options, PreambleKind::kVerdictQuery, deadline);
}

absl::StatusOr<std::unique_ptr<Channel>> DialTunnel(const DialOptions& options, uint32_t service,
                                                    Deadline deadline,
                                                    const std::function<void(int fd)>& on_socket) {
  auto target = MakeTarget(options, deadline);
  if (!target.ok()) return ConnectionError(target.status(), options);
  auto channel = DialChannel(*target, options, PreambleKind::kTunnel, service, deadline, on_socket);
  if (!channel.ok()) return ConnectionError(channel.status(), options);
  return channel;
}

absl::StatusOr<PreambleBytes> ReadPreamble(int fd, Deadline deadline) {
  PreambleBytes bytes;
  const std::string peer = PeerName(fd);
  for (size_t done = 0; done < bytes.size();) {
    ssize_t n = ::recv(fd, bytes.data() + done, bytes.size() - done, MSG_DONTWAIT);
    if (n > 0) {
      done += static_cast<size_t>(n);
      continue;
    }
    if (n == 0) {
      return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss,
                   "{}: connection ended after {} of {} bytes of the preamble", peer, done, bytes.size());
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) return SocketError(errno, peer);
    RETURN_IF_ERROR(WaitSocket(fd, POLLIN, deadline, peer));
  }
  return bytes;
}

absl::StatusOr<std::unique_ptr<Channel>> AcceptChannel(UniqueFd socket, std::shared_ptr<const TlsContext> tls,
                                                       const std::string& expected_host, Deadline deadline) {
  if (!tls) return MakePlainChannel(std::move(socket));
  return MakeTlsChannel(std::move(socket), std::move(tls), TlsRole::kServer, expected_host, deadline);
}

}  // namespace baton::stream
