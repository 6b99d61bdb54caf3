// Requests that another host's back-end had in flight, given to this one: before this side becomes owner they
// are put into a region in memory that outlives the shim, and from then on starting the rings is the same as
// after a crash.
#include <algorithm>

#include "agent/vhost/inflight_answer.h"
#include "agent/vhost/inflight_proto.h"
#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {

void Mediator::Impl::NoteTakenOver() {
  for (const auto& [index, size] : taken_over_) {
    MemoRing ring;
    ring.flags = MemoRing::kTakenOver;
    ring.num = size;
    memo_->set_ring(index, ring);
  }
}

void Mediator::Impl::RecallTakenOver() {
  for (uint32_t i = 0; i < kMaxVrings; ++i) {
    if (const MemoRing ring = memo_->ring(i); ring.flags & MemoRing::kTakenOver) taken_over_[i] = ring.num;
  }
}

absl::Status Mediator::Impl::TakeOver(const v1::DeviceState& state) {
  if (!taken_over_.empty()) memo_->ForgetRings();
  taken_over_.clear();
  const bool any = std::any_of(state.vrings().begin(), state.vrings().end(),
                               [](const v1::VringState& v) { return !v.inflight().empty(); });
  if (!any) return absl::OkStatus();
  auto refuse = [&](const std::string& why) {
    return Error(v1::DESTINATION_BACKEND_FAILED, absl::StatusCode::kFailedPrecondition,
                 "device {}: the source handed over requests in flight, but {}", name(), why);
  };
  if (!state.handed_off()) return refuse("did not say so");
  if (!Ready()) return refuse(message_.empty() ? "its back-end is not connected" : message_);
  const HandoffObstacles obstacles =
      ObstaclesOf(options_.spec.class_(), options_.backend.kind(), offer_.protocol_features, false);
  if (!obstacles.takeover.empty()) return refuse(obstacles.takeover);
  uint32_t size = std::max<uint32_t>(options_.spec.queue_size(), 256);
  uint32_t queues = static_cast<uint32_t>(offer_.queues);
  for (const v1::VringState& v : state.vrings()) {
    if (v.index() >= kMaxVrings || v.size() > virtio::kMaxRingSize) return refuse("a ring is none");
    size = std::max(size, v.size());
    queues = std::max(queues, v.index() + 1);
  }
  const auto format = state.acked_features() & virtio::kFRingPacked ? virtio::RingFormat::kPacked
                                                                    : virtio::RingFormat::kSplit;
  // The region is laid out for the kind of rings, which a back-end learns with the features. QEMU, too, says
  // them first (vhost_dev_prepare_inflight), and again when it starts the device.
  const uint64_t features = state.acked_features() | virtio::kVhostUserFProtocolFeatures;
  if (link_.features_sent != features) {
    absl::Status sent =
        link_.frontend->SetU64(Request::kSetFeatures, features, RequestDeadline(), /*fence=*/true);
    if (!sent.ok()) {
      if (!absl::IsFailedPrecondition(sent)) LoseBackend(sent);
      return refuse(Message(sent));
    }
    link_.features_sent = features;
  }
  // The stride is the back-end's own affair; its answer tells it.
  auto answer = link_.frontend->GetInflight(static_cast<uint16_t>(queues), static_cast<uint16_t>(size),
                                            RequestDeadline());
  if (!answer.ok()) {
    LoseBackend(answer.status());
    return refuse(Message(answer.status()));
  }
  InflightDescription description = answer->first;
  description.num_queues = static_cast<uint16_t>(queues);
  description.queue_size = static_cast<uint16_t>(size);
  auto geometry = virtio::CheckInflightGeometry(format, description.mmap_size, 0, description.num_queues,
                                                description.queue_size, description.mmap_size);
  if (!geometry.ok()) return refuse(Message(geometry.status()));
  std::vector<uint8_t> content(description.mmap_size);
  for (const v1::VringState& v : state.vrings()) {
    auto set = FromProto(v);
    if (!set.ok()) return Annotate(set.status(), fmt::format("device {} ring {}", name(), v.index()));
    ASSIGN_OR_RETURN(auto part, virtio::InflightPart(*geometry, content, static_cast<uint16_t>(v.index())));
    RETURN_IF_ERROR(virtio::WriteInflight(part, description.queue_size, *set));
  }
  auto region = memo_->MakeRegion(description, content, static_cast<uint32_t>(options_.backend.kind()));
  if (!region.ok()) return refuse(Message(region.status()));
  record_.inflight = std::move(*region);
  link_.inflight_sent = false;
  for (const v1::VringState& v : state.vrings()) taken_over_[v.index()] = v.size();
  NoteTakenOver();
  return absl::OkStatus();
}

}  // namespace baton::vhost
