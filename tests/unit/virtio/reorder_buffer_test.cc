#include "agent/virtio/reorder_buffer.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <numeric>
#include <random>

namespace baton::virtio {
namespace {

std::vector<int> DrainAll(ReorderBuffer<int>& buffer) {
  std::vector<int> out;
  buffer.Drain([&](int value) { out.push_back(value); });
  return out;
}

// The example of the 2024 thread: elem1, elem2, elem0.
TEST(ReorderBufferTest, HoldsWhatOvertakesUntilItsTurn) {
  ReorderBuffer<int> buffer(3);
  EXPECT_TRUE(buffer.Complete(1, 101));
  EXPECT_TRUE(DrainAll(buffer).empty());
  EXPECT_TRUE(buffer.Complete(2, 102));
  EXPECT_TRUE(DrainAll(buffer).empty());
  EXPECT_EQ(buffer.held(), 2u);
  EXPECT_TRUE(buffer.Complete(0, 100));
  EXPECT_EQ(DrainAll(buffer), (std::vector<int>{100, 101, 102}));
  EXPECT_EQ(buffer.held(), 0u);
  EXPECT_EQ(buffer.next(), 3u);
}

TEST(ReorderBufferTest, RefusesWhatIsDoneOrOutsideTheWindow) {
  ReorderBuffer<int> buffer(3);
  EXPECT_TRUE(buffer.Complete(2, 0));
  EXPECT_FALSE(buffer.Complete(2, 0));
  EXPECT_FALSE(buffer.Complete(3, 0));
  EXPECT_TRUE(buffer.Complete(0, 0));
  DrainAll(buffer);
  EXPECT_FALSE(buffer.Complete(0, 0));
  EXPECT_TRUE(buffer.Complete(3, 0));
}

TEST(ReorderBufferTest, ReleaseGivesWhatIsHeldOldestFirstAndRestartContinues) {
  ReorderBuffer<int> buffer(4);
  buffer.Complete(3, 103);
  buffer.Complete(1, 101);
  std::vector<int> out;
  buffer.Release([&](int value) { out.push_back(value); });
  EXPECT_EQ(out, (std::vector<int>{101, 103}));
  buffer.Restart(9);
  EXPECT_TRUE(buffer.Complete(9, 109));
  EXPECT_EQ(DrainAll(buffer), (std::vector<int>{109}));
}

TEST(ReorderBufferTest, AnyOrderWithinTheWindowComesOutInOrder) {
  const bool ok = rc::check([] {
    const auto window = *rc::gen::inRange<uint32_t>(1, 300);
    std::mt19937_64 random(*rc::gen::arbitrary<uint64_t>());
    ReorderBuffer<int> buffer(window);
    std::vector<uint64_t> flight(window);
    std::iota(flight.begin(), flight.end(), 0);
    uint64_t begun = window;
    int expected = 0;
    for (int step = 0; step < 2000 && !flight.empty(); ++step) {
      std::swap(flight[random() % flight.size()], flight.back());
      RC_ASSERT(buffer.Complete(flight.back(), static_cast<int>(flight.back())));
      flight.pop_back();
      buffer.Drain([&](int value) { RC_ASSERT(value == expected++); });
      while (begun < buffer.next() + window) flight.push_back(begun++);
    }
    RC_ASSERT(buffer.held() + flight.size() == window);
  });
  EXPECT_TRUE(ok);
}

}  // namespace
}  // namespace baton::virtio
