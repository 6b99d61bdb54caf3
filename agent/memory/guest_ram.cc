#include "agent/memory/guest_ram.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <utility>

namespace baton::memory {

absl::StatusOr<RamBlock> RamBlock::Create(const std::string& id, const std::string& path, uint64_t size) {
  if (size == 0 || size % kPageSize != 0) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "memory file {}: size {} is not a positive multiple of {}", path, size, kPageSize);
  }
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return ErrnoError(errno, fmt::format("memory file {}: create", path));
  // To zero first: what an earlier file of this name held must not show through.
  if (::ftruncate(fd.get(), 0) != 0 || ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) {
    return ErrnoError(errno, fmt::format("memory file {}: set size to {}", path, size));
  }
  if (::fchmod(fd.get(), 0600) != 0) return ErrnoError(errno, fmt::format("memory file {}: chmod", path));
  auto block = FromFd(id, std::move(fd));
  if (!block.ok()) return Annotate(block.status(), fmt::format("memory file {}", path));
  return block;
}

absl::StatusOr<RamBlock> RamBlock::Open(const std::string& id, const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!fd) return ErrnoError(errno, fmt::format("memory file {}: open", path));
  auto block = FromFd(id, std::move(fd));
  if (!block.ok()) return Annotate(block.status(), fmt::format("memory file {}", path));
  return block;
}

absl::StatusOr<RamBlock> RamBlock::FromFd(const std::string& id, UniqueFd fd) {
  struct stat st;
  if (::fstat(fd.get(), &st) != 0) return ErrnoError(errno, fmt::format("RAM block {}: fstat", id));
  if (!S_ISREG(st.st_mode) || st.st_size <= 0 || static_cast<uint64_t>(st.st_size) % kPageSize != 0) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "RAM block {}: not a regular file whose size is a positive multiple of {} (size {})", id,
                 kPageSize, static_cast<int64_t>(st.st_size));
  }
  const auto size = static_cast<size_t>(st.st_size);
  auto map = GuardedMapping::Map(fd.get(), size);
  if (!map.ok()) return Annotate(map.status(), fmt::format("RAM block {}: map {} bytes", id, size));
  // Guest memory belongs in no core file of ours; failure to say so harms nothing.
  ::madvise(map->base(), size, MADV_DONTDUMP);
  RamBlock block;
  block.id_ = id;
  block.map_ = *std::move(map);
  block.fd_ = std::move(fd);
  block.device_ = st.st_dev;
  block.inode_ = st.st_ino;
  return block;
}

