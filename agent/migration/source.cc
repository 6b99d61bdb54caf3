#include "agent/migration/source.h"

#include <poll.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "agent/migration/convergence.h"
#include "agent/migration/source_impl.h"
#include "common/log.h"
#include "common/pause_point.h"

namespace baton::migration {

using Event = Handover::Event;
using std::chrono::milliseconds;
using std::chrono::seconds;

// ---------------------------------------------------------------------------------------------------------
// Requests from other threads

OutgoingMigration::Impl::Impl(SourceOptions options, SourceParts parts, Handover handover)
    : o_(std::move(options)),
      p_(std::move(parts)),
      reporter_(o_.migration_id, o_.vm, v1::ROLE_SOURCE, o_.epoch, p_.on_report),
      handover_(std::move(handover)) {
  o_.dial.migration_id = o_.migration_id;
  uint32_t channels = o_.params.channels();
  if (channels == 0) channels = std::clamp(std::thread::hardware_concurrency(), 1u, 4u);
  o_.dial.data_channels = std::min(channels, stream::kMaxDataChannels);
  o_.sender.bandwidth = o_.params.bandwidth();
  o_.sender.page_checksums = o_.dial.tls == nullptr;
  limits_.max_downtime =
      DurationOr(o_.params.has_max_downtime(), o_.params.max_downtime(), limits_.max_downtime);
  if (o_.params.max_stalled_rounds() > 0) limits_.max_stalled_rounds = o_.params.max_stalled_rounds();
  if (o_.params.on_stall() != v1::ON_STALL_UNSPECIFIED) limits_.on_stall = o_.params.on_stall();
  drain_timeout_ = DurationOr(o_.params.has_drain_timeout(), o_.params.drain_timeout(), seconds(5));
  max_duration_ = DurationOr(o_.params.has_max_duration(), o_.params.max_duration(), std::chrono::hours(1));
}

OutgoingMigration::Impl::~Impl() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    if (sender_) sender_->Cancel();
    if (link_) link_->Shutdown();
    if (asker_) asker_->Stop();
  }
  changed_.notify_all();
  monitor_stop_.Signal();
  if (thread_.joinable()) thread_.join();
  if (monitor_.joinable()) monitor_.join();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return waiters_ == 0; });
}

bool OutgoingMigration::Impl::VmmEnded() const {
  pollfd ended{p_.driver.exit_fd(), POLLIN, 0};
  return ::poll(&ended, 1, 0) == 1;
}

void OutgoingMigration::Impl::Launch(bool only_ask) {
  monitor_ = std::thread([this] { Monitor(); });
  thread_ = std::thread([this, only_ask] {
    if (only_ask) {
      freeze_tried_ = true;  // by the shim before this one
      reporter_.EnterPhase(v1::SWITCHOVER);
      Settle(WithReason(absl::UnavailableError("the shim was restarted after the guest was given away"),
                        v1::SOURCE_SHIM_FAILED));
    } else {
      Run();
    }
    std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  });
}

// Watches the VMM, and publishes progress while the main thread is busy sending.
void OutgoingMigration::Impl::Monitor() {
  for (;;) {
    const bool ticking = ticking_.load(std::memory_order_relaxed);
    pollfd entries[2] = {{monitor_stop_.fd(), POLLIN, 0}, {p_.driver.exit_fd(), POLLIN, 0}};
    if (::poll(entries, 2, ticking ? 200 : -1) < 0 && errno != EINTR) return;
    if (entries[0].revents & POLLIN) {
      if (monitor_stop_.Drain() && stopping()) return;
      if (monitor_done_.load()) return;
    }
    if (entries[1].revents != 0) {
      vmm_dead_ = true;
      Interrupt();
      return;
    }
    if (ticking) TickProgress();
  }
}

// Makes the main thread look at why it was interrupted.
void OutgoingMigration::Impl::Interrupt() {
  std::lock_guard lock(mutex_);
  if (sender_) sender_->Cancel();
  if (link_ && (vmm_dead_ || stopping_)) link_->Shutdown();
  changed_.notify_all();
}

