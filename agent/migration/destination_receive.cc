// Taking in memory and state. Everything the peer says is checked here against what this side knows.
#include <poll.h>

#include <optional>

#include "agent/migration/destination_impl.h"
#include "agent/migration/state_pipe.h"
#include "common/log.h"

namespace baton::migration {

using Event = Handover::Event;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

// How often the main thread looks at what cannot wake it: the VMM's end, broken data channels.
constexpr Duration kLook = milliseconds(200);
// What a source sent before its control connection was lost is here within this time, or never comes.
constexpr Duration kLateFrames = seconds(2);
// The VMM's state without its memory: a few hundred KiB; ROMs and video memory make it some MiB.
constexpr uint64_t kMaxState = 256u << 20;

absl::Status Violation(const std::string& what) {
  return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss, "the source broke the protocol: {}",
               what);
}

// The first few runs of pages, for people: what lies there tells who wrote it.
std::string WhichPages(const memory::PageSets& sets, const memory::GuestRam& ram) {
  constexpr size_t kMost = 6;
  std::vector<std::string> runs;
  for (size_t i = 0; i < sets.size() && runs.size() <= kMost; ++i) {
    uint64_t from = 0;
    for (auto run = sets[i].NextRun(from); run.count != 0; run = sets[i].NextRun(from)) {
      if (runs.size() == kMost) {
        runs.push_back("and more");
        break;
      }
      runs.push_back(fmt::format("{} at {:#x} of block {}", run.count, run.first * memory::kPageSize,
                                 ram.blocks()[i].id()));
      from = run.first + run.count;
    }
  }
  return fmt::format("{}", fmt::join(runs, ", "));
}

// Runs of one acknowledgement: enough for any round, and a message of a few hundred KiB at most.
constexpr int kMostRuns = 16384;

void AddRun(v1::RoundAck& ack, uint32_t block, uint64_t first, uint64_t count) {
  v1::PageRun* run = ack.add_doubtful();
  run->set_block(block);
  run->set_first(first);
  run->set_count(count);
}

void AddRuns(v1::RoundAck& ack, const memory::PageSets& sets) {
  for (uint32_t block = 0; block < sets.size(); ++block) {
    uint64_t from = 0;
    for (auto run = sets[block].NextRun(from); run.count != 0; run = sets[block].NextRun(from)) {
      if (ack.doubtful_size() < kMostRuns) {
        AddRun(ack, block, run.first, run.count);
        from = run.first + run.count;
        continue;
      }
      AddRun(ack, block, run.first, sets[block].pages() - run.first);
      for (++block; block < sets.size(); ++block) AddRun(ack, block, 0, sets[block].pages());
      return;
    }
  }
}

}  // namespace

absl::Status IncomingMigration::Impl::Receive() {
  RETURN_IF_ERROR(AwaitControl());
  RETURN_IF_ERROR(Hello());
  const Deadline deadline = Deadline::After(max_duration_ + seconds(60));
  while (!handover().may_write_owner()) {
    ASSIGN_OR_RETURN(v1::PeerMessage message, NextMessage(deadline));
    RETURN_IF_ERROR(Handle(message, deadline));
  }
  return absl::OkStatus();
}

absl::Status IncomingMigration::Impl::AwaitControl() {
  const Deadline deadline = Deadline::After(o_.connect_timeout);
  for (;;) {
    std::unique_ptr<stream::MessageChannel> control;
    {
      std::unique_lock lock(mutex_);
      changed_.wait_until(lock, deadline.Min(Deadline::After(kLook)).when(),
                          [&] { return control_ || stopping_ || handover_.must_refuse(); });
      control = std::move(control_);
    }
    if (control) {
      auto link = std::make_unique<ControlLink>(std::move(control), o_.link);
      std::lock_guard lock(mutex_);
      link_ = std::move(link);
      return absl::OkStatus();
    }
    RETURN_IF_ERROR(Interrupted());
    if (deadline.Expired())
      return Error(v1::PEER_CONNECTION_FAILED, absl::StatusCode::kDeadlineExceeded,
                   "the source did not connect");
  }
}

