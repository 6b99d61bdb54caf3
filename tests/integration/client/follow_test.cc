// Following migrations: lines in a pipe, the live display on a terminal, interrupts, time limits, restarts of
// batond.
#include <signal.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/integration/client/fixture.h"

namespace baton::testing {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;

size_t CountOf(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++count;
  return count;
}

// Lets a migration created by batonctl pass through its life.
void PlayToEnd(FakeBatond* batond, const v1::Migration& end) {
  std::string id = end.name().substr(end.name().find('/') + 1);
  for (v1::Phase phase : {v1::PREPARING, v1::PRECOPY, v1::SWITCHOVER})
    batond->PutMigration(ExampleMigration(id, phase));
  batond->PutMigration(end);
}

TEST_F(CtlTest, Migrate_InAPipe_OneLineAChange_Exits0) {
  auto ctl = StartPiped({"migrate", "web1", "--to", "b"});
  ASSERT_TRUE(batond_->WaitForWatches(1));
  PlayToEnd(batond_.get(), ExampleMigration("m1", v1::SUCCEEDED));
  EXPECT_EQ(ctl->Wait(), 0) << ctl->err();
  EXPECT_THAT(ctl->out(), Not(HasSubstr("\x1b")));
  for (const char* part : {"  QUEUED\n", "  PREPARING\n", "  PRECOPY\n", "  SWITCHOVER\n", "  SUCCEEDED\n",
                           "round 0: sent 192 MiB"}) {
    EXPECT_EQ(CountOf(ctl->out(), part), 1u) << part << ctl->out();
  }
  EXPECT_THAT(ctl->out(), HasSubstr("web1 moved from a to b in 6.00 s"));
  EXPECT_THAT(ctl->out(), HasSubstr("blackout: vCPUs 21.0 ms, devices 19.0 ms (limit 300 ms)"));
}

TEST_F(CtlTest, Migrate_Json_PrintsOnlyTheFinalRecord) {
  auto ctl = StartPiped({"migrate", "web1", "--to", "b", "-o", "json"});
  ASSERT_TRUE(batond_->WaitForWatches(1));
  PlayToEnd(batond_.get(), ExampleMigration("m1", v1::SUCCEEDED));
  EXPECT_EQ(ctl->Wait(), 0) << ctl->err();
  EXPECT_EQ(json::parse(ctl->out())["phase"], "SUCCEEDED");
}

TEST_F(CtlTest, Migrate_EachEnd_HasItsExitCode) {
  struct Case {
    v1::Phase phase;
    v1::GuestLocation location;
    int code;
    const char* says;
  };
  const Case cases[] = {{v1::FAILED, v1::SOURCE, 20, "runs at the source, host a"},
                        {v1::CANCELLED, v1::SOURCE, 21, "was cancelled"},
                        {v1::FAILED, v1::PAUSED_SOURCE, 22, "stands still at the source"},
                        {v1::FAILED, v1::UNKNOWN, 23, "migration resolve m4 --fenced"},
                        {v1::FAILED, v1::LOST, 24, "runs nowhere"},
                        {v1::FAILED, v1::DESTINATION, 25, "runs at the destination, host b"}};
  int number = 0;
  for (const Case& c : cases) {
    ++number;
    auto ctl = StartPiped({"migrate", "web1", "--to", "b"});
    ASSERT_TRUE(batond_->WaitForWatches(number));
    v1::Migration end =
        FailedMigration("m" + std::to_string(number), v1::DRAIN_TIMEOUT, c.location, "disk0 did not stop");
    end.set_phase(c.phase);
    batond_->PutMigration(end);
    EXPECT_EQ(ctl->Wait(), c.code);
    EXPECT_THAT(ctl->err(), HasSubstr(c.says));
    EXPECT_THAT(ctl->err(), HasSubstr("disk0 did not stop"));
  }
}

TEST_F(CtlTest, Migrate_Interrupted_SaysThatItGoesOn_Exits130) {
  auto ctl = StartPiped({"migrate", "web1", "--to", "b"});
  ASSERT_TRUE(batond_->WaitForWatches(1));
  ctl->Signal(SIGINT);
  EXPECT_EQ(ctl->Wait(), 130);
  EXPECT_THAT(ctl->err(), HasSubstr("migrations/m1 goes on"));
  EXPECT_THAT(ctl->err(), HasSubstr("batonctl cancel m1"));
  EXPECT_FALSE(batond_->GetMigration("migrations/m1").cancel_requested());
}

TEST_F(CtlTest, Migrate_TimeOver_Exits8) {
  CtlResult r = Run({"migrate", "web1", "--to", "b", "--timeout", "3s"});
  EXPECT_EQ(r.code, 8);
  EXPECT_THAT(r.err, HasSubstr("goes on"));
}

TEST_F(CtlTest, Migrate_OnATerminal_RedrawsInPlaceAndRestoresTheCursor) {
  auto ctl = StartOnTerminal({"migrate", "web1", "--to", "b"});
  ASSERT_TRUE(ctl->ReadUntil("\x1b[?25l"));
  ASSERT_TRUE(batond_->WaitForWatches(1));
  batond_->PutMigration(ExampleMigration("m1", v1::PRECOPY));
  ASSERT_TRUE(ctl->ReadUntil("64.0 MiB left"));
  ASSERT_TRUE(ctl->ReadUntil("blackout 34.0 ms"));
  EXPECT_THAT(ctl->out(), HasSubstr("A\r")) << "frames go back to where the last one began";
  batond_->PutMigration(ExampleMigration("m1", v1::SUCCEEDED));
  EXPECT_EQ(ctl->Wait(), 0);
  EXPECT_GT(ctl->out().rfind("\x1b[?25h"), ctl->out().rfind("\x1b[?25l"));
  EXPECT_THAT(ctl->out(), HasSubstr("web1 moved from a to b"));
}

TEST_F(CtlTest, Migrate_CtrlCOnATerminal_RestoresTheCursor) {
  auto ctl = StartOnTerminal({"migrate", "web1", "--to", "b"});
  ASSERT_TRUE(ctl->ReadUntil("\x1b[?25l"));
  ctl->Write("\x03");
  EXPECT_EQ(ctl->Wait(), 130);
  EXPECT_GT(ctl->out().rfind("\x1b[?25h"), ctl->out().rfind("\x1b[?25l"));
  EXPECT_THAT(ctl->out(), HasSubstr("goes on"));
}

TEST_F(CtlTest, Migrate_NarrowTerminal_NoLineIsWider) {
  auto ctl = StartOnTerminal({"migrate", "web1", "--to", "b"}, 40);
  ASSERT_TRUE(batond_->WaitForWatches(1));
  batond_->PutMigration(ExampleMigration("m1", v1::PRECOPY));
  ASSERT_TRUE(ctl->ReadUntil("forecast:"));
  // Lines of the block end with "erase to the end of the line".
  std::istringstream lines(ctl->out().substr(ctl->out().rfind("A\r")));
  std::string line;
  while (std::getline(lines, line)) {
    if (line.find("\x1b[K") == std::string::npos || line.find("+") != std::string::npos) continue;
    std::string visible;
    for (size_t i = 0; i < line.size(); ++i) {
      if (line[i] == '\x1b') {
        while (i < line.size() && !isalpha(static_cast<unsigned char>(line[i]))) ++i;
      } else if ((line[i] & 0xc0) != 0x80 && line[i] != '\r') {
        visible += line[i];
      }
    }
    EXPECT_LE(visible.size(), 41u) << visible;
  }
  ctl->Signal(SIGTERM);
  EXPECT_EQ(ctl->Wait(), 143);
}

TEST_F(CtlTest, Watch_ServerRestarts_NoGapAndNothingTwice) {
  batond_->RepeatOnResume();
  batond_->PutMigration(ExampleMigration("m1", v1::PREPARING));
  auto ctl = StartPiped({"watch", "migration", "m1"});
  ASSERT_TRUE(batond_->WaitForWatches(1));
  batond_->PutMigration(ExampleMigration("m1", v1::PRECOPY));
  ASSERT_TRUE(ctl->ReadUntil("PRECOPY"));
  batond_->Stop();
  ASSERT_TRUE(ctl->ReadErrorUntil("trying again"));
  // Happens while the client is away.
  batond_->PutMigration(ExampleMigration("m1", v1::SWITCHOVER));
  batond_->Start();
  ASSERT_TRUE(batond_->WaitForWatches(2));
  batond_->PutMigration(ExampleMigration("m1", v1::SUCCEEDED));
  EXPECT_EQ(ctl->Wait(), 0) << ctl->err();
  for (const char* phase : {"PREPARING", "PRECOPY", "SWITCHOVER", "FINISHING", "SUCCEEDED"}) {
    EXPECT_EQ(CountOf(ctl->out(), std::string("  ") + phase + "\n"), 1u) << phase << ctl->out();
  }
}

TEST_F(CtlTest, Watch_ServerIsBack_SaysSoBeforeTheNextChange) {
  batond_->PutMigration(ExampleMigration("m1", v1::PRECOPY));
  auto ctl = StartPiped({"watch", "migration", "m1"});
  ASSERT_TRUE(ctl->ReadUntil("PRECOPY"));
  batond_->Stop();
  ASSERT_TRUE(ctl->ReadErrorUntil("trying again"));
  batond_->Start();
  EXPECT_TRUE(ctl->ReadErrorUntil("connected again"));
  batond_->PutMigration(ExampleMigration("m1", v1::SUCCEEDED));
  EXPECT_EQ(ctl->Wait(), 0) << ctl->err();
}

TEST_F(CtlTest, WatchAll_ServerRestarts_EveryRevisionOnce) {
  batond_->RepeatOnResume();
  batond_->PutMigration(ExampleMigration("m1", v1::PREPARING));
  auto ctl = StartPiped({"watch", "-o", "json"});
  ASSERT_TRUE(ctl->ReadUntil("PREPARING"));
  batond_->PutMigration(ExampleMigration("m1", v1::PRECOPY));
  ASSERT_TRUE(ctl->ReadUntil("PRECOPY"));
  batond_->Stop();
  batond_->PutMigration(ExampleMigration("m2", v1::QUEUED));
  batond_->Start();
  ASSERT_TRUE(batond_->WaitForWatches(2));
  ASSERT_TRUE(ctl->ReadErrorUntil("connected again"));
  batond_->PutMigration(ExampleMigration("m2", v1::PREPARING));
  ASSERT_TRUE(ctl->ReadUntil("\"revision\":\"4\""));
  ctl->Signal(SIGINT);
  EXPECT_EQ(ctl->Wait(), 130);
  std::vector<std::string> revisions;
  std::istringstream lines(ctl->out());
  for (std::string line; std::getline(lines, line);) revisions.push_back(json::parse(line)["revision"]);
  EXPECT_EQ(revisions, (std::vector<std::string>{"1", "2", "3", "4"}));
}

TEST_F(CtlTest, Watch_RevisionCompactedAway_StartsOverWithPresentStates) {
  batond_->PutMigration(ExampleMigration("m1", v1::PREPARING));
  auto ctl = StartPiped({"watch", "m1"});
  ASSERT_TRUE(batond_->WaitForWatches(1));
  batond_->Stop();
  batond_->PutMigration(ExampleMigration("m1", v1::PRECOPY));
  batond_->PutMigration(ExampleMigration("m1", v1::SUCCEEDED));
  batond_->Compact(3);
  batond_->Start();
  EXPECT_EQ(ctl->Wait(), 0) << ctl->err();
  EXPECT_THAT(ctl->out(), HasSubstr("SUCCEEDED"));
}

TEST_F(CtlTest, Watch_Ended_LeavesAtOnceWithItsExitCode) {
  batond_->PutMigration(FailedMigration("m1", v1::NOT_CONVERGING, v1::SOURCE, "no progress"));
  CtlResult r = Run({"watch", "m1"});
  EXPECT_EQ(r.code, 20);
  EXPECT_THAT(r.err, HasSubstr("NOT_CONVERGING"));
}

TEST_F(CtlTest, CancelWait_Exits21) {
  Run({"migrate", "web1", "--to", "b", "--no-wait"});
  auto ctl = StartPiped({"cancel", "web1", "--wait"});
  ASSERT_TRUE(batond_->WaitForWatches(1));
  v1::Migration end = FailedMigration("m1", v1::CANCELLED_BY_REQUEST, v1::SOURCE, "cancelled on request");
  end.set_phase(v1::CANCELLED);
  batond_->PutMigration(end);
  EXPECT_EQ(ctl->Wait(), 21);
}

TEST_F(CtlTest, Top_OnATerminal_QLeavesAndRestores) {
  auto ctl = StartOnTerminal({"top", "--interval", "100ms"});
  termios before = ctl->Mode();
  ASSERT_TRUE(ctl->ReadUntil("q leaves"));
  ctl->Write("q");
  EXPECT_EQ(ctl->Wait(), 0);
  EXPECT_THAT(ctl->out(), HasSubstr("\x1b[?1049l"));
  EXPECT_EQ(ctl->Mode().c_lflag, before.c_lflag);
}

TEST_F(CtlTest, Console_OnATerminal_RawUntilCtrlBracket) {
  auto ctl = StartOnTerminal({"vm", "console", "web1"});
  ASSERT_TRUE(ctl->ReadUntil("login: "));
  EXPECT_EQ(ctl->Mode().c_lflag & ICANON, 0u);
  // Ctrl-C belongs to the guest.
  ctl->Write("hello\x03world");
  ASSERT_TRUE(ctl->ReadUntil("WORLD"));
  EXPECT_THAT(ctl->out(), HasSubstr("HELLO\x03"));
  ctl->Write("\x1d");
  EXPECT_EQ(ctl->Wait(), 0);
  EXPECT_NE(ctl->Mode().c_lflag & ICANON, 0u);
}

TEST_F(CtlTest, Console_Signals_RestoreTheTerminal) {
  for (int signal : {SIGTERM, SIGHUP, SIGQUIT, SIGABRT}) {
    auto ctl = StartOnTerminal({"vm", "console", "web1"});
    ASSERT_TRUE(ctl->ReadUntil("login: "));
    ctl->Signal(signal);
    EXPECT_EQ(ctl->Wait(), 128 + signal);
    EXPECT_NE(ctl->Mode().c_lflag & ICANON, 0u) << signal;
  }
}

TEST_F(CtlTest, Console_ThroughPipes) {
  CtlResult r = Run({"vm", "console", "web1"}, "exit\n");
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(r.out, "login: EXIT\n");
  EXPECT_EQ(r.err, "");
  CtlResult timed = Run({"vm", "console", "web1", "--timeout", "5s"});
  EXPECT_EQ(timed.code, 8);
  EXPECT_EQ(timed.out, "login: ");
  EXPECT_EQ(Run({"vm", "console", "nope"}).code, 3);
}

TEST_F(CtlTest, Console_ServerGone_SaysSo) {
  auto ctl = StartPiped({"vm", "console", "web1"}, /*keep_input=*/true);
  ASSERT_TRUE(ctl->ReadUntil("login: "));
  batond_->Stop();
  EXPECT_EQ(ctl->Wait(), 7);
  EXPECT_THAT(ctl->err(), HasSubstr("batond"));
}

}  // namespace
}  // namespace baton::testing