absl::Status OutgoingMigration::Impl::Cancel() {
  std::lock_guard lock(mutex_);
  if (ended_ || handover_.must_ask() || handover_.must_release() || handover_.must_write_refusal())
    return Error(absl::StatusCode::kFailedPrecondition,
                 "migration {} cannot be cancelled any more: the guest was given away", o_.migration_id);
  RETURN_IF_ERROR(handover_.Apply(Event::kCancel));
  cancelled_ = true;
  if (sender_) sender_->Cancel();
  changed_.notify_all();
  return absl::OkStatus();
}

absl::Status OutgoingMigration::Impl::Retune(std::optional<uint64_t> bandwidth,
                                             std::optional<Duration> max_downtime) {
  std::lock_guard lock(mutex_);
  if (ended_) return absl::FailedPreconditionError("the migration has ended");
  if (bandwidth) {
    o_.sender.bandwidth = *bandwidth;
    if (sender_) sender_->SetBandwidth(*bandwidth);
  }
  if (max_downtime) new_max_downtime_ = *max_downtime;
  return absl::OkStatus();
}

absl::Status OutgoingMigration::Impl::Resolve(v1::HandoverState verdict, bool fenced) {
  if (!fenced && verdict != v1::OWNER && verdict != v1::REFUSED)
    return absl::InvalidArgumentError("a resolution is OWNER, REFUSED or fenced");
  std::lock_guard lock(mutex_);
  if (!handover_.must_ask())
    return Error(absl::StatusCode::kFailedPrecondition,
                 "migration {} waits for no verdict here: the handover is {}", o_.migration_id,
                 v1::HandoverState_Name(handover_.state()));
  resolution_ = Resolution{verdict, fenced};
  if (link_) link_->Shutdown();
  if (asker_) asker_->Stop();
  changed_.notify_all();
  return absl::OkStatus();
}

bool OutgoingMigration::Impl::stopping() const {
  std::lock_guard lock(mutex_);
  return stopping_;
}

absl::Status OutgoingMigration::Impl::Apply(Event event) {
  std::lock_guard lock(mutex_);
  return handover_.Apply(event);
}

Handover OutgoingMigration::Impl::handover() const {
  std::lock_guard lock(mutex_);
  return handover_;
}

// ---------------------------------------------------------------------------------------------------------
// Pre-copy

// An error that certainly came from this side: nobody has to wait for what the peer may say about it.
absl::Status OutgoingMigration::Impl::AtSource(const absl::Status& status) {
  return WithReason(status, ReasonOf(status, v1::INTERNAL));
}

void OutgoingMigration::Impl::Run() {
  started_ = Clock::now();
  reporter_.Update([&](v1::SideReport& r) {
    r.set_guest_running(true);
    r.mutable_progress()->set_memory_total(p_.ram.total_bytes());
  });
  reporter_.EnterPhase(v1::PRECOPY);
  absl::Status status = Connect();
  if (status.ok()) status = Precopy();
  if (status.ok()) status = Blackout();
  ticking_ = false;
  Settle(Cause(status));
}

