#include "agent/stream/channel.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "agent/stream/socket_io.h"

namespace baton::stream {
namespace {

constexpr unsigned kTcpUserTimeoutMs = 10'000;
// Where it is set, TCP_USER_TIMEOUT decides how long probes may stay unanswered, not their number (tcp(7)).
constexpr int kKeepIdleSeconds = 5, kKeepIntervalSeconds = 2;
// A blocking call looks up this often at its deadline; nearer deadlines are waited for with poll(2).
constexpr timeval kSlice{1, 0};
constexpr Duration kNear = std::chrono::seconds(2);
// Before it sleeps a transfer gives its processor away so many times, some tens of microseconds: the other
// side usually is that close, and waking a sleeper costs more (about 45 µs in a virtual machine). Measured by
// bench_stream.
constexpr int kYields = 50;
// Round trips within a site are below; also where the processors of both ends are busy.
constexpr std::chrono::microseconds kWithinSite = std::chrono::milliseconds(3);

// Bulk transfers wait inside the system call: one that fills or empties many buffers sleeps and wakes in the
// kernel as often as it must, at no further call. Only where the deadline is near does poll(2) bound the
// wait.
class PlainChannel final : public Channel {
 public:
  explicit PlainChannel(UniqueFd socket) : Channel(PeerName(socket.get())), socket_(std::move(socket)) {}

  absl::StatusOr<size_t> ReadSome(const iovec* buffers, int count, Deadline deadline) override {
    return Receive(buffers, count, 0, deadline);
  }

  absl::Status ReadAll(iovec* buffers, int count, Deadline deadline) override {
    for (bool begun = false; count > 0; begun = true) {
      auto n = Receive(buffers, count, MSG_WAITALL, deadline);
      if (!n.ok()) return begun ? EndedInside(n.status()) : n.status();
      Advance(buffers, count, *n);
    }
    return absl::OkStatus();
  }

  absl::Status WriteAll(iovec* buffers, int count, Deadline deadline) override {
    int tries = 0;
    while (count > 0) {
      if (stopped_.load(std::memory_order_acquire)) return StoppedError();
      msghdr message{};
      message.msg_iov = buffers;
      message.msg_iovlen = static_cast<size_t>(std::min(count, kMaxIovecs));
      const bool patient = tries++ >= yields_;
      const int near = patient ? Near(deadline) : MSG_DONTWAIT;
      ssize_t n = ::sendmsg(socket_.get(), &message, near | MSG_NOSIGNAL);
      if (n < 0) {
        if (errno == EINTR) continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) {
          if (stopped_.load(std::memory_order_acquire)) return StoppedError();
          return SocketError(errno, peer());
        }
        if (!patient) {
          ::sched_yield();
        } else if (near) {
          RETURN_IF_ERROR(WaitSocket(socket_.get(), POLLOUT, deadline, peer()));
        }
        continue;
      }
      tries = 0;
      written_.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
      Advance(buffers, count, static_cast<size_t>(n));
    }
    return absl::OkStatus();
  }

  absl::Status CloseWrite(Deadline) override {
    if (stopped_.load(std::memory_order_acquire)) return StoppedError();
    if (::shutdown(socket_.get(), SHUT_WR) != 0) return SocketError(errno, peer());
    return absl::OkStatus();
  }

  void Shutdown() override {
    stopped_.store(true, std::memory_order_release);
    ::shutdown(socket_.get(), SHUT_RDWR);
  }

  void SleepAtOnce() override { yields_ = 0; }
  int plain_fd() const override { return socket_.get(); }

 private:
  static int Near(Deadline deadline) { return deadline.Left() < kNear ? MSG_DONTWAIT : 0; }

  absl::StatusOr<size_t> Receive(const iovec* buffers, int count, int flags, Deadline deadline) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(buffers);  // recvmsg(2) does not change it
    message.msg_iovlen = static_cast<size_t>(std::min(count, kMaxIovecs));
    for (int tries = 0;; ++tries) {
      if (stopped_.load(std::memory_order_acquire)) return StoppedError();
      const bool patient = tries >= yields_;
      const int near = patient ? Near(deadline) : MSG_DONTWAIT;
      ssize_t n = ::recvmsg(socket_.get(), &message, patient ? flags | near : near);
      if (n > 0) {
        read_.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
        return static_cast<size_t>(n);
      }
      if (n == 0) {
        if (stopped_.load(std::memory_order_acquire)) return StoppedError();
        return Error(absl::StatusCode::kOutOfRange, "{}: closed by the peer", peer());
      }
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) return SocketError(errno, peer());
      if (!patient) {
        ::sched_yield();
      } else if (near) {
        RETURN_IF_ERROR(WaitSocket(socket_.get(), POLLIN, deadline, peer()));
      }
    }
  }

  absl::Status StoppedError() const {
    return Error(absl::StatusCode::kCancelled, "{}: connection was shut down", peer());
  }
  const UniqueFd socket_;
  int yields_ = kYields;
  std::atomic<bool> stopped_{false};
};

}  // namespace

