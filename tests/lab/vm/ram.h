// The guest memory of a lab guest: one shared file, mapped whole, as QEMU's memory-backend-file has it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "agent/virtio/guest_memory.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::lab {

// Guest physical address 0 is the first byte of the file. Nothing is touched that is not used: an 8 GiB guest
// is made in an instant. Immutable after Open; what the guest does with the bytes is the guest's business.
class Ram {
 public:
  // The file must exist and hold `size` bytes.
  static absl::StatusOr<Ram> Open(const std::string& path, uint64_t size);
  Ram(Ram&& other) noexcept;
  Ram& operator=(Ram&&) = delete;
  ~Ram();

  int fd() const { return fd_.get(); }
  uint64_t size() const { return size_; }
  uint8_t* base() const { return base_; }
  // The same for the rings.
  const virtio::GuestMemory& memory() const { return memory_; }
  // Only for addresses that this program chose itself.
  template <typename T>
  T* At(uint64_t gpa) const {
    return reinterpret_cast<T*>(base_ + gpa);
  }

 private:
  Ram(UniqueFd fd, uint8_t* base, uint64_t size) : fd_(std::move(fd)), base_(base), size_(size) {}
  virtio::GuestMemory memory_;
  UniqueFd fd_;
  uint8_t* base_ = nullptr;
  uint64_t size_ = 0;
};

// Hands out guest physical addresses from the bottom up: both sides of a migration, given the same options,
// come to the same layout without a word between them.
class RamLayout {
 public:
  explicit RamLayout(uint64_t size) : size_(size) {}
  // Page-aligned. ResourceExhausted: the guest is too small for its options.
  absl::StatusOr<uint64_t> Take(uint64_t bytes, const std::string& what);
  uint64_t used() const { return next_; }

 private:
  // Not from 0, so that address 0 in a descriptor is always a mistake.
  uint64_t next_ = 0x10000;
  const uint64_t size_;
};

}  // namespace baton::lab
