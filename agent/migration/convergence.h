// The policy of pre-copy: after each round, go on, switch over, give more time to the blackout, or give up.
// Pure: it sees figures of rounds and answers with a decision and its reason in words.
#pragma once

#include <cstdint>
#include <deque>
#include <string>

#include "baton/v1/types.pb.h"
#include "common/clock.h"

namespace baton::migration {

struct ConvergenceLimits {
  // Blackout aimed at.
  Duration max_downtime = std::chrono::milliseconds(300);
  // Rounds without progress before `on_stall` is carried out.
  uint32_t max_stalled_rounds = 5;
  v1::OnStall on_stall = v1::ON_STALL_RAISE_DOWNTIME;
  // Part of the blackout that does not depend on memory: stopping devices, states, two journal syncs.
  Duration fixed_downtime = std::chrono::milliseconds(20);
};

// A round that has just landed at the destination.
struct RoundSample {
  uint32_t round = 0;
  // What the round sent, and how long that took until the destination had it.
  uint64_t bytes = 0;
  Duration duration{0};
  // What was written meanwhile and would have to be sent next.
  uint64_t dirty_bytes = 0;
};

struct ConvergenceDecision {
  enum class Action { kContinue, kRaiseDowntime, kSwitchover, kAbort };
  Action action = Action::kContinue;
  std::string why;
  // Expected blackout if the switchover came now.
  Duration forecast{0};
  // Estimates after this round, bytes a second.
  uint64_t rate = 0;
  uint64_t dirty_rate = 0;
};

// "continue", "raise_downtime", "switchover", "abort".
const char* ActionName(ConvergenceDecision::Action action);

// One for each migration; not thread-safe.
//
// Progress is judged at round boundaries only, against the best of the recent rounds: a single good or bad
// round, or a round that takes long because the link is slow, neither resets nor trips anything. Once the
// forecast is within the limit, a switchover prefers a round that is not worse than its neighbours.
class Convergence {
 public:
  explicit Convergence(const ConvergenceLimits& limits) : limits_(limits), limit_(limits.max_downtime) {}

  ConvergenceDecision Judge(const RoundSample& sample);
  // A new limit in flight; raises made so far are forgotten.
  void SetMaxDowntime(Duration limit);
  // The limit now in force.
  Duration max_downtime() const { return limit_; }

 private:
  void Estimate(const RoundSample& sample);
  Duration Forecast(uint64_t dirty_bytes) const;
  ConvergenceDecision WithinLimit(ConvergenceDecision decision, uint64_t dirty, bool have_before);
  ConvergenceDecision AboveLimit(ConvergenceDecision decision);

  ConvergenceLimits limits_;
  Duration limit_;
  double rate_ = 0;              // bytes a second, smoothed
  std::deque<uint64_t> recent_;  // dirty bytes of recent rounds, the newest last
  uint32_t stalled_ = 0;
  uint32_t refined_ = 0;
};

}  // namespace baton::migration
