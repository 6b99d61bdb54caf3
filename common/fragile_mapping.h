// Read access to a file in memory that somebody else may make shorter at any time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "common/status.h"

namespace baton {

// The first bytes of a shared file, mapped to be read. Whoever else holds a descriptor of it may truncate it,
// and an access to a page that is gone raises SIGBUS: Copy turns that into `false`. (Where a file can be
// sealed with F_SEAL_SHRINK an ordinary mapping does. One that has a name cannot.) Cheaper than pread(2) by
// its system call and by what that does for each page. Move-only.
//
// The first mapping installs a handler of SIGBUS for the process. A SIGBUS that is not about a Copy under way
// happens once more with what was installed before, as a rule the end of the process.
class FragileMapping {
 public:
  FragileMapping() = default;
  // Maps [0, size), with all pages present as far as that can be had: the first Copy finds them.
  static absl::StatusOr<FragileMapping> Map(int fd, size_t size);
  FragileMapping(FragileMapping&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  FragileMapping& operator=(FragileMapping&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~FragileMapping();

  // Copies [offset, offset + size) to `out`. False: it is not within the mapping, or the file is shorter by
  // now; then nothing is promised about `out`. Any thread, but SIGBUS must not be blocked in it.
  [[nodiscard]] bool Copy(size_t offset, void* out, size_t size) const;

  // Where the byte at `offset` is mapped; null if it is not. Only to be asked for ahead of its Copy
  // (__builtin_prefetch, which bears what is not there): never to be read.
  const uint8_t* Hint(size_t offset) const { return offset < size_ ? base_ + offset : nullptr; }

  size_t size() const { return size_; }

 private:
  const uint8_t* base_ = nullptr;
  size_t size_ = 0;
};

}  // namespace baton
