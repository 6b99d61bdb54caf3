// What a migration needs of a device: dirty logging, the stop with a bound, the state out of it and into it.
#include <algorithm>

#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {

namespace {
constexpr Duration kRoundTrip = std::chrono::milliseconds(20);

void SetRange(std::vector<uint64_t>& words, uint64_t gpa, uint64_t size) {
  for (uint64_t page = gpa / memory::kPageSize; page <= (gpa + size - 1) / memory::kPageSize; ++page) {
    if (words.size() <= page / 64) words.resize(page / 64 + 1, 0);
    words[page / 64] |= uint64_t{1} << (page % 64);
  }
}
}  // namespace

absl::Status Mediator::Impl::StartLogging(Deadline deadline) {
  return Run(
      [this] {
        if (logging_) return absl::OkStatus();
        if (!(offer_.features & virtio::kVhostFLogAll) || !(offer_.protocol_features & pf::kLogShmfd)) {
          return Error(
              absl::StatusCode::kFailedPrecondition,
              "device {}: back-end {} cannot log what it writes to guest memory (no LOG_ALL or no LOG_SHMFD)",
              name(), options_.backend.socket());
        }
        if (!Ready()) {
          return Error(v1::SOURCE_BACKEND_FAILED, absl::StatusCode::kUnavailable, "device {}: {}", name(),
                       message_.empty() ? "its back-end is not connected" : message_);
        }
        {
          std::lock_guard lock(log_mutex_);
          carry_.clear();
          log_incomplete_ = false;
        }
        logging_ = true;
        absl::Status status = ApplyLogging(true);
        if (!status.ok()) {
          logging_ = false;
          if (!absl::IsFailedPrecondition(status)) LoseBackend(status);
          return Annotate(WithReason(status, v1::SOURCE_BACKEND_FAILED),
                          fmt::format("device {}: logging", name()));
        }
        return absl::OkStatus();
      },
      deadline);
}

absl::Status Mediator::Impl::StopLogging(Deadline deadline) {
  return Run(
      [this] {
        if (!logging_) return absl::OkStatus();
        logging_ = false;
        absl::Status status = Ready() ? ApplyLogging(false) : absl::OkStatus();
        {
          std::lock_guard lock(log_mutex_);
          log_.reset();
          carry_.clear();
          log_incomplete_ = false;
        }
        link_.log_sent = false;
        if (!status.ok() && !absl::IsFailedPrecondition(status)) LoseBackend(status);
        return Annotate(status, fmt::format("device {}: end of logging", name()));
      },
      deadline);
}

absl::Status Mediator::Impl::EnsureLog() {
  if (record_.memory.empty()) return absl::OkStatus();
  std::shared_ptr<DirtyLog> log;
  {
    std::lock_guard lock(log_mutex_);
    log = log_;
  }
  if (!log || !log->Covers(record_.memory.last_gpa())) {
    ASSIGN_OR_RETURN(std::shared_ptr<DirtyLog> fresh, DirtyLog::Create(record_.memory.last_gpa()));
    RETURN_IF_ERROR(link_.frontend->SetLogBase(fresh->size(), fresh->fd(), RequestDeadline()));
    std::lock_guard lock(log_mutex_);
    // The old one is drained only after the back-end has left it.
    if (log_) log_->Take(carry_);
    log_ = fresh;
    link_.log_sent = true;
    return absl::OkStatus();
  }
  if (link_.log_sent) return absl::OkStatus();
  RETURN_IF_ERROR(link_.frontend->SetLogBase(log->size(), log->fd(), RequestDeadline()));
  link_.log_sent = true;
  return absl::OkStatus();
}

absl::Status Mediator::Impl::ApplyLogging(bool on) {
  if (on) RETURN_IF_ERROR(EnsureLog());
  if (on && record_.features) RETURN_IF_ERROR(SendFeatures());
  for (const auto& [index, applied] : link_.vrings) {
    if (applied.running) RETURN_IF_ERROR(SendVringAddr(index));
  }
  if (!on && record_.features) RETURN_IF_ERROR(SendFeatures());
  return absl::OkStatus();
}

void Mediator::Impl::MarkDirty(uint64_t gpa, uint64_t size) {
  if (!logging_) return;
  std::lock_guard lock(log_mutex_);
  SetRange(carry_, gpa, size);
}

void Mediator::Impl::MarkRingDirty(uint32_t index) {
  // Not every write to a ring is logged (libvhost-user does not log avail_event, DPDK not the event area of a
  // packed ring), and a page more costs nothing.
  if (record_.packed()) {
    if (auto ring = record_.Packed(index); ring.ok()) {
      MarkDirty(ring->desc, virtio::PackedDescBytes(ring->size));
      MarkDirty(ring->device_event, virtio::kPackedEventBytes);
    }
  } else if (auto ring = record_.Split(index); ring.ok()) {
    MarkDirty(ring->used, virtio::SplitUsedBytes(ring->size));
  }
}