absl::Status OutgoingMigration::Impl::Connect() {
  const Deadline deadline = Deadline::After(o_.connect_timeout);
  ASSIGN_OR_RETURN(stream::PeerConnections peer, stream::DialPeer(o_.dial, deadline));
  auto link = std::make_unique<ControlLink>(std::move(peer.control), o_.link, [this] { OnLinkEvent(); });
  auto sender = std::make_unique<stream::MemorySender>(p_.ram, std::move(peer.data), o_.sender);
  {
    std::lock_guard lock(mutex_);
    link_ = std::move(link);
    sender_ = std::move(sender);
    sender_->SetBandwidth(o_.sender.bandwidth);
    if (cancelled_ || stopping_) return absl::CancelledError("cancelled");
  }
  v1::PeerMessage message;
  v1::PeerHello* hello = message.mutable_hello();
  hello->set_version(stream::kProtocolVersion);
  hello->set_migration_id(o_.migration_id);
  hello->set_vm(o_.vm);
  hello->set_epoch(o_.epoch);
  hello->set_channels(o_.dial.data_channels);
  hello->set_page_checksums(o_.sender.page_checksums);
  for (const memory::RamBlock& block : p_.ram.blocks()) {
    v1::RamBlockInfo* info = hello->add_blocks();
    info->set_id(block.id());
    info->set_size(block.size());
  }
  RETURN_IF_ERROR(link_->Send(message, deadline));
  ASSIGN_OR_RETURN(v1::PeerMessage answer,
                   Await([](const v1::PeerMessage& m) { return m.has_welcome(); }, deadline));
  if (answer.welcome().version() != stream::kProtocolVersion)
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kFailedPrecondition,
                 "the destination speaks version {} of the stream, this side {}", answer.welcome().version(),
                 stream::kProtocolVersion);
  const v1::PeerWelcome& welcome = answer.welcome();
  takes_inflight_.insert(welcome.takes_inflight().begin(), welcome.takes_inflight().end());
  orders_inflight_.insert(welcome.orders_inflight().begin(), welcome.orders_inflight().end());
  return absl::OkStatus();
}

void OutgoingMigration::Impl::OnLinkEvent() {
  std::lock_guard lock(mutex_);
  // A lost link ends a round under way. Messages wait for the main thread.
  if (link_ && !link_->lost_status().ok() && sender_) sender_->Cancel();
}

// The next message that `wanted` accepts. Anything that says that the destination will not go on, a lost
// link, and the deadline are errors.
absl::StatusOr<v1::PeerMessage> OutgoingMigration::Impl::Await(
    const std::function<bool(const v1::PeerMessage&)>& wanted, Deadline deadline) {
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      if (cancelled_ || stopping_) return absl::CancelledError("cancelled");
    }
    // In slices, so that a cancel is seen: the link wakes only for the peer.
    auto message = link_->Next(deadline.Min(Deadline::After(milliseconds(200))));
    if (!message.ok() && message.status().code() == absl::StatusCode::kDeadlineExceeded &&
        !deadline.Expired())
      continue;
    if (!message.ok()) return message.status();
    if (wanted(*message)) return message;
    RETURN_IF_ERROR(Objection(*message));
  }
}

// What the destination says against the migration, as an error; OK for other messages.
absl::Status OutgoingMigration::Impl::Objection(const v1::PeerMessage& message) {
  if (message.has_verdict() && message.verdict().verdict() == v1::REFUSED &&
      message.verdict().migration_id() == o_.migration_id) {
    (void)Apply(Event::kRefusedHeard);
    const v1::Verdict& verdict = message.verdict();
    return Error(verdict.reason() == v1::REASON_UNSPECIFIED ? v1::DESTINATION_REFUSED : verdict.reason(),
                 absl::StatusCode::kAborted, "the destination refused: {}", verdict.message());
  }
  if (message.has_abort())
    return Error(message.abort().reason() == v1::REASON_UNSPECIFIED ? v1::DESTINATION_REFUSED
                                                                    : message.abort().reason(),
                 absl::StatusCode::kAborted, "the destination gave up: {}", message.abort().message());
  return absl::OkStatus();
}

