#include "common/guarded_mapping.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <utility>

#include "common/bus_error.h"

namespace baton {
namespace {

constexpr uintptr_t kPage = 4096;

// What the handler finds. In place, since it may look at a slot that is just being given up.
struct Slot {
  std::atomic<bool> taken{false};
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<int> fd{-1};
  std::atomic<bool> broken{false};
};
constinit std::array<Slot, 512> g_slots;

}  // namespace

bool BearGuardedFault(uintptr_t address) {
  const int before = errno;
  for (Slot& slot : g_slots) {
    if (address < slot.begin || address >= slot.end) continue;
    const uintptr_t page = address & ~(kPage - 1);
    // All that is gone at once: guest memory has many pages. Where the file is long enough it is this page
    // that the kernel could not give.
    struct stat st;
    const bool shorter =
        ::fstat(slot.fd, &st) == 0 && static_cast<uintptr_t>(st.st_size) <= page - slot.begin;
    const size_t size = shorter ? slot.end - page : kPage;
    slot.broken = true;
    const void* got = ::mmap(reinterpret_cast<void*>(page), size, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    errno = before;
    return got != MAP_FAILED;
  }
  errno = before;
  return false;
}

absl::StatusOr<GuardedMapping> GuardedMapping::Map(int fd, size_t size) {
  if (!InstallBusErrorHandler()) return absl::InternalError("a handler of SIGBUS cannot be installed");
  size_t index = 0;
  while (index < g_slots.size() && g_slots[index].taken.exchange(true)) ++index;
  if (index == g_slots.size()) return absl::ResourceExhaustedError("too many mappings of guest memory");
  Slot& slot = g_slots[index];
  void* base = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) {
    const int error = errno;
    slot.taken = false;
    return ErrnoError(error, "mapping guest memory");
  }
  slot.broken = false;
  slot.fd = fd;
  slot.begin = reinterpret_cast<uintptr_t>(base);
  slot.end = reinterpret_cast<uintptr_t>(base) + size;
  GuardedMapping out;
  out.base_ = static_cast<uint8_t*>(base);
  out.size_ = size;
  out.slot_ = index;
  return out;
}

GuardedMapping& GuardedMapping::operator=(GuardedMapping&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(size_, other.size_);
  std::swap(slot_, other.slot_);
  return *this;
}

GuardedMapping::~GuardedMapping() {
  if (!base_) return;
  Slot& slot = g_slots[slot_];
  slot.end = 0;
  slot.begin = 0;
  slot.fd = -1;
  ::munmap(base_, size_);
  slot.taken = false;
}

bool GuardedMapping::intact() const { return !base_ || !g_slots[slot_].broken; }

}  // namespace baton
