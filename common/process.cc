#include "common/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>

#include "common/config.h"

// glibc 2.36's header has no linkage specification for C++.
extern "C" {
#include <sys/pidfd.h>
}

extern char** environ;

namespace baton {
namespace {

// What the child tells its parent through the status pipe. A pipe write of this size is atomic.
struct ChildNote {
  enum Kind : int { kPid = 1, kFailed = 2 } kind;
  int value;      // pid, or errno
  char step[24];  // what failed
};

// Everything the child needs, made before the fork: between fork and exec of a program with threads nothing
// may be allocated.
struct Plan {
  std::vector<char*> argv;
  std::vector<char*> envp;
  std::vector<std::string> env_storage;
  std::vector<std::pair<int, int>> moves;  // {source, target}
  std::vector<int> copies;                 // room for the duplicates of the sources
  int base = 3;                            // first number above all targets
  const char* directory = nullptr;
  bool new_session = false;
  pid_t die_with = 0;  // the parent that the child does not outlive; 0: it may
};

absl::StatusOr<UniqueFd> OpenNull() {
  UniqueFd fd(::open("/dev/null", O_RDWR | O_CLOEXEC));
  if (!fd) return ErrnoError(errno, "/dev/null");
  return fd;
}

Plan MakePlan(const SpawnOptions& options, int null_fd) {
  Plan plan;
  for (const std::string& arg : options.argv) plan.argv.push_back(const_cast<char*>(arg.c_str()));
  plan.argv.push_back(nullptr);
  if (!options.clear_env) {
    for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
      std::string name(*entry, std::strcspn(*entry, "="));
      if (options.env.count(name) == 0) plan.env_storage.emplace_back(*entry);
    }
  }
  for (const auto& [name, value] : options.env) plan.env_storage.push_back(name + "=" + value);
  for (std::string& entry : plan.env_storage) plan.envp.push_back(entry.data());
  plan.envp.push_back(nullptr);
  auto or_null = [&](int fd) { return fd < 0 ? null_fd : fd; };
  plan.moves = {
      {or_null(options.stdin_fd), 0}, {or_null(options.stdout_fd), 1}, {or_null(options.stderr_fd), 2}};
  for (const auto& move : options.inherit) plan.moves.push_back(move);
  plan.copies.resize(plan.moves.size());
  for (const auto& [source, target] : plan.moves) plan.base = std::max(plan.base, target + 1);
  plan.directory = options.working_dir.empty() ? nullptr : options.working_dir.c_str();
  plan.new_session = options.new_session;
  plan.die_with = options.die_with_parent ? ::getpid() : 0;
  return plan;
}

// In the child, async-signal-safe calls only. Never returns.
[[noreturn]] void FailChild(int status_fd, const char* step) {
  ChildNote note{};
  note.kind = ChildNote::kFailed;
  note.value = errno;
  for (size_t i = 0; step[i] != '\0' && i + 1 < sizeof(note.step); ++i) note.step[i] = step[i];
  [[maybe_unused]] ssize_t n = ::write(status_fd, &note, sizeof(note));
  ::_exit(127);
}

[[noreturn]] void RunChild(Plan& plan, int status_fd) {
  // exec keeps ignored signals ignored and the mask as it is; a child shall not inherit our SIGPIPE choice.
  struct sigaction action {};
  action.sa_handler = SIG_DFL;
  for (int s = 1; s < NSIG; ++s) ::sigaction(s, &action, nullptr);
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  if (plan.new_session) ::setsid();
  if (plan.die_with != 0) {
    if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) FailChild(status_fd, "prctl");
    // It may have ended before the call above; then no signal comes any more.
    if (::getppid() != plan.die_with) ::_exit(127);
  }
  if (plan.directory != nullptr && ::chdir(plan.directory) != 0) FailChild(status_fd, "chdir");
  // First out of the way of all targets, then close-on-exec for everything, then into place (dup2 clears the
  // flag).
  int status_copy = ::fcntl(status_fd, F_DUPFD_CLOEXEC, plan.base);
  if (status_copy < 0) FailChild(status_fd, "fcntl");
  for (size_t i = 0; i < plan.moves.size(); ++i) {
    plan.copies[i] = ::fcntl(plan.moves[i].first, F_DUPFD_CLOEXEC, plan.base);
    if (plan.copies[i] < 0) FailChild(status_copy, "fcntl");
  }
  if (::close_range(3, UINT_MAX, CLOSE_RANGE_CLOEXEC) != 0) FailChild(status_copy, "close_range");
  for (size_t i = 0; i < plan.moves.size(); ++i) {
    if (::dup2(plan.copies[i], plan.moves[i].second) < 0) FailChild(status_copy, "dup2");
  }
  ::execvpe(plan.argv[0], plan.argv.data(), plan.envp.data());
  FailChild(status_copy, "exec");
}

