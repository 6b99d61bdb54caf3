// The state of a device: out of the source's mediator, into the destination's, and against the memory that
// arrived.
#include <algorithm>

#include "agent/vhost/inflight_proto.h"
#include "agent/vhost/mediator_impl.h"
#include "agent/vhost/ram_view.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {

absl::StatusOr<v1::DeviceState> Mediator::Impl::BuildState() {
  v1::DeviceState out;
  out.set_name(name());
  out.set_acked_features(record_.features.value_or(0) & ~virtio::kVhostOnly);
  out.set_protocol_features(record_.protocol_features);
  out.set_config(std::string(config_.begin(), config_.end()));
  out.set_device_status(record_.status.value_or(0));
  if (options_.ram) {
    for (const memory::GpaRange& range : options_.ram->layout()) {
      v1::GuestRange* r = out.add_layout();
      r->set_gpa(range.gpa);
      r->set_size(range.size);
      r->set_block(range.block);
      r->set_offset(range.offset);
    }
  }
  std::optional<RamView> ram;
  const virtio::MemoryView& memory = StopMemory(&ram);
  out.mutable_vrings()->Reserve(static_cast<int>(record_.vrings.size()));
  for (const auto& [index, vring] : record_.vrings) {
    if (!vring.told || !vring.addr) continue;  // never started
    const std::string where = fmt::format("device {} ring {}", name(), index);
    if (stop_.handed_off.contains(index)) {
      RETURN_IF_ERROR(Annotate(AddHandedOff(memory, index, out.add_vrings()), where));
      out.set_handed_off(true);
      continue;
    }
    auto it = link_.vrings.find(index);
    const bool answered = Ready() && it != link_.vrings.end() && it->second.base && !it->second.running;
    // Why it was drained at all, if something else was asked for.
    const std::string drained =
        stop_.drain_reason.empty() ? "" : fmt::format(" (drained, because {})", stop_.drain_reason);
    if (link_.state == LinkState::kOverdue) {
      return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded, "{}: {}{}", where, message_,
                   drained);
    }
    if (it != link_.vrings.end() && it->second.must_stop) {
      return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded,
                   "{}: {} requests are still in flight{}", where,
                   static_cast<uint16_t>(AvailIndex(index) - UsedIndex(index)), drained);
    }
    v1::VringState* v = out.add_vrings();
    v->set_index(index);
    v->set_size(vring.num);
    v->set_enabled(vring.enabled.value_or(true));
    if (record_.packed()) {
      if (!answered) {
        return Error(v1::SOURCE_BACKEND_FAILED, absl::StatusCode::kUnavailable, "{}: {}", where, message_);
      }
      ASSIGN_OR_RETURN(virtio::PackedRing ring, record_.Packed(index));
      uint32_t raw = *it->second.base;
      // DPDK and rust-vmm give the avail half only; then nothing may be in flight, and used is where avail
      // is.
      if (raw <= 0xffff) raw |= raw << 16;
      virtio::PackedBase base = virtio::DecodePackedBase(raw);
      absl::Status drained = virtio::CheckPackedDrained(ring.size, base);
      if (!drained.ok()) return Annotate(drained, where);
      v->set_packed(true);
      v->set_last_avail(raw & 0xffff);
      v->set_avail_idx(raw & 0xffff);
      v->set_used_idx(raw >> 16);
      v->set_raw_base(*it->second.base);
      v->set_desc_gpa(ring.desc);
      v->set_avail_gpa(ring.driver_event);
      v->set_used_gpa(ring.device_event);
      continue;
    }
    ASSIGN_OR_RETURN(virtio::SplitRing ring, record_.Split(index));
    ASSIGN_OR_RETURN(virtio::SplitIndices indices, virtio::ReadSplitIndices(memory, ring));
    uint16_t last_avail;
    if (answered) {
      last_avail = static_cast<uint16_t>(*it->second.base);
    } else if (indices.avail == indices.used) {
      last_avail = indices.used;  // nothing was outstanding: exact without the back-end
    } else {
      return Error(v1::SOURCE_BACKEND_FAILED, absl::StatusCode::kUnavailable,
                   "{}: its back-end was lost with {} requests outstanding", where,
                   static_cast<uint16_t>(indices.avail - indices.used));
    }
    RETURN_IF_ERROR(Annotate(virtio::CheckSplitInvariants(ring.size, last_avail, indices), where));
    if (last_avail != indices.used) {
      return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded,
                   "{}: {} requests are still in flight{}", where,
                   static_cast<uint16_t>(last_avail - indices.used), drained);
    }
    if (*vring.told != last_avail) {
      // The VMM was answered before the back-end; its own state holds a value that is not true.
      return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded,
                   "{}: it drained only after the bound", where);
    }
    v->set_last_avail(last_avail);
    v->set_avail_idx(indices.avail);
    v->set_used_idx(indices.used);
    v->set_raw_base(answered ? *it->second.base : last_avail);
    v->set_desc_gpa(ring.desc);
    v->set_avail_gpa(ring.avail);
    v->set_used_gpa(ring.used);
  }
  return out;
}

