// The stop of a migration for all rings of a device at once: with the handoff of what is in flight, by asking
// the back-end to stop without completing; else, or if what is in flight may not be handed off, by draining.

#include <algorithm>

#include "agent/vhost/inflight_answer.h"
#include "agent/vhost/inflight_proto.h"
#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/blk_in_flight.h"
#include "agent/virtio/features.h"
#include "agent/virtio/handoff.h"
#include "agent/virtio/ring_access.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

// Most that is set aside for what is to be said of rings; all that a device of usual size needs.
constexpr size_t kMaxStateSpace = size_t{16} << 20;

absl::Status Unsafe(const std::string& why) { return absl::FailedPreconditionError(why); }

// A split ring's indices and descriptors are in the cache of another processor, and will be here when the
// region's part has been copied and analysed. (Of a packed ring the part has a copy.)
void PrefetchRing(const virtio::MemoryView& memory, const DeviceRecord& record, uint32_t index) {
  if (record.packed()) return;
  const auto ring = record.Split(index);
  if (!ring.ok()) return;
  for (uint64_t idx : {ring->avail + virtio::kRingIdx, ring->used + virtio::kRingIdx}) {
    if (const uint8_t* at = memory.PieceAt(idx).At(idx, 2)) __builtin_prefetch(at);
  }
  const uint64_t bytes = virtio::SplitDescBytes(ring->size);
  const uint8_t* at = memory.PieceAt(ring->desc).At(ring->desc, bytes);
  for (uint64_t line = 0; at && line < bytes; line += 64) __builtin_prefetch(at + line);
}

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
  absl::Status asked = link_.frontend->GetVringBases(
      Request::kGetVringBase, rings, 0, true, StopDeadline(false), [this](uint32_t index, uint32_t base) {
        AppliedVring& applied = link_.vrings[index];
        applied.running = false;
        applied.base = base;
        MarkRingDirty(index);
      });
  if (!asked.ok()) LoseBackend(asked);
}

void Mediator::Impl::PrepareSpace() {
  StopSpace& space = stop_space_;
  if (auto stride = RegionStride(record_.inflight.description); record_.inflight && stride.ok())
    space.part.resize(*stride);
  size_t left = kMaxStateSpace;
  uint32_t largest = 0;
  for (const auto& [index, vring] : record_.vrings) {
    if (!vring.started) continue;
    const uint32_t n = vring.num;
    largest = std::max(largest, n);
    const size_t each = record_.packed() ? 2 * sizeof(uint32_t) + sizeof(virtio::InflightDesc) : 4;
    if (n * each > left) continue;
    left -= n * each;
    MakeRoom(record_.packed(), n, &space.states[index]);
  }
  space.reader.Reserve(record_.packed() ? virtio::RingFormat::kPacked : virtio::RingFormat::kSplit,
                       static_cast<uint16_t>(largest));
  space.buffers.resize(largest);
}

struct Mediator::Impl::Judgement {
  explicit Judgement(const Impl& impl)
      : geometry(impl.RegionGeometry()), memory(impl.StopMemory(&ram)), order_kept(impl.OrderKept()) {}

  const absl::StatusOr<virtio::InflightGeometry> geometry;
  std::optional<RamView> ram;
  const virtio::MemoryView& memory;
  const bool order_kept;
  virtio::ClassesPresent classes;
  std::vector<virtio::BlkRequest> requests;  // where the order is not kept
  uint64_t marked = 0;                       // bytes
};

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
  Judgement judgement(*this);
  absl::Status judged = absl::OkStatus();
  // A ring is read as soon as it has stopped, while the back-end stops the next ones.
  auto stopped = [&](uint32_t index, uint32_t base) {
    link_.vrings[index] = AppliedVring();
    // From here on only the region tells what is in flight, as after a crash.
    record_.vrings[index].lost = true;
    MarkRingDirty(index);
    const auto next = std::upper_bound(rings.begin(), rings.end(), index);
    if (judged.ok()) judged = JudgeRing(index, base, next != rings.end() ? *next : kMaxVrings, &judgement);
  };
  // Bit 20 is about every GET_VRING_BASE, also those of a guest that resets its device. So it is only
  // negotiated for this one.
  auto stop = [&]() -> absl::Status {
    if (skip_drain) {
      return fe.GetVringBases(Request::kGetVringBaseSkipDrain, rings, 0, quirks_.pipelines, deadline,
                              stopped);
    }
    const uint64_t usual = fe.protocol_features();
    RETURN_IF_ERROR(fe.SetProtocolFeatures(usual | pf::kGetVringBaseInflight, deadline));
    RETURN_IF_ERROR(fe.GetVringBases(Request::kGetVringBase, rings, quirks_.suspend_num, quirks_.pipelines,
                                     deadline, stopped));
    return fe.SetProtocolFeatures(usual, deadline);
  };
  if (absl::Status asked = stop(); !asked.ok()) {
    // Which rings have stopped is not known. On another connection everything is built again from the region.
    stop_.handed_off.clear();
    LoseBackend(asked);
    return Unsafe(Message(asked));
  }
  if (judged.ok()) judged = JudgeAll(judgement);
  if (judged.ok()) judged = FenceIfNeeded();
  if (judged.ok()) return absl::OkStatus();
  stop_.handed_off.clear();
  ResumeSuspended(rings);
  return judged;
}

