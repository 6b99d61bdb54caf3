#include "agent/vhost/socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/unix_socket.h"

namespace baton::vhost {
namespace {

// ppoll(2): milliseconds are too coarse for what happens inside a blackout.
int PollOne(int fd, short events, Deadline deadline) {
  pollfd p{fd, events, 0};
  Duration left = deadline.Left();
  timespec ts{static_cast<time_t>(left.count() / 1000000000), static_cast<long>(left.count() % 1000000000)};
  return ::ppoll(&p, 1, &ts, nullptr);
}

}  // namespace

absl::StatusOr<Connection> Connection::Dial(const std::string& path, Deadline deadline) {
  ASSIGN_OR_RETURN(UniqueFd fd, ConnectUnix(path, deadline));
  return Connection(std::move(fd));
}

absl::Status Connection::Send(uint32_t request, uint32_t flags, std::span<const uint8_t> payload,
                              std::span<const int> fds, Deadline deadline) {
  Header header{request, flags, static_cast<uint32_t>(payload.size())};
  std::vector<uint8_t> bytes(sizeof header + payload.size());
  std::memcpy(bytes.data(), &header, sizeof header);
  if (!payload.empty()) std::memcpy(bytes.data() + sizeof header, payload.data(), payload.size());
  if (fds.size() > kMaxFds) return absl::InternalError("too many descriptors for one message");
  return SendBytes(bytes, fds, request, deadline);
}

absl::Status Connection::SendRaw(uint32_t request, std::span<const uint8_t> bytes, Deadline deadline) {
  return SendBytes(bytes, {}, request, deadline);
}

absl::Status Connection::SendBytes(std::span<const uint8_t> bytes, std::span<const int> fds, uint32_t request,
                                   Deadline deadline) {
  size_t sent = 0;
  while (sent < bytes.size()) {
    iovec iov{const_cast<uint8_t*>(bytes.data()) + sent, bytes.size() - sent};
    msghdr msg{};
    msg.msg_iov = &iov;
    msg.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFds)] = {};
    if (sent == 0 && !fds.empty()) {
      msg.msg_control = control;
      msg.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
      cmsghdr* cmsg = CMSG_FIRSTHDR(&msg);
      cmsg->cmsg_level = SOL_SOCKET;
      cmsg->cmsg_type = SCM_RIGHTS;
      cmsg->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
      std::memcpy(CMSG_DATA(cmsg), fds.data(), sizeof(int) * fds.size());
    }
    ssize_t n = ::sendmsg(fd_.get(), &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n >= 0) {
      sent += static_cast<size_t>(n);
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) return ErrnoError(errno, "sending " + RequestName(request));
    if (deadline.Expired() || PollOne(fd_.get(), POLLOUT, deadline) == 0) {
      return Error(absl::StatusCode::kDeadlineExceeded, "sending {}: the peer does not read",
                   RequestName(request));
    }
  }
  return absl::OkStatus();
}

