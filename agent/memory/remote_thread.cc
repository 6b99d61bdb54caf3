#include "agent/memory/remote_thread.h"

#include <linux/elf.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <set>
#include <thread>

#include "agent/memory/process_maps.h"
#include "common/log.h"

namespace baton::memory {
namespace {

#if !defined(__x86_64__)
#error "system calls are injected by x86-64 register names"
#endif

// linux/ptrace.h; glibc's header has the requests only under other names.
constexpr auto kGetSigmask = static_cast<__ptrace_request>(0x420a);
constexpr auto kSetSigmask = static_cast<__ptrace_request>(0x420b);
constexpr long kSuspendSeccomp = 1 << 21;
constexpr int kEventStop = 128;

// An injected system call does not wait, so only a machine that is badly overloaded takes longer. Giving up
// in the middle would leave foreign registers in the thread.
constexpr auto kStepLimit = std::chrono::seconds(60);

absl::Status PtraceError(int error, pid_t tid, const char* what) {
  if (error == EPERM || error == EACCES) {
    return Error(
        absl::StatusCode::kPermissionDenied,
        "ptrace {} of thread {} is not permitted: it takes the same user or CAP_SYS_PTRACE, no other tracer, "
        "and consent of the security modules (/proc/sys/kernel/yama/ptrace_scope)",
        what, tid);
  }
  return ErrnoError(error, fmt::format("ptrace {} of thread {}", what, tid));
}

struct StopReport {
  int signal;
  int event;
};

// Waits until the thread reports a stop. A thread that ended is left for its parent to reap.
absl::StatusOr<StopReport> WaitForStop(pid_t tid, Deadline deadline) {
  // wait(2) knows no time limit, and a pidfd does not tell of stops: so look again after short naps. A stop
  // takes some 50 us.
  long nap_ns = 20'000;
  for (;;) {
    siginfo_t info{};
    if (::waitid(P_PID, static_cast<id_t>(tid), &info, WSTOPPED | WEXITED | WNOHANG | WNOWAIT | __WALL) !=
        0) {
      if (errno == EINTR) continue;
      return ErrnoError(errno, fmt::format("wait for thread {}", tid));
    }
    if (info.si_pid != 0) {
      if (info.si_code == CLD_EXITED || info.si_code == CLD_KILLED || info.si_code == CLD_DUMPED) {
        return Error(absl::StatusCode::kNotFound, "thread {} has ended", tid);
      }
      ::waitid(P_PID, static_cast<id_t>(tid), &info, WSTOPPED | WNOHANG | __WALL);
      return StopReport{info.si_status & 0x7f, info.si_status >> 8};
    }
    if (deadline.Expired()) {
      return Error(absl::StatusCode::kDeadlineExceeded, "thread {} did not stop in time", tid);
    }
    const timespec nap{0, nap_ns};
    ::nanosleep(&nap, nullptr);
    nap_ns = std::min(nap_ns * 2, 1'000'000L);
  }
}

// Nothing can attach to a thread that has ended and waits to be reaped; the kernel says EPERM then.
bool HasEnded(pid_t tid) {
  auto stat = ReadProcFile(fmt::format("/proc/{}/stat", tid));
  if (!stat.ok()) return true;
  const size_t name_end = stat->rfind(')');
  if (name_end == std::string::npos || name_end + 2 >= stat->size()) return false;
  const char state = (*stat)[name_end + 2];
  return state == 'Z' || state == 'X';
}

bool HasSeccompFilter(pid_t tid) {
  auto status = ReadProcFile(fmt::format("/proc/{}/status", tid));
  if (!status.ok()) return false;
  const size_t at = status->find("\nSeccomp:\t");
  return at != std::string::npos && (*status)[at + 10] == '2';
}

// The address of a `syscall` instruction in the process: every vDSO has one.
absl::StatusOr<uint64_t> FindSyscallInstruction(pid_t tid) {
  ASSIGN_OR_RETURN(std::string maps, ReadProcFile(fmt::format("/proc/{}/maps", tid)));
  const size_t name = maps.find("[vdso]");
  if (name == std::string::npos)
    return Error(absl::StatusCode::kNotFound, "process of thread {} has no vDSO", tid);
  const size_t newline = maps.rfind('\n', name);
  const size_t line = newline == std::string::npos ? 0 : newline + 1;
  unsigned long start = 0, end = 0;
  if (std::sscanf(maps.c_str() + line, "%lx-%lx", &start, &end) != 2 || end <= start ||
      end - start > (1u << 20)) {
    return Error(absl::StatusCode::kInternal, "unexpected vDSO mapping of thread {}", tid);
  }
  std::vector<uint8_t> code(end - start);
  iovec local{code.data(), code.size()};
  iovec remote{reinterpret_cast<void*>(start), code.size()};
  if (::process_vm_readv(tid, &local, 1, &remote, 1, 0) != static_cast<ssize_t>(code.size())) {
    return PtraceError(errno, tid, "reading memory");
  }
  static constexpr uint8_t kSyscall[] = {0x0f, 0x05};
  auto at = std::search(code.begin(), code.end(), std::begin(kSyscall), std::end(kSyscall));
  if (at == code.end())
    return Error(absl::StatusCode::kNotFound, "no syscall instruction in the vDSO of thread {}", tid);
  return start + static_cast<uint64_t>(at - code.begin());
}

}  // namespace

absl::Status RunAsTracer(const std::function<absl::Status()>& body) {
  absl::Status result;
  std::thread tracer([&] { result = body(); });
  tracer.join();
  return result;
}

absl::StatusOr<std::unique_ptr<RemoteThread>> RemoteThread::Stop(pid_t tid, Deadline deadline) {
  if (::ptrace(PTRACE_SEIZE, tid, nullptr, nullptr) != 0) {
    const int error = errno;
    if (error == ESRCH || HasEnded(tid))
      return Error(absl::StatusCode::kNotFound, "thread {} has ended", tid);
    return PtraceError(error, tid, "attach");
  }
  std::unique_ptr<RemoteThread> thread(new RemoteThread(tid));
  if (::ptrace(PTRACE_INTERRUPT, tid, nullptr, nullptr) != 0) return PtraceError(errno, tid, "interrupt");
  for (;;) {
    ASSIGN_OR_RETURN(StopReport stop, WaitForStop(tid, deadline));
    if (stop.event == kEventStop) return thread;
    // A signal was on its way already: it is delivered, the stop that was asked for follows.
    if (::ptrace(PTRACE_CONT, tid, nullptr, stop.event == 0 ? stop.signal : 0) != 0) {
      return PtraceError(errno, tid, "continue");
    }
  }
}

RemoteThread::~RemoteThread() {
  if (prepared_) {
    // The thread is in a stop that the step's SIGTRAP made, on the kernel's way back to user space where it
    // looks for signals: the place where it also restarts system calls, judging by these very registers.
    iovec registers{&saved_, sizeof(saved_)};
    if (::ptrace(PTRACE_SETREGSET, tid_, NT_PRSTATUS, &registers) != 0 && errno != ESRCH) {
      LOG_ERROR("registers of thread {} could not be restored: {}", tid_, std::strerror(errno));
    }
    ::ptrace(kSetSigmask, tid_, sizeof(saved_mask_), &saved_mask_);
  }
  // Fails if the thread never stopped; then the end of the tracer's thread detaches.
  ::ptrace(PTRACE_DETACH, tid_, nullptr, nullptr);
}

absl::Status RemoteThread::PrepareInjection() {
  if (prepared_) return absl::OkStatus();
  // A filter may answer a system call that the program never makes by killing it.
  if (HasSeccompFilter(tid_) && ::ptrace(PTRACE_SETOPTIONS, tid_, nullptr, kSuspendSeccomp) != 0) {
    return Error(absl::StatusCode::kPermissionDenied,
                 "thread {} has a seccomp filter, and suspending it (PTRACE_O_SUSPEND_SECCOMP) failed: {}",
                 tid_, std::strerror(errno));
  }
  ASSIGN_OR_RETURN(syscall_address_, FindSyscallInstruction(tid_));
  iovec registers{&saved_, sizeof(saved_)};
  if (::ptrace(PTRACE_GETREGSET, tid_, NT_PRSTATUS, &registers) != 0)
    return PtraceError(errno, tid_, "registers");
  if (registers.iov_len != sizeof(saved_) || saved_.cs != 0x33) {
    return Error(absl::StatusCode::kFailedPrecondition, "thread {} does not run 64-bit code", tid_);
  }
  if (::ptrace(kGetSigmask, tid_, sizeof(saved_mask_), &saved_mask_) != 0) {
    return PtraceError(errno, tid_, "signal mask");
  }
  // No handler may run on the registers that we lend. SIGTRAP stays open: the kernel would reset a blocked
  // one's disposition when the step forces it.
  const uint64_t mask = ~(uint64_t{1} << (SIGTRAP - 1));
  if (::ptrace(kSetSigmask, tid_, sizeof(mask), &mask) != 0) return PtraceError(errno, tid_, "signal mask");
  prepared_ = true;
  return absl::OkStatus();
}

absl::Status RemoteThread::Step() {
  const Deadline deadline = Deadline::After(kStepLimit);
  int deliver = 0;
  for (;;) {
    if (::ptrace(PTRACE_SINGLESTEP, tid_, nullptr, deliver) != 0) return PtraceError(errno, tid_, "step");
    ASSIGN_OR_RETURN(StopReport stop, WaitForStop(tid_, deadline));
    // SIGSTOP cannot be blocked: it takes effect, and the step goes on from there.
    deliver = stop.event == 0 && stop.signal == SIGSTOP ? SIGSTOP : 0;
    if (stop.event != 0 || stop.signal != SIGTRAP) continue;
    user_regs_struct now{};
    iovec registers{&now, sizeof(now)};
    if (::ptrace(PTRACE_GETREGSET, tid_, NT_PRSTATUS, &registers) != 0)
      return PtraceError(errno, tid_, "registers");
    if (now.rip != syscall_address_) return absl::OkStatus();
  }
}

absl::StatusOr<int64_t> RemoteThread::Syscall(int64_t number, const std::vector<uint64_t>& arguments) {
  RETURN_IF_ERROR(PrepareInjection());
  user_regs_struct call = saved_;
  call.rip = syscall_address_;
  call.rax = static_cast<unsigned long long>(number);
  // Not in a system call: the kernel must not restart the interrupted one now.
  call.orig_rax = ~0ull;
  // A step that TF asked for is not ours to take.
  call.eflags &= ~0x100ull;
  unsigned long long* const places[] = {&call.rdi, &call.rsi, &call.rdx, &call.r10, &call.r8, &call.r9};
  if (arguments.size() > std::size(places))
    return Error(absl::StatusCode::kInvalidArgument, "too many arguments");
  for (size_t i = 0; i < arguments.size(); ++i) *places[i] = arguments[i];
  iovec registers{&call, sizeof(call)};
  if (::ptrace(PTRACE_SETREGSET, tid_, NT_PRSTATUS, &registers) != 0)
    return PtraceError(errno, tid_, "registers");
  RETURN_IF_ERROR(Step());
  if (::ptrace(PTRACE_GETREGSET, tid_, NT_PRSTATUS, &registers) != 0)
    return PtraceError(errno, tid_, "registers");
  return static_cast<int64_t>(call.rax);
}

absl::StatusOr<uint64_t> RemoteThread::PutOnStack(const void* data, size_t size) {
  RETURN_IF_ERROR(PrepareInjection());
  // Below the 128 bytes under the stack pointer that belong to the running function (System V ABI, red zone).
  const uint64_t at = (saved_.rsp - 128 - size) & ~uint64_t{15};
  iovec local{const_cast<void*>(data), size};
  iovec remote{reinterpret_cast<void*>(at), size};
  if (::process_vm_writev(tid_, &local, 1, &remote, 1, 0) != static_cast<ssize_t>(size)) {
    return PtraceError(errno, tid_, "writing to the stack");
  }
  return at;
}

absl::StatusOr<std::vector<std::unique_ptr<RemoteThread>>> StopAllThreads(pid_t pid, Deadline deadline) {
  std::vector<std::unique_ptr<RemoteThread>> threads;
  std::set<pid_t> stopped;
  // A thread that still runs may start another; when a look finds no new one, none runs.
  for (bool found = true; found;) {
    found = false;
    std::error_code error;
    std::filesystem::directory_iterator tasks(fmt::format("/proc/{}/task", pid), error), end;
    if (error) return Error(absl::StatusCode::kNotFound, "process {} has ended", pid);
    for (; tasks != end; tasks.increment(error)) {
      if (error) return Error(absl::StatusCode::kNotFound, "process {} has ended", pid);
      const pid_t tid = std::atoi(tasks->path().filename().c_str());
      if (stopped.count(tid) != 0) continue;
      auto thread = RemoteThread::Stop(tid, deadline);
      if (thread.status().code() == absl::StatusCode::kNotFound) continue;  // ended meanwhile
      if (!thread.ok()) return thread.status();
      stopped.insert(tid);
      threads.push_back(std::move(thread).value());
      found = true;
    }
  }
  if (threads.empty()) return Error(absl::StatusCode::kNotFound, "process {} has ended", pid);
  return threads;
}

}  // namespace baton::memory
