// The present rate of what is sent in bursts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <optional>

#include "common/clock.h"

namespace baton::migration {

// Bytes a second over the last window, pauses between bursts included: a round that is sent in a few
// milliseconds and followed by a wait says nothing of what a connection carries. Asked at any moments. Not
// thread-safe.
class RateMeter {
 public:
  explicit RateMeter(Duration window) : window_(window) {}

  // `total`: bytes sent until `now`, both never less than before. Nothing until a tenth of the window has
  // passed since the first call.
  std::optional<uint64_t> Sample(Clock::time_point now, uint64_t total) {
    // Closer together they would only make the queue longer.
    if (samples_.empty() || now - samples_.back().at >= window_ / 16) samples_.push_back({now, total});
    // The oldest one is the last that is a whole window ago.
    while (samples_.size() > 1 && now - samples_[1].at >= window_) samples_.pop_front();
    const Sampled& oldest = samples_.front();
    if (now - oldest.at < window_ / 10) return std::nullopt;
    const double seconds = std::chrono::duration<double>(now - oldest.at).count();
    return static_cast<uint64_t>(static_cast<double>(total - std::min(total, oldest.total)) / seconds);
  }

 private:
  struct Sampled {
    Clock::time_point at;
    uint64_t total;
  };
  const Duration window_;
  std::deque<Sampled> samples_;
};

}  // namespace baton::migration
