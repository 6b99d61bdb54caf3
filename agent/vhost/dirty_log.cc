#include "agent/vhost/dirty_log.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <cerrno>

namespace baton::vhost {

absl::StatusOr<std::unique_ptr<DirtyLog>> DirtyLog::Create(uint64_t last_gpa) {
  std::unique_ptr<DirtyLog> log(new DirtyLog);
  log->words_ = WordsFor(last_gpa);
  // 32 GiB of log would be 2^50 bytes of guest: a table like that is a mistake of the peer.
  if (log->size() > (uint64_t{1} << 35)) {
    return Error(absl::StatusCode::kResourceExhausted,
                 "guest memory up to {:#x} is too large for a dirty log", last_gpa);
  }
  log->fd_.reset(::memfd_create("baton-dirty-log", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!log->fd_) return ErrnoError(errno, "memfd_create for a dirty log");
  if (::ftruncate(log->fd_.get(), static_cast<off_t>(log->size())) != 0) {
    return ErrnoError(errno, fmt::format("dirty log of {} bytes", log->size()));
  }
  // A back-end that shrank the file would make our reads fail with SIGBUS.
  if (::fcntl(log->fd_.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0) {
    return ErrnoError(errno, "sealing a dirty log");
  }
  void* map = ::mmap(nullptr, log->size(), PROT_READ | PROT_WRITE, MAP_SHARED, log->fd_.get(), 0);
  if (map == MAP_FAILED)
    return ErrnoError(errno, fmt::format("mapping a dirty log of {} bytes", log->size()));
  log->map_ = static_cast<uint64_t*>(map);
  return log;
}

DirtyLog::~DirtyLog() {
  if (map_) ::munmap(map_, size());
}

void DirtyLog::Take(std::vector<uint64_t>& words) {
  if (words.size() < words_) words.resize(words_, 0);
  for (uint64_t i = 0; i < words_; ++i) {
    // Looking first keeps the pages of a large, clean log from being written, and so allocated. A bit that is
    // set after the look is taken next time.
    if (__atomic_load_n(&map_[i], __ATOMIC_RELAXED) == 0) continue;
    words[i] |= __atomic_exchange_n(&map_[i], 0, __ATOMIC_ACQ_REL);
  }
}

}  // namespace baton::vhost
