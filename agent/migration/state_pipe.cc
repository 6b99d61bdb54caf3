#include "agent/migration/state_pipe.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

namespace baton::migration {
namespace {

absl::Status WaitFor(int fd, short events, Deadline deadline) {
  for (;;) {
    pollfd entry{fd, events, 0};
    const int ready = ::poll(&entry, 1, deadline.PollTimeoutMs());
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return ErrnoError(errno, "VMM state");
    if (ready == 0 && deadline.Expired())
      return absl::DeadlineExceededError(events == POLLIN ? "the VMM does not give its state in time"
                                                          : "the VMM does not take its state in time");
  }
}

}  // namespace

absl::StatusOr<std::string> ReadAvailable(int fd, size_t limit, bool& eof) {
  std::string data;
  eof = false;
  while (data.size() < limit) {
    pollfd entry{fd, POLLIN, 0};
    const int ready = ::poll(&entry, 1, 0);
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return data;
    const size_t at = data.size();
    data.resize(limit);
    const ssize_t got = ::read(fd, data.data() + at, limit - at);
    data.resize(at + static_cast<size_t>(got > 0 ? got : 0));
    if (got < 0 && errno != EINTR && errno != EAGAIN) return ErrnoError(errno, "VMM state");
    if (got == 0) {
      eof = true;
      return data;
    }
  }
  return data;
}

absl::Status ReadToEnd(int fd, Deadline deadline, const std::function<absl::Status(std::string)>& piece) {
  for (;;) {
    RETURN_IF_ERROR(WaitFor(fd, POLLIN, deadline));
    bool eof = false;
    ASSIGN_OR_RETURN(std::string data, ReadAvailable(fd, kStatePiece, eof));
    if (!data.empty()) RETURN_IF_ERROR(piece(std::move(data)));
    if (eof) return absl::OkStatus();
  }
}

absl::Status WriteState(int fd, const std::string& data, Deadline deadline) {
  for (size_t done = 0; done < data.size();) {
    RETURN_IF_ERROR(WaitFor(fd, POLLOUT, deadline));
    // The descriptor may be a socket or a pipe; a VMM that is gone must not raise SIGPIPE.
    ssize_t wrote = ::send(fd, data.data() + done, data.size() - done, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (wrote < 0 && errno == ENOTSOCK) wrote = ::write(fd, data.data() + done, data.size() - done);
    if (wrote < 0 && errno != EINTR && errno != EAGAIN) return ErrnoError(errno, "VMM state");
    if (wrote > 0) done += static_cast<size_t>(wrote);
  }
  return absl::OkStatus();
}

}  // namespace baton::migration
