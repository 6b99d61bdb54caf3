// The mediator's rings at the back-end: where one is to start, and its start.
#include "agent/vhost/mediator_impl.h"
#include "agent/vhost/notify.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {
void Inject(const Notifier& notifier) {
  if (notifier.fd) Notify(notifier.fd.get());
}

absl::StatusOr<uint32_t> Mediator::Impl::ResolveBase(uint32_t index) {
  VringRecord& vring = record_.vrings[index];
  const AppliedVring& applied = link_.vrings[index];
  const uint32_t asked = vring.base.value_or(record_.packed() ? virtio::kPackedBaseAfterReset : 0);
  // The VMM gives back what it was told; the back-end goes on from what it really said.
  if (applied.base && vring.told == asked && !vring.lost) return *applied.base;
  if (link_.inflight_sent) return BaseByRegion(index, asked);
  if (record_.packed()) {
    if (!vring.lost) return asked;
    return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                 "ring {} is packed and has no in-flight region: where the back-end was cannot be told",
                 index);
  }
  ASSIGN_OR_RETURN(virtio::SplitRing ring, record_.Split(index));
  ASSIGN_OR_RETURN(virtio::SplitIndices indices, virtio::ReadSplitIndices(record_.memory, ring));
  // In order means: what was in flight are the avail entries from used->idx on.
  if (vring.lost && (*record_.features & virtio::kFInOrder)) return indices.used;
  // A NIC that does so by itself, likewise (QEMU goes on there with every vhost-user device whose back-end
  // died, virtio_queue_restore_last_avail_idx). Buffers of its receive queues are empty until they are
  // completed; a packet on its way out may leave twice, as on any network.
  if (vring.lost && quirks_.packets_in_order && options_.spec.class_() == v1::NET) return indices.used;
  if (!vring.lost && !quirks_.drains_on_disconnect) return asked;
  // A new connection to a back-end that completed what an older one had in flight (or forgot it:
  // libvhost-user drops completions after an error on its socket), or the successor of one that died. What
  // the VMM asks for may be older than the last completion.
  auto recovered = virtio::RecoverSplit(record_.memory, ring, AllowWindowRecovery(options_.backend));
  if (!recovered.ok()) {
    if (!vring.lost) return indices.used;
    return WithReason(
        absl::FailedPreconditionError(fmt::format("ring {}: {}", index, Message(recovered.status()))),
        v1::INFLIGHT_UNKNOWN);
  }
  if (recovered->rewrite) {
    for (size_t k = 0; k < recovered->heads.size(); ++k) {
      const uint64_t slot = static_cast<uint16_t>(recovered->base + k) % ring.size;
      RETURN_IF_ERROR(record_.memory.Write(ring.avail + 4 + 2 * slot, &recovered->heads[k], 2));
    }
    MarkDirty(ring.avail, virtio::SplitAvailBytes(ring.size));
  }
  if (vring.lost) {
    LOG_INFO("device {}: ring {} goes on at {} with {} requests outstanding{}", name(), index,
             recovered->base, recovered->heads.size(), recovered->rewrite ? ", out of order" : "");
  }
  return recovered->base;
}

std::vector<uint32_t> Mediator::Impl::StartOrder() const {
  std::vector<uint32_t> order;
  for (const auto& [index, vring] : record_.vrings) order.push_back(index);
  if (options_.spec.class_() == v1::NET)
    std::stable_partition(order.begin(), order.end(), [](uint32_t index) { return index % 2 == 0; });
  return order;
}

bool Mediator::Impl::MustHold(uint32_t index) const {
  if (options_.spec.class_() != v1::NET || index % 2 == 0) return false;
  // Only at a destination, and only as long as the VMM does what is expected.
  if (!expected_ || !absl::IsUnavailable(expected_result_)) return false;
  return std::any_of(expected_->vrings().begin(), expected_->vrings().end(), [&](const v1::VringState& v) {
    if (v.index() % 2 != 0 || !v.enabled()) return false;
    auto it = record_.vrings.find(v.index());
    return it == record_.vrings.end() || !it->second.started;
  });
}

absl::Status Mediator::Impl::ReleaseHeldRings(bool force) {
  force |= Clock::now() >= held_until_;
  std::vector<uint32_t> held;
  held.swap(held_rings_);
  for (size_t i = 0; i < held.size(); ++i) {
    const uint32_t index = held[i];
    if (!record_.vrings[index].started) continue;
    if (!force && MustHold(index)) {
      held_rings_.push_back(index);
      continue;
    }
    if (absl::Status started = StartVring(index); !started.ok()) return started;
  }
  return absl::OkStatus();
}