absl::Status ReadNotes(int fd, const std::string& program, int* pid) {
  while (true) {
    ChildNote note{};
    ssize_t n = ::read(fd, &note, sizeof(note));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoError(errno, "read from child");
    if (n == 0) return absl::OkStatus();
    if (n != sizeof(note)) return absl::InternalError("torn note from child");
    if (note.kind == ChildNote::kPid) {
      *pid = note.value;
      continue;
    }
    note.step[sizeof(note.step) - 1] = '\0';
    if (std::strcmp(note.step, "exec") == 0) return ErrnoError(note.value, "cannot execute " + program);
    return ErrnoError(note.value, fmt::format("cannot start {}: {}", program, note.step));
  }
}

struct Pipe {
  UniqueFd read, write;
};
absl::StatusOr<Pipe> MakePipe() {
  int fds[2];
  if (::pipe2(fds, O_CLOEXEC) != 0) return ErrnoError(errno, "pipe");
  return Pipe{UniqueFd(fds[0]), UniqueFd(fds[1])};
}

absl::Status CheckOptions(const SpawnOptions& options) {
  if (options.argv.empty() || options.argv[0].empty())
    return absl::InvalidArgumentError("no program to start");
  return absl::OkStatus();
}

}  // namespace

std::string ExitStatus::ToString() const {
  if (signal == 0) return fmt::format("exited with {}", code);
  const char* name = ::sigabbrev_np(signal);
  return name != nullptr ? fmt::format("was killed by SIG{}", name)
                         : fmt::format("was killed by signal {}", signal);
}

