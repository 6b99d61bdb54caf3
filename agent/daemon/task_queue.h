// A few threads that run what must not run where it arises: on a stream's, a socket's or a shim client's
// thread.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "common/clock.h"

namespace baton::daemon {

// Thread-safe. Tasks that are due start in the order of their times, and run at the same time as others.
class TaskQueue {
 public:
  explicit TaskQueue(int threads);
  // As Stop().
  ~TaskQueue();
  void Post(std::function<void()> task) { PostAfter(Duration(0), std::move(task)); }
  // Runs the task once `delay` has passed.
  void PostAfter(Duration delay, std::function<void()> task);
  // Drops what has not started, waits for what has. Later posts are dropped. Not from a task.
  void Stop();

 private:
  void Run();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::multimap<Clock::time_point, std::function<void()>> tasks_;  // guarded by mutex_
  bool stopping_ = false;                                          // guarded by mutex_
  std::vector<std::thread> threads_;
};

}  // namespace baton::daemon
