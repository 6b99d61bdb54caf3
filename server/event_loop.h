// The one thread on which batond decides: tasks in the order they were posted, and timers.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "common/clock.h"

namespace baton::server {

// Everything that batond knows belongs to this thread, so none of it needs a lock; gRPC's threads only post
// here. Tasks must not wait for anything but the disk.
class EventLoop {
 public:
  using Task = std::function<void()>;
  using TimerId = std::pair<Clock::time_point, uint64_t>;

  // Starts the thread.
  EventLoop();
  // Stop().
  ~EventLoop();

  // Any thread. After Stop() tasks are dropped.
  void Post(Task task);
  // Any thread. The task runs at or soon after `when`.
  TimerId At(Clock::time_point when, Task task);
  // On the loop: the task will not run. On other threads it may just be running. Unknown ids are ignored.
  void Cancel(const TimerId& id);
  // Runs what was posted before, then ends the thread; timers and later posts are dropped. Not from the loop.
  void Stop();
  // Waits until everything posted before has run. Not from the loop.
  void Drain();
  bool InLoop() const { return std::this_thread::get_id() == thread_.get_id(); }

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Task> tasks_;          // guarded by mutex_
  std::map<TimerId, Task> timers_;  // guarded by mutex_
  uint64_t next_timer_ = 0;         // guarded by mutex_
  bool stopping_ = false;           // guarded by mutex_
  std::thread thread_;              // last: starts with everything above in place
};

}  // namespace baton::server