absl::StatusOr<PageSet> RamBlock::Populated() const {
  PageSet set(pages());
  // A descriptor of our own: SEEK_DATA moves the file position, which duplicates share.
  UniqueFd fd(::open(fmt::format("/proc/self/fd/{}", fd_.get()).c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoError(errno, fmt::format("RAM block {}: reopen", id_));
  off_t at = 0;
  const off_t length = static_cast<off_t>(size());
  while (at < length) {
    off_t data = ::lseek(fd.get(), at, SEEK_DATA);
    if (data < 0) {
      if (errno == ENXIO) break;  // nothing but hole from here
      return ErrnoError(errno, fmt::format("RAM block {}: SEEK_DATA", id_));
    }
    if (data >= length) break;
    off_t hole = ::lseek(fd.get(), data, SEEK_HOLE);
    if (hole < 0) return ErrnoError(errno, fmt::format("RAM block {}: SEEK_HOLE", id_));
    // Each page that holds any data.
    uint64_t first = static_cast<uint64_t>(data) / kPageSize;
    uint64_t end = (static_cast<uint64_t>(hole) + kPageSize - 1) / kPageSize;
    set.SetRange(first, end - first);
    at = hole;
  }
  return set;
}

uint64_t GuestRam::total_bytes() const {
  uint64_t total = 0;
  for (const RamBlock& block : blocks_) total += block.size();
  return total;
}

absl::Status GuestRam::CheckIntact() const {
  for (const RamBlock& block : blocks_) {
    // Pages that are gone are holes to whoever looks for holes first, and are not accessed then.
    struct stat st;
    const bool whole = ::fstat(block.fd(), &st) == 0 && static_cast<uint64_t>(st.st_size) >= block.size();
    if (!block.intact() || !whole)
      return Error(absl::StatusCode::kDataLoss,
                   "RAM block {}: some of it could not be had any more: its file was truncated, or its file "
                   "system is full",
                   block.id());
  }
  return absl::OkStatus();
}

absl::Status GuestRam::SetLayout(std::vector<GpaRange> layout) {
  std::sort(layout.begin(), layout.end(), [](const GpaRange& a, const GpaRange& b) { return a.gpa < b.gpa; });
  uint64_t previous_end = 0;
  for (const GpaRange& range : layout) {
    auto bad = [&](const char* why) {
      return Error(absl::StatusCode::kInvalidArgument,
                   "guest memory range at {:#x} of {:#x} bytes (block {}, offset {:#x}): {}", range.gpa,
                   range.size, range.block, range.offset, why);
    };
    if (range.size == 0) return bad("is empty");
    if ((range.gpa | range.size | range.offset) % kPageSize != 0) return bad("is not page aligned");
    if (range.gpa + range.size < range.gpa) return bad("overflows");
    if (range.block >= blocks_.size()) return bad("names no block");
    uint64_t block_size = blocks_[range.block].size();
    if (range.offset > block_size || range.size > block_size - range.offset)
      return bad("lies outside its block");
    if (range.gpa < previous_end) return bad("overlaps the range before it");
    previous_end = range.gpa + range.size;
  }
  auto shared = std::make_shared<const std::vector<GpaRange>>(std::move(layout));
  std::lock_guard lock(state_->mutex);
  state_->layout = std::move(shared);
  return absl::OkStatus();
}

GuestRam::LayoutPtr GuestRam::Layout() const {
  std::lock_guard lock(state_->mutex);
  return state_->layout;
}

std::optional<GuestRam::Place> GuestRam::Find(uint64_t gpa) const {
  LayoutPtr layout = Layout();
  auto after = std::upper_bound(layout->begin(), layout->end(), gpa,
                                [](uint64_t value, const GpaRange& range) { return value < range.gpa; });
  if (after == layout->begin()) return std::nullopt;
  const GpaRange& range = *std::prev(after);
  uint64_t in_range = gpa - range.gpa;
  if (in_range >= range.size) return std::nullopt;
  return Place{range.block, range.offset + in_range, range.size - in_range};
}

uint8_t* GuestRam::At(uint64_t gpa, uint64_t size) const {
  std::optional<Place> place = Find(gpa);
  if (!place || size > place->contiguous) return nullptr;
  return blocks_[place->block].base() + place->offset;
}

void GuestRam::MergeGpaLog(const uint64_t* words, size_t count, PageSets& out) const {
  LayoutPtr layout = Layout();
  for (const GpaRange& range : *layout) {
    uint64_t first = range.gpa / kPageSize;
    uint64_t end = std::min<uint64_t>((range.gpa + range.size) / kPageSize, uint64_t{count} * 64);
    // Word by word, as nearly all of them are zero.
    for (uint64_t page = first; page < end;) {
      uint64_t word = words[page / 64] >> (page % 64);
      uint64_t in_word = std::min<uint64_t>(64 - page % 64, end - page);
      while (word != 0) {
        uint64_t bit = static_cast<uint64_t>(std::countr_zero(word));
        if (bit >= in_word) break;
        out[range.block].Set(range.offset / kPageSize + (page + bit - first));
        word &= word - 1;
      }
      page += in_word;
    }
  }
}

PageSets GuestRam::MakeSets() const {
  PageSets sets;
  sets.reserve(blocks_.size());
  for (const RamBlock& block : blocks_) sets.emplace_back(block.pages());
  return sets;
}

}  // namespace baton::memory
