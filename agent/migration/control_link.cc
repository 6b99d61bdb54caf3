#include "agent/migration/control_link.h"

namespace baton::migration {
namespace {

// A probe fits into any socket buffer; a peer that does not take even that is as good as silent.
constexpr Duration kProbeSend = std::chrono::seconds(5);
// Above what a whole migration ever queues: device states and a few hundred KiB of VMM state in pieces.
constexpr size_t kMaxQueued = 4096;

}  // namespace

ControlLink::ControlLink(std::unique_ptr<stream::MessageChannel> channel, ControlLinkOptions options,
                         std::function<void()> on_event)
    : channel_(std::move(channel)),
      options_(options),
      on_event_(std::move(on_event)),
      thread_([this] { Run(); }) {}

ControlLink::~ControlLink() {
  Shutdown();
  thread_.join();
}

void ControlLink::Shutdown() {
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  channel_->Shutdown();
}

absl::Status ControlLink::Send(const Message& message, Deadline deadline) {
  absl::Status status = channel_->Send(message, deadline);
  if (status.ok()) return status;
  status = Annotate(status, fmt::format("peer {}", channel_->channel().peer()));
  // A deadline is the caller's, and says nothing about the connection.
  return absl::IsDeadlineExceeded(status) ? status : WithReason(status, v1::PEER_CONNECTION_FAILED);
}

void ControlLink::Run() {
  Clock::time_point next_ping = Clock::now();
  Clock::time_point last_heard = next_ping;
  for (;;) {
    const Clock::time_point now = Clock::now();
    if (now >= next_ping) {
      Message message;
      message.mutable_clock()->set_sent_ns(MonotonicNs());
      // A failure shows at the next receive as well.
      if (absl::Status sent = channel_->Send(message, Deadline::After(kProbeSend)); !sent.ok())
        return Lose(sent);
      next_ping = now + options_.ping_interval;
    }
    if (now - last_heard >= options_.silence)
      return Lose(Error(absl::StatusCode::kUnavailable, "silent for {} s",
                        std::chrono::duration_cast<std::chrono::seconds>(options_.silence).count()));
    auto message = channel_->Receive(Deadline::At(std::min(next_ping, last_heard + options_.silence)));
    if (!message.ok()) {
      if (message.status().code() == absl::StatusCode::kDeadlineExceeded) continue;
      return Lose(message.status());
    }
    last_heard = Clock::now();
    if (message->has_clock()) {
      HandleClock(message->clock(), MonotonicNs());
      continue;
    }
    {
      std::lock_guard lock(mutex_);
      if (queue_.size() >= kMaxQueued) {
        lost_ =
            WithReason(absl::ResourceExhaustedError("the peer sends faster than its messages can be handled"),
                       v1::PEER_PROTOCOL_ERROR);
      } else {
        queue_.push_back(*std::move(message));
      }
    }
    changed_.notify_all();
    if (on_event_) on_event_();
    if (!lost_status().ok()) return;
  }
}

void ControlLink::HandleClock(const v1::ClockProbe& probe, int64_t now) {
  if (!probe.answer()) {
    Message answer;
    *answer.mutable_clock() = probe;
    answer.mutable_clock()->set_received_ns(now);
    answer.mutable_clock()->set_answer(true);
    (void)channel_->Send(answer, Deadline::After(kProbeSend));
    return;
  }
  const int64_t way = now - probe.sent_ns();
  std::lock_guard lock(mutex_);
  if (way < 0 || (offset_ && Duration(way) >= round_trip_)) return;
  round_trip_ = Duration(way);
  offset_ = probe.received_ns() - (probe.sent_ns() + way / 2);
}

void ControlLink::Lose(const absl::Status& status) {
  const v1::Reason reason =
      status.code() == absl::StatusCode::kDataLoss ? v1::PEER_PROTOCOL_ERROR : v1::PEER_CONNECTION_FAILED;
  {
    std::lock_guard lock(mutex_);
    lost_ = Error(reason, absl::StatusCode::kUnavailable, "connection to the peer {} lost: {}",
                  channel_->channel().peer(), baton::Message(status));
  }
  changed_.notify_all();
  if (on_event_) on_event_();
}

std::optional<ControlLink::Message> ControlLink::TryNext() {
  std::lock_guard lock(mutex_);
  if (queue_.empty()) return std::nullopt;
  Message message = std::move(queue_.front());
  queue_.pop_front();
  return message;
}

absl::StatusOr<ControlLink::Message> ControlLink::Next(Deadline deadline) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_until(lock, deadline.when(), [&] { return !queue_.empty() || !lost_.ok(); }))
    return absl::DeadlineExceededError("the peer did not answer in time");
  if (queue_.empty()) return lost_;
  Message message = std::move(queue_.front());
  queue_.pop_front();
  return message;
}

absl::Status ControlLink::lost_status() const {
  std::lock_guard lock(mutex_);
  return lost_;
}

bool ControlLink::WaitLost(Deadline deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline.when(), [&] { return !lost_.ok(); });
}

std::optional<int64_t> ControlLink::clock_offset() const {
  std::lock_guard lock(mutex_);
  return offset_;
}

Duration ControlLink::round_trip() const {
  std::lock_guard lock(mutex_);
  return round_trip_;
}

}  // namespace baton::migration