// The reason behind an error of the main thread: what interrupted it matters more than how that showed.
absl::Status OutgoingMigration::Impl::Cause(const absl::Status& status) {
  if (status.ok()) return status;
  if (VmmEnded())
    return Error(v1::SOURCE_VMM_FAILED, absl::StatusCode::kUnavailable, "the VMM at the source ended: {}",
                 Message(p_.driver.IsRunning(Deadline::After(seconds(1))).status()));
  bool cancelled;
  {
    std::lock_guard lock(mutex_);
    cancelled = cancelled_;
  }
  if (cancelled) return Error(v1::CANCELLED_BY_REQUEST, absl::StatusCode::kCancelled, "cancelled on request");
  const v1::Reason known = ReasonOf(status, v1::REASON_UNSPECIFIED);
  const bool peer_gone = known == v1::REASON_UNSPECIFIED || known == v1::PEER_CONNECTION_FAILED;
  if (link_ && peer_gone && status.code() != absl::StatusCode::kDeadlineExceeded) {
    // The data channels break at the same moment as the destination says why.
    const Deadline grace = Deadline::After(milliseconds(500));
    for (;;) {
      auto message = link_->Next(grace);
      if (!message.ok()) break;
      if (absl::Status objection = Objection(*message); !objection.ok()) return objection;
    }
    if (absl::Status lost = link_->lost_status(); !lost.ok()) return lost;
  }
  if (known != v1::REASON_UNSPECIFIED) return status;
  if (status.code() == absl::StatusCode::kDeadlineExceeded) return WithReason(status, v1::PHASE_TIMEOUT);
  return WithReason(status, v1::INTERNAL);
}

absl::Status OutgoingMigration::Impl::Precopy() {
  // Room for YIELDED and for what follows it, now and not in the blackout.
  RETURN_IF_ERROR(p_.journal.Reserve(4));
  const Deadline deadline = Deadline::At(started_ + max_duration_);
  // What becomes a hole from now on would not be one at the destination.
  if (p_.devices.hints() != nullptr) p_.devices.hints()->AllowDiscard(false);
  if (p_.make_vmm_dirty_source) {
    ASSIGN_OR_RETURN(std::unique_ptr<memory::DirtySource> source, p_.make_vmm_dirty_source());
    dirty_sources_.push_back(std::move(source));
  }
  for (auto& source : p_.devices.MakeDirtySources()) dirty_sources_.push_back(std::move(source));
  for (auto& source : dirty_sources_) {
    if (absl::Status status = source->Start(); !status.ok())
      return AtSource(Annotate(status, fmt::format("dirty tracking of {}", source->name())));
  }
  RETURN_IF_ERROR(BeginHints());
  memory::PageSets pages;
  uint64_t populated = 0;
  for (const memory::RamBlock& block : p_.ram.blocks()) {
    ASSIGN_OR_RETURN(memory::PageSet set, block.Populated());
    populated += set.Count() * memory::kPageSize;
    pages.push_back(std::move(set));
  }
  hole_bytes_ = p_.ram.total_bytes() - populated;
  Convergence convergence(limits_);
  for (uint32_t round = 0;; ++round) {
    ASSIGN_OR_RETURN(RoundSample sample, SendRound(pages, round, /*final=*/false, deadline));
    if (round == 0) PausePoint(o_.pause_dir, "precopy");
    RETURN_IF_ERROR(Interrupted());
    for (memory::PageSet& set : pages) set.Reset();
    RETURN_IF_ERROR(Harvest(pages));
    for (size_t i = 0; i < doubtful_.size(); ++i) {
      pages[i].Union(doubtful_[i]);
      doubtful_[i].Reset();
    }
    if (round == 0) RETURN_IF_ERROR(ResolveHints(pages));
    sample.dirty_bytes = CountBytes(pages);
    ApplyNewLimit(convergence);
    const ConvergenceDecision decision = convergence.Judge(sample);
    Record(sample, decision);
    next_round_ = round + 1;
    if (decision.action == ConvergenceDecision::Action::kAbort)
      return Error(v1::NOT_CONVERGING, absl::StatusCode::kAborted, "{}", decision.why);
    if (decision.action == ConvergenceDecision::Action::kSwitchover) {
      left_over_ = std::move(pages);
      return absl::OkStatus();
    }
  }
}

