#include "agent/migration/convergence.h"

#include <gtest/gtest.h>

#include <random>

namespace baton::migration {
namespace {

using Action = ConvergenceDecision::Action;
using std::chrono::milliseconds;

constexpr uint64_t kMiB = 1 << 20;

// A link of 100 MiB/s: a round of n MiB takes n * 10 ms.
RoundSample Round(uint32_t round, uint64_t sent_mib, uint64_t dirty_mib) {
  return {round, sent_mib * kMiB, milliseconds(10) * sent_mib, dirty_mib * kMiB};
}

ConvergenceLimits Limits(v1::OnStall on_stall) {
  ConvergenceLimits limits;
  limits.on_stall = on_stall;
  limits.max_stalled_rounds = 3;
  return limits;
}

TEST(Convergence, QuietGuestSwitchesOverAfterRoundZero) {
  Convergence convergence({});
  auto decision = convergence.Judge(Round(0, 256, 0));
  EXPECT_EQ(decision.action, Action::kSwitchover);
  EXPECT_EQ(decision.forecast, ConvergenceLimits{}.fixed_downtime);
  EXPECT_NE(decision.why.find("too little"), std::string::npos) << decision.why;
}

TEST(Convergence, FallingRoundsGoOnUntilTheLimitIsMet) {
  Convergence convergence(Limits(v1::ON_STALL_ABORT));
  EXPECT_EQ(convergence.Judge(Round(0, 1000, 500)).action, Action::kContinue);
  EXPECT_EQ(convergence.Judge(Round(1, 500, 250)).action, Action::kContinue);
  EXPECT_EQ(convergence.Judge(Round(2, 250, 120)).action, Action::kContinue);
  EXPECT_EQ(convergence.Judge(Round(3, 120, 27)).action, Action::kContinue)
      << "within, but still falling fast";
  auto decision = convergence.Judge(Round(4, 27, 26));
  EXPECT_EQ(decision.action, Action::kSwitchover) << decision.why;
  EXPECT_NEAR(std::chrono::duration<double>(decision.forecast).count(), 0.28, 0.01);
}

TEST(Convergence, WaitsForALocalMinimumButNotForEver) {
  Convergence convergence({});
  convergence.Judge(Round(0, 100, 10));
  convergence.Judge(Round(1, 10, 5));
  EXPECT_EQ(convergence.Judge(Round(2, 5, 9)).action, Action::kContinue) << "a peak";
  EXPECT_EQ(convergence.Judge(Round(3, 9, 5)).action, Action::kContinue) << "falling again";
  EXPECT_EQ(convergence.Judge(Round(4, 5, 5)).action, Action::kSwitchover);
}

TEST(Convergence, RefinementIsBounded) {
  Convergence convergence({});
  uint32_t round = 0;
  // Swings for ever between 4 and 9 MiB, always within the limit.
  while (convergence.Judge(Round(round, 10, round % 2 ? 4 : 9)).action == Action::kContinue)
    ASSERT_LT(++round, 10u);
}

TEST(Convergence, StallIsSeenAndAborted) {
  Convergence convergence(Limits(v1::ON_STALL_ABORT));
  ConvergenceDecision decision;
  uint32_t round = 0;
  do decision = convergence.Judge(Round(round++, 500, 500));
  while (decision.action == Action::kContinue && round < 20);
  EXPECT_EQ(decision.action, Action::kAbort);
  EXPECT_EQ(round, 4u) << "three rounds after the first";
  EXPECT_NE(decision.why.find("3 rounds without progress"), std::string::npos) << decision.why;
}

TEST(Convergence, ADipDoesNotResetTheJudgementForEver) {
  Convergence convergence(Limits(v1::ON_STALL_ABORT));
  uint32_t round = 0;
  // Every third round dips to the same depth: no progress over the best of the recent ones.
  while (convergence.Judge(Round(round, 500, round % 3 ? 500 : 300)).action == Action::kContinue)
    ASSERT_LT(++round, 8u);
}

TEST(Convergence, SlowButSteadyProgressIsNotAStall) {
  Convergence convergence(Limits(v1::ON_STALL_ABORT));
  uint64_t dirty = 2000;
  for (uint32_t round = 0; dirty > 40; ++round) {
    ASSERT_EQ(convergence.Judge(Round(round, dirty, dirty * 85 / 100)).action, Action::kContinue) << round;
    dirty = dirty * 85 / 100;
  }
}

TEST(Convergence, RaisesDowntimeInStepsThenAborts) {
  Convergence convergence(Limits(v1::ON_STALL_RAISE_DOWNTIME));
  int raised = 0;
  ConvergenceDecision decision;
  for (uint32_t round = 0; round < 100; ++round) {
    decision = convergence.Judge(Round(round, 5000, 5000));
    if (decision.action == Action::kRaiseDowntime) ++raised;
    if (decision.action == Action::kAbort) break;
  }
  EXPECT_EQ(decision.action, Action::kAbort);
  EXPECT_EQ(raised, 4) << "2, 4, 8, 16 times";
  EXPECT_EQ(convergence.max_downtime(), milliseconds(4800));
}

TEST(Convergence, RaiseThatIsEnoughSwitchesOverAtOnce) {
  Convergence convergence(Limits(v1::ON_STALL_RAISE_DOWNTIME));
  ConvergenceDecision decision;
  for (uint32_t round = 0; round < 20 && decision.action == Action::kContinue; ++round)
    decision = convergence.Judge(Round(round, 50, 50));
  EXPECT_EQ(decision.action, Action::kSwitchover);
  EXPECT_EQ(convergence.max_downtime(), milliseconds(600));
}

TEST(Convergence, SwitchoverAnswerSwitchesOverWhateverItCosts) {
  Convergence convergence(Limits(v1::ON_STALL_SWITCHOVER));
  ConvergenceDecision decision;
  for (uint32_t round = 0; round < 20 && decision.action == Action::kContinue; ++round)
    decision = convergence.Judge(Round(round, 5000, 5000));
  EXPECT_EQ(decision.action, Action::kSwitchover);
}

TEST(Convergence, NewLimitInFlightCounts) {
  Convergence convergence(Limits(v1::ON_STALL_ABORT));
  EXPECT_EQ(convergence.Judge(Round(0, 200, 200)).action, Action::kContinue);
  EXPECT_EQ(convergence.Judge(Round(1, 200, 200)).action, Action::kContinue);
  convergence.SetMaxDowntime(std::chrono::seconds(3));
  EXPECT_EQ(convergence.Judge(Round(2, 200, 200)).action, Action::kSwitchover);
}

TEST(Convergence, NoisyLinkNeverSwitchesOverAboveTheLimitAndAlwaysEnds) {
  for (uint64_t seed = 1; seed <= 500; ++seed) {
    std::mt19937_64 random(seed);
    Convergence convergence(Limits(seed % 2 ? v1::ON_STALL_ABORT : v1::ON_STALL_RAISE_DOWNTIME));
    const double dirty_ratio = 0.2 + 0.1 * static_cast<double>(random() % 14);
    double to_send = 2000;
    uint32_t round = 0;
    for (;; ++round) {
      ASSERT_LT(round, 400u) << "seed " << seed;
      const double noise = 0.5 + static_cast<double>(random() % 100) / 100;
      RoundSample sample{round, static_cast<uint64_t>(to_send) * kMiB,
                         std::chrono::microseconds(static_cast<int64_t>(to_send * 10000 * noise)), 0};
      to_send = std::min(2000.0, to_send * noise * dirty_ratio);
      sample.dirty_bytes = static_cast<uint64_t>(to_send) * kMiB;
      const auto decision = convergence.Judge(sample);
      ASSERT_FALSE(decision.why.empty());
      if (decision.action == Action::kSwitchover) {
        ASSERT_LE(decision.forecast, convergence.max_downtime());
        break;
      }
      if (decision.action == Action::kAbort) break;
    }
  }
}

}  // namespace
}  // namespace baton::migration
