#include "agent/migration/rate_meter.h"

#include <gtest/gtest.h>

namespace baton::migration {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr uint64_t kOneMiB = 1 << 20;

Clock::time_point AtMs(int ms) { return Clock::time_point(seconds(100)) + milliseconds(ms); }

TEST(RateMeter, ShortIntervalTellsNothing) {
  RateMeter meter(seconds(1));
  EXPECT_EQ(meter.Sample(AtMs(0), 0), std::nullopt);
  // 8 MiB in a millisecond: no 8 GiB a second.
  EXPECT_EQ(meter.Sample(AtMs(1), 8 * kOneMiB), std::nullopt);
  EXPECT_EQ(meter.Sample(AtMs(99), 8 * kOneMiB), std::nullopt);
  EXPECT_NEAR(static_cast<double>(meter.Sample(AtMs(200), 8 * kOneMiB).value_or(0)), 40.0 * kOneMiB, 1.0);
}

// Rounds of 1 MiB, each sent at once and followed by a quarter of a second of nothing, and asked at the worst
// of moments: right after each burst.
TEST(RateMeter, BurstsAreSpreadOverTheirPauses) {
  RateMeter meter(seconds(1));
  uint64_t total = 0;
  for (int ms = 0; ms < 5000; ms += 250) {
    const auto before = meter.Sample(AtMs(ms), total);
    total += kOneMiB;
    const auto after = meter.Sample(AtMs(ms + 1), total);
    if (ms < 1000) continue;
    ASSERT_TRUE(before && after) << ms;
    EXPECT_GE(*before, 4 * kOneMiB * 9 / 10) << ms;
    EXPECT_LE(*after, 5 * kOneMiB) << ms;
  }
}

TEST(RateMeter, SteadyRateIsTold) {
  RateMeter meter(seconds(1));
  for (int ms = 0; ms <= 10000; ms += 10) {
    const auto rate = meter.Sample(AtMs(ms), static_cast<uint64_t>(ms) * 1000);
    if (ms < 100) continue;
    ASSERT_TRUE(rate) << ms;
    EXPECT_NEAR(static_cast<double>(*rate), 1e6, 1.0) << ms;
  }
}

TEST(RateMeter, OldBytesAreForgotten) {
  RateMeter meter(seconds(1));
  meter.Sample(AtMs(0), 0);
  meter.Sample(AtMs(500), 100 * kOneMiB);
  EXPECT_EQ(meter.Sample(AtMs(1500), 100 * kOneMiB), 0u);
  // Also after a time in which nobody asked.
  EXPECT_NEAR(static_cast<double>(meter.Sample(AtMs(60000), 158 * kOneMiB).value_or(0)),
              58.0 * kOneMiB / 58.5, 1.0);
}

}  // namespace
}  // namespace baton::migration
