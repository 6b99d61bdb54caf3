// What a back-end tells of errors: it writes to a queue's error descriptor (VHOST_USER_SET_VRING_ERR), or
// sends VRING_ERR on its channel. The descriptor that it has is ours; the VMM's is written when ours was.
//
// A back-end may tell of errors as often as it likes: after each look there is a pause, and what comes in it
// is one event.
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <cerrno>
#include <chrono>

#include "agent/vhost/mediator_impl.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

constexpr auto kErrorPause = std::chrono::milliseconds(200);

}  // namespace

absl::Status Mediator::Impl::SendVringErr(uint32_t index) {
  auto [at, made] = error_fds_.try_emplace(index);
  if (made) {
    at->second.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    epoll_event event{.events = EPOLLIN, .data = {.u32 = index}};
    if (!at->second || ::epoll_ctl(errors_.get(), EPOLL_CTL_ADD, at->second.get(), &event) != 0) {
      const int error = errno;
      error_fds_.erase(at);
      return ErrnoError(error, "error descriptor");
    }
  }
  const uint64_t value = index;
  const int fd = at->second.get();
  absl::Status sent = link_.frontend->Set(Request::kSetVringErr, Bytes(value), {&fd, 1}, RequestDeadline());
  // A back-end that will not have one only stays silent.
  return absl::IsFailedPrecondition(sent) ? absl::OkStatus() : sent;
}

void Mediator::Impl::ForgetErrors() {
  // Taken out by hand: the back-end's duplicate would keep the descriptor in the set.
  for (const auto& [index, fd] : error_fds_)
    (void)::epoll_ctl(errors_.get(), EPOLL_CTL_DEL, fd.get(), nullptr);
  error_fds_.clear();
}

void Mediator::Impl::OnErrors() {
  epoll_event events[16];
  const int n = ::epoll_wait(errors_.get(), events, 16, 0);
  for (int i = 0; i < n; ++i) {
    auto it = error_fds_.find(events[i].data.u32);
    if (it == error_fds_.end()) continue;
    uint64_t count = 0;
    if (::read(it->second.get(), &count, sizeof count) != static_cast<ssize_t>(sizeof count)) continue;
    OnDeviceError(it->first);
  }
}

void Mediator::Impl::OnDeviceError(uint32_t index) {
  errors_muted_until_ = Clock::now() + kErrorPause;
  // Told on the channel, and by the descriptor, too: one event.
  uint64_t told = 0;
  if (auto fd = error_fds_.find(index);
      fd != error_fds_.end() && ::read(fd->second.get(), &told, sizeof told) < 0)
    LOG_DEBUG("device {}: ring {}: nothing more is told", name(), index);
  auto vring = record_.vrings.find(index);
  if (vring == record_.vrings.end()) return;
  Inject(vring->second.err);
  MemoDevice memo = memo_->device();
  ++memo.events;
  memo.event_kind = v1::DeviceEvent::QUEUE_ERROR;
  memo.event_queue = index;
  memo.event_held = InFlightByRegion().value_or(0);
  memo.event_time_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(
                           std::chrono::system_clock::now().time_since_epoch())
                           .count();
  memo_->set_device(memo);
  LOG_WARN("device {}: back-end {} tells of an error of ring {}; {} requests are in flight", name(),
           options_.backend.socket(), index, memo.event_held);
}

}  // namespace baton::vhost
