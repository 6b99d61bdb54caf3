// Protobuf messages over a unix stream socket: u32 little endian length, then the serialised message, at most
// 16 MiB; descriptors travel by SCM_RIGHTS with the first byte of the length. What comes in is checked:
// lengths, the number of descriptors, and that the bytes parse.
//
// Not thread-safe, with one exception: one thread may receive while another sends.
#pragma once

#include <google/protobuf/message_lite.h>

#include <deque>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton {

class MessageSocket {
 public:
  static constexpr uint32_t kMaxMessage = 16u << 20;
  static constexpr size_t kMaxFds = 8;
  // A connection whose peer does not read is given up once this much waits to be sent.
  static constexpr size_t kMaxQueued = 64u << 20;

  MessageSocket() = default;
  // Takes a connected stream socket and makes it non-blocking.
  explicit MessageSocket(UniqueFd fd);
  MessageSocket(MessageSocket&&) noexcept = default;
  MessageSocket& operator=(MessageSocket&&) noexcept = default;

  static absl::StatusOr<MessageSocket> Connect(const std::string& path, Deadline deadline);

  // For epoll; owned by this object.
  int fd() const { return fd_.get(); }
  bool valid() const { return fd_.valid(); }
  void Close() { fd_.reset(); }

  // --- blocking use, bounded by the deadline ---
  // Sends one message; `fds` stay the caller's. After an error the stream is unusable.
  absl::Status Send(const google::protobuf::MessageLite& message, Deadline deadline,
                    const std::vector<int>& fds = {});
  // Receives one message into `message` and its descriptors into `fds` (closed if null). A peer that closed
  // between messages is OutOfRange; one that closed inside a message is DataLoss. After DeadlineExceeded the
  // call may be repeated; after any other error the stream is unusable.
  absl::Status Receive(google::protobuf::MessageLite& message, Deadline deadline,
                       std::vector<UniqueFd>* fds = nullptr);

  // --- use under epoll, never blocks ---
  // True if a whole message was received, false if more has to arrive first. Errors as Receive.
  absl::StatusOr<bool> TryReceive(google::protobuf::MessageLite& message,
                                  std::vector<UniqueFd>* fds = nullptr);
  // Queues a message and sends what the socket takes. ResourceExhausted if the peer does not read.
  absl::Status Enqueue(const google::protobuf::MessageLite& message, std::vector<UniqueFd> fds = {});
  // Sends what is queued as far as the socket takes it.
  absl::Status Flush();
  // Something is queued: wait for EPOLLOUT.
  bool wants_write() const { return !out_.empty(); }

 private:
  struct Frame {
    std::string bytes;
    size_t sent = 0;
    std::vector<UniqueFd> fds;
  };
  static absl::StatusOr<Frame> MakeFrame(const google::protobuf::MessageLite& message);
  // True when the whole frame is out, false if the socket is full.
  absl::StatusOr<bool> SendSome(Frame& frame, const std::vector<int>& fds);
  absl::StatusOr<size_t> ReceiveSome(char* data, size_t size, bool fds_allowed);

  UniqueFd fd_;
  // The frame being received: its length field, then its body.
  uint8_t length_[4] = {};
  size_t length_got_ = 0;
  std::string body_;
  size_t body_got_ = 0;
  std::vector<UniqueFd> fds_in_;
  std::deque<Frame> out_;
  size_t queued_ = 0;
};

}  // namespace baton
