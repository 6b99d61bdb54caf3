#include "agent/vhost/dirty_log.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

namespace baton::vhost {
namespace {

// 32 GiB of log would be 2^50 bytes of guest: a table like that is a mistake of the peer.
constexpr uint64_t kMaxLog = uint64_t{1} << 35;
constexpr uint64_t kPageShift = 12;

}  // namespace

absl::StatusOr<std::unique_ptr<DirtyLog>> DirtyLog::Create(uint64_t last_gpa) {
  std::unique_ptr<DirtyLog> log(new DirtyLog);
  log->words_ = WordsFor(last_gpa);
  if (log->size() > kMaxLog) {
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
  RETURN_IF_ERROR(log->Map());
  return log;
}

absl::StatusOr<std::unique_ptr<DirtyLog>> DirtyLog::Adopt(UniqueFd fd, uint64_t size, uint64_t offset) {
  struct stat st;
  if (::fstat(fd.get(), &st) != 0) return ErrnoError(errno, "the VMM's dirty log");
  if (offset != 0 || size == 0 || size % 8 != 0 || size > kMaxLog ||
      static_cast<uint64_t>(st.st_size) < size) {
    return Error(absl::StatusCode::kInvalidArgument, "a dirty log of {} bytes at {} in a file of {}", size,
                 offset, st.st_size);
  }
  // QEMU seals its own (util/memfd.c). A file that is cut off under a mapping ends whoever touches it.
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || !(seals & F_SEAL_SHRINK))
    return absl::InvalidArgumentError(
        "a dirty log whose file can be made shorter (F_SEAL_SHRINK is not set)");
  std::unique_ptr<DirtyLog> log(new DirtyLog);
  log->fd_ = std::move(fd);
  log->words_ = size / 8;
  RETURN_IF_ERROR(log->Map());
  return log;
}

absl::Status DirtyLog::Map() {
  void* map = ::mmap(nullptr, size(), PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (map == MAP_FAILED) return ErrnoError(errno, fmt::format("mapping a dirty log of {} bytes", size()));
  map_ = static_cast<uint64_t*>(map);
  return absl::OkStatus();
}

void DirtyLog::Mark(uint64_t gpa, uint64_t size) {
  const uint64_t pages = words_ * 64;
  if (size == 0 || gpa >> kPageShift >= pages) return;
  const uint64_t last_byte = size - 1 > UINT64_MAX - gpa ? UINT64_MAX : gpa + size - 1;
  const uint64_t end = std::min(pages, (last_byte >> kPageShift) + 1);
  for (uint64_t page = gpa >> kPageShift; page < end;) {
    const uint64_t first = page % 64, count = std::min(64 - first, end - page);
    const uint64_t bits = count == 64 ? ~uint64_t{0} : ((uint64_t{1} << count) - 1) << first;
    __atomic_fetch_or(&map_[page / 64], bits, __ATOMIC_ACQ_REL);
    page += count;
  }
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