absl::Status Mediator::Impl::JudgeRing(uint32_t index, uint32_t base, uint32_t next, Judgement* judgement) {
  Judgement& j = *judgement;
  RETURN_IF_ERROR(j.geometry.status());
  std::vector<uint8_t>& part = stop_space_.part;
  std::vector<virtio::GuestSpan>& buffers = stop_space_.buffers;
  PrefetchRing(j.memory, record_, index);
  RETURN_IF_ERROR(CopyPart(*j.geometry, index, &part));
  MigrationStop::HandedOff& ring = stop_.handed_off[index];
  if (auto ready = stop_space_.states.find(index); ready != stop_space_.states.end())
    ring.state.Swap(&ready->second);
  // The copy waits for memory, and what follows it for little: so the next ring's part is asked for there.
  stop_space_.reader.ExpectNext(
      next < j.geometry->num_queues
          ? record_.inflight.map.Hint(j.geometry->mmap_offset + j.geometry->stride * next)
          : nullptr);
  const auto set = ReadSet(j.memory, part, index, base, RoomIn(&ring.state), &stop_space_.reader);
  if (!set.ok()) return Annotate(set.status(), fmt::format("ring {}", index));
  const uint64_t desc = record_.packed() ? record_.Packed(index)->desc : record_.Split(index)->desc;
  const auto n = static_cast<uint16_t>(record_.vrings[index].num);
  buffers.clear();
  if (j.order_kept) {
    j.classes |= virtio::ReadClasses(j.memory, desc, n, *set, v1::BLK, &buffers);
  } else {
    for (virtio::BlkRequest& request : virtio::ReadBlkRequests(j.memory, desc, n, *set, &buffers)) {
      j.classes.Add(request.cls);
      j.requests.push_back(std::move(request));
    }
  }
  MarkBuffersDirty(buffers, &j.marked);
  // At once, as long as it is in the cache.
  ring.told = ToldBase(*set);
  ring.requests = set->size();
  ToProto(*set, &ring.state);
  return absl::OkStatus();
}

absl::Status Mediator::Impl::JudgeAll(const Judgement& judgement) const {
  virtio::HandoffQuestion question;
  question.classes = judgement.classes;
  question.wanted = virtio::InflightAnswer::kHandoff;
  question.suspends = question.exact = true;
  question.confirms_cancel = quirks_.confirms_cancel;
  question.fenced = HasFence();  // asked last, and only if something is in flight
  const virtio::HandoffDecision decision = virtio::DecideHandoff(question);
  if (decision.verdict != virtio::HandoffVerdict::kHandoff) {
    // "drains: why".
    return Unsafe(decision.reason.substr(decision.reason.find(' ') + 1));
  }
  // Reads that nobody confirmed could still arrive in buffers that the guest uses again, if it stays.
  if (decision.resume_must_wait) return Unsafe("its back-end does not confirm that stopped reads have ended");
  if (AnyOverlap(judgement.requests)) {
    return Unsafe("requests in flight overlap, and not both back-ends are known to submit them in order");
  }
  return absl::OkStatus();
}

uint32_t Mediator::Impl::ToldBase(const virtio::InflightView& set) const {
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
