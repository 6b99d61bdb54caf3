#include "agent/migration/convergence.h"

#include <fmt/format.h>

#include <algorithm>

namespace baton::migration {
namespace {

using Action = ConvergenceDecision::Action;

// A round of less than this says more about latency than about the link.
constexpr uint64_t kTellingBytes = 1 << 20;
// Weight of the newest round in the smoothed rate.
constexpr double kNewest = 0.5;
// Less than this is not worth another round, which costs about as much as it would save.
constexpr uint64_t kQuietBytes = 256 << 10;
// A round made progress if it left at most this part of the best recent one.
constexpr double kProgress = 0.9;
// Still falling this fast, another round within the limit shortens the blackout.
constexpr double kFalling = 0.7;
// Worse than the best recent round by this, a better moment is likely to come.
constexpr double kPeak = 1.25;
// Rounds spent on a better moment once the limit is met.
constexpr uint32_t kMaxRefinements = 4;
constexpr int kMaxRaise = 16;

std::string Ms(Duration d) {
  return fmt::format("{:.1f} ms", std::chrono::duration<double, std::milli>(d).count());
}
std::string MiB(uint64_t bytes) { return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20)); }

}  // namespace

const char* ActionName(Action action) {
  switch (action) {
    case Action::kContinue:
      return "continue";
    case Action::kRaiseDowntime:
      return "raise_downtime";
    case Action::kSwitchover:
      return "switchover";
    case Action::kAbort:
      return "abort";
  }
  return "?";
}

void Convergence::SetMaxDowntime(Duration limit) {
  limits_.max_downtime = limit;
  limit_ = limit;
  stalled_ = 0;
}

void Convergence::Estimate(const RoundSample& sample) {
  const double seconds = std::max(1e-6, std::chrono::duration<double>(sample.duration).count());
  const double rate = static_cast<double>(sample.bytes) / seconds;
  if (rate_ == 0) {
    rate_ = rate;
  } else if (sample.bytes >= kTellingBytes) {
    rate_ += kNewest * (rate - rate_);
  } else {
    // Too short to show what the link can do; it can do at least this.
    rate_ = std::max(rate_, rate);
  }
}

Duration Convergence::Forecast(uint64_t dirty_bytes) const {
  if (dirty_bytes == 0) return limits_.fixed_downtime;
  if (rate_ < 1) return std::chrono::hours(1);
  const double seconds = std::min(3600.0, static_cast<double>(dirty_bytes) / rate_);
  return limits_.fixed_downtime +
         std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

ConvergenceDecision Convergence::Judge(const RoundSample& sample) {
  Estimate(sample);
  const double seconds = std::max(1e-6, std::chrono::duration<double>(sample.duration).count());
  ConvergenceDecision decision;
  decision.forecast = Forecast(sample.dirty_bytes);
  decision.rate = static_cast<uint64_t>(rate_);
  decision.dirty_rate = static_cast<uint64_t>(static_cast<double>(sample.dirty_bytes) / seconds);

  const bool have_before = !recent_.empty();
  const uint64_t best = have_before ? *std::min_element(recent_.begin(), recent_.end()) : UINT64_MAX;
  const bool progress =
      !have_before || static_cast<double>(sample.dirty_bytes) <= kProgress * static_cast<double>(best);
  stalled_ = progress ? 0 : stalled_ + 1;
  const bool within = decision.forecast <= limit_;
  decision = within ? WithinLimit(std::move(decision), sample.dirty_bytes, have_before)
                    : AboveLimit(std::move(decision));
  recent_.push_back(sample.dirty_bytes);
  while (recent_.size() > std::max<size_t>(limits_.max_stalled_rounds, 3)) recent_.pop_front();
  return decision;
}

ConvergenceDecision Convergence::WithinLimit(ConvergenceDecision decision, uint64_t dirty, bool have_before) {
  const std::string met = fmt::format("{} left, forecast {} is within the limit of {}", MiB(dirty),
                                      Ms(decision.forecast), Ms(limit_));
  decision.action = Action::kSwitchover;
  if (dirty <= kQuietBytes) {
    decision.why = met + "; too little for another round";
    return decision;
  }
  const auto ratio = [&](uint64_t base) {
    return static_cast<double>(dirty) / static_cast<double>(std::max<uint64_t>(1, base));
  };
  if (refined_ < kMaxRefinements) {
    if (!have_before || ratio(recent_.back()) < kFalling) {
      ++refined_;
      decision.action = Action::kContinue;
      decision.why = met + (have_before ? " and still falling fast" : "; one more round shows where it goes");
      return decision;
    }
    if (ratio(*std::min_element(recent_.begin(), recent_.end())) > kPeak) {
      ++refined_;
      decision.action = Action::kContinue;
      decision.why = met + ", but recent rounds were better: waits for a better moment";
      return decision;
    }
  }
  decision.why = met + " and no longer falling";
  return decision;
}

ConvergenceDecision Convergence::AboveLimit(ConvergenceDecision decision) {
  const std::string above =
      fmt::format("forecast {} is above the limit of {}", Ms(decision.forecast), Ms(limit_));
  if (stalled_ < limits_.max_stalled_rounds) {
    decision.why = stalled_ == 0 ? above + ", rounds make progress"
                                 : fmt::format("{}, {} of {} rounds without progress", above, stalled_,
                                               limits_.max_stalled_rounds);
    return decision;
  }
  const std::string stalled = fmt::format("{} after {} rounds without progress", above, stalled_);
  switch (limits_.on_stall) {
    case v1::ON_STALL_SWITCHOVER:
      decision.action = Action::kSwitchover;
      decision.why = stalled + "; the policy says to switch over";
      return decision;
    case v1::ON_STALL_POSTCOPY:  // of the VMM engine; here as the API says
    case v1::ON_STALL_RAISE_DOWNTIME:
      if (limit_ < kMaxRaise * limits_.max_downtime) {
        limit_ = std::min(limit_ * 2, limits_.max_downtime * kMaxRaise);
        stalled_ = 0;
        refined_ = kMaxRefinements;
        const bool fits = decision.forecast <= limit_;
        decision.action = fits ? Action::kSwitchover : Action::kRaiseDowntime;
        decision.why =
            fmt::format("{}; limit raised to {}{}", stalled, Ms(limit_), fits ? ", which is enough" : "");
        return decision;
      }
      decision.action = Action::kAbort;
      decision.why =
          fmt::format("{}; the limit was raised {} times and cannot be raised further", stalled, kMaxRaise);
      return decision;
    default:
      decision.action = Action::kAbort;
      decision.why = stalled + "; the policy says to abort";
      return decision;
  }
}

}  // namespace baton::migration
