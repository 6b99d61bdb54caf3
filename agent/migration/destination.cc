#include "agent/migration/destination.h"

#include "agent/migration/destination_impl.h"
#include "agent/stream/dial.h"
#include "common/log.h"

namespace baton::migration {

using Event = Handover::Event;
using std::chrono::seconds;

namespace {

// Of the TLS handshake and of the one message of a verdict query.
constexpr Duration kGreetTimeout = seconds(10);
// Connections being greeted at a time: every channel, and some that ask.
constexpr size_t kMaxGreeters = stream::kMaxDataChannels + 8;

}  // namespace

IncomingMigration::Impl::Impl(DestinationOptions options, DestinationParts parts, Handover handover)
    : o_(std::move(options)),
      p_(std::move(parts)),
      reporter_(o_.migration_id, o_.vm, v1::ROLE_DESTINATION, o_.epoch, p_.on_report),
      max_duration_(
          DurationOr(o_.params.has_max_duration(), o_.params.max_duration(), std::chrono::hours(1))),
      handover_(std::move(handover)) {}

IncomingMigration::Impl::~Impl() {
  std::list<Greeter> greeters;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    if (link_) link_->Shutdown();
    if (control_) control_->Shutdown();
    greeters.swap(greeters_);
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  for (Greeter& greeter : greeters) greeter.thread.join();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return waiters_ == 0; });
}

void IncomingMigration::Impl::Launch(bool recovered) {
  thread_ = std::thread([this, recovered] {
    Run(recovered);
    std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  });
}

absl::Status IncomingMigration::Impl::Apply(Event event) {
  std::lock_guard lock(mutex_);
  absl::Status status = handover_.Apply(event);
  changed_.notify_all();
  return status;
}

Handover IncomingMigration::Impl::handover() const {
  std::lock_guard lock(mutex_);
  return handover_;
}

bool IncomingMigration::Impl::stopping() const {
  std::lock_guard lock(mutex_);
  return stopping_;
}

bool IncomingMigration::Impl::SleepUnlessStopping(Duration duration) {
  std::unique_lock lock(mutex_);
  return !changed_.wait_for(lock, duration, [&] { return stopping_; });
}

absl::Status IncomingMigration::Impl::Abort(const std::string& why) {
  std::lock_guard lock(mutex_);
  if (absl::Status status = handover_.Apply(Event::kCancel); !status.ok())
    return Error(absl::StatusCode::kFailedPrecondition,
                 "migration {} cannot be undone here any more: this side owns the guest", o_.migration_id);
  abort_why_ = why;
  changed_.notify_all();
  return absl::OkStatus();
}

absl::Status IncomingMigration::Impl::AcceptChannel(const stream::PreambleBytes& bytes, UniqueFd socket) {
  ASSIGN_OR_RETURN(stream::Preamble preamble, stream::DecodePreamble(bytes));
  if (preamble.migration_id != o_.migration_id)
    return Error(absl::StatusCode::kNotFound, "this is migration '{}', not '{}'", o_.migration_id,
                 preamble.migration_id);
  if (!stream::TokensEqual(preamble.token, o_.token))
    return absl::PermissionDeniedError("the connection's token is not that of the migration");
  if (preamble.kind == stream::PreambleKind::kTunnel)
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument,
                 "only the move of a libvirt domain has tunnels");
  std::lock_guard lock(mutex_);
  if (stopping_) return absl::CancelledError("the shim is ending");
  for (auto greeter = greeters_.begin(); greeter != greeters_.end();) {
    if (!greeter->done) {
      ++greeter;
      continue;
    }
    greeter->thread.join();
    greeter = greeters_.erase(greeter);
  }
  if (greeters_.size() >= kMaxGreeters) return absl::ResourceExhaustedError("too many connections at a time");
  if (preamble.kind == stream::PreambleKind::kChannel) {
    if (handover_.settled() || handover_.must_refuse())
      return absl::FailedPreconditionError("the migration has been decided");
    if (!connected_.insert(preamble.channel).second)
      return Error(absl::StatusCode::kAlreadyExists, "channel {} is connected already", preamble.channel);
  }
  Greeter& greeter = greeters_.emplace_back();
  greeter.thread = std::thread([this, &greeter, preamble, fd = socket.release()] {
    if (absl::Status status = Greet(preamble, UniqueFd(fd)); !status.ok())
      LOG_WARN("migration {}: channel {}: {}", o_.migration_id, preamble.channel, Message(status));
    greeter.done = true;
  });
  return absl::OkStatus();
}

absl::Status IncomingMigration::Impl::Greet(const stream::Preamble& preamble, UniqueFd socket) {
  ASSIGN_OR_RETURN(std::unique_ptr<stream::Channel> channel,
                   stream::AcceptChannel(std::move(socket), o_.tls, "", Deadline::After(kGreetTimeout)));
  if (preamble.kind == stream::PreambleKind::kVerdictQuery) {
    AnswerQuery(std::make_unique<stream::MessageChannel>(std::move(channel)));
    return absl::OkStatus();
  }
  stream::MemoryReceiver* receiver;
  {
    std::lock_guard lock(mutex_);
    if (preamble.channel == 0) {
      control_ = std::make_unique<stream::MessageChannel>(std::move(channel));
      changed_.notify_all();
      return absl::OkStatus();
    }
    receiver = receiver_.get();
    if (receiver == nullptr) {
      waiting_channels_.emplace(preamble.channel, std::move(channel));
      return absl::OkStatus();
    }
  }
  return receiver->AddChannel(preamble.channel, std::move(channel));
}

