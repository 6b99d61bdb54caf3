#include "common/unix_socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

namespace baton {
namespace {

sockaddr_un SocketAddress(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

int Connect(int fd, const sockaddr_un& address) {
  int rc;
  do {
    rc = ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  } while (rc < 0 && errno == EINTR);
  return rc < 0 ? errno : 0;
}

}  // namespace

absl::Status CheckUnixPath(const std::string& path) {
  constexpr size_t kMax = sizeof(sockaddr_un::sun_path) - 1;
  if (path.empty()) return Error(absl::StatusCode::kInvalidArgument, "the path of a unix socket is empty");
  if (path.size() > kMax) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "{}: too long for a unix socket ({} bytes, at most {}); choose a shorter directory or name",
                 path, path.size(), kMax);
  }
  return absl::OkStatus();
}

absl::Status WaitFd(int fd, short events, Deadline deadline, const std::string& what) {
  for (;;) {
    pollfd item{fd, events, 0};
    int rc = ::poll(&item, 1, deadline.PollTimeoutMs());
    if (rc > 0) return absl::OkStatus();
    if (rc < 0 && errno != EINTR) return ErrnoError(errno, what + ": poll");
    if (deadline.Expired()) return Error(absl::StatusCode::kDeadlineExceeded, "{}: no answer in time", what);
  }
}

absl::StatusOr<UniqueFd> ConnectUnix(const std::string& path, Deadline deadline) {
  RETURN_IF_ERROR(CheckUnixPath(path));
  sockaddr_un address = SocketAddress(path);
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) return ErrnoError(errno, path + ": socket");
  // A blocking connect to a unix socket waits for a place in the backlog; SO_SNDTIMEO bounds that wait
  // (socket(7)).
  auto left = deadline.Left();
  if (left < std::chrono::milliseconds(1)) left = std::chrono::milliseconds(1);
  timeval timeout{};
  timeout.tv_sec = std::chrono::duration_cast<std::chrono::seconds>(left).count();
  timeout.tv_usec =
      std::chrono::duration_cast<std::chrono::microseconds>(left % std::chrono::seconds(1)).count();
  (void)::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
  int error = Connect(fd.get(), address);
  if (error == EAGAIN) {
    return Error(absl::StatusCode::kDeadlineExceeded, "{}: the listener does not accept connections", path);
  }
  if (error != 0) return ErrnoError(error, path);
  timeout = {};
  (void)::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
  if (::fcntl(fd.get(), F_SETFL, O_NONBLOCK) < 0) return ErrnoError(errno, path + ": fcntl");
  return fd;
}

absl::StatusOr<UnixListener> UnixListener::Listen(const std::string& path) {
  RETURN_IF_ERROR(CheckUnixPath(path));
  sockaddr_un address = SocketAddress(path);
  struct stat st {};
  if (::lstat(path.c_str(), &st) == 0) {
    if (!S_ISSOCK(st.st_mode)) {
      return Error(absl::StatusCode::kAlreadyExists, "{}: exists and is not a socket", path);
    }
    UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!probe) return ErrnoError(errno, path + ": socket");
    int error = Connect(probe.get(), address);
    if (error == 0 || error == EAGAIN) {
      return Error(absl::StatusCode::kAlreadyExists, "{}: another process listens here", path);
    }
    (void)::unlink(path.c_str());
  }
  UnixListener listener;
  listener.fd_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener.fd_) return ErrnoError(errno, path + ": socket");
  // The mode of the socket itself decides the mode of the file that bind makes, so there is no moment with a
  // wider one.
  (void)::fchmod(listener.fd_.get(), 0600);
  if (::bind(listener.fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) < 0) {
    return ErrnoError(errno, path);
  }
  listener.path_ = path;
  if (::lstat(path.c_str(), &st) == 0) listener.inode_ = st.st_ino;
  if (::listen(listener.fd_.get(), 64) < 0) return ErrnoError(errno, path + ": listen");
  return listener;
}

UnixListener::UnixListener(UnixListener&& other) noexcept
    : fd_(std::move(other.fd_)), path_(std::move(other.path_)), inode_(other.inode_) {
  other.path_.clear();
}

UnixListener& UnixListener::operator=(UnixListener&& other) noexcept {
  if (this != &other) {
    Close();
    fd_ = std::move(other.fd_);
    path_ = std::move(other.path_);
    inode_ = other.inode_;
    other.path_.clear();
  }
  return *this;
}

UnixListener::~UnixListener() { Close(); }

void UnixListener::Close() {
  fd_.reset();
  if (path_.empty()) return;
  struct stat st {};
  if (::lstat(path_.c_str(), &st) == 0 && st.st_ino == inode_) (void)::unlink(path_.c_str());
  path_.clear();
}

UniqueFd UnixListener::Release() {
  path_.clear();
  return std::move(fd_);
}

absl::StatusOr<UniqueFd> UnixListener::Accept() {
  for (;;) {
    int fd = ::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) return UniqueFd(fd);
    if (errno == EINTR || errno == ECONNABORTED) continue;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return UniqueFd();
    return ErrnoError(errno, path_ + ": accept");
  }
}

}  // namespace baton
