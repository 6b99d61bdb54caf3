// One thread's waiting: descriptors with their handlers, and one timer.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>

#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::lab {

// Not thread-safe. A handler may add and remove descriptors, its own included.
class EventLoop {
 public:
  static absl::StatusOr<std::unique_ptr<EventLoop>> Create();

  // For waiting in another loop: readable when something here is ready.
  int fd() const { return epoll_.get(); }
  // `ready` is called while `fd` is readable, or writable with `writable`. Replaces what was there.
  absl::Status Watch(int fd, std::function<void()> ready, bool writable = false);
  void Unwatch(int fd);
  // `expired` of OnTimer is called once `when` has come. Clock::time_point::max(): never.
  void SetTimer(Clock::time_point when);
  void OnTimer(std::function<void(Clock::time_point)> expired) { expired_ = std::move(expired); }
  // Waits at most until `deadline` and calls the handlers of what is ready.
  absl::Status Poll(Deadline deadline);

 private:
  EventLoop() = default;
  struct Watched {
    uint32_t generation;
    std::shared_ptr<std::function<void()>> ready;
  };

  UniqueFd epoll_, timer_;
  std::unordered_map<int, Watched> watched_;
  uint32_t generation_ = 0;
  Clock::time_point timer_at_ = Clock::time_point::max();
  std::function<void(Clock::time_point)> expired_;
};

}  // namespace baton::lab
