#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "agent/memory/dirty_sources.h"
#include "agent/memory/kernel_abi.h"
#include "agent/memory/remote_thread.h"
#include "common/log.h"

namespace baton::memory {
namespace {

constexpr char kDevice[] = "/dev/userfaultfd";
// A thread that cannot be stopped in this time is left alone and the next one is tried.
constexpr auto kThreadLimit = std::chrono::seconds(3);

// Makes the thread create a userfaultfd; returns its number there.
absl::StatusOr<int> CreateIn(RemoteThread& thread) {
  // Only faults of user space need no privilege, and are enough: with asynchronous write protection the
  // kernel resolves every fault, its own as well, without asking anybody.
  int64_t first_error = 0;
  for (int flags : {O_CLOEXEC | O_NONBLOCK, O_CLOEXEC | O_NONBLOCK | kUffdUserModeOnly}) {
    ASSIGN_OR_RETURN(int64_t fd, thread.Syscall(SYS_userfaultfd, {static_cast<uint64_t>(flags)}));
    if (fd >= 0) return static_cast<int>(fd);
    if (first_error == 0) first_error = fd;
  }
  ASSIGN_OR_RETURN(uint64_t path, thread.PutOnStack(kDevice, sizeof(kDevice)));
  ASSIGN_OR_RETURN(int64_t device,
                   thread.Syscall(SYS_openat, {static_cast<uint64_t>(AT_FDCWD), path, O_RDWR | O_CLOEXEC}));
  if (device < 0) {
    return Error(absl::StatusCode::kPermissionDenied,
                 "the VMM can create no userfaultfd: userfaultfd(2): {}; {}: {} (load it, or give the VMM "
                 "access to it)",
                 std::strerror(static_cast<int>(-first_error)), kDevice,
                 std::strerror(static_cast<int>(-device)));
  }
  ASSIGN_OR_RETURN(int64_t fd, thread.Syscall(SYS_ioctl, {static_cast<uint64_t>(device), kUserfaultfdIocNew,
                                                          static_cast<uint64_t>(O_CLOEXEC | O_NONBLOCK)}));
  ASSIGN_OR_RETURN(int64_t closed, thread.Syscall(SYS_close, {static_cast<uint64_t>(device)}));
  if (closed < 0) LOG_WARN("a descriptor of {} stays open in process of thread {}", kDevice, thread.tid());
  if (fd < 0) {
    return Error(absl::StatusCode::kPermissionDenied, "the VMM can create no userfaultfd: {}: {}", kDevice,
                 std::strerror(static_cast<int>(-fd)));
  }
  return static_cast<int>(fd);
}

absl::StatusOr<std::unique_ptr<RemoteThread>> StopAnyThread(pid_t pid, Deadline deadline) {
  // The main thread of a VMM waits for events nearly always, and no vCPU runs on it.
  auto stopped = RemoteThread::Stop(pid, deadline.Min(Deadline::After(kThreadLimit)));
  if (stopped.ok() || stopped.status().code() == absl::StatusCode::kPermissionDenied) return stopped;
  std::error_code error;
  for (std::filesystem::directory_iterator tasks(fmt::format("/proc/{}/task", pid), error), end;
       !error && tasks != end; tasks.increment(error)) {
    const pid_t tid = std::atoi(tasks->path().filename().c_str());
    if (tid == pid) continue;
    auto other = RemoteThread::Stop(tid, deadline.Min(Deadline::After(kThreadLimit)));
    if (other.ok()) return other;
  }
  return stopped.status();
}

}  // namespace

absl::Status AgreeOnUffdFeatures(int uffd) {
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = kUffdWpAsync | kUffdWpUnpopulated | kUffdWpHugetlbfsShmem;
  if (::ioctl(uffd, UFFDIO_API, &api) == 0) return absl::OkStatus();
  if (errno == EINVAL) {
    return Error(
        absl::StatusCode::kUnimplemented,
        "this kernel's userfaultfd lacks asynchronous write protection (UFFD_FEATURE_WP_ASYNC, Linux 6.7)");
  }
  return ErrnoError(errno, "UFFDIO_API");
}

absl::StatusOr<UniqueFd> TakeUserfaultfd(pid_t pid, int pidfd, Deadline deadline) {
  UniqueFd uffd;
  absl::Status status = RunAsTracer([&]() -> absl::Status {
    ASSIGN_OR_RETURN(auto thread, StopAnyThread(pid, deadline));
    ASSIGN_OR_RETURN(int remote, CreateIn(*thread));
    uffd.reset(static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd, remote, 0)));
    const int error = errno;
    ASSIGN_OR_RETURN(int64_t closed, thread->Syscall(SYS_close, {static_cast<uint64_t>(remote)}));
    if (closed < 0)
      LOG_WARN("a userfaultfd stays open in process {}: {}", pid, std::strerror(static_cast<int>(-closed)));
    if (!uffd) return ErrnoError(error, "pidfd_getfd");
    return absl::OkStatus();
  });
  RETURN_IF_ERROR(status);
  RETURN_IF_ERROR(AgreeOnUffdFeatures(uffd.get()));
  return uffd;
}

}  // namespace baton::memory
