// What an agent does with the shims of domains, over fake shims: real processes, files and sockets, no
// libvirt.
#include "agent/daemon/domain_manager.h"

#include <unistd.h>

#include <chrono>
#include <thread>

#include "tests/unit/daemon/agent_fixture.h"

namespace baton::daemon {
namespace {

constexpr char kUuid[] = "5f0c8e0e-3a53-4a5e-9f3c-0d6a4b1c2d3e";

class DomainManagerTest : public AgentTest {
 protected:
  void SetUp() override {
    AgentTest::SetUp();
    paths_ = DomainPathsOf(config_, kUuid);
    v1::ShimConfig conf;
    conf.set_mode(v1::ShimConfig::DOMAIN);
    conf.set_domain_uuid(kUuid);
    conf.set_run_dir(paths_.run_dir);
    conf.set_state_dir(paths_.state_dir);
    conf.set_migration_id("m1");
    conf.set_token(std::string(32, 't'));
    Write(conf);
    launcher_ = MakeShimLauncher(config_);
    StartManager();
  }
  void TearDown() override {
    EndManager();
    AgentTest::TearDown();
  }

  void Write(const v1::ShimConfig& conf) {
    const DomainStore store(config_);
    ASSERT_TRUE(store.WriteSoon(kUuid, conf).ok());
  }
  void StartManager() {
    reports_ = std::make_unique<ReportStore>(config_.state_dir + "/reports");
    ASSERT_TRUE(reports_->Load().ok());
    tasks_ = std::make_unique<TaskQueue>(4);
    manager_ = std::make_unique<DomainManager>(
        DomainManagerParts{config_, ended_, *reports_, backends_, *launcher_, metrics_, *tasks_},
        heard_.Events());
  }
  void EndManager() {
    if (manager_) manager_->Close();
    if (tasks_) tasks_->Stop();
    manager_.reset();
  }
  // Its entry is the last that goes.
  bool WaitGone() {
    const Deadline deadline = Soon();
    while (manager_->Has(kUuid)) {
      if (deadline.Expired()) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    for (const std::string& path : {paths_.conf, paths_.run_dir})
      EXPECT_NE(::access(path.c_str(), F_OK), 0) << path;
    return FindByCommandLine(paths_.state_dir + '\0').empty();
  }
  void ExpectRefused() {
    const v1::SideReport final = heard_.WaitFinal("m1");
    EXPECT_EQ(final.handover(), v1::REFUSED);
    EXPECT_TRUE(WaitGone());
    auto ended = ended_.FindEnded("m1");
    ASSERT_TRUE(ended.has_value());
    EXPECT_EQ(ended->verdict(), v1::REFUSED);
    EXPECT_EQ(ended->token(), std::string(32, 't'));
  }

  VmPaths paths_;
  VmStore ended_{config_};
  BackendResolver backends_{config_};
  AgentMetrics metrics_;
  Heard heard_;
  std::unique_ptr<ShimLauncher> launcher_;
  std::unique_ptr<ReportStore> reports_;
  std::unique_ptr<TaskQueue> tasks_;
  std::unique_ptr<DomainManager> manager_;
};

TEST_F(DomainManagerTest, ShimGoesWhenItsEndWasHeard) {
  ASSERT_TRUE(manager_->FindAgain(Soon()).ok());
  ExpectRefused();
}

TEST_F(DomainManagerTest, ShimThatHearsTheAcknowledgementLateGoesAsWell) {
  ::setenv("BATON_FAKE_SHIM", "busy", 1);
  ASSERT_TRUE(manager_->FindAgain(Soon()).ok());
  ExpectRefused();
}

TEST_F(DomainManagerTest, ShimThatEndsBeforeTheAcknowledgementIsTakenIsStartedAndToldAgain) {
  ::setenv("BATON_FAKE_SHIM", "mortal", 1);
  ASSERT_TRUE(manager_->FindAgain(Soon()).ok());
  ExpectRefused();
  EXPECT_EQ(::access((paths_.state_dir + "/acknowledged").c_str(), F_OK), 0);
}

// The report is on this agent's disk already, and comes again with the connection.
TEST_F(DomainManagerTest, AcknowledgementIsRepeatedByTheNextAgent) {
  ::setenv("BATON_FAKE_SHIM", "busy", 1);
  ASSERT_TRUE(manager_->FindAgain(Soon()).ok());
  EXPECT_TRUE(heard_.WaitFinal("m1").done());
  EndManager();
  EXPECT_EQ(FindByCommandLine(paths_.state_dir + '\0').size(), 1u);
  StartManager();
  ASSERT_TRUE(manager_->FindAgain(Soon()).ok());
  ExpectRefused();
}

}  // namespace
}  // namespace baton::daemon
