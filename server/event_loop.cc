#include "server/event_loop.h"

namespace baton::server {

EventLoop::EventLoop() : thread_([this] { Run(); }) {}

EventLoop::~EventLoop() { Stop(); }

void EventLoop::Post(Task task) {
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return;
    tasks_.push_back(std::move(task));
  }
  wake_.notify_one();
}

EventLoop::TimerId EventLoop::At(Clock::time_point when, Task task) {
  TimerId id;
  {
    std::lock_guard lock(mutex_);
    id = {when, ++next_timer_};
    if (!stopping_) timers_.emplace(id, std::move(task));
  }
  wake_.notify_one();
  return id;
}

void EventLoop::Cancel(const TimerId& id) {
  Task dropped;  // destroyed without the lock: it may own things whose destructors post
  std::lock_guard lock(mutex_);
  if (auto found = timers_.find(id); found != timers_.end()) {
    dropped = std::move(found->second);
    timers_.erase(found);
  }
}

void EventLoop::Stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void EventLoop::Drain() {
  std::mutex mutex;
  std::condition_variable done;
  bool ran = false;
  Post([&] {
    std::lock_guard lock(mutex);
    ran = true;
    done.notify_one();
  });
  std::unique_lock lock(mutex);
  done.wait(lock, [&] { return ran; });
}

void EventLoop::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    Task task;
    if (!timers_.empty() && !stopping_ && timers_.begin()->first.first <= Clock::now()) {
      task = std::move(timers_.begin()->second);
      timers_.erase(timers_.begin());
    } else if (!tasks_.empty()) {
      task = std::move(tasks_.front());
      tasks_.pop_front();
    } else if (stopping_) {
      return;
    } else if (timers_.empty()) {
      wake_.wait(lock);
      continue;
    } else {
      Clock::time_point when = timers_.begin()->first.first;
      wake_.wait_until(lock, when);
      continue;
    }
    lock.unlock();
    task();
    task = nullptr;
    lock.lock();
  }
}

}  // namespace baton::server