absl::Status Channel::EndedInside(const absl::Status& status) const {
  if (status.code() != absl::StatusCode::kOutOfRange) return status;
  return Error(absl::StatusCode::kDataLoss, "{}: the connection ended in the middle of a message", peer());
}

absl::Status Channel::ReadAll(iovec* buffers, int count, Deadline deadline) {
  for (bool begun = false; count > 0; begun = true) {
    auto n = ReadSome(buffers, count, deadline);
    if (!n.ok()) return begun ? EndedInside(n.status()) : n.status();
    Advance(buffers, count, *n);
  }
  return absl::OkStatus();
}

absl::Status Channel::Read(void* data, size_t size, Deadline deadline) {
  iovec buffer{data, size};
  return ReadAll(&buffer, 1, deadline);
}

absl::Status Channel::Write(const void* data, size_t size, Deadline deadline) {
  iovec buffer{const_cast<void*>(data), size};
  return WriteAll(&buffer, 1, deadline);
}

namespace {

absl::StatusOr<bool> IsTcp(int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof(address);
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0)
    return ErrnoError(errno, "peer connection: getsockname");
  return address.ss_family == AF_INET || address.ss_family == AF_INET6;
}

// The host's own choice stands where this one is not to be had (a kernel without it; tcp(7) on what an
// unprivileged process may choose).
void ChooseCongestionControl(int fd) {
  char current[64] = "";  // TCP_CA_NAME_MAX is 16
  socklen_t length = sizeof(current) - 1;
  tcp_info info{};
  socklen_t info_length = sizeof(info);
  if (::getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, current, &length) != 0 ||
      ::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &info_length) != 0)
    return;
  const std::string_view chosen = CongestionControlFor(current, std::chrono::microseconds(info.tcpi_rtt));
  if (chosen != current)
    (void)::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, chosen.data(), static_cast<socklen_t>(chosen.size()));
}

}  // namespace

std::string_view CongestionControlFor(std::string_view current, std::chrono::microseconds round_trip) {
  const bool paces = current.substr(0, 3) == "bbr";
  // No measurement yet is no short path.
  return paces && round_trip.count() > 0 && round_trip <= kWithinSite ? "cubic" : current;
}

absl::Status SetStallLimit(int fd, std::chrono::milliseconds limit) {
  ASSIGN_OR_RETURN(const bool tcp, IsTcp(fd));
  if (!tcp) return absl::OkStatus();
  const auto value = static_cast<unsigned>(limit.count());
  if (::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &value, sizeof(value)) != 0)
    return ErrnoError(errno, "peer connection: TCP_USER_TIMEOUT");
  return absl::OkStatus();
}

absl::Status PrepareSocket(int fd) {
  int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0 || ::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
    return ErrnoError(errno, "peer connection: fcntl");
  }
  ASSIGN_OR_RETURN(const bool tcp, IsTcp(fd));
  if (!tcp) return absl::OkStatus();
  const int on = 1;
  if (::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) != 0 ||
      ::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &kTcpUserTimeoutMs, sizeof(kTcpUserTimeoutMs)) != 0 ||
      ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on)) != 0 ||
      ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &kKeepIdleSeconds, sizeof(kKeepIdleSeconds)) != 0 ||
      ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &kKeepIntervalSeconds, sizeof(kKeepIntervalSeconds)) !=
          0) {
    return ErrnoError(errno, "peer connection: setsockopt");
  }
  ChooseCongestionControl(fd);
  return absl::OkStatus();
}

std::string PeerName(int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof(address);
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) return "peer";
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(&address);
    ::inet_ntop(AF_INET, &v4->sin_addr, text, sizeof(text));
    return fmt::format("{}:{}", text, ntohs(v4->sin_port));
  }
  if (address.ss_family == AF_INET6) {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&address);
    ::inet_ntop(AF_INET6, &v6->sin6_addr, text, sizeof(text));
    return fmt::format("[{}]:{}", text, ntohs(v6->sin6_port));
  }
  return "unix";
}

absl::StatusOr<std::unique_ptr<Channel>> MakePlainChannel(UniqueFd socket) {
  RETURN_IF_ERROR(PrepareSocket(socket.get()));
  const int flags = ::fcntl(socket.get(), F_GETFL);
  if (flags < 0 || ::fcntl(socket.get(), F_SETFL, flags & ~O_NONBLOCK) != 0 ||
      ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &kSlice, sizeof kSlice) != 0 ||
      ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &kSlice, sizeof kSlice) != 0) {
    return ErrnoError(errno, "peer connection: blocking with a time limit");
  }
  return std::unique_ptr<Channel>(std::make_unique<PlainChannel>(std::move(socket)));
}

}  // namespace baton::stream