absl::Status Mediator::Impl::StartVring(uint32_t index) {
  VringRecord& vring = record_.vrings[index];
  Frontend& fe = *link_.frontend;
  RETURN_IF_ERROR(LiftSuspend());
  if (ResumesInPlace(index)) return ResumeInPlace(index);
  if (AppliedVring& applied = link_.vrings[index]; applied.running) {
    // Set up anew by the guest while it still ran for the old ring.
    ASSIGN_OR_RETURN(uint32_t ignored, fe.GetVringBase(index, RequestDeadline()));
    LOG_DEBUG("device {}: ring {} had come to {}", name(), index, ignored);
    applied = AppliedVring();
  }
  RETURN_IF_ERROR(EnsureStateLoaded(RequestDeadline()));
  Recall(index);
  RETURN_IF_ERROR(LiftFence());
  RETURN_IF_ERROR(EnsureInflight());
  // What came from another host is in the region, as if this host's own back-end had been lost.
  if (auto taken = taken_over_.extract(index); taken && taken.mapped() == vring.num) vring.lost = true;
  ASSIGN_OR_RETURN(uint32_t base, ResolveBase(index));
  CompareWithExpected(index, vring.base.value_or(base));
  VringState num{index, vring.num}, start{index, base};
  RETURN_IF_ERROR(fe.Set(Request::kSetVringNum, Bytes(num), {}, RequestDeadline()));
  RETURN_IF_ERROR(fe.Set(Request::kSetVringBase, Bytes(start), {}, RequestDeadline()));
  RETURN_IF_ERROR(SendVringAddr(index));
  if (vring.call.set) RETURN_IF_ERROR(SendNotifier(Request::kSetVringCall, index, vring.call));
  RETURN_IF_ERROR(SendVringErr(index));
  // Before the descriptor is handed over: libvhost-user takes it for an error to find an eventfd empty that
  // its loop believes readable (the number of the one before).
  Inject(vring.kick);
  Memorize(index, /*starts=*/true);
  RETURN_IF_ERROR(SendNotifier(Request::kSetVringKick, index, vring.kick));
  AppliedVring& applied = link_.vrings[index];
  applied = AppliedVring{.running = true, .call_stale = false, .must_stop = false, .base = std::nullopt};
  vring.lost = false;
  // From now on the back-end's state is its own; a later one begins without it.
  state_to_load_.reset();
  Inject(vring.call);
  return absl::OkStatus();
}

bool Mediator::Impl::ResumesInPlace(uint32_t index) const {
  auto it = link_.vrings.find(index);
  const VringRecord& vring = record_.vrings.at(index);
  // `told` does not survive other addresses.
  return it != link_.vrings.end() && it->second.running && it->second.must_stop && vring.told &&
         vring.base == vring.told;
}

absl::Status Mediator::Impl::ResumeInPlace(uint32_t index) {
  VringRecord& vring = record_.vrings[index];
  AppliedVring& applied = link_.vrings[index];
  RETURN_IF_ERROR(SendNotifier(Request::kSetVringCall, index, vring.call));
  Inject(vring.kick);
  RETURN_IF_ERROR(SendNotifier(Request::kSetVringKick, index, vring.kick));
  Inject(vring.call);
  applied.must_stop = applied.call_stale = false;
  message_.clear();
  return absl::OkStatus();
}

uint32_t Mediator::Impl::UsedIndex(uint32_t index) const {
  const VringRecord& vring = record_.vrings.at(index);
  const uint32_t fallback = vring.told.value_or(vring.base.value_or(0));
  if (record_.packed()) return fallback;
  auto ring = record_.Split(index);
  if (!ring.ok()) return fallback;
  auto indices = virtio::ReadSplitIndices(record_.memory, *ring);
  return indices.ok() ? indices->used : fallback;
}

uint32_t Mediator::Impl::AvailIndex(uint32_t index) const {
  auto ring = record_.Split(index);
  if (!ring.ok()) return UsedIndex(index);
  auto indices = virtio::ReadSplitIndices(record_.memory, *ring);
  return indices.ok() ? indices->avail : UsedIndex(index);
}

}  // namespace baton::vhost