const virtio::MemoryView& Mediator::Impl::StopMemory(std::optional<RamView>* ram) const {
  if (!options_.ram || options_.ram->layout().empty()) return record_.memory;
  return ram->emplace(*options_.ram);
}

// The set was checked when it was read (ReadSet), and is ours; the rings are the guest's.
absl::Status Mediator::Impl::AddHandedOff(const virtio::MemoryView& memory, uint32_t index,
                                          v1::VringState* v) {
  const VringRecord& vring = record_.vrings.at(index);
  MigrationStop::HandedOff& ring_stop = stop_.handed_off.at(index);
  if (vring.told != ring_stop.told)
    return virtio::Mismatch("the VMM was told another base than the device's");
  if (std::exchange(ring_stop.collected, true)) return absl::InternalError("its state was collected before");
  v->Swap(&ring_stop.state);
  v->set_index(index);
  v->set_size(vring.num);
  v->set_enabled(vring.enabled.value_or(true));
  v->set_raw_base(*vring.told);
  if (record_.packed()) {
    ASSIGN_OR_RETURN(virtio::PackedRing ring, record_.Packed(index));
    v->set_packed(true);
    v->set_avail_idx(v->last_avail());
    v->set_desc_gpa(ring.desc);
    v->set_avail_gpa(ring.driver_event);
    v->set_used_gpa(ring.device_event);
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(virtio::SplitRing ring, record_.Split(index));
  ASSIGN_OR_RETURN(virtio::SplitIndices indices, virtio::ReadSplitIndices(memory, ring));
  if (indices.used != v->used_idx()) {
    return virtio::Mismatch(
        fmt::format("used->idx went from {} to {} after the stop", v->used_idx(), indices.used));
  }
  v->set_avail_idx(indices.avail);
  v->set_desc_gpa(ring.desc);
  v->set_avail_gpa(ring.avail);
  v->set_used_gpa(ring.used);
  return virtio::CheckSplitInvariants(ring.size, static_cast<uint16_t>(v->last_avail()), indices);
}

absl::Status Mediator::Impl::ExpectState(const v1::DeviceState& state) {
  return Run(
      [this, state]() -> absl::Status {
        RETURN_IF_ERROR(TakeOver(state));
        expected_ = state;
        expected_seen_.clear();
        state_to_load_.reset();
        if (state.has_backend_state()) state_to_load_ = state.backend_state();
        link_.state_loaded = false;
        expected_result_ = state.vrings_size() == 0
                               ? absl::OkStatus()
                               : absl::UnavailableError("the VMM has not started the device yet");
        return EnsureStateLoaded(Deadline::After(options_.request_timeout));
      },
      Deadline::After(options_.request_timeout * 2));
}

absl::Status Mediator::Impl::CheckExpected() const {
  std::lock_guard lock(mutex_);
  return Annotate(published_expected_, fmt::format("device {}", name()));
}

void Mediator::Impl::CompareWithExpected(uint32_t index, uint32_t base) {
  if (!expected_ || (!expected_result_.ok() && !absl::IsUnavailable(expected_result_))) return;
  auto differs = [&](const std::string& what) {
    expected_result_ =
        Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition, "ring {}: {}", index, what);
    message_ = Message(expected_result_);
    LOG_ERROR("device {}: the VMM starts it differently from how it was stopped: {}", name(), message_);
  };
  if ((*record_.features & ~virtio::kVhostOnly) != expected_->acked_features()) {
    return differs(fmt::format("features {:#x} instead of {:#x}", *record_.features & ~virtio::kVhostOnly,
                               expected_->acked_features()));
  }
  const bool state_handed_off = expected_->handed_off();
  auto it = std::find_if(expected_->vrings().begin(), expected_->vrings().end(),
                         [&](const v1::VringState& v) { return v.index() == index; });
  if (it == expected_->vrings().end()) return differs("was not running at the source");
  if (it->size() != record_.vrings[index].num)
    return differs(fmt::format("size {} instead of {}", record_.vrings[index].num, it->size()));
  if (!record_.packed()) {
    auto ring = record_.Split(index);
    if (!ring.ok() || ring->desc != it->desc_gpa() || ring->avail != it->avail_gpa() ||
        ring->used != it->used_gpa()) {
      return differs("its addresses are not those of the source");
    }
    if (base != it->last_avail())
      return differs(fmt::format("begins at {} instead of {}", base, it->last_avail()));
  } else if (state_handed_off && base != (it->last_avail() | it->used_idx() << 16)) {
    return differs(
        fmt::format("begins at {:#x} instead of {:#x}", base, it->last_avail() | it->used_idx() << 16));
  }
  expected_seen_.push_back(index);
  if (expected_seen_.size() < static_cast<size_t>(expected_->vrings_size())) return;
  expected_result_ = absl::OkStatus();
  // From now on the device lives its own life.
  expected_.reset();
}

