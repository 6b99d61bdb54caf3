#include "agent/vhost/memory_table.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>

namespace baton::vhost {
namespace {
constexpr uint64_t kSmallPage = 4096;
}

absl::StatusOr<MemoryTable::Region> MemoryTable::MakeRegion(const MemRegion& wire, UniqueFd fd) {
  struct stat st;
  if (::fstat(fd.get(), &st) != 0) return ErrnoError(errno, "descriptor of a memory region");
  if (!S_ISREG(st.st_mode)) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "memory region gpa {:#x}: its descriptor is not a memory file", wire.gpa);
  }
  if (static_cast<uint64_t>(st.st_size) < wire.mmap_offset + wire.size) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "memory region gpa {:#x}: offset {:#x} + size {:#x} is beyond its file of {:#x} bytes",
                 wire.gpa, wire.mmap_offset, wire.size, st.st_size);
  }
  return Region{wire, std::move(fd), st.st_dev, st.st_ino};
}

absl::Status MemoryTable::Replace(std::vector<MemRegion> regions, std::vector<UniqueFd> fds) {
  RETURN_IF_ERROR(CheckRegions(regions));
  std::vector<Region> fresh;
  for (size_t i = 0; i < regions.size(); ++i) {
    ASSIGN_OR_RETURN(Region region, MakeRegion(regions[i], std::move(fds[i])));
    fresh.push_back(std::move(region));
  }
  regions_ = std::move(fresh);
  return absl::OkStatus();
}

absl::Status MemoryTable::Add(const MemRegion& region, UniqueFd fd) {
  if (regions_.size() >= kMaxMemSlots) {
    return Error(absl::StatusCode::kInvalidArgument, "more than {} memory regions", kMaxMemSlots);
  }
  std::vector<MemRegion> all{region};
  for (const Region& r : regions_) all.push_back(r.wire);
  RETURN_IF_ERROR(CheckRegions(all));
  ASSIGN_OR_RETURN(Region fresh, MakeRegion(region, std::move(fd)));
  regions_.push_back(std::move(fresh));
  return absl::OkStatus();
}

absl::Status MemoryTable::Remove(const MemRegion& region) {
  auto it = std::find_if(regions_.begin(), regions_.end(), [&](const Region& r) {
    return r.wire.gpa == region.gpa && r.wire.user_addr == region.user_addr && r.wire.size == region.size;
  });
  if (it == regions_.end()) {
    return Error(absl::StatusCode::kNotFound,
                 "no memory region with gpa {:#x}, size {:#x} and user address {:#x}", region.gpa,
                 region.size, region.user_addr);
  }
  regions_.erase(it);
  return absl::OkStatus();
}

uint64_t MemoryTable::last_gpa() const {
  uint64_t last = 0;
  for (const Region& r : regions_) last = std::max(last, r.wire.gpa + r.wire.size - 1);
  return last;
}

std::vector<MemoryRegionInfo> MemoryTable::Describe() const {
  std::vector<MemoryRegionInfo> out;
  for (const Region& r : regions_) {
    out.push_back({r.wire.gpa, r.wire.size, r.wire.user_addr, r.wire.mmap_offset, r.device, r.inode});
  }
  return out;
}

std::optional<uint64_t> MemoryTable::ToGpa(uint64_t user_addr, uint64_t size) const {
  for (const Region& r : regions_) {
    if (user_addr < r.wire.user_addr || user_addr - r.wire.user_addr >= r.wire.size) continue;
    uint64_t offset = user_addr - r.wire.user_addr;
    if (size <= r.wire.size - offset) return r.wire.gpa + offset;
  }
  return std::nullopt;
}

absl::StatusOr<std::pair<const MemoryTable::Region*, uint64_t>> MemoryTable::Locate(uint64_t gpa,
                                                                                    size_t size) const {
  for (const Region& r : regions_) {
    if (gpa < r.wire.gpa || gpa - r.wire.gpa >= r.wire.size) continue;
    uint64_t offset = gpa - r.wire.gpa;
    if (size <= r.wire.size - offset) return std::make_pair(&r, r.wire.mmap_offset + offset);
  }
  return Error(absl::StatusCode::kOutOfRange, "[{:#x}, {:#x}) is not within one region of guest memory", gpa,
               gpa + size);
}

absl::Status MemoryTable::Read(uint64_t gpa, void* out, size_t size) const {
  ASSIGN_OR_RETURN(auto place, Locate(gpa, size));
  auto* bytes = static_cast<uint8_t*>(out);
  for (size_t got = 0; got < size;) {
    ssize_t n =
        ::pread(place.first->fd.get(), bytes + got, size - got, static_cast<off_t>(place.second + got));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoError(errno, fmt::format("reading guest memory at {:#x}", gpa));
    if (n == 0)
      return Error(absl::StatusCode::kOutOfRange, "guest memory at {:#x}: its file was truncated", gpa + got);
    got += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::Status MemoryTable::Write(uint64_t gpa, const void* data, size_t size) const {
  ASSIGN_OR_RETURN(auto place, Locate(gpa, size));
  auto failed = [&](int error) {
    return ErrnoError(error, fmt::format("writing guest memory at {:#x}", gpa));
  };
  // hugetlbfs has no write(2), so that it goes through a mapping for the time, of whole pages of the file.
  // The kernel writes it: what is gone is EFAULT then, and not SIGBUS.
  struct stat st;
  if (::fstat(place.first->fd.get(), &st) != 0) return failed(errno);
  const uint64_t page = std::bit_ceil(std::max<uint64_t>(static_cast<uint64_t>(st.st_blksize), kSmallPage));
  const uint64_t first = place.second & ~(page - 1);
  const size_t length = (place.second + size - first + page - 1) & ~(page - 1);
  void* map = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, place.first->fd.get(),
                     static_cast<off_t>(first));
  if (map == MAP_FAILED) return failed(errno);
  const iovec from = {const_cast<void*>(data), size};
  const iovec to = {static_cast<uint8_t*>(map) + (place.second - first), size};
  const ssize_t n = ::process_vm_writev(::getpid(), &from, 1, &to, 1, 0);
  const int error = n < 0 ? errno : EFAULT;
  ::munmap(map, length);
  return n == static_cast<ssize_t>(size) ? absl::OkStatus() : failed(error);
}

}  // namespace baton::vhost
