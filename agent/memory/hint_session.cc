#include "agent/memory/hint_session.h"

#include <utility>

namespace baton::memory {

absl::Status HintSession::BaselineTaken(const Conditions& conditions) {
  if (state_ != State::kNew) return absl::FailedPreconditionError("the session of hints has begun already");
  if (conditions.post_copy)
    return absl::FailedPreconditionError("hints leave pages out that post-copy would have to deliver");
  if (conditions.poison != 0)
    return Error(absl::StatusCode::kFailedPrecondition,
                 "the guest fills free pages with {:#010x}; left out they would arrive as zeroes",
                 conditions.poison);
  state_ = State::kBaseline;
  return absl::OkStatus();
}

absl::Status HintSession::Published() {
  if (state_ != State::kBaseline)
    return absl::FailedPreconditionError("hints were asked for without a baseline of the dirty sources");
  state_ = State::kPublished;
  return absl::OkStatus();
}

void HintSession::OnStart() {
  if (state_ == State::kPublished) state_ = State::kCollecting;
}

void HintSession::OnHint(uint32_t block, uint64_t first_page, uint64_t pages) {
  if (state_ != State::kCollecting || block >= hinted_.size()) return;
  hinted_[block].SetRange(first_page, pages);
  hinted_bytes_ += pages * kPageSize;
}

void HintSession::OnStop() {
  if (state_ == State::kCollecting) state_ = State::kStopped;
}

void HintSession::Drop(std::string why) {
  if (state_ == State::kResolved || state_ == State::kDropped) return;
  state_ = State::kDropped;
  why_dropped_ = std::move(why);
  for (PageSet& set : hinted_) set.Reset();
}

absl::StatusOr<PageSets> HintSession::Resolve(const PageSets& dirty) {
  if (state_ != State::kStopped && state_ != State::kDropped)
    return absl::FailedPreconditionError("hints may still come");
  if (dirty.size() != hinted_.size()) return absl::InvalidArgumentError("sets of other blocks");
  if (state_ == State::kStopped) state_ = State::kResolved;
  PageSets skip = hinted_;
  for (size_t i = 0; i < skip.size(); ++i) skip[i].Subtract(dirty[i]);
  return skip;
}

}  // namespace baton::memory