absl::Status IncomingMigration::Impl::Interrupted() {
  pollfd ended{p_.driver.exit_fd(), POLLIN, 0};
  if (::poll(&ended, 1, 0) == 1)
    return Error(v1::DESTINATION_VMM_FAILED, absl::StatusCode::kUnavailable,
                 "the VMM at the destination ended: {}",
                 Message(p_.driver.IsRunning(Deadline::After(seconds(1))).status()));
  std::lock_guard lock(mutex_);
  if (stopping_) return absl::CancelledError("the shim is ending");
  if (!abort_why_.empty())
    return Error(v1::CANCELLED_BY_REQUEST, absl::StatusCode::kCancelled, "{}", abort_why_);
  if (handover_.must_refuse())
    return Error(v1::PEER_CONNECTION_FAILED, absl::StatusCode::kUnavailable,
                 "the source lost its connection");
  return absl::OkStatus();
}

absl::StatusOr<v1::PeerMessage> IncomingMigration::Impl::NextMessage(Deadline deadline) {
  for (;;) {
    auto message = link_->Next(deadline.Min(Deadline::After(kLook)));
    if (message.ok()) return message;
    RETURN_IF_ERROR(Interrupted());
    if (message.status().code() != absl::StatusCode::kDeadlineExceeded) return message.status();
    if (deadline.Expired())
      return Error(v1::PHASE_TIMEOUT, absl::StatusCode::kDeadlineExceeded, "the migration took too long");
    Tick();
    if (receiver_) RETURN_IF_ERROR(receiver_->status());
  }
}

absl::Status IncomingMigration::Impl::CheckHello(const v1::PeerHello& hello) const {
  if (hello.version() != stream::kProtocolVersion)
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kFailedPrecondition,
                 "the source speaks version {} of the stream, this side {}", hello.version(),
                 stream::kProtocolVersion);
  if (hello.migration_id() != o_.migration_id || hello.vm() != o_.vm)
    return Violation(fmt::format("hello for migration '{}' of VM '{}'", hello.migration_id(), hello.vm()));
  if (hello.epoch() != o_.epoch)
    return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition,
                 "the source owns the guest at epoch {}; this side was prepared for epoch {}", hello.epoch(),
                 o_.epoch);
  if (hello.channels() == 0 || hello.channels() > stream::kMaxDataChannels)
    return Violation(fmt::format("{} data channels", hello.channels()));
  if (o_.tls == nullptr && !hello.page_checksums()) return Violation("plaintext without checksums");
  const auto& blocks = p_.ram.blocks();
  if (hello.blocks_size() != static_cast<int>(blocks.size()))
    return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition,
                 "the source has {} RAM blocks, this side {}", hello.blocks_size(), blocks.size());
  for (int i = 0; i < hello.blocks_size(); ++i) {
    if (hello.blocks(i).id() != blocks[i].id() || hello.blocks(i).size() != blocks[i].size())
      return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition,
                   "RAM block {} is '{}' of {} bytes at the source, '{}' of {} here", i, hello.blocks(i).id(),
                   hello.blocks(i).size(), blocks[i].id(), blocks[i].size());
  }
  return absl::OkStatus();
}

absl::Status IncomingMigration::Impl::Hello() {
  const Deadline deadline = Deadline::After(seconds(30));
  ASSIGN_OR_RETURN(v1::PeerMessage message, NextMessage(deadline));
  if (!message.has_hello()) return Violation("the first message is not hello");
  RETURN_IF_ERROR(CheckHello(message.hello()));
  stream::ReceiverOptions options;
  options.channels = message.hello().channels();
  options.page_checksums = message.hello().page_checksums();
  auto receiver = std::make_unique<stream::MemoryReceiver>(p_.ram, options);
  std::map<uint32_t, std::unique_ptr<stream::Channel>> waiting;
  {
    std::lock_guard lock(mutex_);
    receiver_ = std::move(receiver);
    waiting.swap(waiting_channels_);
  }
  for (auto& [number, channel] : waiting) RETURN_IF_ERROR(receiver_->AddChannel(number, std::move(channel)));
  auto load = p_.driver.BeginLoad(deadline);
  if (!load.ok()) return WithReason(Annotate(load.status(), "beginning to load"), v1::DESTINATION_VMM_FAILED);
  load_fd_ = *std::move(load);
  v1::PeerMessage welcome;
  welcome.mutable_welcome()->set_version(stream::kProtocolVersion);
  for (std::string& device : p_.devices.TakesInflight())
    welcome.mutable_welcome()->add_takes_inflight(std::move(device));
  for (std::string& device : p_.devices.OrdersInflight())
    welcome.mutable_welcome()->add_orders_inflight(std::move(device));
  RETURN_IF_ERROR(link_->Send(welcome, deadline));
  reporter_.EnterPhase(v1::PRECOPY);
  return absl::OkStatus();
}