absl::Status VerifyAgainstMemory(const v1::DeviceState& state, const memory::GuestRam& ram) {
  RamView view(ram);
  for (const v1::VringState& v : state.vrings()) {
    const std::string where = fmt::format("device {} ring {}", state.name(), v.index());
    auto mismatch = [&](const std::string& what) {
      return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition, "{}: {}", where, what);
    };
    if (v.size() == 0 || v.size() > virtio::kMaxRingSize || v.index() >= kMaxVrings)
      return mismatch("no such ring is possible");
    if (v.packed()) {
      virtio::PackedRing ring{static_cast<uint16_t>(v.size()), v.desc_gpa(), v.avail_gpa(), v.used_gpa()};
      if (absl::Status ok = virtio::CheckPackedGeometry(ring); !ok.ok()) return mismatch(Message(ok));
      if (!v.inflight().empty()) {
        ASSIGN_OR_RETURN(virtio::InflightSet set, FromProto(v));
        RETURN_IF_ERROR(Annotate(virtio::VerifyInflightPacked(view, ring, set), where));
        continue;
      }
      uint32_t raw = v.avail_idx() & 0xffff;
      virtio::PackedBase base = virtio::DecodePackedBase(raw | v.used_idx() << 16);
      RETURN_IF_ERROR(Annotate(virtio::CheckPackedDrained(ring.size, base), where));
      continue;
    }
    virtio::SplitRing ring{static_cast<uint16_t>(v.size()), v.desc_gpa(), v.avail_gpa(), v.used_gpa()};
    if (absl::Status ok = virtio::CheckSplitGeometry(ring); !ok.ok()) return mismatch(Message(ok));
    auto indices = virtio::ReadSplitIndices(view, ring);
    if (!indices.ok()) return mismatch(Message(indices.status()));
    if (indices->avail != v.avail_idx()) {
      return mismatch(
          fmt::format("avail->idx is {} in the memory that arrived, {} at the source: a page was lost",
                      indices->avail, v.avail_idx()));
    }
    if (indices->used != v.used_idx()) {
      return mismatch(
          fmt::format("used->idx is {} in the memory that arrived, {} at the source: a page was lost",
                      indices->used, v.used_idx()));
    }
    if (v.last_avail() > 0xffff) return mismatch("its base is no index");
    if (!v.inflight().empty()) {
      ASSIGN_OR_RETURN(virtio::InflightSet set, FromProto(v));
      RETURN_IF_ERROR(Annotate(virtio::VerifyInflightSplit(view, ring, *indices, set), where));
      continue;
    }
    RETURN_IF_ERROR(Annotate(
        virtio::CheckSplitDrained(ring.size, static_cast<uint16_t>(v.last_avail()), *indices), where));
  }
  return absl::OkStatus();
}

}  // namespace baton::vhost
