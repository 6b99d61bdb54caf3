// Ownership of a file descriptor.
#pragma once

#include <unistd.h>

#include <utility>

namespace baton {

// Closes its descriptor when it dies. Move-only; -1 is "none". Not thread-safe, like a raw int.
class UniqueFd {
 public:
  UniqueFd() = default;
  // Takes ownership of `fd`.
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) reset(other.release());
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  explicit operator bool() const { return valid(); }
  // Gives the descriptor to the caller.
  [[nodiscard]] int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1) {
    int old = std::exchange(fd_, fd);
    if (old >= 0) ::close(old);
  }
  // A duplicate with close-on-exec set; invalid if the process has no descriptors left.
  UniqueFd Duplicate() const;

 private:
  int fd_ = -1;
};

}  // namespace baton
