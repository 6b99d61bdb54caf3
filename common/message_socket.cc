#include "common/message_socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/unix_socket.h"

namespace baton {
namespace {

// The buffer of a message grows as its bytes arrive, so that a length alone cannot make a program allocate.
constexpr size_t kReadStep = 64u << 10;

uint32_t LoadLe32(const uint8_t* p) {
  return uint32_t{p[0]} | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
}

absl::Status PeerClosed() { return absl::OutOfRangeError("the peer closed the connection"); }

}  // namespace

MessageSocket::MessageSocket(UniqueFd fd) : fd_(std::move(fd)) {
  int flags = ::fcntl(fd_.get(), F_GETFL);
  if (flags >= 0) (void)::fcntl(fd_.get(), F_SETFL, flags | O_NONBLOCK);
}

absl::StatusOr<MessageSocket> MessageSocket::Connect(const std::string& path, Deadline deadline) {
  ASSIGN_OR_RETURN(UniqueFd fd, ConnectUnix(path, deadline));
  return MessageSocket(std::move(fd));
}

absl::StatusOr<MessageSocket::Frame> MessageSocket::MakeFrame(const google::protobuf::MessageLite& message) {
  size_t size = message.ByteSizeLong();
  if (size > kMaxMessage) {
    return Error(absl::StatusCode::kInvalidArgument, "message of {} bytes is longer than {}", size,
                 kMaxMessage);
  }
  Frame frame;
  frame.bytes.resize(4 + size);
  for (int i = 0; i < 4; ++i) frame.bytes[i] = static_cast<char>(size >> (8 * i) & 0xff);
  message.SerializeWithCachedSizesToArray(reinterpret_cast<uint8_t*>(frame.bytes.data() + 4));
  return frame;
}

absl::StatusOr<bool> MessageSocket::SendSome(Frame& frame, const std::vector<int>& fds) {
  while (frame.sent < frame.bytes.size()) {
    iovec iov{frame.bytes.data() + frame.sent, frame.bytes.size() - frame.sent};
    msghdr header{};
    header.msg_iov = &iov;
    header.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(kMaxFds * sizeof(int))] = {};
    if (frame.sent == 0 && !fds.empty()) {
      header.msg_control = control;
      header.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
      cmsghdr* cmsg = CMSG_FIRSTHDR(&header);
      cmsg->cmsg_level = SOL_SOCKET;
      cmsg->cmsg_type = SCM_RIGHTS;
      cmsg->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
      std::memcpy(CMSG_DATA(cmsg), fds.data(), fds.size() * sizeof(int));
    }
    ssize_t n = ::sendmsg(fd_.get(), &header, MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
      return ErrnoError(errno, "send");
    }
    frame.sent += static_cast<size_t>(n);
  }
  return true;
}

absl::Status MessageSocket::Send(const google::protobuf::MessageLite& message, Deadline deadline,
                                 const std::vector<int>& fds) {
  if (!fd_) return absl::UnavailableError("the connection is closed");
  if (fds.size() > kMaxFds) return absl::InvalidArgumentError("too many descriptors");
  ASSIGN_OR_RETURN(Frame frame, MakeFrame(message));
  for (;;) {
    ASSIGN_OR_RETURN(bool done, SendSome(frame, fds));
    if (done) return absl::OkStatus();
    RETURN_IF_ERROR(WaitFd(fd_.get(), POLLOUT, deadline, "send"));
  }
}

absl::Status MessageSocket::Enqueue(const google::protobuf::MessageLite& message, std::vector<UniqueFd> fds) {
  if (!fd_) return absl::UnavailableError("the connection is closed");
  if (fds.size() > kMaxFds) return absl::InvalidArgumentError("too many descriptors");
  ASSIGN_OR_RETURN(Frame frame, MakeFrame(message));
  if (queued_ + frame.bytes.size() > kMaxQueued) {
    return Error(absl::StatusCode::kResourceExhausted, "the peer does not read: {} bytes wait to be sent",
                 queued_);
  }
  frame.fds = std::move(fds);
  queued_ += frame.bytes.size();
  out_.push_back(std::move(frame));
  return Flush();
}

