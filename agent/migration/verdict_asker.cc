#include "agent/migration/verdict_asker.h"

#include <algorithm>

namespace baton::migration {

void VerdictAsker::Stop() {
  std::lock_guard lock(mutex_);
  stopped_ = true;
  if (talking_ != nullptr) talking_->Shutdown();
  changed_.notify_all();
}

absl::StatusOr<v1::Verdict> VerdictAsker::Ask() {
  Duration backoff = options_.backoff;
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      if (stopped_) return absl::CancelledError("stopped asking for the verdict");
    }
    auto verdict = AskOnce();
    if (verdict.ok() && (verdict->verdict() == v1::OWNER || verdict->verdict() == v1::REFUSED))
      return verdict;
    on_failure_(verdict.ok() ? absl::UnavailableError("the destination has not decided yet")
                             : verdict.status());
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, backoff, [&] { return stopped_; });
    backoff = std::min(backoff * 2, options_.backoff_max);
  }
}

absl::StatusOr<v1::Verdict> VerdictAsker::AskOnce() {
  const Deadline deadline = Deadline::After(options_.attempt_timeout);
  const Duration connect_bound = std::chrono::seconds(10);
  ASSIGN_OR_RETURN(std::unique_ptr<stream::MessageChannel> channel,
                   stream::DialVerdictQuery(options_.dial, deadline.Min(Deadline::After(connect_bound))));
  {
    std::lock_guard lock(mutex_);
    if (stopped_) return absl::CancelledError("stopped asking for the verdict");
    talking_ = channel.get();
  }
  auto answer = [&]() -> absl::StatusOr<v1::Verdict> {
    v1::PeerMessage question;
    question.mutable_verdict_query()->set_migration_id(options_.dial.migration_id);
    RETURN_IF_ERROR(channel->Send(question, deadline));
    for (;;) {
      ASSIGN_OR_RETURN(v1::PeerMessage message, channel->Receive(deadline));
      if (!message.has_verdict()) continue;
      if (message.verdict().migration_id() != options_.dial.migration_id)
        return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss,
                     "the destination answered for migration '{}'", message.verdict().migration_id());
      return message.verdict();
    }
  }();
  std::lock_guard lock(mutex_);
  talking_ = nullptr;
  return answer;
}

}  // namespace baton::migration