v1::PeerMessage IncomingMigration::Impl::VerdictMessage() const {
  std::lock_guard lock(mutex_);
  v1::PeerMessage message;
  v1::Verdict* verdict = message.mutable_verdict();
  verdict->set_migration_id(o_.migration_id);
  verdict->set_verdict(handover_.answer_to_query());
  verdict->set_epoch(verdict->verdict() == v1::OWNER ? handover_.own_epoch() : o_.epoch);
  if (verdict->verdict() == v1::REFUSED) {
    verdict->set_reason(refusal_.ok() ? v1::DESTINATION_REFUSED : ReasonOf(refusal_));
    verdict->set_message(Message(refusal_));
  }
  return message;
}

void IncomingMigration::Impl::AnswerQuery(std::unique_ptr<stream::MessageChannel> channel) {
  auto question = channel->Receive(Deadline::After(kGreetTimeout));
  if (!question.ok() || !question->has_verdict_query() ||
      question->verdict_query().migration_id() != o_.migration_id) {
    LOG_WARN("migration {}: a verdict query that asks nothing", o_.migration_id);
    return;
  }
  {
    std::unique_lock lock(mutex_);
    if (handover_.answer_to_query() == v1::IDLE) {
      // Who asks here has given the first connection up.
      (void)handover_.Apply(Event::kConnectionLost);
      if (link_) link_->Shutdown();
      changed_.notify_all();
    }
    changed_.wait_for(lock, o_.query_timeout,
                      [&] { return stopping_ || handover_.answer_to_query() != v1::IDLE; });
  }
  const v1::PeerMessage answer = VerdictMessage();
  LOG_INFO("migration {}: the source asked; answered {}", o_.migration_id,
           v1::HandoverState_Name(answer.verdict().verdict()));
  if (!channel->Send(answer, Deadline::After(kGreetTimeout)).ok()) return;
  // The asker closes once it has read; closing first could take the answer with it.
  (void)channel->Receive(Deadline::After(seconds(2)));
}

IncomingMigration::Outcome IncomingMigration::Impl::outcome() const {
  std::lock_guard lock(mutex_);
  return ended_ ? outcome_ : Outcome::kNone;
}

absl::StatusOr<IncomingMigration::Outcome> IncomingMigration::Impl::Wait(Deadline deadline) {
  std::unique_lock lock(mutex_);
  ++waiters_;
  const bool ended = changed_.wait_until(lock, deadline.when(), [&] { return ended_; });
  --waiters_;
  changed_.notify_all();
  if (!ended) return absl::DeadlineExceededError("the migration goes on");
  return outcome_;
}

// ---------------------------------------------------------------------------------------------------------

IncomingMigration::IncomingMigration(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
IncomingMigration::~IncomingMigration() = default;

absl::StatusOr<std::unique_ptr<IncomingMigration>> IncomingMigration::Start(DestinationOptions options,
                                                                            DestinationParts parts) {
  Handover handover = Handover::Destination(options.migration_id, options.epoch);
  ASSIGN_OR_RETURN(Ownership now, ReplayOwnership(parts.journal.Records()));
  if (now.state == Ownership::State::kOwner || now.state == Ownership::State::kYielded)
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "this host's journal says that it has owned VM {} since epoch {}", options.vm, now.epoch);
  // INCOMING, OWNER or REFUSED, and one more.
  RETURN_IF_ERROR(parts.journal.Reserve(3));
  RETURN_IF_ERROR(parts.journal.Append(handover.IncomingRecord()));
  std::unique_ptr<IncomingMigration> migration(new IncomingMigration(
      std::make_unique<Impl>(std::move(options), std::move(parts), std::move(handover))));
  migration->impl_->Launch(false);
  return migration;
}

absl::StatusOr<std::unique_ptr<IncomingMigration>> IncomingMigration::Recover(DestinationOptions options,
                                                                              DestinationParts parts) {
  ASSIGN_OR_RETURN(Handover handover, Handover::Recover(v1::ROLE_DESTINATION, options.migration_id,
                                                        options.epoch, parts.journal.Records()));
  std::unique_ptr<IncomingMigration> migration(new IncomingMigration(
      std::make_unique<Impl>(std::move(options), std::move(parts), std::move(handover))));
  migration->impl_->Launch(true);
  return migration;
}

absl::Status IncomingMigration::AcceptChannel(const stream::PreambleBytes& preamble, UniqueFd socket) {
  return impl_->AcceptChannel(preamble, std::move(socket));
}
absl::Status IncomingMigration::Abort(const std::string& why) { return impl_->Abort(why); }
v1::SideReport IncomingMigration::report() const { return impl_->report(); }
IncomingMigration::Outcome IncomingMigration::outcome() const { return impl_->outcome(); }
absl::StatusOr<IncomingMigration::Outcome> IncomingMigration::Wait(Deadline deadline) {
  return impl_->Wait(deadline);
}

}  // namespace baton::migration
