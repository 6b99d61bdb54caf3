// What tests of baton-shim expect of the guest that it serves.
#pragma once

#include <gtest/gtest.h>

#include "tests/integration/shim/shim_host.h"

namespace baton::test {

// Of a step of a shim or a guest that runs.
inline Deadline Soon() { return Deadline::After(std::chrono::seconds(60)); }

// Guests boot slowly under TCG on a machine that does other things, too.
inline Deadline Boot() { return Deadline::After(std::chrono::seconds(120)); }

// The guest executes and its disk answers.
inline void ExpectWrites(ShimHost& host) {
  for (int i = 0; i < 2; ++i) {
    host.console.out.SkipToEnd();
    auto line = host.console.out.WaitFor("PROGRESS", Soon());
    ASSERT_TRUE(line.ok()) << line.status();
    EXPECT_EQ(NumberIn(*line, "errors"), 0u) << *line;
  }
}

// The guest reads back everything it ever wrote.
inline void ExpectChecked(ShimHost& host) {
  auto result = host.console.Ask("q", "RESULT", Boot());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(NumberIn(*result, "errors"), 0u) << *result;
  EXPECT_EQ(NumberIn(*result, "memory_errors").value_or(0), 0u) << *result;
}

}  // namespace baton::test
