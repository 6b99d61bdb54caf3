// The stop of a migration for all rings of a device at once: with the handoff of what is in flight, by asking
// the back-end to stop without completing; else, or if what is in flight may not be handed off, by draining.

#include <algorithm>

#include "agent/vhost/inflight_answer.h"
#include "agent/vhost/inflight_proto.h"
#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/blk_in_flight.h"
#include "agent/virtio/features.h"
#include "agent/virtio/handoff.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

absl::Status Unsafe(const std::string& why) { return absl::FailedPreconditionError(why); }

// Whether any two requests touch the same sector and one of them writes.
bool AnyOverlap(const std::vector<virtio::BlkRequest>& requests) {
  struct Span {
    virtio::Extent extent;
    bool writes;
  };
  std::vector<Span> spans;
  for (const virtio::BlkRequest& request : requests) {
    for (const virtio::Extent& extent : request.extents) spans.push_back({extent, request.writes()});
  }
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.extent.first < b.extent.first; });
  uint64_t end = 0, written_end = 0;
  for (const Span& span : spans) {
    if (span.extent.first < (span.writes ? end : written_end)) return true;
    end = std::max(end, span.extent.end);
    if (span.writes) written_end = std::max(written_end, span.extent.end);
  }
  return false;
}

}  // namespace

void Mediator::Impl::StopAllRings() {
  stop_.drain_reason.clear();
  stop_.handed_off.clear();
  if (!Ready()) return;
  (void)StopDeadline(/*begin=*/true);
  if (HandoffWanted()) {
    if (absl::Status suspended = SuspendRings(); !suspended.ok()) {
      stop_.drain_reason = Message(suspended);
      LOG_INFO("device {}: drains instead of handing over what is in flight: {}", name(), stop_.drain_reason);
    }
  }
  if (!Ready() || !stop_.handed_off.empty()) return;
  if (SuspendsByStatus()) SuspendByStatus(StopDeadline(false));
  if (Ready()) DrainRings();
}

std::vector<uint32_t> Mediator::Impl::RunningRings() const {
  std::vector<uint32_t> rings;
  for (const auto& [index, applied] : link_.vrings) {
    auto it = record_.vrings.find(index);
    if (applied.running && !applied.must_stop && it != record_.vrings.end() && it->second.started)
      rings.push_back(index);
  }
  return rings;
}

void Mediator::Impl::DrainRings() {
  // Only rings that have run empty: the answers come at once then, and one after the other loses nothing but
  // a round trip each. The others are stopped one by one, each with what is left of the bound.
  if (link_.suspended || !quirks_.pipelines || record_.packed() || !RunsEmpty()) return;
  std::vector<uint32_t> rings = RunningRings();
  for (uint32_t index : rings) {
    if (!AwaitAllUsed(index, StopDeadline(false))) return;
  }
  if (rings.size() < 2) return;
  auto bases = link_.frontend->GetVringBases(Request::kGetVringBase, rings, 0, true, StopDeadline(false));
  if (!bases.ok()) {
    LoseBackend(bases.status());
    return;
  }
  for (size_t i = 0; i < rings.size(); ++i) {
    AppliedVring& applied = link_.vrings[rings[i]];
    applied.running = false;
    applied.base = (*bases)[i];
    MarkRingDirty(rings[i]);
  }
}

absl::Status Mediator::Impl::SuspendRings() {
  const HandoffObstacles obstacles =
      ObstaclesOf(options_.spec.class_(), options_.backend.kind(), offer_.protocol_features, HasFence());
  if (!obstacles.handoff.empty()) return Unsafe(obstacles.handoff);
  if (!link_.inflight_sent) return Unsafe("its back-end was given no in-flight region");
  const std::vector<uint32_t> rings = RunningRings();
  if (rings.empty()) return absl::OkStatus();
  Frontend& fe = *link_.frontend;
  const bool skip_drain = (offer_.protocol_features & pf::kSkipDrain) != 0;
  const Deadline deadline = StopDeadline(false).Min(Deadline::After(options_.request_timeout));
  // Bit 20 is about every GET_VRING_BASE, also those of a guest that resets its device. So it is only
  // negotiated for this one.
  auto bases = [&]() -> absl::StatusOr<std::vector<uint32_t>> {
    if (skip_drain) {
      return fe.GetVringBases(Request::kGetVringBaseSkipDrain, rings, 0, quirks_.pipelines, deadline);
    }
    const uint64_t usual = fe.protocol_features();
    RETURN_IF_ERROR(fe.SetProtocolFeatures(usual | pf::kGetVringBaseInflight, deadline));
    ASSIGN_OR_RETURN(auto answers, fe.GetVringBases(Request::kGetVringBase, rings, quirks_.suspend_num,
                                                    quirks_.pipelines, deadline));
    RETURN_IF_ERROR(fe.SetProtocolFeatures(usual, deadline));
    return answers;
  }();
  if (!bases.ok()) {
    // Which rings have stopped is not known. On another connection everything is built again from the region.
    LoseBackend(bases.status());
    return Unsafe(Message(bases.status()));
  }
  for (uint32_t index : rings) {
    link_.vrings[index] = AppliedVring();
    // From here on only the region tells what is in flight, as after a crash.
    record_.vrings[index].lost = true;
    MarkRingDirty(index);
  }
  absl::Status judged = JudgeSets(rings, *bases);
  if (judged.ok()) judged = FenceIfNeeded();
  if (judged.ok()) return absl::OkStatus();
  stop_.handed_off.clear();
  ResumeSuspended(rings);
  return judged;
}

