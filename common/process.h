// Child processes: started with exactly the descriptors they shall have, watched through pidfds, never left
// behind by accident. And processes that are not our children any more, named by pid and start time.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton {

// How a process ended.
struct ExitStatus {
  int code = 0;    // exit code, if signal is 0
  int signal = 0;  // signal that killed it
  bool ok() const { return code == 0 && signal == 0; }
  // "exited with 1", "was killed by SIGKILL".
  std::string ToString() const;
};

struct SpawnOptions {
  // argv[0] is the program: a path, or a name searched in PATH.
  std::vector<std::string> argv = {};
  // On top of the parent's environment (or instead of it, with clear_env).
  std::map<std::string, std::string> env = {};
  bool clear_env = false;
  // Descriptors of the parent for 0, 1 and 2; -1 is /dev/null. Not consumed.
  int stdin_fd = -1;
  int stdout_fd = -1;
  int stderr_fd = -1;
  // {descriptor of the parent, number in the child}; numbers from 3, each once. Everything else above 2 is
  // closed in the child, whatever its close-on-exec flag.
  std::vector<std::pair<int, int>> inherit = {};
  // setsid(): a session and process group of its own, so that signals to our terminal or group miss it.
  bool new_session = false;
  // SIGKILL for the child when the thread that started it ends, however that happens (PR_SET_PDEATHSIG): for
  // children that must not outlive a parent that crashes. Not for SpawnDetached.
  bool die_with_parent = false;
  std::string working_dir = {};
};

// A child. Move-only; destroying one that was neither waited for nor released kills it (and, with
// new_session, its process group) with SIGKILL and reaps it. One thread at a time, except pid() and pidfd().
class Process {
 public:
  // NotFound, PermissionDenied … if the program cannot be executed: exec's failure is reported here, not as
  // an exit. The child gets default signal handlers and an empty signal mask. Safe in programs with threads.
  static absl::StatusOr<Process> Spawn(const SpawnOptions& options);
  Process(Process&& other) noexcept;
  Process& operator=(Process&& other) noexcept;
  ~Process();

  pid_t pid() const { return pid_; }
  // Readable once the process has ended.
  int pidfd() const { return pidfd_.get(); }
  // Waits for the end and reaps. DeadlineExceeded leaves it running. Later calls return the same.
  absl::StatusOr<ExitStatus> Wait(Deadline deadline);
  // Nothing happens if it has ended.
  void Signal(int signal);
  // SIGTERM, then SIGKILL if it has not ended by the deadline; reaps.
  ExitStatus Terminate(Deadline grace);
  // Gives up the child: it runs on, and is reaped by nobody here.
  void Release();

 private:
  Process(pid_t pid, UniqueFd pidfd, bool group) : pid_(pid), pidfd_(std::move(pidfd)), group_(group) {}
  void KillNow();
  pid_t pid_ = -1;
  UniqueFd pidfd_;
  bool group_ = false;
  bool reaped_ = false;
  ExitStatus status_;
};

// Starts a process that belongs to nobody here: forked twice, in a session of its own, so that it outlives
// us, is adopted by init (or the nearest subreaper) and leaves no zombie. Returns its pid and start time.
struct ProcessId {
  pid_t pid = 0;
  // Clock ticks since boot, field 22 of /proc/PID/stat: with the pid, unique until a reboot.
  uint64_t start_time = 0;
};
absl::StatusOr<ProcessId> SpawnDetached(const SpawnOptions& options);

// Start time of a running process; NotFound if there is none (zombies count as none).
absl::StatusOr<uint64_t> ProcessStartTime(pid_t pid);
// A pidfd for exactly that process; NotFound if it is gone, also if its pid has been given to another. One
// that has ended but was not reaped still has a pidfd, which is readable at once.
absl::StatusOr<UniqueFd> OpenPidfd(const ProcessId& id);
// True while exactly that process runs.
bool ProcessAlive(const ProcessId& id);
// Waits until a pidfd says that its process has ended. DeadlineExceeded.
absl::Status WaitPidfd(int pidfd, Deadline deadline);
// SIGKILL to exactly that process, and waits for its end. OK if it had ended before.
absl::Status KillProcess(const ProcessId& id, Deadline deadline);

// Runs a command to its end and captures what it prints, each stream up to `max_output` bytes (more is
// dropped). At the deadline its whole process group is killed: DeadlineExceeded. A failure to start is an
// error, a bad exit is not.
struct CommandOutput {
  ExitStatus status;
  std::string out;
  std::string err;
};
absl::StatusOr<CommandOutput> RunCommand(SpawnOptions options, Deadline deadline, size_t max_output = 65536);

}  // namespace baton