absl::Status IncomingMigration::Impl::Handle(const v1::PeerMessage& message, Deadline deadline) {
  switch (message.body_case()) {
    case v1::PeerMessage::kRoundBegin:
      reporter_.Tick([&](v1::Progress& p) { p.set_round(message.round_begin().round()); });
      return absl::OkStatus();
    case v1::PeerMessage::kRoundEnd:
      RETURN_IF_ERROR(LandRound(message.round_end(), deadline));
      return LoadIfComplete();
    case v1::PeerMessage::kDevices:
      if (have_devices_) return Violation("device states came twice");
      devices_ = message.devices();
      have_devices_ = true;
      reporter_.EnterPhase(v1::SWITCHOVER);
      return LoadIfComplete();
    case v1::PeerMessage::kVmmState:
      RETURN_IF_ERROR(TakeState(message.vmm_state(), deadline));
      return LoadIfComplete();
    case v1::PeerMessage::kYield:
      return TakeYield(message.yield());
    case v1::PeerMessage::kAbort:
      return Error(
          message.abort().reason() == v1::REASON_UNSPECIFIED ? v1::INTERNAL : message.abort().reason(),
          absl::StatusCode::kAborted, "the source gave up: {}", message.abort().message());
    default:
      return Violation(fmt::format("message {} at this point", static_cast<int>(message.body_case())));
  }
}

absl::Status IncomingMigration::Impl::LandRound(const v1::RoundEnd& end, Deadline deadline) {
  if (landed_) return Violation("a round after the final one");
  const std::vector<uint64_t> frames(end.frames().begin(), end.frames().end());
  const Clock::time_point begin = Clock::now();
  RETURN_IF_ERROR(AwaitFrames(frames, deadline));
  const uint64_t doubtful = receiver_->doubtful_pages();
  if (end.final()) {
    AddTime("barrier", begin);
    if (doubtful > 0)
      return Error(v1::STATE_MISMATCH, absl::StatusCode::kDataLoss,
                   "{} pages of guest memory do not match their checksums after the final round: {}",
                   doubtful, WhichPages(receiver_->doubtful(), p_.ram));
    landed_ = true;
    return absl::OkStatus();
  }
  if (doubtful > 0)
    LOG_INFO("round {}: {} pages changed while they were sent, and are to come again", end.round(), doubtful);
  Tick();
  v1::PeerMessage message;
  message.mutable_round_ack()->set_round(end.round());
  message.mutable_round_ack()->set_doubtful_pages(doubtful);
  // The source waits for this, so nothing more is on its way.
  if (doubtful > 0) AddRuns(*message.mutable_round_ack(), receiver_->doubtful());
  return link_->Send(message, deadline);
}

// In slices: an abort, the VMM's end and a source that is gone wake nobody here, and neither does a data
// channel that was turned away because it came after an abort, whose frames never land.
absl::Status IncomingMigration::Impl::AwaitFrames(const std::vector<uint64_t>& frames, Deadline deadline) {
  std::optional<Deadline> late;
  for (;;) {
    const absl::Status landed = receiver_->WaitForFrames(frames, deadline.Min(Deadline::After(kLook)));
    if (!absl::IsDeadlineExceeded(landed) || deadline.Expired()) return landed;
    RETURN_IF_ERROR(Interrupted());
    Tick();
    const absl::Status lost = link_->lost_status();
    if (lost.ok()) continue;
    if (!late) late = Deadline::After(kLateFrames);
    if (late->Expired()) return lost;
  }
}

absl::Status IncomingMigration::Impl::TakeState(const v1::VmmState& state, Deadline deadline) {
  if (state_complete_) return Violation("VMM state after its end");
  state_bytes_ += state.data().size();
  if (state_bytes_ > kMaxState) return Violation(fmt::format("more than {} bytes of VMM state", kMaxState));
  if (state.stage() == v1::VmmState::SETUP) {
    if (!held_state_.empty()) return Violation("state of the set-up after the final state");
    reporter_.EnterPhase(v1::SWITCHOVER);
    return FeedState(state.data(), deadline);
  }
  if (state.stage() != v1::VmmState::FINAL) return Violation("VMM state of no stage");
  held_state_ += state.data();
  state_complete_ = state.eof();
  return absl::OkStatus();
}

