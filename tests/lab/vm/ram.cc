#include "tests/lab/vm/ram.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <utility>

namespace baton::lab {

absl::StatusOr<Ram> Ram::Open(const std::string& path, uint64_t size) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!fd) return ErrnoError(errno, "guest memory " + path);
  struct stat st {};
  if (::fstat(fd.get(), &st) < 0) return ErrnoError(errno, path);
  if (static_cast<uint64_t>(st.st_size) < size) {
    return Error(absl::StatusCode::kInvalidArgument, "guest memory {}: {} bytes, {} are needed", path,
                 st.st_size, size);
  }
  void* base = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd.get(), 0);
  if (base == MAP_FAILED) return ErrnoError(errno, "mapping of " + path);
  Ram ram(std::move(fd), static_cast<uint8_t*>(base), size);
  ASSIGN_OR_RETURN(ram.memory_, virtio::GuestMemory::Create({{0, size, ram.base_}}));
  return ram;
}

Ram::Ram(Ram&& other) noexcept
    : memory_(std::move(other.memory_)),
      fd_(std::move(other.fd_)),
      base_(std::exchange(other.base_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

Ram::~Ram() {
  if (base_) ::munmap(base_, size_);
}

absl::StatusOr<uint64_t> RamLayout::Take(uint64_t bytes, const std::string& what) {
  const uint64_t rounded = (bytes + 4095) & ~uint64_t{4095};
  if (rounded < bytes || rounded > size_ || next_ > size_ - rounded) {
    return Error(absl::StatusCode::kResourceExhausted,
                 "{}: {} bytes do not fit into {} bytes of guest memory", what, bytes, size_);
  }
  return std::exchange(next_, next_ + rounded);
}

}  // namespace baton::lab
