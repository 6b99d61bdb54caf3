#include "agent/virtio/handoff.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

namespace baton::virtio {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

HandoffQuestion Best() {
  HandoffQuestion q;
  q.wanted = InflightAnswer::kHandoff;
  q.suspends = q.confirms_cancel = q.exact = true;
  q.classes.reads = q.classes.writes = true;
  return q;
}

struct Row {
  const char* what;
  HandoffQuestion question;
  HandoffVerdict verdict;
  const char* reason;
};

TEST(Handoff, TheRulesOneByOne) {
  auto with = [](auto&& change) {
    HandoffQuestion q = Best();
    change(q);
    return q;
  };
  using Q = HandoffQuestion;
  const Row rows[] = {
      {"all is well", Best(), HandoffVerdict::kHandoff, "confirms that it has given its requests up"},
      {"policy", with([](Q& q) { q.wanted = InflightAnswer::kDrain; }), HandoffVerdict::kDrain, "policy"},
      {"suspend", with([](Q& q) { q.suspends = false; }), HandoffVerdict::kDrain, "cannot stop without"},
      {"exact", with([](Q& q) { q.exact = false; }), HandoffVerdict::kDrain, "cannot be told exactly"},
      {"zone append", with([](Q& q) { q.classes.not_idempotent = true; }), HandoffVerdict::kDrain,
       "done twice"},
      {"cancel", with([](Q& q) { q.confirms_cancel = false; }), HandoffVerdict::kDrain, "nothing confirms"},
      {"fence", with([](Q& q) { q.confirms_cancel = false, q.fenced = true; }), HandoffVerdict::kHandoff,
       "fenced"},
      {"reads only", with([](Q& q) { q.confirms_cancel = q.classes.writes = false; }),
       HandoffVerdict::kHandoff, "only reads"},
      {"network", with([](Q& q) { q.confirms_cancel = false, q.classes = {.harmless = true}; }),
       HandoffVerdict::kHandoff, "without harm"},
      {"nothing", with([](Q& q) { q.confirms_cancel = false, q.classes = {}; }), HandoffVerdict::kHandoff,
       "nothing is in flight"},
      {"unknown set at the bound", with([](Q& q) { q.exact = false, q.bound_passed = true; }),
       HandoffVerdict::kAbort, "cannot be told exactly"},
  };
  for (const Row& row : rows) {
    const HandoffDecision decision = DecideHandoff(row.question);
    EXPECT_EQ(decision.verdict, row.verdict) << row.what;
    EXPECT_THAT(decision.reason, HasSubstr(row.reason)) << row.what;
  }
}

// The rules again, as predicates that every one of the 1024 combinations must satisfy.
TEST(Handoff, EveryCombinationKeepsTheRules) {
  std::map<HandoffVerdict, int> seen;
  for (unsigned bits = 0; bits < 1 << 10; ++bits) {
    auto bit = [&](unsigned k) { return (bits >> k & 1) != 0; };
    HandoffQuestion q;
    q.wanted = bit(0) ? InflightAnswer::kHandoff : InflightAnswer::kDrain;
    q.suspends = bit(1);
    q.confirms_cancel = bit(2);
    q.fenced = bit(3);
    q.exact = bit(4);
    q.bound_passed = bit(5);
    q.classes = {.reads = bit(6), .writes = bit(7), .not_idempotent = bit(8), .harmless = bit(9)};
    const bool may = q.wanted == InflightAnswer::kHandoff && q.suspends && q.exact &&
                     !q.classes.not_idempotent && (!q.classes.writes || q.confirms_cancel || q.fenced);
    const HandoffDecision d = DecideHandoff(q);
    ++seen[d.verdict];
    EXPECT_EQ(d.verdict, may              ? HandoffVerdict::kHandoff
                         : q.bound_passed ? HandoffVerdict::kAbort
                                          : HandoffVerdict::kDrain)
        << bits;
    EXPECT_EQ(d.resume_must_wait, may && q.classes.reads && !q.confirms_cancel) << bits;
    EXPECT_THAT(d.reason, StartsWith(d.verdict == HandoffVerdict::kHandoff ? "handed off: "
                                     : d.verdict == HandoffVerdict::kDrain ? "drains: "
                                                                           : "aborts: "));
  }
  EXPECT_EQ(seen.size(), 3u);
}

}  // namespace
}  // namespace baton::virtio
