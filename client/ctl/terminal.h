// The user's terminal: what it is, how wide, raw mode, and signals as events. Everything that changes the
// terminal puts it back when it dies.
#pragma once

#include <absl/status/statusor.h>
#include <signal.h>
#include <termios.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/fd.h"

namespace baton::client {

bool IsTerminal(int fd);

struct TerminalSize {
  int columns = 80;
  int rows = 24;
};
// The terminal's size; the default where it cannot be told. COLUMNS in the environment wins.
TerminalSize SizeOf(int fd);

// Colours are for terminals that can, unless NO_COLOR is set.
bool WantsColour(int fd);

// Writes everything, whatever the descriptor's buffering. Errors (a closed pipe) are answered.
absl::Status WriteAll(int fd, const std::string& bytes);

// Puts a terminal into raw mode for as long as it lives. The old mode also comes back when the process
// crashes (SIGSEGV, SIGABRT and the like). At most one at a time.
class RawMode {
 public:
  static absl::StatusOr<RawMode> Enter(int fd);
  RawMode(RawMode&& other) noexcept;
  RawMode& operator=(RawMode&&) = delete;
  ~RawMode();

 private:
  RawMode(int fd, const termios& old) : fd_(fd), old_(old) {}
  int fd_;
  termios old_;
};

// Delivers signals through a descriptor instead of letting them act, for as long as it lives. At most one at
// a time.
class Signals {
 public:
  explicit Signals(const std::vector<int>& signals);
  ~Signals();
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

  // Readable while signals wait.
  int fd() const { return read_end_.get(); }
  // The next signal that arrived, if any.
  std::optional<int> Next();

 private:
  std::vector<std::pair<int, struct sigaction>> old_;
  UniqueFd read_end_;
  UniqueFd write_end_;
};

// While it lives, SIGINT and SIGTERM end the process with 128 + the signal's number after writing `message`
// to standard error: for calls that must not be interrupted without a word. At most one at a time.
class InterruptMessage {
 public:
  explicit InterruptMessage(const std::string& message);
  ~InterruptMessage();
  InterruptMessage(const InterruptMessage&) = delete;
  InterruptMessage& operator=(const InterruptMessage&) = delete;
};

}  // namespace baton::client
