// What RecoverSplit says of a ring whose back-end died, against a model that knows the truth.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <random>

#include "tests/unit/virtio/fake_memory.h"

namespace baton::virtio {
namespace {

using testing::ElementsAre;

TEST(SplitRecovery, NothingOutstanding_IsExactWithoutAnyAssumption) {
  FakeSplitRing r(4);
  r.Submit(0);
  r.Complete(0);
  auto got = RecoverSplit(r.memory, r.ring, false);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->base, 1);
  EXPECT_TRUE(got->exact);
  EXPECT_TRUE(got->heads.empty());
}

TEST(SplitRecovery, OutstandingButOnlyExactAllowed_IsUnknown) {
  FakeSplitRing r(4);
  r.Submit(0);
  auto got = RecoverSplit(r.memory, r.ring, false);
  EXPECT_EQ(ReasonOf(got.status()), v1::INFLIGHT_UNKNOWN);
}

TEST(SplitRecovery, OrderedHistory_NeedsNoRewriting) {
  FakeSplitRing r(8);
  for (uint16_t i = 0; i < 100; ++i) {
    r.Submit(i % 3);
    r.Complete(i % 3);
  }
  r.Submit(1);
  r.Submit(2);
  auto got = RecoverSplit(r.memory, r.ring, true);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->base, 100);
  EXPECT_THAT(got->heads, ElementsAre(1, 2));
  EXPECT_FALSE(got->rewrite);
}

TEST(SplitRecovery, OvertakenRequest_IsFoundAndItsSlotMustBeRewritten) {
  FakeSplitRing r(8);
  for (uint16_t i = 0; i < 50; ++i) {
    r.Submit(i % 2);
    r.Complete(i % 2);
  }
  r.Submit(0);
  r.Submit(1);
  r.Complete(1);
  auto got = RecoverSplit(r.memory, r.ring, true);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->base, 51);
  EXPECT_THAT(got->heads, ElementsAre(0));
  EXPECT_TRUE(got->rewrite);
}

// The mailing list's example: an old request's slot is overwritten while it is in flight.
TEST(SplitRecovery, OverwrittenSlot_IsUnknown) {
  FakeSplitRing r(4);
  for (uint16_t head : {0, 1, 2, 3}) r.Submit(head);
  for (uint16_t head : {1, 2, 3}) r.Complete(head);
  r.Submit(1);
  auto got = RecoverSplit(r.memory, r.ring, true);
  EXPECT_EQ(ReasonOf(got.status()), v1::INFLIGHT_UNKNOWN) << got.status();
}

TEST(SplitRecovery, HeadBeyondTheRing_IsAMismatch) {
  FakeSplitRing r(4);
  r.Submit(9);
  EXPECT_EQ(ReasonOf(RecoverSplit(r.memory, r.ring, true).status()), v1::STATE_MISMATCH);
}

TEST(SplitRecovery, IndicesTooFarApart_AreAMismatch) {
  FakeSplitRing r(4);
  r.SetIndices(10, 5);
  EXPECT_EQ(ReasonOf(RecoverSplit(r.memory, r.ring, true).status()), v1::STATE_MISMATCH);
}

// A driver that reuses the descriptor freed last, as Linux does, and a device that completes out of order;
// killed at a random moment. Whenever RecoverSplit answers, and no request was overtaken by a whole ring, the
// answer is the truth.
struct Outcome {
  bool answered = false, right = false, assumption_held = true;
};

Outcome KilledAtRandom(uint64_t seed, uint16_t n, int depth, double disorder) {
  std::mt19937_64 random(seed);
  FakeSplitRing r(n);
  uint16_t start = static_cast<uint16_t>(random());
  r.SetIndices(start, start);
  struct Request {
    uint16_t head;
    uint16_t at;  // avail index
  };
  std::vector<uint16_t> free;
  for (int i = n; i-- > 0;) free.push_back(static_cast<uint16_t>(i));
  std::vector<Request> flight;
  // A ring that begins at a random index must have been around once.
  const int steps = 4 * n + static_cast<int>(random() % (8 * n));
  for (int step = 0; step < steps || r.avail == r.used; ++step) {
    if (!free.empty() && static_cast<int>(flight.size()) < depth && (flight.empty() || random() % 2)) {
      uint16_t head = free.back();
      free.pop_back();
      flight.push_back({head, r.avail});
      r.Submit(head);
    } else if (!flight.empty()) {
      size_t pick = std::uniform_real_distribution<>(0, 1)(random) < disorder ? random() % flight.size() : 0;
      r.Complete(flight[pick].head);
      free.push_back(flight[pick].head);
      flight.erase(flight.begin() + static_cast<long>(pick));
    }
  }
  Outcome out;
  std::vector<uint16_t> truth;
  for (const Request& request : flight) {
    truth.push_back(request.head);
    out.assumption_held &= static_cast<uint16_t>(r.avail - request.at) < n;
  }
  auto got = RecoverSplit(r.memory, r.ring, true);
  out.answered = got.ok();
  if (got.ok()) {
    std::vector<uint16_t> heads = got->heads;
    std::sort(heads.begin(), heads.end());
    std::sort(truth.begin(), truth.end());
    out.right = heads == truth && got->base == r.used;
  }
  return out;
}

TEST(SplitRecovery, NeverWrongWhereItsAssumptionHolds) {
  EXPECT_TRUE(rc::check([] {
    auto seed = *rc::gen::arbitrary<uint64_t>();
    auto n = *rc::gen::element<uint16_t>(8, 16, 64, 128);
    auto depth = *rc::gen::inRange(1, n + 1);
    auto disorder = *rc::gen::element(0.0, 0.05, 0.3, 1.0);
    Outcome out = KilledAtRandom(seed, n, depth, disorder);
    if (out.answered && out.assumption_held) RC_ASSERT(out.right);
  }));
}

TEST(SplitRecovery, AnswersForTheDepthsThatDisksSee) {
  for (int depth : {1, 2, 4, 8, 16}) {
    int answered = 0, wrong = 0;
    for (uint64_t seed = 0; seed < 300; ++seed) {
      Outcome out = KilledAtRandom(seed * 7919 + static_cast<uint64_t>(depth), 128, depth, 0.3);
      answered += out.answered;
      wrong += out.answered && out.assumption_held && !out.right;
    }
    std::printf("depth %d: %d of 300 answered, %d wrong\n", depth, answered, wrong);
    EXPECT_EQ(wrong, 0);
    EXPECT_GE(answered, depth <= 2 ? 285 : depth <= 8 ? 200 : 1) << "depth " << depth;
  }
}

}  // namespace
}  // namespace baton::virtio
