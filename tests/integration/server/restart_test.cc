// batond killed with SIGKILL in every phase: the migration goes on, and a watch misses nothing.
#include <gtest/gtest.h>

#include "tests/integration/server/fake_agent.h"
#include "tests/integration/server/until.h"
#include "tests/integration/server/watcher.h"

namespace baton::test {
namespace {

using Kind = v1::Command::BodyCase;

class RestartTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(batond_.Start().ok());
    a_ = std::make_unique<FakeAgent>("a", batond_.NewChannel());
    b_ = std::make_unique<FakeAgent>("b", batond_.NewChannel());
    a_->AddVm("web1", 1);
    ASSERT_TRUE(a_->AwaitSession() && b_->AwaitSession());
    api_ = std::make_unique<Api>(batond_.channel());
    // The VM may be told after Hello.
    ASSERT_TRUE(Until([&] { return api_->GetVm("web1").ok(); }));
  }
  void Create() {
    auto created = api_->Create("web1", "b", "r1");
    ASSERT_TRUE(created.ok()) << created.status();
    name_ = created->name();
    id_ = name_.substr(name_.find('/') + 1);
    watcher_ = std::make_unique<Watcher>(batond_.NewChannel(), name_);
  }
  void Report(FakeAgent& agent, v1::Role role, v1::Phase phase, v1::HandoverState handover, bool running,
              bool done = false, v1::Reason reason = v1::REASON_UNSPECIFIED) {
    v1::SideReport report;
    report.set_migration_id(id_);
    report.set_vm("web1");
    report.set_role(role);
    report.set_phase(phase);
    report.set_handover(handover);
    report.set_epoch(handover == v1::OWNER ? 2 : 1);
    report.set_guest_running(running);
    report.set_done(done);
    report.set_reason(reason);
    agent.Report(report);
  }
  // The sides' part from here to the end.
  void Precopy() {
    Report(*a_, v1::ROLE_SOURCE, v1::PRECOPY, v1::IDLE, true);
    Report(*b_, v1::ROLE_DESTINATION, v1::PRECOPY, v1::IDLE, false);
  }
  void Yield() { Report(*a_, v1::ROLE_SOURCE, v1::SWITCHOVER, v1::YIELDED, false); }
  void Own() {
    b_->AddVm("web1", 2);
    Report(*b_, v1::ROLE_DESTINATION, v1::FINISHING, v1::OWNER, true, true, v1::NONE);
  }
  void Release() {
    Report(*a_, v1::ROLE_SOURCE, v1::SUCCEEDED, v1::RELEASED, false, true, v1::NONE);
    a_->RemoveVm("web1");
  }
  // Everything that the agents tell of a migration that succeeds, once its source was told to start.
  void MoveOver() {
    Precopy();
    Yield();
    Own();
    Release();
  }
  void ExpectSuccess() {
    v1::Migration end = watcher_->AwaitPhase(v1::SUCCEEDED);
    EXPECT_EQ(end.phase(), v1::SUCCEEDED) << end.DebugString();
    EXPECT_EQ(end.guest_location(), v1::DESTINATION);
    EXPECT_TRUE(a_->AwaitAck(id_) && b_->AwaitAck(id_));
    auto vm = api_->GetVm("web1");
    ASSERT_TRUE(vm.ok()) << vm.status();
    EXPECT_EQ(vm->host(), "hosts/b");
    EXPECT_EQ(vm->epoch(), 2u);
    ExpectNoGaps();
  }
  // Everything that the log holds of this migration came to the watch, once and in order, restarts or not.
  void ExpectNoGaps() {
    auto seen = watcher_->seen();
    ASSERT_FALSE(seen.empty());
    for (size_t i = 1; i < seen.size(); ++i) EXPECT_LT(seen[i - 1].revision(), seen[i].revision());
    grpc::ClientContext context;
    v1::WatchMigrationsRequest request;
    request.set_name(name_);
    request.set_start_revision(seen.front().revision());
    auto stream = api_->migrations().WatchMigrations(&context, request);
    v1::WatchMigrationsResponse response;
    for (size_t i = 1; i < seen.size(); ++i) {
      ASSERT_TRUE(stream->Read(&response));
      EXPECT_EQ(response.revision(), seen[i].revision());
      EXPECT_EQ(response.migration().phase(), seen[i].migration().phase());
    }
    context.TryCancel();
    while (stream->Read(&response)) {
    }
    (void)stream->Finish();
  }
  void Restart() {
    batond_.Restart();
    int count = ++restarts_;
    ASSERT_TRUE(a_->AwaitSession(1 + count) && b_->AwaitSession(1 + count));
  }

  BatondHarness batond_;
  std::unique_ptr<FakeAgent> a_, b_;
  std::unique_ptr<Api> api_;
  std::unique_ptr<Watcher> watcher_;
  std::string name_, id_;
  int restarts_ = 0;
};

TEST_F(RestartTest, Undisturbed) {
  Create();
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing));
  Precopy();
  EXPECT_EQ(watcher_->AwaitPhase(v1::PRECOPY).phase(), v1::PRECOPY);
  Yield();
  EXPECT_EQ(watcher_->AwaitPhase(v1::SWITCHOVER).guest_location(), v1::UNKNOWN);
  Own();
  Release();
  ExpectSuccess();
}

