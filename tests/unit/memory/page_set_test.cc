#include "agent/memory/page_set.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace baton::memory {
namespace {

TEST(PageSet, NextRun_FindsRunsAcrossWords) {
  PageSet set(200);
  set.SetRange(60, 80);
  set.Set(199);
  auto run = set.NextRun(0);
  EXPECT_EQ(run.first, 60u);
  EXPECT_EQ(run.count, 80u);
  run = set.NextRun(140);
  EXPECT_EQ(run.first, 199u);
  EXPECT_EQ(run.count, 1u);
  EXPECT_EQ(set.NextRun(200).count, 0u);
  EXPECT_EQ(set.Count(), 81u);
}

TEST(PageSet, SetRange_ClipsToSize) {
  PageSet set(70);
  set.SetRange(64, 1000);
  EXPECT_EQ(set.Count(), 6u);
  set.SetRange(70, 1);
  set.SetRange(~uint64_t{0}, ~uint64_t{0});
  EXPECT_EQ(set.Count(), 6u);
  set.SetAll();
  EXPECT_EQ(set.Count(), 70u);
  EXPECT_EQ(set.NextRun(0).count, 70u);
}

// Against a vector<bool>, with sizes around word boundaries.
TEST(PageSet, RandomOperations_MatchModel) {
  std::mt19937_64 random(7);
  for (uint64_t pages : {1u, 63u, 64u, 65u, 128u, 1000u}) {
    PageSet set(pages);
    std::vector<bool> model(pages);
    for (int step = 0; step < 300; ++step) {
      uint64_t first = random() % pages;
      uint64_t count = random() % (pages + 10);
      bool value = random() % 2;
      if (value) {
        set.SetRange(first, count);
      } else {
        set.ClearRange(first, count);
      }
      for (uint64_t p = first; p < std::min(pages, first + count); ++p) model[p] = value;

      std::vector<bool> from_runs(pages);
      uint64_t total = 0;
      for (auto run = set.NextRun(0); run.count != 0; run = set.NextRun(run.first + run.count)) {
        for (uint64_t p = run.first; p < run.first + run.count; ++p) from_runs[p] = true;
        total += run.count;
      }
      ASSERT_EQ(from_runs, model);
      ASSERT_EQ(set.Count(), total);
      ASSERT_EQ(set.Empty(), total == 0);
    }
  }
}

TEST(PageSet, UnionAndSubtract) {
  PageSet a(100), b(100);
  a.SetRange(0, 50);
  b.SetRange(40, 20);
  a.Union(b);
  EXPECT_EQ(a.Count(), 60u);
  a.Subtract(b);
  EXPECT_EQ(a.Count(), 40u);
  EXPECT_FALSE(a.Test(40));
}

}  // namespace
}  // namespace baton::memory