absl::Status Connection::ReadSome(uint8_t* out, size_t least, size_t most, size_t* got,
                                  std::vector<UniqueFd>* fds, bool sleep, Deadline deadline) {
  while (*got < least) {
    const bool begins = fds && *got == 0;
    iovec iov{out + *got, (begins ? most : least) - *got};
    msghdr msg{};
    msg.msg_iov = &iov;
    msg.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFds)];
    msg.msg_control = control;
    msg.msg_controllen = sizeof control;
    ssize_t n = ::recvmsg(fd_.get(), &msg, MSG_CMSG_CLOEXEC | (sleep && begins ? 0 : MSG_DONTWAIT));
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == ECONNRESET && begins) return absl::UnavailableError("closed");
      if (errno != EAGAIN && errno != EWOULDBLOCK) return ErrnoError(errno, "receiving");
      if ((sleep && begins) || deadline.Expired() || PollOne(fd_.get(), POLLIN, deadline) == 0) {
        // Only between messages the connection is still in step.
        if (begins) return absl::DeadlineExceededError("no message came in time");
        return Error(absl::StatusCode::kDataLoss, "the message stopped after {} of {} bytes", *got, least);
      }
      continue;
    }
    std::vector<UniqueFd> received;
    for (cmsghdr* cmsg = CMSG_FIRSTHDR(&msg); cmsg; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
      if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS) continue;
      size_t count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count; ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(cmsg) + i * sizeof(int), sizeof fd);
        received.emplace_back(fd);
      }
    }
    if (msg.msg_flags & MSG_CTRUNC) {
      return Error(absl::StatusCode::kInvalidArgument, "more than {} descriptors came with one message",
                   kMaxFds);
    }
    if (!received.empty()) {
      if (!begins) {
        return absl::InvalidArgumentError(
            "descriptors came with something else than the first byte of a message");
      }
      *fds = std::move(received);
    }
    if (n == 0) {
      if (begins) return absl::UnavailableError("closed");
      return Error(absl::StatusCode::kDataLoss, "closed within a message, after {} of {} bytes", *got, least);
    }
    *got += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::StatusOr<size_t> Connection::ReceiveRaw(std::span<uint8_t> out) {
  if (ahead_.size > 0) return absl::InvalidArgumentError("something came that nobody asked for");
  iovec iov{out.data(), out.size()};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  // No room for descriptors: the kernel closes them, and says so.
  const ssize_t n = ::recvmsg(fd_.get(), &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return 0;
  if (n < 0) return ErrnoError(errno, "receiving");
  if (msg.msg_flags & MSG_CTRUNC)
    return absl::InvalidArgumentError("descriptors came with an answer without any");
  if (n == 0 && !out.empty()) return absl::UnavailableError("closed");
  return static_cast<size_t>(n);
}

absl::StatusOr<WireMessage> Connection::Receive(bool reply, Deadline deadline) {
  return ReceiveMessage(reply, /*sleep=*/false, deadline);
}

void Connection::SetPatience(Duration patience) {
  // Every other call says MSG_DONTWAIT, so only ReceiveNext is affected.
  const auto us = std::chrono::duration_cast<std::chrono::microseconds>(patience).count();
  const timeval most{static_cast<time_t>(us / 1000000), static_cast<suseconds_t>(us % 1000000)};
  const int flags = ::fcntl(fd_.get(), F_GETFL);
  patient_ = ::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &most, sizeof most) == 0 && flags >= 0 &&
             ::fcntl(fd_.get(), F_SETFL, flags & ~O_NONBLOCK) == 0;
}

absl::StatusOr<WireMessage> Connection::ReceiveNext(Deadline deadline) {
  if (!patient_) return absl::DeadlineExceededError("nothing is waited for");
  return ReceiveMessage(/*reply=*/false, /*sleep=*/true, deadline);
}

absl::StatusOr<WireMessage> Connection::ReceiveMessage(bool reply, bool sleep, Deadline deadline) {
  WireMessage message;
  constexpr size_t kHead = sizeof message.header;
  std::array<uint8_t, kHead + kUsualPayload> bytes;
  Ahead before = std::exchange(ahead_, {});
  size_t got = before.size;
  std::copy_n(before.bytes.begin(), got, bytes.begin());
  message.fds = std::move(before.fds);
  RETURN_IF_ERROR(ReadSome(bytes.data(), kHead, sleep && got == 0 ? bytes.size() : kHead, &got, &message.fds,
                           sleep, deadline));
  std::memcpy(&message.header, bytes.data(), kHead);
  RETURN_IF_ERROR(CheckHeader(message.header, reply));
  message.payload.resize(message.header.size);
  size_t have = std::min<size_t>(got - kHead, message.header.size);
  if (have > 0) std::memcpy(message.payload.data(), bytes.data() + kHead, have);
  if (const size_t end = kHead + have; got > end) {
    // A read ends with the message that brings descriptors (unix_stream_read_generic of the kernel), so they
    // are this one's.
    ahead_.size = got - end;
    std::copy_n(bytes.begin() + end, ahead_.size, ahead_.bytes.begin());
    ahead_.fds = std::exchange(message.fds, {});
  }
  if (have < message.payload.size()) {
    RETURN_IF_ERROR(Annotate(ReadSome(message.payload.data(), message.payload.size(), message.payload.size(),
                                      &have, nullptr, false, deadline),
                             "payload of message " + std::to_string(message.header.request)));
  }
  return message;
}

}  // namespace baton::vhost
