// Monotonic time and deadlines.
#pragma once

#include <chrono>
#include <cstdint>

namespace baton {

using Clock = std::chrono::steady_clock;
using Duration = std::chrono::nanoseconds;

// Nanoseconds of CLOCK_MONOTONIC; comparable between processes of one host.
inline int64_t MonotonicNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

// A point in time by which something must have happened. Copyable; passed down through every call that waits.
class Deadline {
 public:
  static Deadline After(Duration duration) { return Deadline(Clock::now() + duration); }
  static Deadline At(Clock::time_point when) { return Deadline(when); }
  bool Expired() const { return Clock::now() >= when_; }
  // Time left, never negative.
  Duration Left() const {
    auto left = when_ - Clock::now();
    return left.count() > 0 ? std::chrono::duration_cast<Duration>(left) : Duration(0);
  }
  // For poll(2) and epoll_wait(2): milliseconds left, rounded up so that a wait never ends early.
  int PollTimeoutMs() const {
    auto ms = (Left() + std::chrono::microseconds(999)) / std::chrono::milliseconds(1);
    return static_cast<int>(ms > 1000000000 ? 1000000000 : ms);
  }
  Clock::time_point when() const { return when_; }
  // The earlier of the two.
  Deadline Min(Deadline other) const { return other.when_ < when_ ? other : *this; }

 private:
  explicit Deadline(Clock::time_point when) : when_(when) {}
  Clock::time_point when_;
};

}  // namespace baton
