#include "agent/stream/pacer.h"

#include <algorithm>

namespace baton::stream {
namespace {
constexpr double kBurstSeconds = 0.010;
}

void Pacer::Refill(Clock::time_point now) {
  double seconds = std::chrono::duration<double>(now - refilled_).count();
  refilled_ = now;
  double rate = static_cast<double>(rate_);
  tokens_ = std::min(tokens_ + seconds * rate, rate * kBurstSeconds);
}

void Pacer::SetRate(uint64_t rate) {
  {
    std::lock_guard lock(mutex_);
    // What was earned and owed so far is settled at the old rate. Debt made while there was no limit is none.
    if (rate_ == 0) {
      tokens_ = 0;
      refilled_ = Clock::now();
    } else {
      Refill(Clock::now());
    }
    rate_ = rate;
  }
  changed_.notify_all();
}

uint64_t Pacer::rate() const {
  std::lock_guard lock(mutex_);
  return rate_;
}

absl::Status Pacer::Acquire(uint64_t bytes, Deadline deadline) {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (cancelled_) return Error(absl::StatusCode::kCancelled, "sending was cancelled");
    if (rate_ == 0) return absl::OkStatus();
    auto now = Clock::now();
    Refill(now);
    if (tokens_ >= 0) {
      tokens_ -= static_cast<double>(bytes);
      return absl::OkStatus();
    }
    if (now >= deadline.when()) {
      return Error(absl::StatusCode::kDeadlineExceeded, "bandwidth limit of {} bytes/s leaves no time",
                   rate_);
    }
    auto paid = now +
                std::chrono::duration_cast<Clock::duration>(
                    std::chrono::duration<double>(-tokens_ / static_cast<double>(rate_))) +
                std::chrono::microseconds(1);
    changed_.wait_until(lock, std::min(paid, deadline.when()));
  }
}

void Pacer::Cancel() {
  {
    std::lock_guard lock(mutex_);
    cancelled_ = true;
  }
  changed_.notify_all();
}

}  // namespace baton::stream
