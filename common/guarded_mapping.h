// A shared file mapped whole, to be read and written, that somebody else may make shorter at any time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/status.h"

namespace baton {

// Where FragileMapping bears a truncated file copy by copy, this bears it for good, at no cost to any access:
// one that finds its page gone (SIGBUS: the file was truncated, or its file system is full) goes on with
// zeroes of this process, and from then on intact() is false. So whoever has used the memory has to look at
// intact() before it draws a conclusion from it. Move-only.
//
// The first mapping installs the handler of SIGBUS that FragileMapping has, too.
class GuardedMapping {
 public:
  GuardedMapping() = default;
  // Maps [0, size) of `fd`, which must stay open as long as the mapping. ResourceExhausted: more than some
  // hundreds of them.
  static absl::StatusOr<GuardedMapping> Map(int fd, size_t size);
  GuardedMapping(GuardedMapping&& other) noexcept { *this = static_cast<GuardedMapping&&>(other); }
  GuardedMapping& operator=(GuardedMapping&& other) noexcept;
  ~GuardedMapping();

  uint8_t* base() const { return base_; }
  size_t size() const { return size_; }
  // Every access so far has found the file. Any thread; an access by a thread is seen by itself, and by
  // others as other writes are.
  bool intact() const;

 private:
  uint8_t* base_ = nullptr;
  size_t size_ = 0;
  size_t slot_ = 0;
};

}  // namespace baton
