#include "agent/vhost/backend_state.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "common/unix_socket.h"

namespace baton::vhost {
namespace {

constexpr uint32_t kSave = 0, kLoad = 1, kStopped = 0;

// The end of the pipe that is ours, after the back-end has agreed.
absl::StatusOr<UniqueFd> Begin(Frontend& frontend, uint32_t direction, Deadline deadline) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return ErrnoError(errno, "a pipe for the device state");
  UniqueFd read_end(ends[0]), write_end(ends[1]);
  UniqueFd& ours = direction == kSave ? read_end : write_end;
  UniqueFd& theirs = direction == kSave ? write_end : read_end;
  ASSIGN_OR_RETURN(UniqueFd own, frontend.SetDeviceStateFd({direction, kStopped}, theirs.get(), deadline));
  // Our copy of its end must go: it would keep the reader from ever seeing the end.
  theirs.reset();
  if (own) {
    struct stat st;
    if (::fstat(own.get(), &st) != 0 || !(S_ISFIFO(st.st_mode) || S_ISSOCK(st.st_mode))) {
      return absl::InvalidArgumentError(
          "SET_DEVICE_STATE_FD: the back-end's own channel is neither a pipe nor a socket");
    }
    ours = std::move(own);
  }
  if (::fcntl(ours.get(), F_SETFL, O_NONBLOCK) != 0) return ErrnoError(errno, "the device state's channel");
  return std::move(ours);
}

// Waits for `events` on `fd`, and serves the back-end's requests meanwhile: it may ask while it works.
absl::Status WaitChannel(Frontend& frontend, int fd, short events, Deadline deadline) {
  for (;;) {
    pollfd p[3] = {{fd, events, 0}, {frontend.channel_fd(), POLLIN, 0}, {frontend.fd(), 0, 0}};
    const int n = ::poll(p, 3, deadline.PollTimeoutMs());
    if (n < 0 && errno != EINTR) return ErrnoError(errno, "poll");
    if (n == 0) {
      return absl::DeadlineExceededError(events & POLLIN ? "the back-end does not finish saving its state"
                                                         : "the back-end does not take its state");
    }
    if (n > 0 && p[1].revents) frontend.ServeChannel();
    if (n > 0 && p[0].revents) return absl::OkStatus();
    if (n > 0 && p[2].revents)
      return absl::UnavailableError("the back-end hung up during its state transfer");
  }
}

}  // namespace

absl::StatusOr<std::string> SaveBackendState(Frontend& frontend, Deadline deadline) {
  std::string state;
  {
    ASSIGN_OR_RETURN(UniqueFd channel, Begin(frontend, kSave, deadline));
    std::string buffer(size_t{64} << 10, 0);
    for (;;) {
      RETURN_IF_ERROR(WaitChannel(frontend, channel.get(), POLLIN, deadline));
      const ssize_t n = ::read(channel.get(), buffer.data(), buffer.size());
      if (n == 0) break;
      if (n < 0) {
        if (errno == EAGAIN || errno == EINTR) continue;
        return ErrnoError(errno, "reading the device state");
      }
      if (state.size() + static_cast<size_t>(n) > kMaxBackendState) {
        return Error(absl::StatusCode::kResourceExhausted, "the device state is larger than {} bytes",
                     kMaxBackendState);
      }
      state.append(buffer.data(), static_cast<size_t>(n));
    }
  }
  // The end of the stream may be that of a back-end that failed: only this answer tells.
  RETURN_IF_ERROR(frontend.CheckDeviceState(deadline));
  return state;
}

absl::Status LoadBackendState(Frontend& frontend, const std::string& state, Deadline deadline) {
  {
    ASSIGN_OR_RETURN(UniqueFd channel, Begin(frontend, kLoad, deadline));
    for (size_t done = 0; done < state.size();) {
      RETURN_IF_ERROR(WaitChannel(frontend, channel.get(), POLLOUT, deadline));
      // SIGPIPE is blocked on the mediator's thread, so that a reader that is gone is an error like others.
      const ssize_t n = ::write(channel.get(), state.data() + done, state.size() - done);
      if (n < 0) {
        if (errno == EAGAIN || errno == EINTR) continue;
        if (errno == EPIPE) break;  // CHECK_DEVICE_STATE says what it thinks of that
        return ErrnoError(errno, "writing the device state");
      }
      done += static_cast<size_t>(n);
    }
  }
  return frontend.CheckDeviceState(deadline);
}

}  // namespace baton::vhost