absl::Status MessageSocket::Flush() {
  while (!out_.empty()) {
    Frame& frame = out_.front();
    std::vector<int> fds;
    for (const UniqueFd& fd : frame.fds) fds.push_back(fd.get());
    ASSIGN_OR_RETURN(bool done, SendSome(frame, fds));
    if (!done) break;
    queued_ -= frame.bytes.size();
    out_.pop_front();
  }
  return absl::OkStatus();
}

// Bytes read, 0 if none are there yet.
absl::StatusOr<size_t> MessageSocket::ReceiveSome(char* data, size_t size, bool fds_allowed) {
  for (;;) {
    iovec iov{data, size};
    msghdr header{};
    header.msg_iov = &iov;
    header.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(kMaxFds * sizeof(int))];
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
    ssize_t n = ::recvmsg(fd_.get(), &header, MSG_CMSG_CLOEXEC);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return size_t{0};
      return ErrnoError(errno, "receive");
    }
    std::vector<UniqueFd> fds;
    for (cmsghdr* cmsg = CMSG_FIRSTHDR(&header); cmsg != nullptr; cmsg = CMSG_NXTHDR(&header, cmsg)) {
      if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS) continue;
      size_t count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count; ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(cmsg) + i * sizeof(int), sizeof(int));
        fds.emplace_back(fd);
      }
    }
    if (header.msg_flags & MSG_CTRUNC) {
      return Error(absl::StatusCode::kDataLoss, "more than {} descriptors with one message", kMaxFds);
    }
    if (!fds.empty() && !fds_allowed) return absl::DataLossError("descriptors inside a message");
    for (UniqueFd& fd : fds) fds_in_.push_back(std::move(fd));
    if (n == 0) {
      if (length_got_ == 0) return PeerClosed();
      return absl::DataLossError("the peer closed the connection inside a message");
    }
    return static_cast<size_t>(n);
  }
}

absl::StatusOr<bool> MessageSocket::TryReceive(google::protobuf::MessageLite& message,
                                               std::vector<UniqueFd>* fds) {
  if (!fd_) return absl::UnavailableError("the connection is closed");
  while (length_got_ < 4) {
    // Never past the message, so that descriptors stay with the message they came with.
    ASSIGN_OR_RETURN(size_t n, ReceiveSome(reinterpret_cast<char*>(length_) + length_got_, 4 - length_got_,
                                           length_got_ == 0));
    if (n == 0) return false;
    length_got_ += n;
  }
  uint32_t length = LoadLe32(length_);
  if (length > kMaxMessage) {
    return Error(absl::StatusCode::kDataLoss, "message length {} is above {}", length, kMaxMessage);
  }
  while (body_got_ < length) {
    body_.resize(std::min<size_t>(length, body_got_ + kReadStep));
    ASSIGN_OR_RETURN(size_t n, ReceiveSome(body_.data() + body_got_, body_.size() - body_got_, false));
    if (n == 0) return false;
    body_got_ += n;
  }
  bool parsed = message.ParseFromArray(body_.data(), static_cast<int>(length));
  std::vector<UniqueFd> received = std::move(fds_in_);
  fds_in_.clear();
  length_got_ = 0;
  body_got_ = 0;
  body_ = std::string();
  if (!parsed) {
    return Error(absl::StatusCode::kDataLoss, "{} bytes are no {}", length, message.GetTypeName());
  }
  if (fds != nullptr) *fds = std::move(received);
  return true;
}

absl::Status MessageSocket::Receive(google::protobuf::MessageLite& message, Deadline deadline,
                                    std::vector<UniqueFd>* fds) {
  for (;;) {
    ASSIGN_OR_RETURN(bool done, TryReceive(message, fds));
    if (done) return absl::OkStatus();
    RETURN_IF_ERROR(WaitFd(fd_.get(), POLLIN, deadline, "receive"));
  }
}

}  // namespace baton