absl::Status IncomingMigration::Impl::FeedState(const std::string& data, Deadline deadline) {
  const absl::Status written =
      WriteState(load_fd_.get(), data, deadline.Min(Deadline::After(o_.load_timeout)));
  if (written.ok()) return written;
  // Why it takes no more is known to the VMM.
  const absl::Status loaded = p_.driver.FinishLoad(Deadline::After(seconds(2)));
  return WithReason(loaded.ok() ? Annotate(written, "loading the VMM's state") : loaded,
                    v1::DESTINATION_VMM_FAILED);
}

absl::Status IncomingMigration::Impl::TakeYield(const v1::Yield& yield) {
  if (yield.migration_id() != o_.migration_id || yield.epoch() != o_.epoch)
    return Violation(fmt::format("yield of migration '{}' at epoch {}", yield.migration_id(), yield.epoch()));
  if (!loaded_) return Violation("yield before everything was sent");
  source_frozen_at_ns_ = yield.frozen_at_ns();
  return Apply(Event::kYieldHeard);
}

absl::Status IncomingMigration::Impl::SetLayout() {
  std::vector<memory::GpaRange> layout;
  for (const v1::RamRange& range : devices_.layout())
    layout.push_back({range.gpa(), range.size(), range.block(), range.offset()});
  if (absl::Status status = p_.ram.SetLayout(std::move(layout)); !status.ok())
    return WithReason(Annotate(status, "guest physical layout from the source"), v1::PEER_PROTOCOL_ERROR);
  return absl::OkStatus();
}

absl::Status IncomingMigration::Impl::LoadIfComplete() {
  if (loaded_ || !landed_ || !have_devices_ || !state_complete_) return absl::OkStatus();
  const Deadline deadline = Deadline::After(o_.load_timeout);
  Clock::time_point begin = Clock::now();
  // Before the VMM loads: it looks at the rings, too.
  RETURN_IF_ERROR(SetLayout());
  absl::Status checked = p_.devices.VerifyAgainstMemory(devices_, p_.ram);
  if (checked.ok()) checked = p_.devices.ExpectStates(devices_);
  if (!checked.ok()) return WithReason(checked, ReasonOf(checked, v1::STATE_MISMATCH));
  AddTime("check", begin);
  begin = Clock::now();
  RETURN_IF_ERROR(FeedState(held_state_, deadline));
  load_fd_.reset();
  held_state_.clear();
  if (absl::Status status = p_.driver.FinishLoad(deadline); !status.ok())
    return WithReason(Annotate(status, "loading the VMM's state"), v1::DESTINATION_VMM_FAILED);
  AddTime("load", begin);
  loaded_ = true;
  return Apply(Event::kStateChecked);
}

// The reason behind an error: a data channel breaks when the source gives up, and the source says why.
absl::Status IncomingMigration::Impl::Cause(const absl::Status& status) {
  if (absl::Status interrupted = Interrupted();
      !interrupted.ok() && ReasonOf(interrupted, v1::INTERNAL) != v1::PEER_CONNECTION_FAILED)
    return interrupted;
  const v1::Reason known = ReasonOf(status, v1::REASON_UNSPECIFIED);
  if (link_ && (known == v1::REASON_UNSPECIFIED || known == v1::PEER_CONNECTION_FAILED) &&
      status.code() != absl::StatusCode::kDeadlineExceeded) {
    const Deadline grace = Deadline::After(milliseconds(500));
    for (auto message = link_->Next(grace); message.ok(); message = link_->Next(grace)) {
      if (message->has_abort()) return Handle(*message, grace);
    }
    if (known == v1::REASON_UNSPECIFIED) {
      if (absl::Status lost = link_->lost_status(); !lost.ok()) return lost;
    }
  }
  if (known != v1::REASON_UNSPECIFIED) return status;
  if (status.code() == absl::StatusCode::kDataLoss || status.code() == absl::StatusCode::kInvalidArgument)
    return WithReason(status, v1::PEER_PROTOCOL_ERROR);
  if (status.code() == absl::StatusCode::kDeadlineExceeded) return WithReason(status, v1::PHASE_TIMEOUT);
  return WithReason(
      status, status.code() == absl::StatusCode::kUnavailable ? v1::PEER_CONNECTION_FAILED : v1::INTERNAL);
}

void IncomingMigration::Impl::Tick() {
  if (!receiver_) return;
  const v1::ByteCounts counts = receiver_->counts();
  reporter_.Tick([&](v1::Progress& progress) {
    *progress.mutable_bytes() = counts;
    progress.set_memory_total(p_.ram.total_bytes());
  });
}

}  // namespace baton::migration