Process::Process(Process&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      pidfd_(std::move(other.pidfd_)),
      group_(other.group_),
      reaped_(other.reaped_),
      status_(other.status_) {}

Process& Process::operator=(Process&& other) noexcept {
  if (this != &other) {
    KillNow();
    pid_ = std::exchange(other.pid_, -1);
    pidfd_ = std::move(other.pidfd_);
    group_ = other.group_;
    reaped_ = other.reaped_;
    status_ = other.status_;
  }
  return *this;
}

Process::~Process() { KillNow(); }

void Process::Release() {
  pid_ = -1;
  pidfd_.reset();
}

void Process::KillNow() {
  if (pid_ < 0 || reaped_) return;
  Signal(SIGKILL);
  // A killed process ends unless it hangs in the kernel; nobody can do more than wait.
  while (!Wait(Deadline::After(std::chrono::hours(1))).ok()) {
  }
}

absl::StatusOr<Process> Process::Spawn(const SpawnOptions& options) {
  RETURN_IF_ERROR(CheckOptions(options));
  ASSIGN_OR_RETURN(UniqueFd null_fd, OpenNull());
  ASSIGN_OR_RETURN(Pipe status, MakePipe());
  Plan plan = MakePlan(options, null_fd.get());
  // _Fork runs no atfork handlers: gRPC's and malloc's are for children that go on without exec.
  pid_t pid = ::_Fork();
  if (pid < 0) return ErrnoError(errno, "fork");
  if (pid == 0) RunChild(plan, status.write.get());
  status.write.reset();
  UniqueFd pidfd(::pidfd_open(pid, 0));
  int pidfd_error = errno;
  Process process(pid, std::move(pidfd), options.new_session);
  int unused = 0;
  absl::Status started = ReadNotes(status.read.get(), options.argv[0], &unused);
  if (started.ok() && !process.pidfd_) started = ErrnoError(pidfd_error, "pidfd_open");
  if (!started.ok()) {
    ::kill(pid, SIGKILL);
    while (::waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
    }
    process.Release();
    return started;
  }
  return process;
}

absl::StatusOr<ExitStatus> Process::Wait(Deadline deadline) {
  if (reaped_) return status_;
  if (pid_ < 0) return absl::FailedPreconditionError("no process");
  RETURN_IF_ERROR(WaitPidfd(pidfd_.get(), deadline));
  siginfo_t info{};
  while (::waitid(P_PIDFD, static_cast<id_t>(pidfd_.get()), &info, WEXITED) < 0) {
    if (errno != EINTR) {
      // Somebody else reaped it (SIGCHLD ignored): it has ended, how is unknown.
      reaped_ = true;
      return status_;
    }
  }
  reaped_ = true;
  if (info.si_code == CLD_EXITED) {
    status_.code = info.si_status;
  } else {
    status_.signal = info.si_status;
  }
  return status_;
}

void Process::Signal(int signal) {
  if (pid_ < 0 || reaped_) return;
  if (group_) {
    ::kill(-pid_, signal);
  } else {
    ::pidfd_send_signal(pidfd_.get(), signal, nullptr, 0);
  }
}

ExitStatus Process::Terminate(Deadline grace) {
  Signal(SIGTERM);
  auto status = Wait(grace);
  if (status.ok()) return *status;
  KillNow();
  return status_;
}

absl::StatusOr<ProcessId> SpawnDetached(const SpawnOptions& options) {
  RETURN_IF_ERROR(CheckOptions(options));
  ASSIGN_OR_RETURN(UniqueFd null_fd, OpenNull());
  ASSIGN_OR_RETURN(Pipe status, MakePipe());
  Plan plan = MakePlan(options, null_fd.get());
  plan.new_session = true;
  plan.die_with = 0;
  pid_t middle = ::_Fork();
  if (middle < 0) return ErrnoError(errno, "fork");
  if (middle == 0) {
    // In a session of its own even before exec, so that a signal to our group in between misses it.
    ::setsid();
    pid_t child = ::_Fork();
    if (child < 0) FailChild(status.write.get(), "fork");
    if (child == 0) RunChild(plan, status.write.get());
    ChildNote note{};
    note.kind = ChildNote::kPid;
    note.value = child;
    [[maybe_unused]] ssize_t n = ::write(status.write.get(), &note, sizeof(note));
    ::_exit(0);
  }
  status.write.reset();
  while (::waitpid(middle, nullptr, 0) < 0 && errno == EINTR) {
  }
  ProcessId id;
  RETURN_IF_ERROR(ReadNotes(status.read.get(), options.argv[0], &id.pid));
  auto start = ProcessStartTime(id.pid);
  if (!start.ok()) return Error(absl::StatusCode::kUnavailable, "{} ended at once", options.argv[0]);
  id.start_time = *start;
  return id;
}

namespace {

struct StatLine {
  char state = 0;
  uint64_t start_time = 0;
};

absl::StatusOr<StatLine> ReadStat(pid_t pid) {
  auto stat = ReadFileLimited(fmt::format("/proc/{}/stat", pid), 65536);
  if (!stat.ok()) return Error(absl::StatusCode::kNotFound, "no process {}", pid);
  // The second field is the name in parentheses and may itself contain any character: count from the last
  // ')'.
  size_t at = stat->rfind(')');
  if (at == std::string::npos || at + 2 >= stat->size())
    return absl::InternalError("unreadable /proc/PID/stat");
  at += 2;
  StatLine line;
  line.state = (*stat)[at];
  // Field 3 follows the name; field 22 is 19 further.
  for (int field = 3; field < 22; ++field) {
    at = stat->find(' ', at);
    if (at == std::string::npos) return absl::InternalError("short /proc/PID/stat");
    ++at;
  }
  line.start_time = std::strtoull(stat->c_str() + at, nullptr, 10);
  return line;
}

}  // namespace

absl::StatusOr<uint64_t> ProcessStartTime(pid_t pid) {
  ASSIGN_OR_RETURN(StatLine line, ReadStat(pid));
  if (line.state == 'Z' || line.state == 'X')
    return Error(absl::StatusCode::kNotFound, "process {} has ended", pid);
  return line.start_time;
}

absl::StatusOr<UniqueFd> OpenPidfd(const ProcessId& id) {
  if (id.pid <= 0) return Error(absl::StatusCode::kNotFound, "no process {}", id.pid);
  UniqueFd fd(::pidfd_open(id.pid, 0));
  if (!fd) return ErrnoError(errno, fmt::format("process {}", id.pid));
  // Read after the open: if it is the right one now, the pidfd is too. Its state says too little: a process
  // whose first thread has ended is a zombie there while other threads still hold its files and locks; only
  // the pidfd tells when all have ended.
  ASSIGN_OR_RETURN(StatLine line, ReadStat(id.pid));
  if (line.start_time != id.start_time)
    return Error(absl::StatusCode::kNotFound, "pid {} belongs to another process now", id.pid);
  return fd;
}

bool ProcessAlive(const ProcessId& id) {
  auto fd = OpenPidfd(id);
  if (!fd.ok()) return false;
  pollfd poll{fd->get(), POLLIN, 0};
  return ::poll(&poll, 1, 0) == 0;
}

absl::Status WaitPidfd(int pidfd, Deadline deadline) {
  while (true) {
    pollfd poll{pidfd, POLLIN, 0};
    int n = ::poll(&poll, 1, deadline.PollTimeoutMs());
    if (n > 0) return absl::OkStatus();
    if (n < 0 && errno != EINTR) return ErrnoError(errno, "poll");
    if (deadline.Expired())
      return Error(absl::StatusCode::kDeadlineExceeded, "the process has not ended in time");
  }
}

absl::Status KillProcess(const ProcessId& id, Deadline deadline) {
  auto fd = OpenPidfd(id);
  if (!fd.ok()) return absl::IsNotFound(fd.status()) ? absl::OkStatus() : fd.status();
  if (::pidfd_send_signal(fd->get(), SIGKILL, nullptr, 0) != 0 && errno != ESRCH)
    return ErrnoError(errno, fmt::format("kill {}", id.pid));
  return WaitPidfd(fd->get(), deadline);
}

namespace {

// Reads what is there; false at the end of the stream.
bool Drain(int fd, size_t limit, std::string* out) {
  char buffer[4096];
  while (true) {
    ssize_t n = ::read(fd, buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno == EAGAIN;
    if (n == 0) return false;
    size_t room = limit - std::min(limit, out->size());
    out->append(buffer, std::min(room, static_cast<size_t>(n)));
  }
}

}  // namespace

absl::StatusOr<CommandOutput> RunCommand(SpawnOptions options, Deadline deadline, size_t max_output) {
  ASSIGN_OR_RETURN(Pipe out, MakePipe());
  ASSIGN_OR_RETURN(Pipe err, MakePipe());
  options.stdout_fd = out.write.get();
  options.stderr_fd = err.write.get();
  options.new_session = true;
  ASSIGN_OR_RETURN(Process process, Process::Spawn(options));
  out.write.reset();
  err.write.reset();
  for (int fd : {out.read.get(), err.read.get()}) ::fcntl(fd, F_SETFL, O_NONBLOCK);
  CommandOutput result;
  bool out_open = true, err_open = true, ended = false;
  // A daemon that the command left behind may hold the pipes open for ever: its end is the command's own
  // exit.
  while (!ended) {
    pollfd polls[3] = {{process.pidfd(), POLLIN, 0},
                       {out_open ? out.read.get() : -1, POLLIN, 0},
                       {err_open ? err.read.get() : -1, POLLIN, 0}};
    int n = ::poll(polls, 3, deadline.PollTimeoutMs());
    if (n < 0 && errno != EINTR) return ErrnoError(errno, "poll");
    ended = n > 0 && polls[0].revents != 0;
    if (out_open) out_open = Drain(out.read.get(), max_output, &result.out);
    if (err_open) err_open = Drain(err.read.get(), max_output, &result.err);
    if (!ended && deadline.Expired())
      return Error(absl::StatusCode::kDeadlineExceeded, "{} did not end in time and was killed",
                   options.argv[0]);
  }
  ASSIGN_OR_RETURN(result.status, process.Wait(Deadline::After(std::chrono::seconds(1))));
  return result;
}

}  // namespace baton