absl::Status Mediator::Impl::HarvestLog(memory::PageSets& out) {
  if (!options_.ram) return absl::FailedPreconditionError("the mediator knows no guest memory");
  std::vector<uint64_t> words;
  {
    std::lock_guard lock(log_mutex_);
    if (std::exchange(log_incomplete_, false)) {
      LOG_WARN("device {}: its back-end died while it logged: all memory counts as written", name());
      for (auto& set : out) set.SetAll();
    }
    words.swap(carry_);
    if (log_) log_->Take(words);
  }
  options_.ram->MergeGpaLog(words.data(), words.size(), out);
  return absl::OkStatus();
}

absl::Status Mediator::Impl::ArmStop(Duration drain_bound) {
  return Run(
      [this, drain_bound] {
        std::lock_guard lock(mutex_);
        armed_ = drain_bound;
        stop_duration_ = {};
        stop_began_.reset();
        stop_ended_.reset();
        return absl::OkStatus();
      },
      Deadline::After(options_.request_timeout * 2));
}

absl::Status Mediator::Impl::DisarmStop() {
  return Run(
      [this] {
        std::lock_guard lock(mutex_);
        armed_.reset();
        stop_began_.reset();
        stop_ended_.reset();
        return absl::OkStatus();
      },
      Deadline::After(options_.request_timeout * 2));
}

bool Mediator::Impl::Armed() const {
  std::lock_guard lock(mutex_);
  return armed_.has_value();
}

Deadline Mediator::Impl::StopDeadline(bool begin) {
  std::lock_guard lock(mutex_);
  if (!armed_) return Deadline::After(options_.stop_timeout);
  if (begin && !stop_began_) stop_began_ = Clock::now();
  // The last of many rings still gets time for a round trip.
  Clock::time_point until = stop_began_.value_or(Clock::now()) + *armed_;
  return Deadline::At(std::max(until, Clock::now() + kRoundTrip));
}

Deadline Mediator::Impl::RequestDeadline() const {
  std::lock_guard lock(mutex_);
  Deadline ordinary = Deadline::After(options_.request_timeout);
  if (!armed_ || !stop_began_) return ordinary;
  return ordinary.Min(Deadline::At(std::max(*stop_began_ + *armed_, Clock::now() + kRoundTrip)));
}

Duration Mediator::Impl::stop_duration() const {
  std::lock_guard lock(mutex_);
  return stop_duration_;
}

absl::StatusOr<v1::DeviceState> Mediator::Impl::CollectState(Deadline deadline) {
  auto running = [this] {
    return std::any_of(published_.queues().begin(), published_.queues().end(),
                       [](const auto& q) { return q.started(); });
  };
  {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, deadline.when(), [&] { return !running(); })) {
      return Error(v1::SOURCE_VMM_FAILED, absl::StatusCode::kDeadlineExceeded,
                   "device {}: the VMM did not stop it", name());
    }
  }
  auto state = std::make_shared<absl::StatusOr<v1::DeviceState>>(absl::InternalError("no state"));
  RETURN_IF_ERROR(Run(
      [this, state] {
        *state = BuildState();
        return absl::OkStatus();
      },
      deadline));
  return std::move(*state);
}

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
  for (const auto& [index, vring] : record_.vrings) {
    if (!vring.told || !vring.addr) continue;  // never started
    const std::string where = fmt::format("device {} ring {}", name(), index);
    auto it = link_.vrings.find(index);
    const bool answered = Ready() && it != link_.vrings.end() && it->second.base && !it->second.running;
    if (link_.state == LinkState::kOverdue) {
      return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded, "{}: {}", where, message_);
    }
    if (it != link_.vrings.end() && it->second.must_stop) {
      return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded,
                   "{}: {} requests are still in flight", where,
                   static_cast<uint16_t>(AvailIndex(index) - UsedIndex(index)));
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
    ASSIGN_OR_RETURN(virtio::SplitIndices indices, virtio::ReadSplitIndices(record_.memory, ring));
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
                   "{}: {} requests are still in flight", where,
                   static_cast<uint16_t>(last_avail - indices.used));
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

absl::Status Mediator::Impl::ExpectState(const v1::DeviceState& state) {
  return Run(
      [this, state] {
        expected_ = state;
        expected_seen_.clear();
        expected_result_ = state.vrings_size() == 0
                               ? absl::OkStatus()
                               : absl::UnavailableError("the VMM has not started the device yet");
        return absl::OkStatus();
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
  }
  expected_seen_.push_back(index);
  if (expected_seen_.size() < static_cast<size_t>(expected_->vrings_size())) return;
  expected_result_ = absl::OkStatus();
  // From now on the device lives its own life.
  expected_.reset();
}

namespace {

class RamView : public virtio::MemoryView {
 public:
  explicit RamView(const memory::GuestRam& ram) : ram_(ram) {}
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override {
    const uint8_t* at = ram_.At(gpa, size);
    if (!at)
      return Error(absl::StatusCode::kOutOfRange, "[{:#x}, {:#x}) is not guest memory", gpa, gpa + size);
    std::memcpy(out, at, size);
    return absl::OkStatus();
  }

 private:
  const memory::GuestRam& ram_;
};

}  // namespace

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
    RETURN_IF_ERROR(Annotate(
        virtio::CheckSplitDrained(ring.size, static_cast<uint16_t>(v.last_avail()), *indices), where));
  }
  return absl::OkStatus();
}

}  // namespace baton::vhost
