// Events from a background thread to a loop that polls file descriptors.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "common/fd.h"

namespace baton::client {

// A queue whose descriptor is readable while something is in it. Push from any thread, Pop from one.
template <typename T>
class EventQueue {
 public:
  EventQueue() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

  // For poll(2), POLLIN. Invalid (-1) only if the process had no descriptor left.
  int fd() const { return fd_.get(); }

  void Push(T value) {
    std::lock_guard<std::mutex> lock(mutex_);
    items_.push_back(std::move(value));
    uint64_t one = 1;
    [[maybe_unused]] ssize_t written = ::write(fd_.get(), &one, sizeof one);
  }

  // The oldest item, or nothing.
  std::optional<T> Pop() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (items_.empty()) return std::nullopt;
    T value = std::move(items_.front());
    items_.pop_front();
    if (items_.empty()) {
      uint64_t count;
      [[maybe_unused]] ssize_t got = ::read(fd_.get(), &count, sizeof count);
    }
    return value;
  }

 private:
  const UniqueFd fd_;
  std::mutex mutex_;
  std::deque<T> items_;  // guarded by mutex_
};

}  // namespace baton::client
