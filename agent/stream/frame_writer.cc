#include "agent/stream/frame_writer.h"

#include <linux/errqueue.h>
#include <netinet/in.h>
#include <sys/sendfile.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "agent/stream/socket_io.h"

namespace baton::stream {
namespace {

class PlainWriter final : public FrameWriter {
 public:
  explicit PlainWriter(Channel& channel) : channel_(channel) {}
  absl::Status Write(FrameBatch& batch, Deadline deadline) override {
    int count = 0;
    for (; count < batch.piece_count(); ++count)
      buffers_[static_cast<size_t>(count)] = batch.pieces()[count].bytes;
    return channel_.WriteAll(buffers_.data(), count, deadline);
  }

 private:
  Channel& channel_;
  std::array<iovec, 512> buffers_;
};

class SendfileWriter final : public FrameWriter {
 public:
  explicit SendfileWriter(Channel& channel) : channel_(channel) {}

  absl::Status Write(FrameBatch& batch, Deadline deadline) override {
    for (int i = 0; i < batch.piece_count(); ++i) {
      FrameBatch::Piece& piece = batch.pieces()[i];
      if (piece.fd < 0) {
        RETURN_IF_ERROR(channel_.WriteAll(&piece.bytes, 1, deadline));
        continue;
      }
      off_t offset = static_cast<off_t>(piece.offset);
      for (size_t left = piece.bytes.iov_len; left > 0;) {
        ssize_t n = ::sendfile(channel_.plain_fd(), piece.fd, &offset, left);
        if (n > 0) {
          channel_.AddWritten(static_cast<uint64_t>(n));
          left -= static_cast<size_t>(n);
          continue;
        }
        if (n == 0)
          return Error(absl::StatusCode::kInternal, "{}: sendfile: memory file became shorter",
                       channel_.peer());
        if (errno == EINTR) continue;
        if (errno != EAGAIN) return SocketError(errno, channel_.peer());
        RETURN_IF_ERROR(WaitSocket(channel_.plain_fd(), POLLOUT, deadline, channel_.peer()));
      }
    }
    return absl::OkStatus();
  }

 private:
  Channel& channel_;
};

class ZeroCopyWriter final : public FrameWriter {
 public:
  explicit ZeroCopyWriter(Channel& channel) : channel_(channel) {
    const int on = 1;
    enabled_ = ::setsockopt(channel_.plain_fd(), SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on)) == 0;
  }

  absl::Status Write(FrameBatch& batch, Deadline deadline) override {
    for (int i = 0; i < batch.piece_count(); ++i) {
      FrameBatch::Piece& piece = batch.pieces()[i];
      // Headers live in the batch, which is used again at once: they are copied.
      if (piece.fd < 0 || !enabled_) {
        RETURN_IF_ERROR(channel_.WriteAll(&piece.bytes, 1, deadline));
      } else {
        RETURN_IF_ERROR(SendPinned(piece.bytes, deadline));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Finish(Deadline deadline) override {
    while (completed_ != issued_) {
      RETURN_IF_ERROR(Reap());
      // Completions show as POLLERR, which is always polled for.
      if (completed_ != issued_)
        RETURN_IF_ERROR(WaitSocket(channel_.plain_fd(), 0, deadline, channel_.peer()));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status SendPinned(iovec bytes, Deadline deadline) {
    while (bytes.iov_len > 0) {
      ssize_t n = ::send(channel_.plain_fd(), bytes.iov_base, bytes.iov_len,
                         MSG_ZEROCOPY | MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n >= 0) {
        ++issued_;
        channel_.AddWritten(static_cast<uint64_t>(n));
        bytes.iov_base = static_cast<char*>(bytes.iov_base) + n;
        bytes.iov_len -= static_cast<size_t>(n);
        continue;
      }
      if (errno == EINTR) continue;
      if (errno == ENOBUFS) {
        // RLIMIT_MEMLOCK or the socket's option memory is used up: wait for completions, or copy if none is
        // due.
        RETURN_IF_ERROR(Reap());
        if (completed_ == issued_) return channel_.WriteAll(&bytes, 1, deadline);
        RETURN_IF_ERROR(WaitSocket(channel_.plain_fd(), 0, deadline, channel_.peer()));
        continue;
      }
      if (errno != EAGAIN) return SocketError(errno, channel_.peer());
      RETURN_IF_ERROR(WaitSocket(channel_.plain_fd(), POLLOUT, deadline, channel_.peer()));
      RETURN_IF_ERROR(Reap());
    }
    return absl::OkStatus();
  }

  // Takes the notifications that are there.
  absl::Status Reap() {
    for (;;) {
      char control[128];
      msghdr message{};
      message.msg_control = control;
      message.msg_controllen = sizeof(control);
      if (::recvmsg(channel_.plain_fd(), &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) {
        if (errno == EAGAIN) break;
        if (errno == EINTR) continue;
        return SocketError(errno, channel_.peer());
      }
      for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
        sock_extended_err error;
        std::memcpy(&error, CMSG_DATA(c), sizeof(error));
        if (error.ee_origin != SO_EE_ORIGIN_ZEROCOPY || error.ee_errno != 0) continue;
        // Numbers [ee_info, ee_data] of the calls that are done with their memory.
        completed_ += error.ee_data - error.ee_info + 1;
      }
    }
    int pending = 0;
    socklen_t length = sizeof(pending);
    if (::getsockopt(channel_.plain_fd(), SOL_SOCKET, SO_ERROR, &pending, &length) == 0 && pending != 0) {
      return SocketError(pending, channel_.peer());
    }
    return absl::OkStatus();
  }

  Channel& channel_;
  bool enabled_ = false;
  uint32_t issued_ = 0;  // wraps like the kernel's numbers
  uint32_t completed_ = 0;
};

}  // namespace

uint8_t* FrameBatch::AddHeader(const FrameHeader& header, uint32_t checksums) {
  uint8_t* at = &scratch_[scratch_used_];
  const size_t size = kFrameHeaderSize + checksums * 8u;
  EncodeFrameHeader(header, at);
  scratch_used_ += size;
  // Headers of runs follow each other without memory in between.
  if (pieces_used_ > 0 && pieces_[pieces_used_ - 1].fd < 0) {
    pieces_[pieces_used_ - 1].bytes.iov_len += size;
  } else {
    pieces_[pieces_used_++] = {{at, size}, -1, 0};
  }
  return at + kFrameHeaderSize;
}

void FrameBatch::AddData(uint8_t* base, int fd, uint64_t offset, uint32_t length) {
  pieces_[pieces_used_++] = {{base + offset, length}, fd, offset};
  data_bytes_ += length;
}

std::unique_ptr<FrameWriter> MakeFrameWriter(Channel& channel, SendStrategy strategy) {
  if (channel.plain_fd() >= 0 && strategy == SendStrategy::kSendfile)
    return std::make_unique<SendfileWriter>(channel);
  if (channel.plain_fd() >= 0 && strategy == SendStrategy::kZeroCopy)
    return std::make_unique<ZeroCopyWriter>(channel);
  return std::make_unique<PlainWriter>(channel);
}

}  // namespace baton::stream