TEST_F(RestartTest, APhaseDoesNotWaitForFiguresThatWereHeldBack) {
  Create();
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing));
  Precopy();
  watcher_->AwaitPhase(v1::PRECOPY);
  Duration best = std::chrono::hours(1);
  // Figures alone are kept for a quarter of a second, so that more may come.
  auto after_figures = [&](v1::Phase now, v1::HandoverState handover, const std::function<void()>& report,
                           v1::Phase phase) {
    v1::SideReport figures;
    figures.set_migration_id(id_);
    figures.set_vm("web1");
    figures.set_role(v1::ROLE_SOURCE);
    figures.set_phase(now);
    figures.set_handover(handover);
    figures.set_epoch(1);
    figures.set_guest_running(handover == v1::IDLE);
    figures.mutable_progress()->set_remaining(now);
    a_->Report(figures);
    const Clock::time_point start = Clock::now();
    report();
    watcher_->AwaitPhase(phase);
    best = std::min(best, Clock::now() - start);
  };
  after_figures(
      v1::PRECOPY, v1::IDLE, [this] { Yield(); }, v1::SWITCHOVER);
  after_figures(
      v1::SWITCHOVER, v1::YIELDED, [this] { Own(); }, v1::FINISHING);
  after_figures(
      v1::SWITCHOVER, v1::YIELDED, [this] { Release(); }, v1::SUCCEEDED);
  EXPECT_LT(best, std::chrono::milliseconds(150));
  ExpectSuccess();
}

TEST_F(RestartTest, KilledWhileInspecting) {
  a_->Hold(Kind::kInspectVm);
  Create();
  ASSERT_TRUE(a_->AwaitCommand(Kind::kInspectVm));
  Restart();
  ASSERT_TRUE(a_->AwaitCommand(Kind::kInspectVm, 2));
  a_->Release(Kind::kInspectVm);
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing));
  MoveOver();
  ExpectSuccess();
}

TEST_F(RestartTest, KilledWhileTheDestinationPrepares) {
  b_->Hold(Kind::kPrepareIncoming);
  Create();
  ASSERT_TRUE(b_->AwaitCommand(Kind::kPrepareIncoming));
  Restart();
  ASSERT_TRUE(b_->AwaitCommand(Kind::kPrepareIncoming, 2));
  b_->Release(Kind::kPrepareIncoming);
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing));
  MoveOver();
  ExpectSuccess();
}

TEST_F(RestartTest, KilledWhileTheSourceStarts) {
  a_->Hold(Kind::kStartOutgoing);
  Create();
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing));
  Restart();
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing, 2));
  EXPECT_EQ(a_->LastCommand(Kind::kStartOutgoing).start_outgoing().token(), std::string(32, 't'));
  a_->Release(Kind::kStartOutgoing);
  MoveOver();
  ExpectSuccess();
}

TEST_F(RestartTest, KilledInEveryPhaseOfOneMigration) {
  Create();
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing));
  Precopy();
  watcher_->AwaitPhase(v1::PRECOPY);
  Restart();
  Yield();
  watcher_->AwaitPhase(v1::SWITCHOVER);
  Restart();
  EXPECT_EQ(api_->Get(name_)->phase(), v1::SWITCHOVER);
  Own();
  watcher_->AwaitPhase(v1::FINISHING);
  // The source lost its peer; batond tells it the verdict.
  ASSERT_TRUE(a_->AwaitCommand(Kind::kResolve));
  EXPECT_EQ(a_->LastCommand(Kind::kResolve).resolve().verdict(), v1::OWNER);
  Restart();
  Release();
  ExpectSuccess();
  Restart();
  EXPECT_EQ(api_->Get(name_)->phase(), v1::SUCCEEDED);
}

// What happens while batond is away is in the agents' inventory when it comes back.
TEST_F(RestartTest, TheWholeMigrationHappensWithoutBatond) {
  Create();
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing));
  batond_.Kill();
  MoveOver();
  ASSERT_TRUE(batond_.Start().ok());
  ExpectSuccess();
}

TEST_F(RestartTest, QueuedMigrationsSurvive) {
  a_->Hold(Kind::kInspectVm);
  a_->AddVm("web2", 1);
  a_->AddVm("web3", 1);
  ASSERT_TRUE(Until([&] { return api_->GetVm("web3").ok(); }));
  Create();
  auto second = api_->Create("web2", "b");
  auto third = api_->Create("web3", "b");  // the default limit is two for a host
  ASSERT_TRUE(second.ok() && third.ok());
  EXPECT_EQ(third->phase(), v1::QUEUED);
  Restart();
  EXPECT_EQ(api_->Get(third->name())->phase(), v1::QUEUED);
  auto cancelled = api_->Cancel(third->name());
  ASSERT_TRUE(cancelled.ok()) << cancelled.status();
  EXPECT_EQ(cancelled->phase(), v1::CANCELLED);
  EXPECT_EQ(cancelled->reason(), v1::CANCELLED_BY_REQUEST);
}

TEST_F(RestartTest, TheSameRequestIdGivesTheSameMigrationAfterARestart) {
  Create();
  Restart();
  auto again = api_->Create("web1", "b", "r1");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->name(), name_);
  auto other = api_->Create("web1", "a", "r1");
  EXPECT_EQ(other.status().code(), absl::StatusCode::kAlreadyExists);
}

}  // namespace
}  // namespace baton::test
