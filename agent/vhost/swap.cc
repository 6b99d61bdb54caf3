// Another back-end for a device under a running guest.
//
// The guest runs on and goes on making requests available, so a ring does not run empty by itself: the old
// back-end must stop fetching. It is first given kick descriptors that nobody writes to; then it is stopped
// in the way of its kind (docs/backends.md) and only a ring with nothing in flight is taken from it. What the
// guest made available meanwhile waits in the ring, and the new back-end finds it there: StartVring looks
// without being told.
#include <poll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <future>

#include "agent/vhost/backend_state.h"
#include "agent/vhost/mediator_impl.h"
#include "agent/vhost/probe.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

// A packed base of a back-end that tells the avail half only: with nothing in flight, used is where avail is.
uint32_t WholePackedBase(uint32_t raw) { return raw <= 0xffff ? raw | raw << 16 : raw; }

}  // namespace

absl::StatusOr<SwapResult> Mediator::Impl::Swap(const SwapOptions& wanted,
                                                std::function<absl::Status()> record, Deadline deadline) {
  // A caller that gave up must not find the device swapped later; one whose swap has begun hears its end.
  enum { kWaiting, kBegun, kAbandoned };
  struct Shared {
    std::atomic<int> state{kWaiting};
    std::promise<absl::StatusOr<SwapResult>> result;
  };
  auto shared = std::make_shared<Shared>();
  auto future = shared->result.get_future();
  absl::Status ran = Run(
      [this, shared, wanted, record = std::move(record)] {
        int waiting = kWaiting;
        if (!shared->state.compare_exchange_strong(waiting, kBegun)) return absl::OkStatus();
        auto result = SwapNow(wanted, record);
        Publish();
        shared->result.set_value(std::move(result));
        return absl::OkStatus();
      },
      deadline);
  int waiting = kWaiting;
  if (!ran.ok() && shared->state.compare_exchange_strong(waiting, kAbandoned)) return ran;
  return future.get();
}

