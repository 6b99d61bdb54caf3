#include "client/ctl/follow.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "client/ctl/exit_codes.h"
#include "client/ctl/live_display.h"
#include "client/ctl/progress.h"
#include "client/ctl/text.h"
#include "client/lib/units.h"
#include "client/lib/watch.h"

namespace baton::client {
namespace {

enum class Wake { kEvents, kSignal, kTick, kTimeout, kOutputGone };

// Waits for the watch, a signal, the next redraw or the timeout. A pipe whose reader is gone ends the
// program, as a write to it would.
Wake Wait(const MigrationWatch& watch, const Signals& signals, std::optional<Deadline> timeout, int tick_ms) {
  int wait = tick_ms;
  if (timeout) {
    int left = timeout->PollTimeoutMs();
    wait = wait < 0 ? left : std::min(wait, left);
  }
  pollfd fds[] = {{watch.fd(), POLLIN, 0}, {signals.fd(), POLLIN, 0}, {STDOUT_FILENO, 0, 0}};
  int ready = poll(fds, 3, wait);
  if (ready > 0 && (fds[1].revents & POLLIN) != 0) return Wake::kSignal;
  if (ready > 0 && (fds[0].revents & POLLIN) != 0) return Wake::kEvents;
  if (ready > 0 && (fds[2].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0) return Wake::kOutputGone;
  return timeout && timeout->Expired() ? Wake::kTimeout : Wake::kTick;
}

std::string WhyLost(const absl::Status& status) {
  return status.ok() ? "the server ended the stream" : Message(status);
}

// Shows one migration in the way that fits where the output goes.
class View {
 public:
  explicit View(Format format) {
    bool machine = IsMachineFormat(format) || format == Format::kName;
    // Results go to standard output; progress must not mix with them.
    int fd = machine ? STDERR_FILENO : STDOUT_FILENO;
    if (IsTerminal(fd)) {
      live_.emplace(fd);
      fd_ = fd;
    }
    lines_ = !machine;
  }

  bool live() const { return live_.has_value(); }

  void Update(const v1::Migration& migration) {
    migration_ = migration;
    std::vector<std::string> lines = log_.Update(migration);
    Draw(lines);
  }
  void Redraw() {
    if (live_) Draw({});
  }
  // A remark: stays in the live block until replaced; a line on standard error otherwise.
  void Note(const std::string& note) {
    if (live_) {
      note_ = note;
      Redraw();
    } else if (!note.empty()) {
      PrintError(note + "\n");
    }
  }
  void Clear() {
    if (live_) live_->Clear();
  }

 private:
  void Draw(const std::vector<std::string>& lines) {
    if (!live_) {
      std::string text;
      for (const auto& line : lines) text += line + "\n";
      if (lines_ && !text.empty()) Print(text).IgnoreError();
      return;
    }
    LiveView view;
    view.columns = SizeOf(fd_).columns;
    view.ascii = !LocaleIsUtf8();
    view.colour = WantsColour(fd_);
    view.now_ns = NowNs();
    view.note = note_;
    live_->Draw(lines, HasEnded(migration_) ? std::vector<std::string>{} : RenderLive(migration_, view));
  }

  std::optional<LiveDisplay> live_;
  int fd_ = STDOUT_FILENO;
  bool lines_ = true;
  ProgressLog log_;
  v1::Migration migration_;
  std::string note_;
};

// Ctrl-Z: leave a clean terminal behind, stop, and draw again when continued.
void Suspend(View* view) {
  view->Clear();
  raise(SIGSTOP);
  view->Redraw();
}

absl::Status PrintEnd(const v1::Migration& migration, Format format) {
  if (IsMachineFormat(format) || format == Format::kName) {
    return PrintResource(format, migration, migration.name(), [] { return std::string(); });
  }
  // Failures also belong on standard error, where scripts look for them.
  if (migration.phase() != v1::SUCCEEDED) {
    PrintError(Summary(migration));
    return absl::OkStatus();
  }
  return Print(Summary(migration));
}

// Answers the exit code if the signal ends the command.
std::optional<int> HandleSignal(int signal, View* view, const std::string& hint) {
  if (signal == SIGWINCH) {
    view->Redraw();
    return std::nullopt;
  }
  if (signal == SIGTSTP) {
    Suspend(view);
    return std::nullopt;
  }
  view->Clear();
  if (!hint.empty()) PrintError("\n" + hint + "\n");
  return 128 + signal;
}

}  // namespace

std::vector<int> FollowSignals() { return {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH, SIGTSTP}; }

absl::StatusOr<int> FollowMigration(Client* client, Signals* signals, const v1::Migration& start,
                                    const FollowOptions& options) {
  constexpr int kRedrawMs = 500;
  View view(options.format);
  v1::Migration migration = start;
  view.Update(migration);
  std::optional<Deadline> timeout;
  if (options.timeout.count() > 0) timeout = Deadline::After(options.timeout);
  std::optional<MigrationWatch> watch;
  if (!HasEnded(migration)) {
    // From the record's own revision on: nothing that happened since it was read is missed.
    watch.emplace(client, migration.name(), migration.revision());
    while (!HasEnded(migration)) {
      switch (Wait(*watch, *signals, timeout, view.live() ? kRedrawMs : -1)) {
        case Wake::kTick:
          view.Redraw();
          break;
        case Wake::kTimeout:
          view.Clear();
          PrintError("the time was over; " + options.interrupt_hint + "\n");
          return kExitTimeout;
        case Wake::kOutputGone:
          return 128 + SIGPIPE;
        case Wake::kSignal:
          while (auto signal = signals->Next()) {
            auto code = HandleSignal(*signal, &view, options.interrupt_hint);
            if (code) return *code;
          }
          break;
        case Wake::kEvents:
          while (auto event = watch->Next()) {
            switch (event->kind) {
              case WatchEvent::Kind::kChange:
                view.Note("");
                migration = std::move(event->migration);
                view.Update(migration);
                break;
              case WatchEvent::Kind::kDisconnected:
                view.Note(WhyLost(event->status) + "; trying again, the migration goes on");
                break;
              case WatchEvent::Kind::kResumed:
                view.Note("");
                if (!view.live()) PrintError("connected again\n");
                break;
              case WatchEvent::Kind::kRestarted:
                break;
              case WatchEvent::Kind::kEnded:
                view.Clear();
                return event->status;
            }
            if (HasEnded(migration)) break;
          }
          break;
      }
    }
  }
  view.Clear();
  RETURN_IF_ERROR(PrintEnd(migration, options.format));
  const int code = ExitCodeFor(migration);
  if (options.leave) options.leave(code);
  return code;
}

absl::StatusOr<int> FollowAll(Client* client, Signals* signals, const FollowOptions& options) {
  std::optional<Deadline> timeout;
  if (options.timeout.count() > 0) timeout = Deadline::After(options.timeout);
  MigrationWatch watch(client, "", 0);
  while (true) {
    switch (Wait(watch, *signals, timeout, -1)) {
      case Wake::kTick:
        break;
      case Wake::kTimeout:
        return kExitTimeout;
      case Wake::kOutputGone:
        return 128 + SIGPIPE;
      case Wake::kSignal:
        while (auto signal = signals->Next()) {
          if (*signal == SIGTSTP) raise(SIGSTOP);
          if (*signal != SIGTSTP && *signal != SIGWINCH) return 128 + *signal;
        }
        break;
      case Wake::kEvents:
        while (auto event = watch.Next()) {
          if (event->kind == WatchEvent::Kind::kEnded) return event->status;
          if (event->kind == WatchEvent::Kind::kDisconnected) {
            PrintError(WhyLost(event->status) + "; trying again\n");
          }
          if (event->kind == WatchEvent::Kind::kResumed) PrintError("connected again\n");
          if (event->kind != WatchEvent::Kind::kChange) continue;
          std::string line = options.format == Format::kJson   ? ToJson(event->migration, true)
                             : options.format == Format::kYaml ? "---\n" + ToYaml(event->migration)
                             : options.format == Format::kName ? event->migration.name()
                                                               : StatusLine(event->migration);
          if (line.empty() || line.back() != '\n') line += "\n";
          RETURN_IF_ERROR(Print(line));
        }
        break;
    }
  }
}

}  // namespace baton::client
