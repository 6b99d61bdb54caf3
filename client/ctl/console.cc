#include "client/ctl/console.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <optional>

#include "client/ctl/context.h"
#include "client/ctl/exit_codes.h"
#include "client/ctl/terminal.h"
#include "client/lib/console.h"
#include "client/lib/names.h"

namespace baton::client {
namespace {

constexpr char kLeave = 0x1d;  // Ctrl-]
// Input is not read faster than the server takes it.
constexpr size_t kMaxUnsent = 256 * 1024;

struct Loop {
  Client* client;
  ConsoleSession* session;
  Signals* signals;
  bool terminal;
  std::optional<Deadline> timeout;
  bool input_open = true;

  // Answers the exit code once it is over.
  std::optional<absl::StatusOr<int>> Step();
  std::optional<absl::StatusOr<int>> ReadInput();
  std::optional<absl::StatusOr<int>> TakeOutput();
};

std::optional<absl::StatusOr<int>> Loop::ReadInput() {
  char buffer[4096];
  ssize_t n = ::read(STDIN_FILENO, buffer, sizeof buffer);
  if (n < 0) {
    if (errno == EINTR || errno == EAGAIN) return std::nullopt;
    return ErrnoError(errno, "reading input");
  }
  if (n == 0) {
    // A terminal that hung up ends it; a pipe that ended leaves the output to be followed.
    input_open = false;
    return terminal ? std::optional<absl::StatusOr<int>>(kExitOk) : std::nullopt;
  }
  std::string input(buffer, static_cast<size_t>(n));
  if (terminal) {
    size_t leave = input.find(kLeave);
    if (leave != std::string::npos) {
      if (leave > 0) session->Send(input.substr(0, leave));
      return kExitOk;
    }
  }
  session->Send(std::move(input));
  return std::nullopt;
}

std::optional<absl::StatusOr<int>> Loop::TakeOutput() {
  while (auto event = session->Next()) {
    if (event->ended) {
      if (event->status.ok()) return kExitOk;
      return event->status;
    }
    // The guest may drive the terminal: that is what a console is for.
    absl::Status written = WriteAll(STDOUT_FILENO, event->output);
    if (!written.ok()) return written;
  }
  return std::nullopt;
}

std::optional<absl::StatusOr<int>> Loop::Step() {
  bool read_input = input_open && session->Unsent() < kMaxUnsent;
  pollfd fds[] = {{read_input ? STDIN_FILENO : -1, POLLIN, 0},
                  {session->fd(), POLLIN, 0},
                  {signals->fd(), POLLIN, 0},
                  {STDOUT_FILENO, 0, 0}};
  // While input is held back, look again soon whether the server has taken some.
  int wait = input_open && !read_input ? 20 : -1;
  if (timeout) wait = wait < 0 ? timeout->PollTimeoutMs() : std::min(wait, timeout->PollTimeoutMs());
  int ready = ::poll(fds, 4, wait);
  if (ready < 0 && errno != EINTR) return ErrnoError(errno, "poll");
  if (ready > 0) {
    if (fds[2].revents != 0) {
      if (auto signal = signals->Next()) return 128 + *signal;
    }
    if (fds[1].revents != 0) {
      if (auto done = TakeOutput()) return done;
    }
    if (fds[0].revents != 0) {
      if (auto done = ReadInput()) return done;
    }
    if ((fds[3].revents & (POLLERR | POLLHUP)) != 0) return 128 + SIGPIPE;
  }
  if (timeout && timeout->Expired()) return kExitTimeout;
  return std::nullopt;
}

}  // namespace

absl::StatusOr<int> RunConsole(Client* client, const std::string& vm, Duration timeout) {
  bool terminal = IsTerminal(STDIN_FILENO);
  Signals signals({SIGINT, SIGTERM, SIGHUP, SIGQUIT});
  ConsoleSession session(client, vm);
  std::optional<RawMode> raw;
  if (terminal) {
    PrintError("connected to the console of " + ShortName(vm) + "; Ctrl-] leaves\n");
    ASSIGN_OR_RETURN(RawMode mode, RawMode::Enter(STDIN_FILENO));
    raw.emplace(std::move(mode));
  }
  Loop loop{client, &session, &signals, terminal, std::nullopt};
  if (timeout.count() > 0) loop.timeout = Deadline::After(timeout);
  while (true) {
    auto done = loop.Step();
    if (!done) continue;
    raw.reset();
    if (terminal) PrintError("\n");
    return *std::move(done);
  }
}

}  // namespace baton::client