absl::StatusOr<SwapResult> Mediator::Impl::SwapNow(const SwapOptions& wanted,
                                                   const std::function<absl::Status()>& record) {
  auto refuse = [&](absl::StatusCode code, const std::string& why) {
    return Error(code, "device {}: {}", name(), why);
  };
  if (options_.backend.socket() == wanted.backend.socket()) return SwapResult{.unchanged = true};
  if (Armed() || logging_) {
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "device {}: it is being migrated; its back-end cannot be swapped now", name());
  }
  if (link_.state == LinkState::kHeld) return refuse(absl::StatusCode::kFailedPrecondition, message_);
  if (link_.state == LinkState::kOverdue)
    return refuse(absl::StatusCode::kUnavailable, "its back-end owes an answer: " + message_);
  if (wanted.inflight == v1::HANDOFF && Ready() && !quirks_.confirms_cancel) {
    // A fence would keep the new one from the storage as well: both are on this host.
    return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                 "device {}: its back-end ({}) does not confirm that it has cancelled what it had in flight; "
                 "use drain",
                 name(), quirks_.name);
  }

  // The new one first, up to the point where it could start the rings.
  const v1::Backend old_backend = options_.backend;
  const v1::Device before = BuildDescription();
  const bool was_ready = Ready();
  struct Side {
    Link link;
    v1::Backend backend;
    Offer offer;
    std::vector<uint8_t> config;
    std::string message;
  };
  auto take = [&] {
    Side side{std::exchange(link_, Link()), options_.backend, offer_, config_, message_};
    return side;
  };
  auto give = [&](Side side) {
    link_ = std::move(side.link);
    options_.backend = std::move(side.backend);
    quirks_ = QuirksOf(options_.backend.kind());
    offer_ = side.offer;
    config_ = std::move(side.config);
    message_ = std::move(side.message);
  };
  Side old = take();
  options_.backend = wanted.backend;
  quirks_ = QuirksOf(options_.backend.kind());
  absl::Status connected = ConnectForSwap(Deadline::After(options_.connect_timeout));
  if (connected.ok()) {
    for (const v1::Finding& finding : CompareForSwap(before, BuildDescription())) {
      if (finding.severity() == v1::BLOCKER) {
        connected = absl::FailedPreconditionError(finding.message());
        break;
      }
    }
  }
  if (!connected.ok()) {
    give(std::move(old));
    return Annotate(WithReason(connected, v1::DESTINATION_BACKEND_FAILED),
                    fmt::format("device {}: back-end {}", name(), wanted.backend.socket()));
  }
  Side fresh = take();
  give(std::move(old));

  // Then the old one.
  const auto began = Clock::now();
  SwapResult result;
  const bool hand_over = was_ready && wanted.inflight == v1::HANDOFF;
  const std::vector<uint32_t> suspended = hand_over ? RunningRings() : std::vector<uint32_t>();
  if (hand_over) {
    stop_.handed_off.clear();
    // What it says is in flight is in the region, which goes on to the new one.
    if (absl::Status stopped = SuspendRings(); !stopped.ok())
      return Annotate(WithReason(stopped, v1::INFLIGHT_UNKNOWN), fmt::format("device {}", name()));
    result.handed_off += stop_.requests();
    stop_.handed_off.clear();
    for (uint32_t index : suspended) Memorize(index);
  } else if (was_ready) {
    absl::Status stopped = StopForSwap(Deadline::After(wanted.drain_bound));
    if (!stopped.ok()) return Annotate(stopped, fmt::format("device {}", name()));
  }
  auto keep_old = [&](const absl::Status& why, const std::string& what) {
    if (hand_over) {
      ResumeSuspended(suspended);
    } else if (was_ready) {
      ResumeAfterSwap();
    }
    return Annotate(why, fmt::format("device {}: {}", name(), what));
  };
  if (was_ready) {
    // What the guest told the device through its control queue, among others.
    v1::DeviceState own;
    absl::Status moved = SaveStateInto(&own, Deadline::After(options_.request_timeout));
    if (moved.ok() && !own.backend_state().empty()) {
      moved = LoadBackendState(*fresh.link.frontend, own.backend_state(),
                               Deadline::After(options_.request_timeout));
      if (!moved.ok()) moved = WithReason(moved, v1::DESTINATION_BACKEND_FAILED);
      fresh.link.state_loaded = moved.ok();
    }
    if (!moved.ok()) return keep_old(moved, "the state of its back-end was not moved");
  }
  if (absl::Status recorded = record ? record() : absl::OkStatus(); !recorded.ok())
    return keep_old(recorded, "its new back-end could not be recorded");

  // From here on there is only the new one.
  ForgetErrors();
  old = take();
  give(std::move(fresh));
  old.link = Link();
  backoff_ = {};
  rebuild_counts_ = false;
  // The old one still has the old region's descriptor.
  replace_region_ = true;
  ++swaps_;
  message_.clear();
  LOG_INFO("device {}: back-end {} replaced by {}", name(), old_backend.socket(), options_.backend.socket());
  absl::Status built = BuildRings();
  result.pause = Clock::now() - began;
  if (built.ok()) return result;
  if (absl::IsFailedPrecondition(built)) {
    Hold(built);
  } else {
    LoseBackend(built);
  }
  return Error(v1::SOURCE_BACKEND_FAILED, absl::StatusCode::kUnavailable,
               "device {}: it was given to back-end {}, which failed: {}; the old one is not used any more",
               name(), options_.backend.socket(), Message(built));
}

absl::Status Mediator::Impl::ConnectForSwap(Deadline deadline) {
  RETURN_IF_ERROR(Dial());
  pollfd p{link_.frontend->fd(), POLLIN, 0};
  if (::poll(&p, 1, deadline.PollTimeoutMs()) == 0) {
    return absl::DeadlineExceededError(
        "accepts the connection but does not answer (stopped, or busy with another front-end)");
  }
  ASSIGN_OR_RETURN(uint64_t features, link_.frontend->FinishGetFeatures(deadline));
  RETURN_IF_ERROR(Negotiate(features));
  link_.state = LinkState::kReady;
  return BuildDevice();
}

