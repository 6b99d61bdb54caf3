// Dirty logging at the back-end, whatever the VMM does about logging of its own.
#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

void SetRange(std::vector<uint64_t>& words, uint64_t gpa, uint64_t size) {
  const uint64_t last = (gpa + size - 1) / memory::kPageSize;
  if (words.size() <= last / 64) words.resize(last / 64 + 1, 0);
  for (uint64_t page = gpa / memory::kPageSize; page <= last; ++page)
    words[page / 64] |= uint64_t{1} << (page % 64);
}

}  // namespace

absl::Status Mediator::Impl::StartLogging(Deadline deadline) {
  return Run(
      [this] {
        if (options_.vmm_moves_memory)
          return absl::FailedPreconditionError("the VMM keeps the log of this device");
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

absl::Status Mediator::Impl::OnLogBase(WireMessage& m, absl::Status* refused) {
  const auto wanted = m.As<LogDescription>();
  ASSIGN_OR_RETURN(auto adopted, DirtyLog::Adopt(std::move(m.fds[0]), wanted.mmap_size, wanted.mmap_offset));
  bool first;
  {
    std::lock_guard lock(log_mutex_);
    first = !log_;
    log_ = std::move(adopted);
  }
  link_.log_sent = false;
  if (!logging_ || !Ready()) return absl::OkStatus();
  absl::Status sent = EnsureLog();
  // QEMU starts a device in the middle of a migration before it names the log (vhost_dev_start).
  if (sent.ok() && first && AnyRuns()) MarkAllDirty();
  return Forward(sent, refused);
}

absl::Status Mediator::Impl::LogForVmm(bool on, absl::Status* refused) {
  if (logging_ == on) return absl::OkStatus();
  logging_ = on;
  absl::Status applied = Ready() ? ApplyLogging(on) : absl::OkStatus();
  if (!on) {
    // The next migration brings another one; this one is the VMM's to forget.
    std::lock_guard lock(log_mutex_);
    log_.reset();
    log_incomplete_ = false;
    link_.log_sent = false;
  }
  return Forward(applied, refused);
}

void Mediator::Impl::MarkAllDirty() {
  std::lock_guard lock(log_mutex_);
  if (log_) log_->Mark(0, log_->size() * 8 * memory::kPageSize);
}

absl::Status Mediator::Impl::EnsureLog() {
  if (record_.memory.empty()) return absl::OkStatus();
  if (options_.vmm_moves_memory) {
    std::lock_guard lock(log_mutex_);
    if (!log_ || link_.log_sent) return absl::OkStatus();
    if (!log_->Covers(record_.memory.last_gpa()))
      return absl::FailedPreconditionError("the VMM's dirty log is shorter than its memory");
    if (std::exchange(log_incomplete_, false)) log_->Mark(0, log_->size() * 8 * memory::kPageSize);
    RETURN_IF_ERROR(link_.frontend->SetLogBase(log_->size(), log_->fd(), RequestDeadline()));
    link_.log_sent = true;
    return absl::OkStatus();
  }
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

void Mediator::Impl::SetBits(uint64_t gpa, uint64_t size) {
  if (!options_.vmm_moves_memory) return SetRange(carry_, gpa, size);
  if (log_) log_->Mark(gpa, size);
}

void Mediator::Impl::MarkDirty(uint64_t gpa, uint64_t size) {
  if (!logging_) return;
  std::lock_guard lock(log_mutex_);
  SetBits(gpa, size);
}

// What a read had brought when it was given up is in memory, but in no log: a back-end logs what it
// completes.
void Mediator::Impl::MarkBuffersDirty(const std::vector<virtio::GuestSpan>& buffers, uint64_t* total) {
  const uint64_t last = record_.memory.last_gpa();
  // Status bytes, mostly, and near each other.
  std::optional<uint64_t> marked;
  // A guest that names all of its memory again and again gets it marked once.
  if (!logging_ || *total > last) return;
  std::lock_guard lock(log_mutex_);
  for (const virtio::GuestSpan& buffer : buffers) {
    // A size of 0 is the largest there is here.
    if (buffer.gpa > last || buffer.size - 1 > last - buffer.gpa) continue;
    *total += buffer.size;
    if (*total > last) return SetBits(0, last + 1);
    const uint64_t page = buffer.gpa / memory::kPageSize;
    if (marked == page && (buffer.gpa + (buffer.size - 1)) / memory::kPageSize == page) continue;
    marked = page;
    SetBits(buffer.gpa, buffer.size);
  }
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

}  // namespace baton::vhost
