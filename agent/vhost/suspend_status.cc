// Suspension by the device status (VIRTIO 1.4, 2.1.2 and 3.4): for the stop of a migration, where a back-end
// offers the feature and the VMM uses the status. The device stops consuming, completes what it has, and says
// so; then the rings are asked for as always. The guest knows nothing of it: the feature is not offered to
// the VMM.
#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

constexpr uint64_t kDriverOk = 4, kSuspended = 16, kNeedsReset = 64;

}  // namespace

bool Mediator::Impl::SuspendsByStatus() const {
  return link_.features_sent && (*link_.features_sent & virtio::kFSuspend) && record_.status &&
         (*record_.status & kDriverOk);
}

void Mediator::Impl::SuspendByStatus(Deadline deadline) {
  Frontend& fe = *link_.frontend;
  const uint64_t running = *record_.status;
  auto lose = [&](const absl::Status& why) {
    if (fe.overdue()) {
      AwaitOverdue(why);
    } else {
      LoseBackend(why);
    }
  };
  link_.suspended = running;
  // Where it is acknowledged, that may come only when everything is completed.
  if (absl::Status sent = fe.SetU64(Request::kSetStatus, running | kSuspended, deadline); !sent.ok())
    return lose(sent);
  // There is no event for it: the driver polls (3.4.1).
  while (!deadline.Expired()) {
    auto status = fe.GetU64(Request::kGetStatus, deadline);
    if (!status.ok()) return lose(status.status());
    if (*status & kNeedsReset)
      return lose(absl::UnavailableError("the device could not be suspended and asks to be reset"));
    if ((*status & kSuspended) && !(*status & kDriverOk)) return;
    if (!DrainMoment().ok()) return;
  }
  // What it has not completed is seen ring by ring.
  LOG_WARN("device {}: it is not suspended at the bound of its stop", name());
}

absl::Status Mediator::Impl::LiftSuspend() {
  if (!link_.suspended) return absl::OkStatus();
  const uint64_t running = *std::exchange(link_.suspended, std::nullopt);
  record_.status = running;
  return link_.frontend->SetU64(Request::kSetStatus, running, RequestDeadline());
}

}  // namespace baton::vhost