absl::Status Mediator::Impl::StopForSwap(Deadline deadline) {
  std::vector<uint32_t> running;
  for (const auto& [index, applied] : link_.vrings) {
    if (applied.running) running.push_back(index);
  }
  // Nobody tells it of requests any more.
  absl::Status status;
  std::vector<Notifier> silences;
  for (uint32_t index : running) {
    // Not empty: see StartVring. As full as it can be, so that it says when it was read.
    Notifier silence{true, UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))};
    const uint64_t full = UINT64_MAX - 1;
    if (!silence.fd || ::write(silence.fd.get(), &full, sizeof full) != sizeof full)
      return ErrnoError(errno, "eventfd");
    link_.vrings[index].kick_stale = true;
    status = SendNotifier(Request::kSetVringKick, index, silence);
    if (!status.ok()) break;
    silences.push_back(std::move(silence));
  }
  if (status.ok() && !running.empty() && quirks_.drains_on_disconnect) {
    for (const Notifier& silence : silences) {
      status = AwaitRead(silence.fd.get(), deadline);
      if (!status.ok()) break;
    }
    if (status.ok()) status = DrainByDisconnect(deadline);
  } else if (status.ok()) {
    // libvhost-user closes the call descriptor at GET_VRING_BASE, and loses what it completes afterwards.
    // Without kicks it fetches nothing any more, so its region runs empty; kinds that poll their rings drain
    // when asked.
    const bool wait_first = quirks_.inflight == virtio::InflightKind::kLibvhostUser;
    while (wait_first && InFlightByRegion().value_or(0) != 0) {
      if (deadline.Expired()) {
        status = Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded,
                       "{} requests are still in flight at the bound", InFlightByRegion().value_or(0));
        break;
      }
      status = DrainMoment();
      if (!status.ok()) break;
    }
    for (size_t i = 0; status.ok() && i < running.size(); ++i) status = StopRingForSwap(running[i], deadline);
  }
  if (status.ok()) return status;
  if (!link_.frontend || (!absl::IsFailedPrecondition(status) && ReasonOf(status) != v1::DRAIN_TIMEOUT)) {
    // Out of step: the rings are recovered over a new connection.
    if (link_.frontend) LoseBackend(status);
    return WithReason(status, v1::SOURCE_BACKEND_FAILED);
  }
  ResumeAfterSwap();
  return status;
}

// Until the back-end has handled the last kick that it gets. qemu-storage-daemon waits for the requests of a
// connection that has ended, and aborts when a kick makes it fetch another one meanwhile (the assertion in
// vhost_user_server_ref).
absl::Status Mediator::Impl::AwaitRead(int silence, Deadline deadline) {
  for (;;) {
    pollfd p[2] = {{silence, POLLOUT, 0}, {link_.frontend->fd(), POLLIN, 0}};
    const int n = ::poll(p, 2, deadline.PollTimeoutMs());
    if (n > 0 && p[0].revents != 0) return absl::OkStatus();
    if (n > 0) RETURN_IF_ERROR(Annotate(link_.frontend->Unasked(), "while a ring drained"));
    if (deadline.Expired())
      return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded,
                   "its back-end did not read a notification in time");
  }
}

