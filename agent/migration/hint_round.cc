#include "agent/migration/hint_round.h"

#include <algorithm>
#include <utility>

#include "agent/migration/reporter.h"

namespace baton::migration {
namespace {

// How often a wait looks at what cannot wake it.
constexpr Duration kLookAround = std::chrono::milliseconds(100);

}  // namespace

HintRound::HintRound(memory::HintSource& source, memory::PageSets none, HintOptions options)
    : source_(source), options_(options), session_(std::move(none)) {}

HintRound::~HintRound() { Finish(); }

// source_ takes a lock of its own around the calls of the listener, so it is never called with mutex_ held.
absl::Status HintRound::Begin() {
  const uint32_t poison = source_.poison();
  {
    std::lock_guard lock(mutex_);
    RETURN_IF_ERROR(session_.BaselineTaken({.post_copy = false, .poison = poison}));
    // Before it is: the answer may come before Publish returns.
    RETURN_IF_ERROR(session_.Published());
    published_at_ = Clock::now();
  }
  absl::Status published = source_.Publish(*this);
  if (!published.ok()) {
    std::lock_guard lock(mutex_);
    session_.Drop(Message(published));
  }
  return published;
}

absl::Status HintRound::AwaitHead(const std::function<absl::Status()>& interrupted) {
  const Clock::time_point begin = Clock::now();
  const Deadline head = Deadline::At(begin + options_.head);
  std::unique_lock lock(mutex_);
  Deadline look = Deadline::At(begin + options_.first_hint);
  uint64_t seen = 0;
  while (session_.collecting() && !head.Expired()) {
    const bool ended = changed_.wait_until(lock, look.Min(head).Min(Deadline::After(kLookAround)).when(),
                                           [&] { return !session_.collecting(); });
    if (ended) break;
    lock.unlock();
    const absl::Status status = interrupted();
    lock.lock();
    if (!status.ok()) return status;
    if (!look.Expired()) continue;
    const uint64_t now = session_.hinted_bytes();
    if (now - seen < options_.worth_waiting) break;
    seen = now;
    look = Deadline::After(options_.window);
  }
  waited_ += Clock::now() - begin;
  return absl::OkStatus();
}

bool HintRound::settled() const {
  std::lock_guard lock(mutex_);
  return !session_.collecting();
}

memory::PageSets HintRound::Hinted() const {
  std::lock_guard lock(mutex_);
  return session_.hinted();
}

absl::Status HintRound::Settle(const std::function<absl::Status()>& interrupted) {
  if (settled()) return absl::OkStatus();
  source_.PublishStop();
  const Clock::time_point begin = Clock::now();
  const Deadline stop = Deadline::At(begin + options_.stop);
  std::unique_lock lock(mutex_);
  while (session_.collecting() && !stop.Expired()) {
    if (changed_.wait_until(lock, stop.Min(Deadline::After(kLookAround)).when(),
                            [&] { return !session_.collecting(); }))
      break;
    lock.unlock();
    const absl::Status status = interrupted();
    lock.lock();
    if (!status.ok()) return status;
  }
  if (session_.collecting()) session_.Drop("the guest did not end its hints in time");
  waited_ += Clock::now() - begin;
  return absl::OkStatus();
}

absl::StatusOr<memory::PageSets> HintRound::Resolve(const memory::PageSets& dirty) {
  std::lock_guard lock(mutex_);
  return session_.Resolve(dirty);
}

void HintRound::Finish() {
  source_.Finish();
  std::lock_guard lock(mutex_);
  session_.Drop("given up");
}

v1::HintFigures HintRound::figures() const {
  std::lock_guard lock(mutex_);
  v1::HintFigures figures;
  figures.set_hinted(session_.hinted_bytes());
  if (answer_ != Duration{}) SetDuration(figures.mutable_answer(), answer_);
  SetDuration(figures.mutable_waited(), waited_);
  figures.set_unused(session_.why_dropped());
  return figures;
}

void HintRound::OnStart() {
  std::lock_guard lock(mutex_);
  session_.OnStart();
}

void HintRound::OnHint(uint32_t block, uint64_t first_page, uint64_t pages) {
  std::lock_guard lock(mutex_);
  session_.OnHint(block, first_page, pages);
}

void HintRound::OnStop() {
  std::lock_guard lock(mutex_);
  session_.OnStop();
  answer_ = Clock::now() - published_at_;
  changed_.notify_all();
}

void HintRound::OnLost(const std::string& why) {
  std::lock_guard lock(mutex_);
  session_.Drop(why);
  changed_.notify_all();
}

}  // namespace baton::migration
