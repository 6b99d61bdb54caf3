#include "tests/lab/vm/console.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

namespace baton::lab {

absl::StatusOr<std::unique_ptr<Console>> Console::Open(const std::string& path, const std::string& log_path) {
  UnixListener listener;
  if (!path.empty()) {
    ASSIGN_OR_RETURN(listener, UnixListener::Listen(path));
  }
  UniqueFd log;
  if (!log_path.empty()) {
    log.reset(::open(log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    if (!log) return ErrnoError(errno, log_path);
  }
  return std::unique_ptr<Console>(new Console(std::move(listener), std::move(log)));
}

void Console::Say(const std::string& line) {
  const std::string text = line + "\r\n";
  std::lock_guard lock(mutex_);
  if (log_) (void)!::write(log_.get(), text.data(), text.size());
  // A client that does not read misses something, as with QEMU.
  if (client_) (void)!::send(client_.get(), text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
}

std::vector<int> Console::fds() const {
  std::lock_guard lock(mutex_);
  if (client_) return {client_.get()};
  if (listener_.fd() >= 0) return {listener_.fd()};
  return {};
}

void Console::Attend(int fd, const std::function<void(char)>& typed) {
  if (fd == listener_.fd()) {
    auto client = listener_.Accept();
    std::lock_guard lock(mutex_);
    if (client.ok()) client_ = *std::move(client);
    return;
  }
  char keys[256];
  const ssize_t n = ::recv(fd, keys, sizeof keys, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) {
    std::lock_guard lock(mutex_);
    client_.reset();
    return;
  }
  for (ssize_t i = 0; i < n; ++i) typed(keys[i]);
}

}  // namespace baton::lab
