#include "agent/stream/pacer.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/unit/stream/stream_testing.h"

namespace baton::stream {
namespace {

TEST(Pacer, Unlimited_NeverWaits) {
  Pacer pacer(0);
  auto start = Clock::now();
  for (int i = 0; i < 1000; ++i) ASSERT_TRUE(pacer.Acquire(1u << 30, Soon()).ok());
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(30));
}

TEST(Pacer, Limited_KeepsTheRateOverSeveralThreads) {
  Pacer pacer(10'000'000);
  auto start = Clock::now();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10; ++i) ASSERT_TRUE(pacer.Acquire(50'000, Soon()).ok());
    });
  }
  for (auto& thread : threads) thread.join();
  // 2 MB at 10 MB/s is 200 ms, less the burst of 10 ms and the last debt of 5 ms.
  EXPECT_GE(Clock::now() - start, std::chrono::milliseconds(180));
}

TEST(Pacer, HigherRate_WakesThoseWhoWait) {
  Pacer pacer(1000);
  ASSERT_TRUE(pacer.Acquire(1'000'000, Soon()).ok());  // a debt of 1000 s
  std::thread waiter([&] { EXPECT_TRUE(pacer.Acquire(1, Soon()).ok()); });
  pacer.SetRate(0);
  waiter.join();
}

TEST(Pacer, Cancel_WakesThoseWhoWait) {
  Pacer pacer(1000);
  ASSERT_TRUE(pacer.Acquire(1'000'000, Soon()).ok());
  std::thread waiter([&] { EXPECT_EQ(pacer.Acquire(1, Soon()).code(), absl::StatusCode::kCancelled); });
  pacer.Cancel();
  waiter.join();
}

TEST(Pacer, Deadline_EndsTheWait) {
  Pacer pacer(1000);
  ASSERT_TRUE(pacer.Acquire(1'000'000, Soon()).ok());
  EXPECT_EQ(pacer.Acquire(1, Deadline::After(std::chrono::milliseconds(10))).code(),
            absl::StatusCode::kDeadlineExceeded);
}

}  // namespace
}  // namespace baton::stream
