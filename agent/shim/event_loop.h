// The shim's main thread: epoll, and functions posted by other threads. Sleeps as long as nothing happens; it
// has no timers of its own.
#pragma once

#include <sys/epoll.h>

#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "common/fd.h"
#include "common/status.h"

namespace baton::shim {

// Watch, Change and Unwatch only from the loop's thread (or before Run). Post and Quit from any thread.
class EventLoop {
 public:
  static absl::StatusOr<std::unique_ptr<EventLoop>> Create();

  // Calls `ready` with the events (EPOLLIN …) of `fd`, level-triggered. The descriptor stays the caller's and
  // must be unwatched before it is closed. A callback may unwatch any descriptor.
  absl::Status Watch(int fd, uint32_t events, std::function<void(uint32_t)> ready);
  void Change(int fd, uint32_t events);
  void Unwatch(int fd);
  // Calls `ended` with SIGTERM or SIGINT when the process is told to end. SIGHUP is ignored: a shim outlives
  // whoever started it. SIGPIPE too. Once, before any thread is started, so that all of them inherit the
  // mask.
  absl::Status WatchTermination(std::function<void(int signal)> ended);
  // Runs `function` in the loop, in the order of posting.
  void Post(std::function<void()> function);
  // Until Quit.
  void Run();
  void Quit();

 private:
  EventLoop(UniqueFd epoll, UniqueFd wake) : epoll_(std::move(epoll)), wake_(std::move(wake)) {}
  void Wake();

  UniqueFd epoll_;
  UniqueFd wake_;
  UniqueFd signals_;
  std::unordered_map<int, std::shared_ptr<std::function<void(uint32_t)>>> watches_;
  std::mutex mutex_;
  std::vector<std::function<void()>> posted_;  // guarded by mutex_
  bool quit_ = false;                          // guarded by mutex_
};

}  // namespace baton::shim
