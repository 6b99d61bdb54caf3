#include "common/fragile_mapping.h"

#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <cstring>

#include "common/bus_error.h"

namespace baton {
namespace {

// A copy under way in this thread: where it leaves to, and which bytes it may find gone.
struct CopyUnderWay {
  sigjmp_buf* escape;
  uintptr_t begin, end;
};
constinit thread_local CopyUnderWay t_copy{};

struct sigaction g_handler_before;

void OnBusError(int, siginfo_t* info, void*) {
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  // The signal is the access's own, so nothing is interrupted but the copy.
  if (t_copy.escape && at >= t_copy.begin && at < t_copy.end) siglongjmp(*t_copy.escape, 1);
  if (BearGuardedFault(at)) return;
  ::sigaction(SIGBUS, &g_handler_before, nullptr);
}

bool Install() {
  struct sigaction action {};
  action.sa_sigaction = OnBusError;
  // Left by a jump that does not restore the mask: the signal must not stay blocked.
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return ::sigaction(SIGBUS, &action, &g_handler_before) == 0;
}

}  // namespace

bool InstallBusErrorHandler() {
  static const bool installed = Install();
  return installed;
}

absl::StatusOr<FragileMapping> FragileMapping::Map(int fd, size_t size) {
  if (!InstallBusErrorHandler()) return absl::InternalError("a handler of SIGBUS cannot be installed");
  void* base = ::mmap(nullptr, size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (base == MAP_FAILED) return ErrnoError(errno, "mapping a file of others");
  FragileMapping out;
  out.base_ = static_cast<const uint8_t*>(base);
  out.size_ = size;
  return out;
}

FragileMapping::~FragileMapping() {
  if (base_) ::munmap(const_cast<uint8_t*>(base_), size_);
}

bool FragileMapping::Copy(size_t offset, void* out, size_t size) const {
  if (offset > size_ || size > size_ - offset) return false;
  const auto begin = reinterpret_cast<uintptr_t>(base_) + offset;
  sigjmp_buf escape;
  if (sigsetjmp(escape, 0) != 0) {
    t_copy = {};
    return false;
  }
  t_copy = {&escape, begin, begin + size};
  std::atomic_signal_fence(std::memory_order_seq_cst);
  std::memcpy(out, base_ + offset, size);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  t_copy = {};
  return true;
}

}  // namespace baton
