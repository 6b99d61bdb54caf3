// Holding a thread of another process with ptrace(2), and making it run a system call.
#pragma once

#include <signal.h>
#include <sys/types.h>
#include <sys/user.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/status.h"

namespace baton::memory {

// Runs `body` on a thread of its own and waits for it. ptrace ties a tracee to the thread that attached, and
// the kernel lets go of every tracee when that thread ends: so no way out of `body` can leave a thread held.
absl::Status RunAsTracer(const std::function<absl::Status()>& body);

// A thread that stands still. Use only within RunAsTracer, on its thread. The destructor puts the registers
// and the signal mask back as they were and lets the thread go: a system call that was interrupted is
// restarted by the kernel as if nothing had been.
class RemoteThread {
 public:
  // Stops `tid` (PTRACE_SEIZE, PTRACE_INTERRUPT: no signal is involved). PermissionDenied names what forbids
  // it; NotFound if the thread has ended; DeadlineExceeded if it cannot be stopped now, because it waits in
  // the kernel in a way that nothing interrupts (vfork, dead storage).
  static absl::StatusOr<std::unique_ptr<RemoteThread>> Stop(pid_t tid, Deadline deadline);
  ~RemoteThread();
  RemoteThread(const RemoteThread&) = delete;
  RemoteThread& operator=(const RemoteThread&) = delete;

  pid_t tid() const { return tid_; }
  // Runs one system call in the thread, which must be one that does not wait. Returns what the kernel
  // returned, -errno included. An error means that it could not be run.
  absl::StatusOr<int64_t> Syscall(int64_t number, const std::vector<uint64_t>& arguments);
  // Copies a few bytes to the unused part of the thread's stack, for arguments; returns their address there.
  // Valid until the next call.
  absl::StatusOr<uint64_t> PutOnStack(const void* data, size_t size);

 private:
  explicit RemoteThread(pid_t tid) : tid_(tid) {}
  absl::Status PrepareInjection();
  absl::Status Step();

  const pid_t tid_;
  bool prepared_ = false;
  user_regs_struct saved_{};
  uint64_t saved_mask_ = 0;
  uint64_t syscall_address_ = 0;
};

// Stops all threads of `pid`, also those that appear meanwhile. Use within RunAsTracer.
absl::StatusOr<std::vector<std::unique_ptr<RemoteThread>>> StopAllThreads(pid_t pid, Deadline deadline);

}  // namespace baton::memory
