// The pure rules around the machine: limits, filters, page tokens, names, roles, forecast, configuration,
// parameters.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "common/grpc_status.h"
#include "server/api/auth.h"
#include "server/config.h"
#include "server/control/dry_run.h"
#include "server/control/filter.h"
#include "server/control/policies.h"
#include "server/event_loop.h"
#include "server/names.h"
#include "server/schedule/limits.h"
#include "tests/temp_dir.h"

namespace baton::server {
namespace {

TEST(Limits, EachLimitHoldsAndNobodyIsHeldUpByAnother) {
  ScheduleLimits limits{.outgoing_per_host = 1, .incoming_per_host = 2, .cluster = 4};
  std::vector<Slot> queued = {
      {"1", "a", "x"}, {"2", "a", "y"}, {"3", "b", "x"}, {"4", "c", "x"}, {"5", "d", "y"}};
  EXPECT_EQ(Admit(limits, {}, queued), (std::vector<std::string>{"1", "3", "5"}));
  EXPECT_EQ(Admit(limits, {{"0", "b", "z"}}, queued), (std::vector<std::string>{"1", "4", "5"}));
  limits.cluster = 2;
  EXPECT_EQ(Admit(limits, {{"0", "z", "z"}}, queued), (std::vector<std::string>{"1"}));
  EXPECT_EQ(Admit({0, 0, 0}, {}, queued).size(), queued.size());
}

TEST(Filter, ConjunctionsOfKnownFields) {
  auto filter = ParseMigrationFilter("vm=web1 AND phase=PRECOPY AND active=true");
  ASSERT_TRUE(filter.ok());
  v1::Migration m;
  m.set_vm("vms/web1");
  m.set_phase(v1::PRECOPY);
  EXPECT_TRUE(filter->Matches(m));
  m.set_phase(v1::FAILED);
  EXPECT_FALSE(filter->Matches(m));
  EXPECT_TRUE(ParseMigrationFilter("")->Matches(m));
  EXPECT_TRUE(ParseMigrationFilter("active=false")->Matches(m));
  for (const char* bad : {"vm", "=x", "colour=red", "vm=a AND vm=b", "phase=LATER", "active=maybe", "vm="}) {
    absl::Status status = ParseMigrationFilter(bad).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_EQ(BadRequestOf(status).field_violations_size(), 1) << bad;
  }
}

TEST(Pages, TokensBelongToTheirCall) {
  std::string token = MakePageToken("vms", "host=a", "web1");
  EXPECT_EQ(*ParsePageToken(token, "vms", "host=a"), "web1");
  EXPECT_EQ(*ParsePageToken("", "vms", "host=a"), "");
  EXPECT_FALSE(ParsePageToken(token, "vms", "host=b").ok());
  EXPECT_FALSE(ParsePageToken(token, "hosts", "host=a").ok());
  EXPECT_FALSE(ParsePageToken("%%%", "vms", "").ok());
  EXPECT_EQ(*PageSize(0), 50u);
  EXPECT_EQ(*PageSize(5000), 1000u);
  EXPECT_FALSE(PageSize(-1).ok());
}

TEST(Names, AreCheckedAndIdsSortByTime) {
  EXPECT_EQ(*ParseName("vms/web1", "vms", "vm"), "web1");
  for (const char* bad : {"", "web1", "vms/", "vms/UPPER", "vms/a/b", "hosts/web1", "vms/../x"}) {
    EXPECT_EQ(ParseName(bad, "vms", "vm").status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
  std::string first = NewMigrationId(1'700'000'000'000), second = NewMigrationId(1'700'000'000'001);
  EXPECT_LT(first, second);
  EXPECT_TRUE(ParseName("migrations/" + first, "migrations", "name").ok()) << first;
}

TEST(Roles, ComeFromUrisFirstThenTheCommonName) {
  EXPECT_EQ(CallerFromNames({"baton://agent/host-a"}, "x").ToString(), "agent:host-a");
  EXPECT_EQ(CallerFromNames({"spiffe://other", "baton://operator/jane"}, "admin:eve").role, Role::kOperator);
  EXPECT_EQ(CallerFromNames({}, "viewer:bob").role, Role::kViewer);
  for (const char* nobody : {"", "bob", "root:bob", "agent:", ":x"}) {
    EXPECT_EQ(CallerFromNames({}, nobody).role, Role::kNone) << nobody;
  }
  EXPECT_EQ(CallerFromNames({"baton://agent/", "baton://king/x", "baton://agent"}, "").role, Role::kNone);
}

TEST(Roles, CoverEachOtherUpwardsAndAgentsOnlyThemselves) {
  Caller viewer{Role::kViewer, "v"}, op{Role::kOperator, "o"}, admin{Role::kAdmin, "a"},
      agent{Role::kAgent, "h"};
  EXPECT_TRUE(Require(viewer, Role::kViewer).ok());
  EXPECT_FALSE(Require(viewer, Role::kOperator).ok());
  EXPECT_TRUE(Require(op, Role::kViewer).ok());
  EXPECT_FALSE(Require(op, Role::kAdmin).ok());
  EXPECT_TRUE(Require(admin, Role::kAdmin).ok());
  EXPECT_FALSE(Require(agent, Role::kViewer).ok());
  EXPECT_FALSE(Require({}, Role::kViewer).ok());
  EXPECT_TRUE(RequireAgent(agent, "h").ok());
  EXPECT_FALSE(RequireAgent(agent, "other").ok());
  EXPECT_FALSE(RequireAgent(admin, "h").ok());  // an administrator's certificate does not make a host
  EXPECT_TRUE(RequireAgent({Role::kAdmin, "local"}, "h").ok());
  EXPECT_EQ(ReasonOf(RequireAgent(agent, "other")), v1::PERMISSION_DENIED_REASON);
}

TEST(Forecast, SaysWhetherItConverges) {
  v1::Migration calm;
  calm.mutable_params()->mutable_max_downtime()->set_nanos(300'000'000);
  v1::Migration busy = calm;
  Forecast(1 << 30, 10 << 20, 1e9, &calm);
  EXPECT_EQ(calm.findings(0).severity(), v1::INFO);
  EXPECT_LT(calm.progress().forecast_downtime().nanos(), 300'000'000);
  EXPECT_GE(calm.progress().forecast_remaining().seconds(), 1);
  Forecast(uint64_t{1} << 34, 2'000'000'000, 1e9, &busy);
  EXPECT_EQ(busy.findings(0).severity(), v1::WARNING);
  EXPECT_FALSE(busy.findings(0).remedy().empty());
  v1::Migration nothing;
  Forecast(0, 0, 0, &nothing);
  EXPECT_NE(nothing.findings(0).message().find("assumed"), std::string::npos);
}

TEST(Params, CallersOwnStandAboveThePolicys) {
  v1::MigrationParams policy, own;
  policy.set_bandwidth(1000);
  policy.set_tls(true);
  policy.mutable_max_downtime()->set_seconds(2);
  own.set_bandwidth(0);
  own.mutable_max_downtime()->set_nanos(500'000'000);
  v1::MigrationParams merged = MergeParams(policy, own);
  EXPECT_TRUE(merged.has_bandwidth());
  EXPECT_EQ(merged.bandwidth(), 0u);
  EXPECT_TRUE(merged.tls());
  EXPECT_EQ(merged.max_downtime().seconds(), 0);
  EXPECT_EQ(merged.max_downtime().nanos(), 500'000'000);
  EXPECT_EQ(merged.drain_timeout().seconds(), 5);
  own.set_bandwidth(10);
  own.set_channels(1000);
  own.mutable_drain_timeout()->set_seconds(-1);
  absl::Status status = ValidateParams(own, "p.");
  EXPECT_EQ(BadRequestOf(status).field_violations_size(), 3) << status;
  EXPECT_TRUE(ValidateParams(DefaultParams(), "").ok());
}

TEST(Params, AnswersToRequestsInFlight) {
  auto rule = [](v1::MigrationParams* to, const std::string& device, v1::DeviceClass c,
                 v1::InflightAnswer answer) {
    v1::InflightRule* r = to->add_inflight_rules();
    r->set_device(device);
    r->set_class_(c);
    r->set_answer(answer);
  };
  v1::MigrationParams policy, own;
  policy.set_inflight(v1::HANDOFF);
  rule(&policy, "disk0", v1::DEVICE_CLASS_UNSPECIFIED, v1::DRAIN);
  rule(&policy, "", v1::BLK, v1::HANDOFF);
  v1::MigrationParams merged = MergeParams(policy, own);
  EXPECT_EQ(merged.inflight(), v1::HANDOFF);
  ASSERT_EQ(merged.inflight_rules_size(), 2);
  // A rule about the same replaces the policy's, the others stay.
  rule(&own, "disk0", v1::DEVICE_CLASS_UNSPECIFIED, v1::HANDOFF);
  merged = MergeParams(policy, own);
  ASSERT_EQ(merged.inflight_rules_size(), 2);
  EXPECT_EQ(merged.inflight_rules(0).class_(), v1::BLK);
  EXPECT_EQ(merged.inflight_rules(1).answer(), v1::HANDOFF);
  // A caller's default stands above everything the policy says.
  own.clear_inflight_rules();
  own.set_inflight(v1::DRAIN);
  merged = MergeParams(policy, own);
  EXPECT_EQ(merged.inflight(), v1::DRAIN);
  EXPECT_EQ(merged.inflight_rules_size(), 0);
  EXPECT_TRUE(ValidateParams(policy, "").ok());
  rule(&policy, "disk0", v1::BLK, v1::DRAIN);                                         // both
  rule(&policy, "", v1::DEVICE_CLASS_UNSPECIFIED, v1::DRAIN);                         // neither
  rule(&policy, "x", v1::DEVICE_CLASS_UNSPECIFIED, v1::INFLIGHT_ANSWER_UNSPECIFIED);  // no answer
  rule(&policy, "disk0", v1::DEVICE_CLASS_UNSPECIFIED, v1::DRAIN);                    // twice
  EXPECT_EQ(BadRequestOf(ValidateParams(policy, "p.")).field_violations_size(), 4);
}

class ConfigTest : public ::testing::Test {
 protected:
  std::string Write(const std::string& text) {
    std::ofstream(dir_ / "c.yaml") << text;
    return dir_ / "c.yaml";
  }
  const test::TempDir dir_;
};

TEST_F(ConfigTest, EveryFieldIsReadAndFlagsWin) {
  std::string path = Write(R"(listen: 127.0.0.1:7500
metrics: off
data_dir: /srv/batond
tls: {ca: /c, cert: /d, key: /k}
log: {level: debug, format: json}
limits: {outgoing_per_host: 3, incoming_per_host: 4, cluster: 0}
heartbeat: {interval: 1s, timeout: 4s}
deadlines: {preparing: 30s, switchover: 20s, finishing: 10s, cleanup: 5s, overtime: 1m, unreachable: 2s, lost: 1h}
history: 100
watch_log: 500
dirty_sample: 2s
)");
  const char* argv[] = {"batond", "--config", path.c_str(),      "--max-incoming",
                        "9",      "--listen", "unix:/run/b.sock"};
  auto command = ParseCommandLine(7, argv);
  ASSERT_TRUE(command.ok()) << command.status();
  const ServerConfig& config = command->config;
  EXPECT_EQ(config.listen.unix_path, "/run/b.sock");
  EXPECT_FALSE(config.metrics);
  EXPECT_EQ(config.data_dir, "/srv/batond");
  EXPECT_EQ(config.tls.key, "/k");
  EXPECT_TRUE(config.log_json);
  EXPECT_EQ(config.limits.outgoing_per_host, 3u);
  EXPECT_EQ(config.limits.incoming_per_host, 9u);
  EXPECT_EQ(config.limits.cluster, 0u);
  EXPECT_EQ(config.heartbeat_timeout, std::chrono::seconds(4));
  EXPECT_EQ(config.times.lost, std::chrono::hours(1));
  EXPECT_EQ(config.watch_log, 500);
}

TEST_F(ConfigTest, MistakesAreToldWithFileAndLine) {
  std::string path =
      Write("listen: nowhere\nlimits:\n  outgoing: 3\nheartbeat: {interval: 5s, timeout: 6s}\n");
  ServerConfig config;
  absl::Status status = ReadConfigFile(path, &config);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  for (const char* part : {":1: listen", ":3: limits.outgoing", "heartbeat.timeout"}) {
    EXPECT_NE(Message(status).find(part), std::string::npos) << part << "\n" << status;
  }
}

TEST_F(ConfigTest, WrongFlagsAreRefusedAndHelpNamesThemAll) {
  const char* unknown[] = {"batond", "--lisen", "x"};
  EXPECT_EQ(ParseCommandLine(3, unknown).status().code(), absl::StatusCode::kInvalidArgument);
  const char* bad[] = {"batond", "--listen", "nowhere"};
  EXPECT_NE(Message(ParseCommandLine(3, bad).status()).find("--listen: 'nowhere'"), std::string::npos);
  const char* beat[] = {"batond", "--heartbeat", "1ms"};
  EXPECT_FALSE(ParseCommandLine(3, beat).ok());
  const char* help[] = {"batond", "--help"};
  auto command = ParseCommandLine(2, help);
  ASSERT_TRUE(command.ok() && command->print);
  for (const char* flag : {"--config", "--listen", "--metrics", "--data-dir", "--tls-ca", "--max-outgoing"}) {
    EXPECT_NE(command->print->find(flag), std::string::npos) << flag;
  }
}

TEST(Loop, RunsTasksInOrderAndTimersInTime) {
  EventLoop loop;
  std::string order;
  loop.Post([&] { order += "a"; });
  auto late = loop.At(Clock::now() + std::chrono::hours(1), [&] { order += "never"; });
  loop.Post([&] {
    EXPECT_TRUE(loop.InLoop());
    loop.Cancel(late);
    order += "b";
  });
  loop.Drain();
  EXPECT_EQ(order, "ab");
  std::mutex mutex;
  std::condition_variable fired;
  bool done = false;
  loop.At(Clock::now() + std::chrono::milliseconds(5), [&] {
    std::lock_guard lock(mutex);
    done = true;
    fired.notify_one();
  });
  std::unique_lock lock(mutex);
  EXPECT_TRUE(fired.wait_for(lock, std::chrono::seconds(10), [&] { return done; }));
}

TEST(Loop, StopRunsWhatWasPostedAndDropsTheRest) {
  int ran = 0;
  auto owned = std::make_shared<int>(1);
  {
    EventLoop loop;
    for (int i = 0; i < 100; ++i) loop.Post([&] { ++ran; });
    loop.At(Clock::now() + std::chrono::hours(1), [owned] {});
    loop.Stop();
    loop.Post([&] { ran = -1; });
  }
  EXPECT_EQ(ran, 100);
  EXPECT_EQ(owned.use_count(), 1);
}

}  // namespace
}  // namespace baton::server