absl::Status Mediator::Impl::StopRingForSwap(uint32_t index, Deadline deadline) {
  auto late = [&](const std::string& what) {
    return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded, "ring {}: {}", index, what);
  };
  auto base = link_.frontend->GetVringBase(index, deadline);
  if (!base.ok()) {
    if (!link_.frontend->overdue()) return base.status();
    // The answer is waited for, and then the ring is started again.
    link_.vrings[index].must_stop = true;
    AwaitOverdue(base.status());
    return late("the back-end did not stop it in time");
  }
  // Back-ends that answer at once complete the rest in the background.
  while (!record_.packed() && UsedIndex(index) != *base) {
    if (deadline.Expired()) break;
    RETURN_IF_ERROR(DrainMoment());
  }
  VringRecord& vring = record_.vrings[index];
  AppliedVring& applied = link_.vrings[index];
  applied.running = false;
  applied.base = *base;
  vring.base = vring.told = record_.packed() ? WholePackedBase(*base) : *base;
  MarkRingDirty(index);
  if (record_.packed()) {
    ASSIGN_OR_RETURN(virtio::PackedRing ring, record_.Packed(index));
    if (!virtio::CheckPackedDrained(ring.size, virtio::DecodePackedBase(*vring.base)).ok())
      return late("requests are still in flight");
  } else if (UsedIndex(index) != *base) {
    return late(
        fmt::format("{} requests are still in flight", static_cast<uint16_t>(*base - UsedIndex(index))));
  }
  Memorize(index);
  return absl::OkStatus();
}

absl::Status Mediator::Impl::DrainByDisconnect(Deadline deadline) {
  // It serves the next connection only when all of this one is done; kicks no longer reach it, so that comes.
  std::vector<uint32_t> running;
  for (const auto& [index, applied] : link_.vrings) {
    if (applied.running) running.push_back(index);
  }
  auto lost = [&](const absl::Status& why) {
    for (uint32_t index : running) record_.vrings[index].lost = true;
    return why;
  };
  if (absl::Status dialled = Dial(); !dialled.ok()) return lost(dialled);
  pollfd p{link_.frontend->fd(), POLLIN, 0};
  if (::poll(&p, 1, deadline.PollTimeoutMs()) == 0) {
    // The hello goes on; what follows is an ordinary reconnect to the old one.
    for (uint32_t index : running) record_.vrings[index].base = UsedIndex(index);
    return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded,
                 "its back-end still had requests in flight at the bound");
  }
  auto features = link_.frontend->FinishGetFeatures(deadline);
  if (!features.ok()) return lost(features.status());
  for (uint32_t index : running) {
    VringRecord& vring = record_.vrings[index];
    vring.base = UsedIndex(index);
    Memorize(index);
  }
  // A record that fails after this goes back to it.
  RETURN_IF_ERROR(Negotiate(*features));
  link_.state = LinkState::kReady;
  return BuildDevice();
}

void Mediator::Impl::ResumeAfterSwap() {
  // kHello: it drains, and is built again when it answers. kOverdue: Reconcile starts what has to run.
  if (!Ready()) return;
  absl::Status status;
  for (auto& [index, vring] : record_.vrings) {
    if (!vring.started || !status.ok()) continue;
    if (!link_.vrings[index].running) {
      status = StartVring(index);
    } else {
      status = RestoreKick(index);
    }
    if (status.ok()) status = SendEnable(index);
  }
  if (absl::IsFailedPrecondition(status)) {
    Hold(status);
  } else if (!status.ok()) {
    LoseBackend(status);
  }
}

absl::Status Mediator::Impl::RestoreKick(uint32_t index) {
  if (!std::exchange(link_.vrings[index].kick_stale, false)) return absl::OkStatus();
  const Notifier& kick = record_.vrings[index].kick;
  Inject(kick);
  return SendNotifier(Request::kSetVringKick, index, kick);
}

std::optional<uint64_t> Mediator::Impl::InFlightByRegion() {
  if (!record_.inflight || !link_.inflight_sent) return std::nullopt;
  uint64_t total = 0;
  for (const auto& [index, vring] : record_.vrings) {
    if (!vring.started || !vring.addr) continue;
    auto set = ReadInflightPart(index);
    if (!set.ok()) return std::nullopt;
    total += set->size();
  }
  return total;
}

}  // namespace baton::vhost