absl::Status Mediator::Impl::JudgeSets(const std::vector<uint32_t>& rings,
                                       const std::vector<uint32_t>& bases) {
  ASSIGN_OR_RETURN(virtio::InflightGeometry geometry, RegionGeometry());
  std::optional<RamView> ram;
  const virtio::MemoryView& memory = StopMemory(&ram);
  virtio::HandoffQuestion question;
  question.wanted = virtio::InflightAnswer::kHandoff;
  question.suspends = question.exact = true;
  question.confirms_cancel = quirks_.confirms_cancel;
  question.fenced = HasFence();  // asked last, and only if something is in flight
  const bool order_kept = OrderKept();
  std::vector<virtio::BlkRequest> requests;
  // One queue at a time through the same buffers: fresh memory costs more than what is done with it.
  std::vector<uint8_t> part;
  std::vector<virtio::GuestSpan> buffers;
  uint64_t marked = 0;
  for (size_t i = 0; i < rings.size(); ++i) {
    const uint32_t index = rings[i];
    RETURN_IF_ERROR(CopyPart(geometry, index, &part));
    auto set = ReadSet(memory, part, index, bases[i]);
    if (!set.ok()) return Annotate(set.status(), fmt::format("ring {}", index));
    const uint64_t desc = record_.packed() ? record_.Packed(index)->desc : record_.Split(index)->desc;
    const auto n = static_cast<uint16_t>(record_.vrings[index].num);
    if (order_kept) {
      question.classes |= virtio::ReadClasses(memory, desc, n, *set, v1::BLK, &buffers);
    } else {
      for (virtio::BlkRequest& request : virtio::ReadBlkRequests(memory, desc, n, *set, &buffers)) {
        question.classes.Add(request.cls);
        requests.push_back(std::move(request));
      }
    }
    MarkBuffersDirty(buffers, &marked);
    buffers.clear();
    // At once, as long as it is in the cache.
    MigrationStop::HandedOff& ring = stop_.handed_off[index];
    ring.told = ToldBase(*set);
    ring.requests = set->size();
    ToProto(*set, &ring.state);
  }
  const virtio::HandoffDecision decision = virtio::DecideHandoff(question);
  if (decision.verdict != virtio::HandoffVerdict::kHandoff) {
    // "drains: why".
    return Unsafe(decision.reason.substr(decision.reason.find(' ') + 1));
  }
  // Reads that nobody confirmed could still arrive in buffers that the guest uses again, if it stays.
  if (decision.resume_must_wait) return Unsafe("its back-end does not confirm that stopped reads have ended");
  if (AnyOverlap(requests)) {
    return Unsafe("requests in flight overlap, and not both back-ends are known to submit them in order");
  }
  return absl::OkStatus();
}

uint32_t Mediator::Impl::ToldBase(const virtio::InflightSet& set) const {
  if (!record_.packed()) return set.last_avail();
  return virtio::EncodePackedBase({set.avail, set.used});
}

void Mediator::Impl::ResumeSuspended(const std::vector<uint32_t>& rings) {
  if (!Ready()) return;
  // What a back-end forgets with GET_VRING_BASE differs; it is told everything again.
  link_.inflight_sent = false;
  auto resume = [&]() -> absl::Status {
    for (uint32_t index : rings) RETURN_IF_ERROR(StartVring(index));
    for (uint32_t index : rings) {
      if (auto it = link_.enabled.find(index); it == link_.enabled.end() || !it->second) continue;
      VringState state{index, 1};
      RETURN_IF_ERROR(link_.frontend->Set(Request::kSetVringEnable, Bytes(state), {}, RequestDeadline()));
    }
    return absl::OkStatus();
  };
  absl::Status resumed = resume();
  if (absl::IsFailedPrecondition(resumed)) {
    Hold(resumed);
  } else if (!resumed.ok()) {
    LoseBackend(resumed);
  }
}

}  // namespace baton::vhost
