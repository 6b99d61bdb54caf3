// An eventfd with which one thread wakes another out of poll(2).
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdint>

#include "common/fd.h"

namespace baton::migration {

// Any thread may call.
class WakeFd {
 public:
  WakeFd() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  int fd() const { return fd_.get(); }
  void Signal() {
    const uint64_t one = 1;
    (void)!::write(fd_.get(), &one, sizeof one);
  }
  // True if there was a signal.
  bool Drain() {
    uint64_t count = 0;
    return ::read(fd_.get(), &count, sizeof count) == sizeof count;
  }

 private:
  UniqueFd fd_;
};

}  // namespace baton::migration
