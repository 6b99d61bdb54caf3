#include "agent/shim/event_loop.h"

#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "common/log.h"

namespace baton::shim {

absl::StatusOr<std::unique_ptr<EventLoop>> EventLoop::Create() {
  UniqueFd epoll(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll) return ErrnoError(errno, "epoll_create1");
  UniqueFd wake(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake) return ErrnoError(errno, "eventfd");
  int wake_fd = wake.get();
  std::unique_ptr<EventLoop> loop(new EventLoop(std::move(epoll), std::move(wake)));
  RETURN_IF_ERROR(loop->Watch(wake_fd, EPOLLIN, [wake_fd](uint32_t) {
    uint64_t count;
    (void)!::read(wake_fd, &count, sizeof(count));
  }));
  return loop;
}

absl::Status EventLoop::Watch(int fd, uint32_t events, std::function<void(uint32_t)> ready) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) < 0) return ErrnoError(errno, "epoll_ctl");
  watches_[fd] = std::make_shared<std::function<void(uint32_t)>>(std::move(ready));
  return absl::OkStatus();
}

absl::Status EventLoop::WatchTermination(std::function<void(int)> ended) {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&set, signal);
  if (int error = ::pthread_sigmask(SIG_BLOCK, &set, nullptr); error != 0)
    return ErrnoError(error, "sigmask");
  (void)::signal(SIGPIPE, SIG_IGN);
  signals_.reset(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!signals_) return ErrnoError(errno, "signalfd");
  return Watch(signals_.get(), EPOLLIN, [this, ended = std::move(ended)](uint32_t) {
    signalfd_siginfo info;
    while (::read(signals_.get(), &info, sizeof(info)) == sizeof(info)) {
      if (info.ssi_signo != SIGHUP) ended(static_cast<int>(info.ssi_signo));
    }
  });
}

void EventLoop::Change(int fd, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event);
}

void EventLoop::Unwatch(int fd) {
  if (watches_.erase(fd) > 0) (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

void EventLoop::Wake() {
  uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof(one));
}

void EventLoop::Post(std::function<void()> function) {
  {
    std::lock_guard lock(mutex_);
    posted_.push_back(std::move(function));
  }
  Wake();
}

void EventLoop::Quit() {
  {
    std::lock_guard lock(mutex_);
    quit_ = true;
  }
  Wake();
}

void EventLoop::Run() {
  for (;;) {
    std::vector<std::function<void()>> posted;
    {
      std::lock_guard lock(mutex_);
      posted.swap(posted_);
      if (posted.empty() && quit_) return;
    }
    for (auto& function : posted) function();
    if (!posted.empty()) continue;
    epoll_event events[16];
    int count = ::epoll_wait(epoll_.get(), events, 16, -1);
    if (count < 0 && errno != EINTR) {
      LOG_ERROR("epoll_wait: {}", Message(ErrnoError(errno, "epoll_wait")));
      return;
    }
    for (int i = 0; i < count; ++i) {
      auto it = watches_.find(events[i].data.fd);
      if (it == watches_.end()) continue;  // unwatched by a callback before this one
      auto ready = it->second;             // outlives its own removal
      (*ready)(events[i].events);
    }
  }
}

}  // namespace baton::shim
