#include "tests/lab/device/guest_map.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace baton::lab {
namespace {

constexpr uint64_t kLogPage = 4096;

}  // namespace

absl::StatusOr<SharedMapping> SharedMapping::Map(int fd, uint64_t offset, uint64_t size) {
  struct stat st;
  if (::fstat(fd, &st) != 0) return ErrnoError(errno, "fstat");
  uint64_t end;
  // A size of zero is what some special files say (hugetlbfs says its own); mmap refuses what does not fit.
  if (size == 0 || __builtin_add_overflow(offset, size, &end) || end > static_cast<uint64_t>(st.st_size)) {
    return Error(absl::StatusCode::kInvalidArgument, "{} bytes at {:#x} of a file of {}", size, offset,
                 st.st_size);
  }
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t lead = offset % page;
  SharedMapping out;
  out.mapped_ = size + lead;
  void* at =
      ::mmap(nullptr, out.mapped_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset - lead));
  if (at == MAP_FAILED) return ErrnoError(errno, "mmap");
  out.base_ = static_cast<uint8_t*>(at);
  out.data_ = out.base_ + lead;
  out.size_ = size;
  return out;
}

SharedMapping& SharedMapping::operator=(SharedMapping&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(mapped_, other.mapped_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

SharedMapping::~SharedMapping() {
  if (base_) ::munmap(base_, mapped_);
}

absl::Status GuestMap::Rebuild() {
  std::vector<virtio::GuestMemory::Region> regions;
  for (const Region& r : regions_) {
    regions.push_back({r.description.gpa, r.description.size, r.mapping.data()});
  }
  ASSIGN_OR_RETURN(memory_, virtio::GuestMemory::Create(std::move(regions)));
  return absl::OkStatus();
}

absl::Status GuestMap::Add(const vhost::MemRegion& region, int fd) {
  std::vector<vhost::MemRegion> all = {region};
  for (const Region& r : regions_) all.push_back(r.description);
  RETURN_IF_ERROR(vhost::CheckRegions(all));
  ASSIGN_OR_RETURN(SharedMapping mapping, SharedMapping::Map(fd, region.mmap_offset, region.size));
  regions_.push_back({region, std::move(mapping)});
  return Rebuild();
}

absl::Status GuestMap::Remove(const vhost::MemRegion& region) {
  auto it = std::find_if(regions_.begin(), regions_.end(), [&](const Region& r) {
    return r.description.gpa == region.gpa && r.description.user_addr == region.user_addr &&
           r.description.size == region.size;
  });
  if (it == regions_.end()) return Error(absl::StatusCode::kNotFound, "no region at {:#x}", region.gpa);
  old_.push_back(std::move(it->mapping));
  regions_.erase(it);
  return Rebuild();
}

void GuestMap::Clear() {
  for (Region& r : regions_) old_.push_back(std::move(r.mapping));
  regions_.clear();
  memory_ = {};
}

std::optional<uint64_t> GuestMap::FromUser(uint64_t user_addr) const {
  for (const Region& r : regions_) {
    if (user_addr >= r.description.user_addr && user_addr - r.description.user_addr < r.description.size) {
      return r.description.gpa + (user_addr - r.description.user_addr);
    }
  }
  return std::nullopt;
}

absl::Status SharedLog::Set(const vhost::LogDescription& description, int fd) {
  ASSIGN_OR_RETURN(mapping_, SharedMapping::Map(fd, description.mmap_offset, description.mmap_size));
  return absl::OkStatus();
}

void SharedLog::Mark(uint64_t gpa, uint64_t size) {
  if (!mapping_ || size == 0) return;
  // The data is there before its bit: whoever takes the bit away and then copies the page has the new data.
  std::atomic_thread_fence(std::memory_order_release);
  const uint64_t last = (gpa + size - 1) / kLogPage;
  for (uint64_t page = gpa / kLogPage; page <= last && page / 8 < mapping_.size(); ++page) {
    __atomic_or_fetch(mapping_.data() + page / 8, static_cast<uint8_t>(1u << page % 8), __ATOMIC_ACQ_REL);
  }
}

}  // namespace baton::lab
