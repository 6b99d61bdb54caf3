// The decision table against its rules, over every state of both ends.
#include "agent/vmm/libvirt/settlement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <libvirt/libvirt.h>

#include <functional>
#include <optional>

namespace baton::vmm {
namespace {

using Action = SettlementAction;
using Condition = DomainCondition;

// --- what the conditions mean, written down apart from the table ---

bool Runs(Condition c) {
  return c == Condition::kRunning || c == Condition::kRunningPostcopy ||
         c == Condition::kRunningPostcopyFailed;
}
bool IsCopy(Condition c) {
  return c != Condition::kUnreachable && c != Condition::kAbsent && c != Condition::kShutOff &&
         c != Condition::kShutOffMigrated && c != Condition::kShutOffFailed;
}

std::string Show(const SettlementInput& in) {
  return fmt::format(
      "source {}{}, destination {}{}, call {}, ran {}, handed over {}, was paused {}, watched {}, "
      "suspended {}, fenced {}, QEMU {}, unnoticed {}, recovery lasts {}",
      NameOf(in.source.condition), in.source.job ? " (job)" : "", NameOf(in.destination.condition),
      in.destination.job ? " (job)" : "", in.call_active, in.destination_ran, in.handed_over, in.was_paused,
      in.destination_watched, in.source_suspended, in.fenced, in.source_qemu, in.unnoticed,
      in.recovery_lasts);
}

// One of each kind, and none.
const char* const kSourceQemu[] = {"",          "postcopy-paused", "postcopy-recover", "postcopy-active",
                                   "completed", "something new"};

void ForAll(const std::function<void(const SettlementInput&)>& check) {
  for (int s = 0; s < kDomainConditions; ++s) {
    for (int d = 0; d < kDomainConditions; ++d) {
      for (int bits = 0; bits < 1 << 9; ++bits) {
        SettlementInput in;
        in.source = {static_cast<Condition>(s), (bits & 1) != 0};
        in.destination = {static_cast<Condition>(d), (bits & 2) != 0};
        in.call_active = bits & 4;
        in.destination_ran = bits & 8;
        in.handed_over = bits & 16;
        in.was_paused = bits & 32;
        in.destination_watched = bits & 64;
        in.source_suspended = bits & 128;
        in.fenced = bits & 256;
        check(in);
        if (testing::Test::HasFailure()) return;
        if (in.source.condition != Condition::kPausedPostcopyFailed) continue;
        for (const char* qemu : kSourceQemu) {
          for (int more = 0; more < 4; ++more) {
            in.source_qemu = qemu;
            in.unnoticed = more & 1;
            in.recovery_lasts = more & 2;
            check(in);
            if (testing::Test::HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(Settle, NothingRunsThatMayRunElsewhere) {
  int resumed = 0;
  ForAll([&](const SettlementInput& in) {
    if (Settle(in).action != Action::kResumeSource) return;
    ++resumed;
    const Condition d = in.destination.condition;
    EXPECT_TRUE(in.source.condition == Condition::kPausedMigration ||
                in.source.condition == Condition::kPausedIncoming ||
                (in.source.condition == Condition::kPaused && in.source_suspended && !in.was_paused))
        << "what others have paused is theirs to resume: " << Show(in);
    EXPECT_FALSE(IsCopy(d)) << Show(in);
    EXPECT_FALSE(in.destination_ran) << "its memory is older than its disks: " << Show(in);
    EXPECT_FALSE(in.call_active || in.source.job || in.destination.job) << Show(in);
    if (d == Condition::kUnreachable) {
      EXPECT_TRUE(in.fenced) << Show(in);
    } else {
      EXPECT_TRUE(in.destination_watched || d == Condition::kShutOffFailed)
          << "it may have run and ended unseen: " << Show(in);
    }
  });
  EXPECT_GT(resumed, 0);
}

TEST(Settle, NothingIsDestroyedByInference) {
  int destroyed = 0;
  ForAll([&](const SettlementInput& in) {
    const Action action = Settle(in).action;
    const Condition s = in.source.condition, d = in.destination.condition;
    if (action == Action::kDestroySource) {
      ++destroyed;
      EXPECT_FALSE(Runs(s)) << Show(in);
      EXPECT_TRUE(IsCopy(s)) << Show(in);
      EXPECT_TRUE(IsCopy(d)) << Show(in);
      EXPECT_TRUE(d == Condition::kRunning || in.destination_ran)
          << "seen to run, with all of its memory: " << Show(in);
    }
    if (action == Action::kDestroyDestination) {
      ++destroyed;
      EXPECT_TRUE(IsCopy(d) && !Runs(d)) << Show(in);
      EXPECT_FALSE(in.destination_ran) << Show(in);
      EXPECT_TRUE(IsCopy(s)) << "the source must be seen to hold the guest: " << Show(in);
      EXPECT_FALSE(s == Condition::kPausedPostcopy || s == Condition::kPausedPostcopyFailed)
          << "a part of the guest is at the destination: " << Show(in);
    }
    if (action == Action::kDestroySource || action == Action::kDestroyDestination) {
      EXPECT_FALSE(in.call_active || in.source.job || in.destination.job) << Show(in);
    }
  });
  EXPECT_GT(destroyed, 0);
}

TEST(Settle, WhatIsNotSeenIsUnknownAndAskedAgain) {
  ForAll([](const SettlementInput& in) {
    const Settlement out = Settle(in);
    if (in.source.condition == Condition::kUnreachable) {
      EXPECT_EQ(out.location, v1::UNKNOWN) << Show(in);
      EXPECT_TRUE(out.action == Action::kAskAgain || out.action == Action::kWait) << Show(in);
    }
    if (in.destination.condition != Condition::kUnreachable || in.fenced) return;
    EXPECT_NE(out.location, v1::DESTINATION) << Show(in);
    EXPECT_NE(out.location, v1::PAUSED_DESTINATION) << Show(in);
    EXPECT_NE(out.location, v1::LOST) << Show(in);
    if (out.location == v1::UNKNOWN) {
      EXPECT_TRUE(out.action == Action::kAskAgain || out.action == Action::kWait ||
                  out.action == Action::kPauseSource)
          << Show(in);
    } else {
      // Only what certainly never left the source is there without a look at the destination.
      EXPECT_TRUE(!in.handed_over || in.call_active || in.source.job || in.destination.job) << Show(in);
    }
  });
}

TEST(Settle, LocationIsWhatWasSeen) {
  ForAll([](const SettlementInput& in) {
    const Settlement out = Settle(in);
    const Condition s = in.source.condition, d = in.destination.condition;
    switch (out.location) {
      case v1::SOURCE:
        EXPECT_TRUE(Runs(s) && !Runs(d)) << Show(in);
        break;
      case v1::DESTINATION:
        EXPECT_TRUE(IsCopy(d) && !Runs(s)) << Show(in);
        break;
      case v1::PAUSED_SOURCE:
        EXPECT_TRUE(IsCopy(s) && !Runs(s) && !Runs(d)) << Show(in);
        break;
      case v1::PAUSED_DESTINATION:
        EXPECT_TRUE(IsCopy(d) && !Runs(d) && !Runs(s)) << Show(in);
        break;
      case v1::LOST:
        EXPECT_FALSE(Runs(s) || IsCopy(d)) << Show(in);
        break;
      default:
        EXPECT_EQ(out.location, v1::UNKNOWN) << Show(in);
    }
    EXPECT_FALSE(out.why.empty());
    if (out.action == Action::kNothing) {
      EXPECT_NE(out.location, v1::UNKNOWN) << "settled means known: " << Show(in);
      EXPECT_FALSE(IsCopy(s) && IsCopy(d)) << "settled means one copy at most: " << Show(in);
    }
  });
}

// Does what the table says until it says that there is nothing to do, in a world of which the table sees only
// what it is shown. `truth` is how the destination really is where it does not answer.
void Follow(SettlementInput in, Condition truth) {
  const SettlementInput begin = in;
  const bool two_at_first = Runs(in.source.condition) && Runs(truth);
  const bool any_at_first = IsCopy(in.source.condition) || IsCopy(truth);
  for (int step = 0; step < 6; ++step) {
    const Action action = Settle(in).action;
    switch (action) {
      case Action::kResumeSource:
        in.source.condition = Condition::kRunning;
        in.source_suspended = false;
        break;
      case Action::kPauseSource:
        in.source.condition = Condition::kPaused;
        in.source_suspended = true;
        break;
      case Action::kDestroySource:
        in.source.condition = Condition::kShutOff;
        break;
      case Action::kDestroyDestination:
        ASSERT_NE(in.destination.condition, Condition::kUnreachable) << Show(begin);
        in.destination.condition = truth = Condition::kAbsent;
        break;
      default:
        if (two_at_first && !begin.call_active && !begin.source.job &&
            begin.source.condition != Condition::kUnreachable &&
            (begin.handed_over || begin.destination_ran) && !begin.destination.job) {
          EXPECT_FALSE(Runs(in.source.condition)) << "two go on: " << Show(begin);
        }
        return;
    }
    EXPECT_FALSE(!two_at_first && Runs(in.source.condition) && Runs(truth))
        << NameOf(action) << " made two run: " << Show(begin) << ", in truth " << NameOf(truth);
    EXPECT_TRUE(!any_at_first || IsCopy(in.source.condition) || IsCopy(truth))
        << NameOf(action) << " ended the last copy: " << Show(begin) << ", in truth " << NameOf(truth);
  }
  ADD_FAILURE() << "never settles: " << Show(begin);
}

TEST(Settle, FollowedToItsEnd_NeverMakesTwoOrNone) {
  ForAll([](const SettlementInput& in) {
    // A source that was suspended by us runs only after we have resumed it.
    if (in.destination.condition != Condition::kUnreachable) return Follow(in, in.destination.condition);
    for (int d = 1; d < kDomainConditions; ++d) {
      const auto truth = static_cast<Condition>(d);
      // What the input states for certain holds.
      if (in.fenced && Runs(truth)) continue;
      if (!in.handed_over && !in.destination_ran && Runs(truth)) continue;
      Follow(in, truth);
    }
  });
}

// --- libvirt's states by name ---

struct Case {
  const char* what;
  Condition source, destination;
  Action action;
  v1::GuestLocation location;
  std::function<void(SettlementInput&)> more = nullptr;
};

TEST(Settle, StatesThatLibvirtLeavesBehind) {
  const Case cases[] = {
      {"a clean move of a transient domain", Condition::kAbsent, Condition::kRunning, Action::kNothing,
       v1::DESTINATION},
      {"a clean move of a persistent domain", Condition::kShutOffMigrated, Condition::kRunning,
       Action::kNothing, v1::DESTINATION},
      {"a cancelled move", Condition::kRunning, Condition::kAbsent, Action::kNothing, v1::SOURCE},
      {"the source's daemon restarted in perform, the destination cleaned up", Condition::kRunning,
       Condition::kShutOff, Action::kNothing, v1::SOURCE},
      {"PERFORM3_DONE: restarted after perform, finish was done", Condition::kPausedMigration,
       Condition::kRunning, Action::kDestroySource, v1::DESTINATION},
      {"PERFORM3_DONE: restarted after perform, finish never came, the destination cleaned up",
       Condition::kPausedMigration, Condition::kAbsent, Action::kResumeSource, v1::PAUSED_SOURCE},
      {"the same, and the destination still waits", Condition::kPausedMigration, Condition::kPausedIncoming,
       Action::kDestroyDestination, v1::PAUSED_SOURCE},
      {"connection lost in finish: the source was resumed, the destination runs", Condition::kRunning,
       Condition::kRunning, Action::kPauseSource, v1::UNKNOWN},
      {"and after that", Condition::kPaused, Condition::kRunning, Action::kDestroySource, v1::DESTINATION,
       [](SettlementInput& in) { in.source_suspended = true; }},
      {"connection lost in finish: the source was resumed, the destination does not answer",
       Condition::kRunning, Condition::kUnreachable, Action::kPauseSource, v1::UNKNOWN},
      {"and after that", Condition::kPaused, Condition::kUnreachable, Action::kAskAgain, v1::UNKNOWN,
       [](SettlementInput& in) { in.source_suspended = true; }},
      {"and it answers that it has nothing", Condition::kPaused, Condition::kAbsent, Action::kResumeSource,
       v1::PAUSED_SOURCE, [](SettlementInput& in) { in.source_suspended = true; }},
      {"connection lost in confirm", Condition::kPausedMigration, Condition::kRunning, Action::kDestroySource,
       v1::DESTINATION, [](SettlementInput& in) { in.destination_ran = true; }},
      {"connection lost in perform, the destination does not answer", Condition::kRunning,
       Condition::kUnreachable, Action::kNothing, v1::SOURCE,
       [](SettlementInput& in) { in.handed_over = false; }},
      {"it is said that the stream never got through, but the migration has stopped the source",
       Condition::kPausedMigration, Condition::kUnreachable, Action::kAskAgain, v1::UNKNOWN,
       [](SettlementInput& in) { in.handed_over = false; }},
      {"the destination's host died after perform", Condition::kPausedMigration, Condition::kUnreachable,
       Action::kAskAgain, v1::UNKNOWN},
      {"and was fenced", Condition::kPausedMigration, Condition::kUnreachable, Action::kResumeSource,
       v1::PAUSED_SOURCE, [](SettlementInput& in) { in.fenced = true; }},
      {"a fence for a destination that answers changes nothing", Condition::kPausedMigration,
       Condition::kRunning, Action::kDestroySource, v1::DESTINATION,
       [](SettlementInput& in) { in.fenced = true; }},
      {"it is known to have run at the destination, which was fenced", Condition::kPausedMigration,
       Condition::kUnreachable, Action::kOperator, v1::LOST,
       [](SettlementInput& in) { in.fenced = in.destination_ran = true; }},
      {"the guest ran at the destination and crashed there", Condition::kPausedMigration, Condition::kAbsent,
       Action::kOperator, v1::LOST, [](SettlementInput& in) { in.destination_ran = true; }},
      {"nobody watched the destination", Condition::kPausedMigration, Condition::kAbsent, Action::kOperator,
       v1::UNKNOWN, [](SettlementInput& in) { in.destination_watched = false; }},
      {"nor this one, but libvirt says that it did not get as far as running", Condition::kPausedMigration,
       Condition::kShutOffFailed, Action::kResumeSource, v1::PAUSED_SOURCE,
       [](SettlementInput& in) { in.destination_watched = false; }},
      {"the same, and the guest was seen to run there", Condition::kPausedMigration,
       Condition::kShutOffFailed, Action::kOperator, v1::LOST,
       [](SettlementInput& in) { in.destination_ran = true; }},
      {"the source's host died after the move", Condition::kUnreachable, Condition::kRunning,
       Action::kAskAgain, v1::UNKNOWN},
      {"a domain that its user had paused moved", Condition::kShutOffMigrated, Condition::kPaused,
       Action::kNothing, v1::PAUSED_DESTINATION, [](SettlementInput& in) { in.was_paused = true; }},
      {"the same, confirm was lost", Condition::kPaused, Condition::kPaused, Action::kDestroyDestination,
       v1::PAUSED_SOURCE, [](SettlementInput& in) { in.was_paused = true; }},
      {"the same, and its user resumed it at the destination", Condition::kPaused, Condition::kRunning,
       Action::kDestroySource, v1::DESTINATION, [](SettlementInput& in) { in.was_paused = true; }},
      {"both paused, it may have run at the destination", Condition::kPausedMigration, Condition::kPaused,
       Action::kOperator, v1::UNKNOWN},
      {"an I/O error at the destination after it ran", Condition::kPausedMigration, Condition::kPaused,
       Action::kDestroySource, v1::PAUSED_DESTINATION,
       [](SettlementInput& in) { in.destination_ran = true; }},
      {"post-copy under way", Condition::kPausedPostcopy, Condition::kRunningPostcopy, Action::kWait,
       v1::DESTINATION},
      {"post-copy lost its connection", Condition::kPausedPostcopyFailed, Condition::kRunningPostcopyFailed,
       Action::kRecoverPostcopy, v1::DESTINATION},
      {"the same, with the jobs that libvirt keeps", Condition::kPausedPostcopyFailed,
       Condition::kRunningPostcopyFailed, Action::kRecoverPostcopy, v1::DESTINATION,
       [](SettlementInput& in) { in.source.job = in.destination.job = true; }},
      {"the destination has not noticed", Condition::kPausedPostcopyFailed, Condition::kRunningPostcopy,
       Action::kWait, v1::DESTINATION,
       [](SettlementInput& in) { in.source.job = in.destination.job = true; }},
      {"the source has not noticed", Condition::kPausedPostcopy, Condition::kRunningPostcopyFailed,
       Action::kWait, v1::DESTINATION,
       [](SettlementInput& in) { in.source.job = in.destination.job = true; }},
      {"it is being recovered", Condition::kPausedPostcopyFailed, Condition::kRunningPostcopyFailed,
       Action::kWait, v1::DESTINATION, [](SettlementInput& in) { in.call_active = true; }},
      {"post-copy done, confirm lost", Condition::kPausedPostcopyFailed, Condition::kRunning,
       Action::kDestroySource, v1::DESTINATION},
      {"post-copy, the source's QEMU died", Condition::kAbsent, Condition::kRunningPostcopyFailed,
       Action::kOperator, v1::DESTINATION},
      {"and the destination has not noticed", Condition::kAbsent, Condition::kRunningPostcopy, Action::kWait,
       v1::DESTINATION, [](SettlementInput& in) { in.destination.job = true; }},
      {"and a person has ended what the destination had", Condition::kAbsent, Condition::kShutOff,
       Action::kNothing, v1::LOST, [](SettlementInput& in) { in.destination_ran = true; }},
      {"post-copy, the destination's QEMU died", Condition::kPausedPostcopyFailed, Condition::kShutOff,
       Action::kNothing, v1::LOST, [](SettlementInput& in) { in.destination_ran = true; }},
      {"the same, with the job that libvirt keeps at the source", Condition::kPausedPostcopyFailed,
       Condition::kAbsent, Action::kNothing, v1::LOST,
       [](SettlementInput& in) { in.source.job = in.destination_ran = true; }},
      {"the same, and the call that was to recover it lasts", Condition::kPausedPostcopyFailed,
       Condition::kAbsent, Action::kWait, v1::UNKNOWN,
       [](SettlementInput& in) { in.call_active = in.source.job = in.destination_ran = true; }},
      {"the same, and the source has not noticed", Condition::kPausedPostcopy, Condition::kAbsent,
       Action::kWait, v1::UNKNOWN, [](SettlementInput& in) { in.source.job = in.destination_ran = true; }},
      {"the same, and nobody saw it run", Condition::kPausedPostcopyFailed, Condition::kAbsent,
       Action::kOperator, v1::LOST, [](SettlementInput& in) { in.source.job = true; }},
      {"and a person has ended the source's half", Condition::kShutOff, Condition::kAbsent, Action::kNothing,
       v1::LOST},
      {"it ran there in post-copy, and its host was fenced", Condition::kPausedPostcopyFailed,
       Condition::kUnreachable, Action::kNothing, v1::LOST,
       [](SettlementInput& in) { in.source.job = in.fenced = in.destination_ran = true; }},
      {"the guest shut itself down meanwhile", Condition::kShutOff, Condition::kAbsent, Action::kNothing,
       v1::LOST},
      {"the only copy has not been started", Condition::kAbsent, Condition::kPausedIncoming,
       Action::kOperator, v1::UNKNOWN},
      {"the guest crashed at the source before it was handed over", Condition::kCrashed,
       Condition::kPausedIncoming, Action::kDestroyDestination, v1::PAUSED_SOURCE},
      {"the move is under way", Condition::kRunning, Condition::kPausedIncoming, Action::kWait, v1::SOURCE,
       [](SettlementInput& in) { in.call_active = in.source.job = in.destination.job = true; }},
      {"it is being finished", Condition::kPausedMigration, Condition::kPausedIncoming, Action::kWait,
       v1::UNKNOWN, [](SettlementInput& in) { in.source.job = in.destination.job = true; }},
      {"the source's daemon died in finish, which goes on without it", Condition::kPausedMigration,
       Condition::kPausedIncoming, Action::kWait, v1::UNKNOWN,
       [](SettlementInput& in) { in.destination.job = true; }},
      {"and has started the guest", Condition::kPausedMigration, Condition::kRunning, Action::kWait,
       v1::DESTINATION, [](SettlementInput& in) { in.destination.job = true; }},
      {"and the source was resumed all the same", Condition::kRunning, Condition::kRunning,
       Action::kPauseSource, v1::UNKNOWN, [](SettlementInput& in) { in.destination.job = true; }},
      {"post-copy that has lost its source keeps its job for ever", Condition::kAbsent,
       Condition::kRunningPostcopyFailed, Action::kOperator, v1::DESTINATION,
       [](SettlementInput& in) { in.destination.job = true; }},
      {"it is being confirmed", Condition::kPausedMigration, Condition::kRunning, Action::kWait,
       v1::DESTINATION, [](SettlementInput& in) { in.source.job = true; }},
  };
  for (const Case& c : cases) {
    SettlementInput in;
    in.source.condition = c.source;
    in.destination.condition = c.destination;
    if (c.more) c.more(in);
    const Settlement out = Settle(in);
    EXPECT_STREQ(NameOf(out.action), NameOf(c.action)) << c.what << ": " << out.why;
    EXPECT_EQ(out.location, c.location) << c.what << ": " << out.why;
  }
}

TEST(Settle, PostCopyIsRecoveredWhereItIsBroken) {
  int recovered = 0, looked = 0;
  ForAll([&](const SettlementInput& in) {
    const Settlement out = Settle(in);
    if (out.action != Action::kRecoverPostcopy) return;
    ++recovered;
    EXPECT_FALSE(in.call_active) << Show(in);
    EXPECT_EQ(in.source.condition, Condition::kPausedPostcopyFailed) << Show(in);
    EXPECT_EQ(out.location, v1::DESTINATION) << Show(in);
    EXPECT_THAT(in.source_qemu, testing::AnyOf("", "postcopy-paused", "something new"))
        << "what goes on is left alone: " << Show(in);
    const Condition d = in.destination.condition;
    if (d == Condition::kRunningPostcopyFailed || d == Condition::kPausedPostcopyFailed) return;
    ++looked;
    EXPECT_TRUE(d == Condition::kRunningPostcopy || d == Condition::kPausedPostcopy) << Show(in);
    EXPECT_TRUE(in.unnoticed) << "it has the time to notice: " << Show(in);
  });
  EXPECT_GT(recovered, looked);
  EXPECT_GT(looked, 0);
}

TEST(Settle, ABrokenPostCopyThatIsNotRecoveredYet_SaysWhatWasSeen) {
  SettlementInput in;
  in.source = {Condition::kPausedPostcopyFailed, true};
  in.destination = {Condition::kRunningPostcopy, true};
  const auto why = [&in] { return Settle(in).why; };
  for (const char* qemu : {"", "postcopy-paused"}) {
    in.source_qemu = qemu;
    EXPECT_THAT(why(), testing::HasSubstr("the destination has not noticed yet"));
  }
  EXPECT_THAT(why(), testing::HasSubstr("with a job, its QEMU postcopy-paused; destination"));
  for (Condition destination : {Condition::kRunningPostcopy, Condition::kRunningPostcopyFailed}) {
    in.destination.condition = destination;
    in.source_qemu = "postcopy-active";
    EXPECT_THAT(why(), testing::HasSubstr("post-copy goes on"));
    in.source_qemu = "postcopy-recover-setup";
    EXPECT_THAT(why(), testing::HasSubstr("is being connected again"));
    in.source_qemu = "completed";
    EXPECT_THAT(why(), testing::HasSubstr("has sent everything"));
  }
  in.source_qemu = "postcopy-paused";
  in.destination = {Condition::kUnreachable, false};
  EXPECT_EQ(Settle(in).action, Action::kAskAgain);
  EXPECT_THAT(why(), testing::HasSubstr("the destination does not answer"));
  in.source.condition = Condition::kPausedPostcopy;
  in.source_qemu.clear();
  in.destination = {Condition::kRunningPostcopyFailed, true};
  EXPECT_THAT(why(), testing::HasSubstr("the source has not noticed yet"));
}

TEST(Settle, ARecoveryThatGetsNoFurther_SaysSo) {
  SettlementInput in;
  in.source = {Condition::kPausedPostcopyFailed, true};
  in.call_active = true;
  for (Condition destination : {Condition::kRunningPostcopy, Condition::kRunningPostcopyFailed}) {
    in.destination = {destination, true};
    in.source_qemu = "postcopy-paused";
    in.recovery_lasts = false;
    EXPECT_THAT(Settle(in).why, testing::HasSubstr("libvirt is at work"));
    in.recovery_lasts = true;
    const Settlement hangs = Settle(in);
    EXPECT_EQ(hangs.action, Action::kWait);
    EXPECT_EQ(hangs.location, v1::DESTINATION);
    EXPECT_THAT(hangs.why, testing::HasSubstr("has not got there"));
    // It did, and lasts as long as there is something to send.
    in.source_qemu = "postcopy-active";
    EXPECT_THAT(Settle(in).why, testing::HasSubstr("libvirt is at work"));
  }
}

// What a half has lost does not come back: whoever reads the record is told what there is to do.
TEST(Settle, AHalfOfAGuest_IsLeftAsItIs_AndAPersonIsTold) {
  int halves = 0;
  ForAll([&](const SettlementInput& in) {
    const Condition s = in.source.condition, d = in.destination.condition;
    const bool source_half =
        s == Condition::kPausedPostcopyFailed && d != Condition::kUnreachable && !IsCopy(d);
    const bool destination_half =
        s != Condition::kUnreachable && !IsCopy(s) &&
        (d == Condition::kRunningPostcopyFailed || d == Condition::kPausedPostcopyFailed);
    if (in.call_active || !(source_half || (destination_half && !in.source.job))) return;
    ++halves;
    const Settlement out = Settle(in);
    EXPECT_THAT(out.why, testing::HasSubstr("virsh destroy")) << Show(in);
    EXPECT_THAT(out.why, testing::HasSubstr("a power cut to it")) << Show(in);
    EXPECT_EQ(out.location, source_half ? v1::LOST : v1::DESTINATION) << Show(in);
    const bool over = source_half && in.destination_ran;
    EXPECT_EQ(out.action, over ? Action::kNothing : Action::kOperator) << Show(in);
    if (over) {
      EXPECT_THAT(out.why, testing::HasSubstr("must not run")) << Show(in);
    }
  });
  EXPECT_GT(halves, 0);
}

TEST(ConditionOf, ReadsLibvirtsStates) {
  const auto source = MigrationRole::kSource, destination = MigrationRole::kDestination;
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_RUNNING, VIR_DOMAIN_RUNNING_BOOTED, source), Condition::kRunning);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_RUNNING, VIR_DOMAIN_RUNNING_POSTCOPY, destination),
            Condition::kRunningPostcopy);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_RUNNING, VIR_DOMAIN_RUNNING_POSTCOPY_FAILED, destination),
            Condition::kRunningPostcopyFailed);
  // Reasons of other states have the same numbers.
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_SHUTDOWN, VIR_DOMAIN_RUNNING_POSTCOPY, source), Condition::kRunning);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_MIGRATION, source), Condition::kPausedMigration);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_MIGRATION, destination),
            Condition::kPausedIncoming);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_STARTING_UP, destination),
            Condition::kPausedIncoming);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_USER, source), Condition::kPaused);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_IOERROR, destination), Condition::kPaused);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_POSTCOPY_FAILED, source),
            Condition::kPausedPostcopyFailed);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_CRASHED, source), Condition::kCrashed);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_SHUTOFF, VIR_DOMAIN_SHUTOFF_MIGRATED, source),
            Condition::kShutOffMigrated);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_SHUTOFF, VIR_DOMAIN_SHUTOFF_CRASHED, source), Condition::kShutOff);
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_SHUTOFF, VIR_DOMAIN_SHUTOFF_FAILED, destination),
            Condition::kShutOffFailed);
  // There it says nothing of this migration.
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_SHUTOFF, VIR_DOMAIN_SHUTOFF_FAILED, source), Condition::kShutOff);
  for (int reason : {VIR_DOMAIN_SHUTOFF_UNKNOWN, VIR_DOMAIN_SHUTOFF_SHUTDOWN, VIR_DOMAIN_SHUTOFF_DESTROYED,
                     VIR_DOMAIN_SHUTOFF_CRASHED, VIR_DOMAIN_SHUTOFF_DAEMON})
    EXPECT_EQ(ConditionOf(VIR_DOMAIN_SHUTOFF, reason, destination), Condition::kShutOff) << reason;
  EXPECT_EQ(ConditionOf(VIR_DOMAIN_NOSTATE, 0, source), Condition::kUnreachable);
  EXPECT_EQ(ConditionOf(77, 0, source), Condition::kUnreachable);
}

}  // namespace
}  // namespace baton::vmm