absl::StatusOr<RoundSample> OutgoingMigration::Impl::SendRound(const memory::PageSets& pages, uint32_t round,
                                                               bool final, Deadline deadline) {
  RETURN_IF_ERROR(Interrupted());
  RoundSample sample;
  sample.round = round;
  sample.bytes = CountBytes(pages);
  round_.store(round, std::memory_order_relaxed);
  ticking_ = !final;
  if (!final) monitor_stop_.Signal();  // from now on it ticks
  v1::PeerMessage message;
  message.mutable_round_begin()->set_round(round);
  message.mutable_round_begin()->set_bytes(sample.bytes);
  const Clock::time_point begin = Clock::now();
  RETURN_IF_ERROR(link_->Send(message, deadline));
  stream::RoundOptions options;
  options.skip_holes = !final && round > 0;
  if (hints_) {
    RETURN_IF_ERROR(SendHinted(pages, deadline));
    sample.bytes -= CountBytes(deferred_);
  } else {
    RETURN_IF_ERROR(sender_->SendRound(pages, round, options, deadline));
  }
  RETURN_IF_ERROR(WithReason(p_.ram.CheckIntact(), v1::SOURCE_VMM_FAILED));
  if (final) return sample;
  RETURN_IF_ERROR(SendRoundEnd(round, false, deadline));
  ASSIGN_OR_RETURN(
      const v1::PeerMessage ack,
      Await([&](const v1::PeerMessage& m) { return m.has_round_ack() && m.round_ack().round() == round; },
            deadline));
  RETURN_IF_ERROR(TakeDoubtful(ack.round_ack()));
  sample.duration = Clock::now() - begin;
  return sample;
}

// Pages that changed while they were sent. A guest's writes are dirty pages, too; but a VMM may take free
// pages away (free page reporting of QEMU's own balloon) between the checksum and the copy, and such a page
// counts as unwritten: punching a hole keeps the write protection of what it unmaps (unmap_mapping_pages, no
// ZAP_FLAG_DROP_MARKER).
absl::Status OutgoingMigration::Impl::TakeDoubtful(const v1::RoundAck& ack) {
  if (ack.doubtful().empty()) return absl::OkStatus();
  if (doubtful_.empty()) doubtful_ = p_.ram.MakeSets();
  for (const v1::PageRun& run : ack.doubtful()) {
    if (run.block() >= doubtful_.size() || run.count() > doubtful_[run.block()].pages() ||
        run.first() > doubtful_[run.block()].pages() - run.count())
      return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss,
                   "the destination doubts {} pages at {} of block {}, which are not guest memory",
                   run.count(), run.first(), run.block());
    doubtful_[run.block()].SetRange(run.first(), run.count());
  }
  return absl::OkStatus();
}

absl::Status OutgoingMigration::Impl::SendRoundEnd(uint32_t round, bool final, Deadline deadline) {
  v1::PeerMessage message;
  message.mutable_round_end()->set_round(round);
  message.mutable_round_end()->set_final(final);
  for (uint64_t frames : sender_->frames()) message.mutable_round_end()->add_frames(frames);
  return link_->Send(message, deadline);
}

absl::Status OutgoingMigration::Impl::Interrupted() {
  if (vmm_dead_) return absl::UnavailableError("the VMM ended");
  std::lock_guard lock(mutex_);
  if (cancelled_ || stopping_) return absl::CancelledError("cancelled");
  return link_->lost_status();
}

absl::Status OutgoingMigration::Impl::Harvest(memory::PageSets& pages) {
  for (auto& source : dirty_sources_) {
    if (absl::Status status = source->Harvest(pages); !status.ok()) {
      // A process that is being killed gives its memory up before its pidfd says that it has ended; which of
      // the two this is decides whether there still is a guest.
      pollfd ended{p_.driver.exit_fd(), POLLIN, 0};
      (void)::poll(&ended, 1, 2000);
      return AtSource(Annotate(status, fmt::format("dirty pages of {}", source->name())));
    }
  }
  return absl::OkStatus();
}

uint64_t OutgoingMigration::Impl::CountBytes(const memory::PageSets& pages) {
  uint64_t bytes = 0;
  for (const memory::PageSet& set : pages) bytes += set.Count() * memory::kPageSize;
  return bytes;
}

void OutgoingMigration::Impl::ApplyNewLimit(Convergence& convergence) {
  std::lock_guard lock(mutex_);
  if (new_max_downtime_) convergence.SetMaxDowntime(*new_max_downtime_);
  new_max_downtime_.reset();
}

}  // namespace baton::migration
