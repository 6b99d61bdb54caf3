#include "client/ctl/terminal.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "common/status.h"

namespace baton::client {
namespace {

// What the crash handler restores; set by the one RawMode that exists.
volatile sig_atomic_t crash_fd = -1;
termios crash_mode;

constexpr int kCrashSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};

void RestoreAndDie(int signal) {
  // tcsetattr is async-signal-safe (POSIX.1-2008). SA_RESETHAND has put the default action back.
  if (crash_fd >= 0) tcsetattr(crash_fd, TCSANOW, &crash_mode);
  raise(signal);
}

// Where PassOn writes; set by the one Signals that exists.
volatile sig_atomic_t signal_pipe = -1;

void PassOn(int signal) {
  int saved = errno;
  auto number = static_cast<unsigned char>(signal);
  [[maybe_unused]] ssize_t written = ::write(signal_pipe, &number, 1);
  errno = saved;
}

char last_words[1024];
volatile sig_atomic_t last_words_length = 0;

void SayAndDie(int signal) {
  [[maybe_unused]] ssize_t written =
      ::write(STDERR_FILENO, last_words, static_cast<size_t>(last_words_length));
  _exit(128 + signal);
}

}  // namespace

bool IsTerminal(int fd) { return isatty(fd) == 1; }

TerminalSize SizeOf(int fd) {
  TerminalSize out;
  winsize size{};
  if (ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) {
    out.columns = size.ws_col;
    if (size.ws_row > 0) out.rows = size.ws_row;
  }
  if (const char* columns = std::getenv("COLUMNS"); columns != nullptr && std::atoi(columns) > 0) {
    out.columns = std::atoi(columns);
  }
  return out;
}

bool WantsColour(int fd) {
  const char* no_colour = std::getenv("NO_COLOR");
  if (no_colour != nullptr && *no_colour != '\0') return false;
  const char* term = std::getenv("TERM");
  return IsTerminal(fd) && term != nullptr && *term != '\0' && std::string(term) != "dumb";
}

absl::Status WriteAll(int fd, const std::string& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    ssize_t n = ::write(fd, bytes.data() + done, bytes.size() - done);
    if (n > 0) {
      done += static_cast<size_t>(n);
    } else if (n < 0 && errno == EAGAIN) {
      pollfd waiting{fd, POLLOUT, 0};
      ::poll(&waiting, 1, -1);
    } else if (n < 0 && errno != EINTR) {
      return ErrnoError(errno, "writing output");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<RawMode> RawMode::Enter(int fd) {
  termios old;
  if (tcgetattr(fd, &old) != 0) return ErrnoError(errno, "reading the terminal's mode");
  crash_mode = old;
  crash_fd = fd;
  for (int signal : kCrashSignals) {
    struct sigaction action {};
    action.sa_handler = RestoreAndDie;
    action.sa_flags = SA_RESETHAND | SA_NODEFER;
    sigaction(signal, &action, nullptr);
  }
  termios raw = old;
  cfmakeraw(&raw);
  if (tcsetattr(fd, TCSADRAIN, &raw) != 0) {
    crash_fd = -1;
    return ErrnoError(errno, "setting the terminal's mode");
  }
  return RawMode(fd, old);
}

RawMode::RawMode(RawMode&& other) noexcept : fd_(other.fd_), old_(other.old_) { other.fd_ = -1; }

RawMode::~RawMode() {
  if (fd_ < 0) return;
  tcsetattr(fd_, TCSADRAIN, &old_);
  crash_fd = -1;
  for (int signal : kCrashSignals) ::signal(signal, SIG_DFL);
}

Signals::Signals(const std::vector<int>& signals) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return;
  read_end_.reset(ends[0]);
  write_end_.reset(ends[1]);
  signal_pipe = write_end_.get();
  for (int signal : signals) {
    struct sigaction action {};
    action.sa_handler = PassOn;
    action.sa_flags = SA_RESTART;
    struct sigaction old {};
    sigaction(signal, &action, &old);
    old_.emplace_back(signal, old);
  }
}

Signals::~Signals() {
  for (const auto& [signal, old] : old_) sigaction(signal, &old, nullptr);
  signal_pipe = -1;
}

std::optional<int> Signals::Next() {
  unsigned char number;
  if (!read_end_ || ::read(read_end_.get(), &number, 1) != 1) return std::nullopt;
  return number;
}

InterruptMessage::InterruptMessage(const std::string& message) {
  // The handler may run at any moment: it finds either the whole text or none.
  size_t length = std::min(message.size(), sizeof last_words);
  std::memcpy(last_words, message.data(), length);
  last_words_length = static_cast<sig_atomic_t>(length);
  for (int signal : {SIGINT, SIGTERM}) {
    struct sigaction action {};
    action.sa_handler = SayAndDie;
    sigaction(signal, &action, nullptr);
  }
}

InterruptMessage::~InterruptMessage() {
  for (int signal : {SIGINT, SIGTERM}) ::signal(signal, SIG_DFL);
  last_words_length = 0;
}

}  // namespace baton::client
