// How the mediator's rings drain and stop at the back-end.
#include <poll.h>

#include "agent/vhost/mediator_impl.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

// How often used->idx is looked at while a ring drains; there is no event for it, since GET_VRING_BASE made
// the back-end close the call descriptor.
constexpr auto kDrainPoll = std::chrono::microseconds(100);

}  // namespace

absl::Status Mediator::Impl::DrainMoment() {
  Frontend& fe = *link_.frontend;
  pollfd p[2] = {{fe.fd(), POLLIN, 0}, {fe.channel_fd(), POLLIN, 0}};
  timespec wait{0, std::chrono::nanoseconds(kDrainPoll).count()};
  if (::ppoll(p, 2, &wait, nullptr) <= 0) return absl::OkStatus();
  if (p[1].revents) fe.ServeChannel();
  if (!p[0].revents) return absl::OkStatus();
  absl::Status unasked = Annotate(fe.Unasked(), "while a ring drained");
  if (!unasked.ok()) LoseBackend(unasked);
  return unasked;
}

bool Mediator::Impl::AwaitAllUsed(uint32_t index, Deadline deadline) {
  auto ring = record_.Split(index);
  if (!ring.ok()) return true;
  for (bool kicked = false;; kicked = true) {
    auto indices = virtio::ReadSplitIndices(record_.memory, *ring);
    if (!indices.ok() || indices->avail == indices->used) return true;
    // A vCPU that stopped between its store to avail->idx and its kick has made a request available that the
    // back-end was never told of. The driver's own kick comes when the guest goes on, and is spurious then.
    if (!kicked) Inject(record_.vrings[index].kick);
    if (deadline.Expired() || !DrainMoment().ok()) return false;
  }
}

uint32_t Mediator::Impl::StopVring(uint32_t index) {
  if (auto ring = stop_.handed_off.find(index); Armed() && ring != stop_.handed_off.end())
    return ring->second.told;
  // By value: losing the back-end empties the map.
  if (!link_.vrings[index].running) return link_.vrings[index].base.value_or(UsedIndex(index));
  if (!Ready()) {
    link_.vrings[index].must_stop = true;
    return UsedIndex(index);
  }
  Frontend& fe = *link_.frontend;
  const Deadline deadline = StopDeadline(/*begin=*/true);
  // GET_VRING_BASE makes libvhost-user close the call descriptor; a completion after that breaks the device,
  // and every later completion is lost. So the ring first runs empty, and one that does not is left running.
  // A device that is suspended takes nothing more from the ring, and has nothing to complete.
  if (!record_.packed() && !link_.suspended && RunsEmpty() && !AwaitAllUsed(index, deadline)) {
    if (!Ready()) return UsedIndex(index);
    link_.vrings[index].must_stop = true;
    message_ = fmt::format("ring {} still has requests in flight at the bound of its stop", index);
    LOG_WARN("device {}: {}", name(), message_);
    return UsedIndex(index);
  }
  auto base = fe.GetVringBase(index, StopDeadline(false));
  if (!base.ok()) {
    link_.vrings[index].must_stop = true;
    // Slow storage or a stopped process: the answer is awaited without holding up the VMM.
    if (fe.overdue()) {
      AwaitOverdue(base.status());
    } else {
      LoseBackend(base.status());
    }
    return UsedIndex(index);
  }
  // Back-ends that answer at once complete the rest in the background.
  while (!record_.packed() && UsedIndex(index) != *base && !deadline.Expired()) {
    if (!DrainMoment().ok()) return UsedIndex(index);  // still marked as running, and so as lost
  }
  AppliedVring& applied = link_.vrings[index];
  applied.running = false;
  applied.base = *base;
  if (!record_.packed() && UsedIndex(index) != *base) {
    LOG_WARN("device {}: ring {} still has {} requests in flight at the bound of its stop", name(), index,
             static_cast<uint16_t>(*base - UsedIndex(index)));
  }
  MarkRingDirty(index);
  return *base;
}

}  // namespace baton::vhost
