// Unix stream sockets by path: connecting with a deadline, listening, credentials of the path itself.
#pragma once

#include <string>

#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton {

// Fails with InvalidArgument if `path` is empty or does not fit into a socket address (sun_path holds 107
// bytes and the terminating zero, unix(7)); the message names the path and the limit.
absl::Status CheckUnixPath(const std::string& path);

// Connects to the stream socket at `path`; the descriptor is non-blocking and close-on-exec. NotFound if
// there is no such file, Unavailable if nobody listens, DeadlineExceeded if the listener's backlog stays
// full.
absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path, Deadline deadline);

// Waits until `fd` has one of `events` (poll(2)) or an error condition, or the deadline passes
// (DeadlineExceeded with `what` in the message).
absl::Status WaitFd(int fd, short events, Deadline deadline, const std::string& what);

// A listening stream socket. Move-only. Removes its path at destruction if the path is still this socket.
class UnixListener {
 public:
  // Binds and listens at `path` with mode 0600. The file of a listener that died is replaced; AlreadyExists
  // if another process listens there.
  static absl::StatusOr<UnixListener> Listen(const std::string& path);
  UnixListener() = default;
  UnixListener(UnixListener&&) noexcept;
  UnixListener& operator=(UnixListener&&) noexcept;
  ~UnixListener();

  // Non-blocking; for poll and epoll.
  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }
  // The next connection (non-blocking, close-on-exec), or an invalid descriptor if none is pending.
  absl::StatusOr<UniqueFd> Accept();
  void Close();
  // Gives the descriptor away and leaves the path in place, for a socket that another process inherits.
  UniqueFd Release();

 private:
  UniqueFd fd_;
  std::string path_;
  uint64_t inode_ = 0;
};

}  // namespace baton
