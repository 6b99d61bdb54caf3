// One vhost-user connection: whole messages with their descriptors, in and out, each by a deadline.
#pragma once

#include <span>
#include <string>

#include "agent/vhost/wire.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::vhost {

// A connected AF_UNIX stream. Descriptors are accepted only with the first byte of a header; those that come
// at another place, or beyond kMaxFds, are closed and make the message an error. Received descriptors are
// close-on-exec. After any error other than Unavailable from Poll the connection must not be used any more.
// Not thread-safe.
class Connection {
 public:
  Connection() = default;
  explicit Connection(UniqueFd fd) : fd_(std::move(fd)) {}
  // NotFound / Unavailable name the path. The socket is non-blocking.
  static absl::StatusOr<Connection> Dial(const std::string& path, Deadline deadline);

  int fd() const { return fd_.get(); }
  bool valid() const { return fd_.valid(); }
  void Close() { fd_.reset(); }

  // Unavailable: the peer is gone. DeadlineExceeded: it does not read.
  absl::Status Send(uint32_t request, uint32_t flags, std::span<const uint8_t> payload,
                    std::span<const int> fds, Deadline deadline);

  // Bytes of several whole messages without descriptors, with one call where the socket takes them.
  absl::Status SendRaw(std::span<const uint8_t> bytes, Deadline deadline);

  // The next message; `reply` says which flags a header must have. Unavailable "closed": the peer hung up
  // between messages. DataLoss: it hung up within one. InvalidArgument: malformed header. DeadlineExceeded.
  absl::StatusOr<WireMessage> Receive(bool reply, Deadline deadline);
  // What has come, at most out.size() bytes, without waiting: 0 if nothing. For answers of known length that
  // carry no descriptors; ones that do are an error.
  absl::StatusOr<size_t> ReceiveRaw(std::span<uint8_t> out);

 private:
  absl::Status SendBytes(std::span<const uint8_t> bytes, std::span<const int> fds, const std::string& what,
                         Deadline deadline);
  absl::Status ReadFull(uint8_t* out, size_t size, std::vector<UniqueFd>* fds, Deadline deadline);
  UniqueFd fd_;
};

}  // namespace baton::vhost
