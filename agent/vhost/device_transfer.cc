// The mediator's part in what a back-end itself remembers: its state from one host to the other, and telling
// the network where a NIC is now.
#include <algorithm>
#include <cstdio>

#include "agent/vhost/backend_state.h"
#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/features.h"
#include "agent/virtio/net_protocol.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

// One frame may be lost on the way, or reach a switch that is not ready: a few in a short window, as QEMU's
// announce-self does. Times from the first.
constexpr std::chrono::milliseconds kAnnounceAt[] = {
    std::chrono::milliseconds(0),   std::chrono::milliseconds(50),  std::chrono::milliseconds(150),
    std::chrono::milliseconds(300), std::chrono::milliseconds(500),
};

// "52:54:00:12:34:56" as the payload of SEND_RARP: the six bytes first.
std::optional<uint64_t> RarpPayload(const std::string& mac) {
  unsigned b[6];
  if (std::sscanf(mac.c_str(), "%2x:%2x:%2x:%2x:%2x:%2x", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5]) != 6)
    return std::nullopt;
  uint64_t payload = 0;
  for (int i = 5; i >= 0; --i) payload = payload << 8 | b[i];
  return payload;
}

}  // namespace

absl::Status Mediator::Impl::SaveStateInto(v1::DeviceState* out, Deadline deadline) {
  if (!record_.features || !Ready() || !(link_.frontend->protocol_features() & pf::kDeviceState))
    return absl::OkStatus();
  auto state = SaveBackendState(*link_.frontend, deadline.Min(Deadline::After(options_.request_timeout)));
  if (state.ok()) {
    LOG_INFO("device {}: its back-end gave {} bytes of state", name(), state->size());
    out->set_backend_state(*std::move(state));
    return absl::OkStatus();
  }
  absl::Status failed =
      Annotate(WithReason(state.status(), v1::SOURCE_BACKEND_FAILED),
               fmt::format("device {}: the state of back-end {}", name(), options_.backend.socket()));
  // The state was only read: the rings go on as after any other stop, unless the connection is out of step.
  if (link_.frontend->overdue()) {
    AwaitOverdue(state.status());
  } else if (absl::IsUnavailable(state.status()) || absl::IsInvalidArgument(state.status())) {
    LoseBackend(state.status());
  }
  return failed;
}

absl::Status Mediator::Impl::EnsureStateLoaded(Deadline deadline) {
  if (!state_to_load_ || link_.state_loaded) return absl::OkStatus();
  auto failed = [&](const absl::Status& why) {
    return Annotate(
        WithReason(why, v1::DESTINATION_BACKEND_FAILED),
        fmt::format("device {}: loading its state into back-end {}", name(), options_.backend.socket()));
  };
  if (!Ready()) {
    return failed(absl::UnavailableError(message_.empty() ? "the back-end is not connected" : message_));
  }
  if (!(link_.frontend->protocol_features() & pf::kDeviceState)) {
    // Not to be cured by another attempt: without it nothing would tell the device what its driver has set.
    state_to_load_.reset();
    return failed(absl::FailedPreconditionError("it does not offer DEVICE_STATE"));
  }
  absl::Status loaded = absl::OkStatus();
  if (!record_.features && expected_) {
    // A VMM that has not begun yet will accept what its guest had; the state depends on it.
    const uint64_t features =
        expected_->acked_features() | (offer_.features & virtio::kVhostUserFProtocolFeatures);
    loaded = link_.frontend->SetU64(Request::kSetFeatures, features, deadline, /*fence=*/true);
  }
  if (loaded.ok()) loaded = LoadBackendState(*link_.frontend, *state_to_load_, deadline);
  if (loaded.ok()) {
    link_.state_loaded = true;
    LOG_INFO("device {}: its back-end has loaded {} bytes of state", name(), state_to_load_->size());
    return absl::OkStatus();
  }
  // What it holds now is undefined. A fresh connection begins with a fresh device; nobody tries this state
  // again.
  state_to_load_.reset();
  LoseBackend(Annotate(loaded, "loading its state"));
  return failed(loaded);
}

absl::Status Mediator::Impl::Announce(Deadline deadline) {
  if (options_.spec.class_() != v1::NET) return absl::OkStatus();
  return Run(
      [this]() -> absl::Status {
        if (!Ready() || !record_.any_started()) return absl::OkStatus();
        Frontend& fe = *link_.frontend;
        const bool guest = record_.features && (*record_.features & virtio::kNetFGuestAnnounce);
        if (guest) {
          // Where the VMM shows a configuration space of its own, it asks the guest (QEMU: announce-self).
          if (!(record_.protocol_features & fe.protocol_features() & pf::kConfig)) return absl::OkStatus();
          struct {
            ConfigHeader header;
            uint16_t status;
          } __attribute__((packed)) write{{6, 2, 1}, virtio::kNetStatusLinkUp | virtio::kNetStatusAnnounce};
          static_assert(sizeof write == 14);
          absl::Status set = fe.Set(Request::kSetConfig, Bytes(write), {}, RequestDeadline());
          if (set.ok()) {
            config_changed_ = true;
            LOG_INFO("device {}: the guest is asked to announce itself", name());
            return absl::OkStatus();
          }
          if (!absl::IsFailedPrecondition(set)) {
            LoseBackend(set);
            return set;
          }
          LOG_INFO("device {}: {}; RARP instead", name(), Message(set));
        }
        if (!(fe.protocol_features() & pf::kRarp)) {
          return absl::FailedPreconditionError(
              fmt::format("device {}: its back-end cannot announce it (no RARP)", name()));
        }
        announce_mac_ = RarpPayload(options_.spec.mac());
        if (!announce_mac_ && config_.size() >= 6) {
          announce_mac_ = 0;
          std::copy_n(config_.begin(), 6, reinterpret_cast<uint8_t*>(&*announce_mac_));
        }
        if (!announce_mac_) {
          return absl::FailedPreconditionError(
              fmt::format("device {}: its MAC address is not known", name()));
        }
        announced_ = 0;
        announce_at_ = Clock::now();
        AnnounceNow();
        return absl::OkStatus();
      },
      deadline);
}

void Mediator::Impl::AnnounceNow() {
  const Clock::time_point first = announce_at_ - kAnnounceAt[announced_];
  if (Ready()) {
    absl::Status sent = link_.frontend->SetU64(Request::kSendRarp, *announce_mac_, RequestDeadline());
    if (!sent.ok()) {
      LOG_WARN("device {}: SEND_RARP: {}", name(), Message(sent));
      if (!absl::IsFailedPrecondition(sent)) LoseBackend(sent);
    }
  }
  if (++announced_ == std::size(kAnnounceAt)) {
    announce_mac_.reset();
    return;
  }
  announce_at_ = first + kAnnounceAt[announced_];
}

}  // namespace baton::vhost
