// One vhost-user connection: whole messages with their descriptors, in and out, each by a deadline.
#pragma once

#include <array>
#include <span>
#include <string>
#include <vector>

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
  void Close() {
    fd_.reset();
    ahead_ = {};
  }

  // Unavailable: the peer is gone. DeadlineExceeded: it does not read.
  absl::Status Send(uint32_t request, uint32_t flags, std::span<const uint8_t> payload,
                    std::span<const int> fds, Deadline deadline);

  // Bytes of several whole messages of the same request without descriptors, with one call where the socket
  // takes them.
  absl::Status SendRaw(uint32_t request, std::span<const uint8_t> bytes, Deadline deadline);

  // The next message; `reply` says which flags a header must have. Unavailable "closed": the peer hung up
  // between messages. DataLoss: it hung up within one. InvalidArgument: malformed header. DeadlineExceeded.
  absl::StatusOr<WireMessage> Receive(bool reply, Deadline deadline);
  // From now on ReceiveNext waits for so long.
  void SetPatience(Duration patience);
  // The next request, with one system call in which it is also waited for. DeadlineExceeded if it does not
  // begin in the time that was given to SetPatience (as the kernel rounds it); `deadline` is about the rest
  // of it. Otherwise as Receive, but descriptors may come with the payload, too.
  absl::StatusOr<WireMessage> ReceiveNext(Deadline deadline);
  // What has come, at most out.size() bytes, without waiting: 0 if nothing. For answers of known length that
  // carry no descriptors; ones that do are an error.
  absl::StatusOr<size_t> ReceiveRaw(std::span<uint8_t> out);

 private:
  // Most messages have eight bytes of payload or none. What ReceiveNext finds beyond the end of one is less
  // than a header, so that poll(2) still tells of every message.
  static constexpr size_t kUsualPayload = 8;
  // The beginning of the next message, and its descriptors.
  struct Ahead {
    std::array<uint8_t, kUsualPayload> bytes;
    size_t size = 0;
    std::vector<UniqueFd> fds;
  };

  // `request`: what is sent, for the error.
  absl::Status SendBytes(std::span<const uint8_t> bytes, std::span<const int> fds, uint32_t request,
                         Deadline deadline);
  absl::StatusOr<WireMessage> ReceiveMessage(bool reply, bool sleep, Deadline deadline);
  // Reads until `*got` is at least `least`; with the first byte of a message as far as `most`. `fds` takes
  // descriptors that come with that one; null if none may come. `sleep`: waits for it as ReceiveNext does.
  absl::Status ReadSome(uint8_t* out, size_t least, size_t most, size_t* got, std::vector<UniqueFd>* fds,
                        bool sleep, Deadline deadline);
  UniqueFd fd_;
  bool patient_ = false;
  Ahead ahead_;
};

}  // namespace baton::vhost
