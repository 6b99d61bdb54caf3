#include "tests/lab/device/event_loop.h"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace baton::lab {

absl::StatusOr<std::unique_ptr<EventLoop>> EventLoop::Create() {
  std::unique_ptr<EventLoop> out(new EventLoop);
  out->epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  out->timer_.reset(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!out->epoll_ || !out->timer_) return ErrnoError(errno, "epoll");
  EventLoop* loop = out.get();
  RETURN_IF_ERROR(loop->Watch(loop->timer_.get(), [loop] {
    uint64_t count;
    if (::read(loop->timer_.get(), &count, sizeof count) < 0) return;
    loop->timer_at_ = Clock::time_point::max();
    if (loop->expired_) loop->expired_(Clock::now());
  }));
  return out;
}

absl::Status EventLoop::Watch(int fd, std::function<void()> ready, bool writable) {
  const bool known = watched_.count(fd) > 0;
  epoll_event event{};
  event.events = writable ? EPOLLOUT : EPOLLIN;
  event.data.u64 = uint64_t{++generation_} << 32 | static_cast<uint32_t>(fd);
  if (::epoll_ctl(epoll_.get(), known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) != 0) {
    return ErrnoError(errno, "epoll_ctl");
  }
  watched_[fd] = {generation_, std::make_shared<std::function<void()>>(std::move(ready))};
  return absl::OkStatus();
}

void EventLoop::Unwatch(int fd) {
  if (watched_.erase(fd) > 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

void EventLoop::SetTimer(Clock::time_point when) {
  if (when == timer_at_) return;
  timer_at_ = when;
  itimerspec spec{};
  if (when != Clock::time_point::max()) {
    // Zero would disarm it.
    const int64_t ns = std::max<int64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(when.time_since_epoch()).count(), 1);
    spec.it_value = {ns / 1000000000, ns % 1000000000};
  }
  ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &spec, nullptr);
}

absl::Status EventLoop::Poll(Deadline deadline) {
  epoll_event events[64];
  const int count = ::epoll_wait(epoll_.get(), events, 64, deadline.PollTimeoutMs());
  if (count < 0 && errno != EINTR) return ErrnoError(errno, "epoll_wait");
  for (int i = 0; i < count; ++i) {
    const auto fd = static_cast<int>(static_cast<uint32_t>(events[i].data.u64));
    auto it = watched_.find(fd);
    // Removed by a handler before it, perhaps for another descriptor of this number.
    if (it == watched_.end() || it->second.generation != events[i].data.u64 >> 32) continue;
    const std::shared_ptr<std::function<void()>> ready = it->second.ready;
    (*ready)();
  }
  return absl::OkStatus();
}

}  // namespace baton::lab
