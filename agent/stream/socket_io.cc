#include "agent/stream/socket_io.h"

#include <cerrno>
#include <cstring>

namespace baton::stream {

absl::Status WaitSocket(int fd, short events, Deadline deadline, const std::string& peer) {
  for (;;) {
    pollfd entry{fd, events, 0};
    const Duration left = deadline.Left();
    const timespec timeout{static_cast<time_t>(left.count() / 1'000'000'000),
                           static_cast<long>(left.count() % 1'000'000'000)};
    int n = ::ppoll(&entry, 1, &timeout, nullptr);
    if (n > 0) return absl::OkStatus();
    if (n < 0 && errno != EINTR) return SocketError(errno, peer);
    if (n == 0 && deadline.Expired()) {
      return Error(absl::StatusCode::kDeadlineExceeded, "{}: the peer {} in time", peer,
                   events == POLLIN ? "sent nothing" : "took nothing");
    }
  }
}

absl::Status SocketError(int error, const std::string& peer) {
  return Error(absl::StatusCode::kUnavailable, "{}: connection broke: {}", peer, std::strerror(error));
}

void Advance(iovec*& buffers, int& count, size_t bytes) {
  while (count > 0 && bytes >= buffers->iov_len) {
    bytes -= buffers->iov_len;
    ++buffers;
    --count;
  }
  if (count > 0) {
    buffers->iov_base = static_cast<char*>(buffers->iov_base) + bytes;
    buffers->iov_len -= bytes;
  }
}

}  // namespace baton::stream
