// Every command of batonctl that asks and answers, against a fake batond: outputs, requests, errors, exit
// codes.
#include <yaml-cpp/yaml.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/grpc_status.h"
#include "tests/integration/client/fixture.h"

namespace baton::testing {
namespace {

using nlohmann::json;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

TEST_F(CtlTest, GetHosts_Table_ShowsEveryPage) {
  CtlResult r = Run({"get", "hosts"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("NAME  STATE"));
  EXPECT_THAT(r.out, HasSubstr("a     READY"));
  EXPECT_THAT(r.out, HasSubstr("c     UNREACHABLE"));
  EXPECT_THAT(r.out, HasSubstr("32.0 GiB"));
  EXPECT_THAT(Run({"get", "hosts", "-o", "wide"}).out, HasSubstr("a.example:7410"));
}

TEST_F(CtlTest, GetHosts_Json_HasStableFieldNames) {
  json list = json::parse(Run({"get", "hosts", "-o", "json"}).out);
  ASSERT_EQ(list["hosts"].size(), 3u);
  EXPECT_EQ(list["hosts"][0]["name"], "hosts/a");
  EXPECT_EQ(list["hosts"][0]["peer_address"], "a.example:7410");
  EXPECT_EQ(list["hosts"][0]["cordoned"], false) << "fields at their default are there";
  EXPECT_EQ(list["hosts"][0]["memory_total"], "68719476736")
      << "64-bit integers are strings in protobuf's JSON";
  EXPECT_EQ(json::parse(Run({"get", "host", "a", "-o", "json"}).out)["name"], "hosts/a");
}

TEST_F(CtlTest, GetVm_Yaml_SaysTheSameAsJson) {
  YAML::Node vm = YAML::Load(Run({"get", "vm", "web1", "-o", "yaml"}).out);
  EXPECT_EQ(vm["name"].as<std::string>(), "vms/web1");
  EXPECT_EQ(vm["devices"][0]["backend"]["kind"].as<std::string>(), "QEMU_STORAGE_DAEMON");
  EXPECT_EQ(vm["epoch"].Tag(), "!") << "a string in JSON stays one in YAML";
}

TEST_F(CtlTest, GetVms_NameFormat_PrintsFullNames) {
  EXPECT_EQ(Run({"get", "vms", "-o", "name"}).out, "vms/web1\n");
}

TEST_F(CtlTest, GetVms_HostFilter_ReachesTheServer) {
  CtlResult r = Run({"get", "vms", "--host", "b"});
  EXPECT_EQ(r.code, 0);
  EXPECT_EQ(r.out, "");
  EXPECT_THAT(r.err, HasSubstr("no vms found"));
  EXPECT_THAT(batond_->requests(), Contains(HasSubstr("filter: \"host=hosts/b\"")));
}

TEST_F(CtlTest, GetMigrations_FiltersAndTable) {
  batond_->PutMigration(ExampleMigration("m1", v1::SUCCEEDED));
  CtlResult r = Run({"get", "migrations", "--vm", "web1", "--phase", "succeeded"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("m1    web1  a     b   SUCCEEDED"));
  EXPECT_THAT(r.out, HasSubstr("21.0 ms"));
  EXPECT_THAT(batond_->requests(), Contains(HasSubstr("filter: \"vm=vms/web1 AND phase=SUCCEEDED\"")));
}

TEST_F(CtlTest, Get_MissingResource_Exits3) {
  CtlResult r = Run({"get", "vm", "nope"});
  EXPECT_EQ(r.code, 3);
  EXPECT_EQ(r.out, "");
  EXPECT_THAT(r.err, HasSubstr("error: vms/nope does not exist"));
}

TEST_F(CtlTest, Describe_ShowsEverything) {
  batond_->PutMigration(ExampleMigration("m1", v1::SUCCEEDED));
  EXPECT_THAT(Run({"describe", "host", "a"}).out, HasSubstr("web1"));
  EXPECT_THAT(Run({"describe", "vm", "vms/web1"}).out, HasSubstr("/run/qsd/disk0.sock"));
  CtlResult migration = Run({"describe", "migration", "m1"});
  EXPECT_EQ(migration.code, 0) << migration.err;
  for (const char* part :
       {"Phases:", "Rounds:", "Decisions:", "Downtimes:", "switchover: what is left fits", "192 MiB"}) {
    EXPECT_THAT(migration.out, HasSubstr(part));
  }
  EXPECT_THAT(Run({"describe", "policy", "default"}).out, HasSubstr("300 ms"));
}

TEST_F(CtlTest, VmStart_SendsTheSpec) {
  std::string spec = WriteFile("vm.yaml", "name: db\nmemory: 64MiB\nvcpus: 1\n");
  CtlResult r = Run({"vm", "start", spec, "--host", "b"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(r.out, "vms/db runs on hosts/b\n");
  EXPECT_THAT(batond_->requests(), Contains(HasSubstr("memory_bytes: 67108864")));
  EXPECT_EQ(Run({"vm", "start", "-", "--host", "b"}, "name: db2\nmemory: 64MiB\nvcpus: 1\n").code, 0);
}

TEST_F(CtlTest, VmStart_WrongSpec_NamesFileLineAndField) {
  std::string spec = WriteFile("vm.yaml", "name: db\nmemory: much\nvcpus: 1\n");
  CtlResult r = Run({"vm", "start", spec, "--host", "b"});
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.err, HasSubstr("vm.yaml:2: memory:"));
  CtlResult missing = Run({"vm", "start", directory_ / "none.yaml", "--host", "b"});
  EXPECT_EQ(missing.code, 2) << "a file that is not there is wrong input, not a missing resource";
  EXPECT_THAT(missing.err, HasSubstr("none.yaml"));
}

TEST_F(CtlTest, VmStopAndList) {
  EXPECT_THAT(Run({"vm", "list"}).out, HasSubstr("web1"));
  EXPECT_EQ(Run({"vm", "stop", "web1", "--force"}).code, 0);
  EXPECT_THAT(batond_->requests(), Contains(HasSubstr("StopVm { name: \"vms/web1\" force: true")));
  EXPECT_EQ(Run({"vm", "stop", "web1"}).code, 3);
}

TEST_F(CtlTest, Migrate_NoWait_SendsWhatWasGivenAndNothingElse) {
  CtlResult r =
      Run({"migrate", "web1", "--to", "b", "--no-wait", "--max-downtime", "50ms", "--bandwidth", "1Gbit",
           "--no-tls", "--label", "why=test", "--request-id", "0b5bd3b4-0b2c-4a43-ac4a-5dce2d0a35c5"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("migrations/m1 created"));
  EXPECT_THAT(
      batond_->requests(),
      Contains(HasSubstr("params { max_downtime { nanos: 50000000 } bandwidth: 125000000 tls: false }")));
  EXPECT_THAT(batond_->requests(), Contains(HasSubstr("request_id: \"0b5bd3b4")));
}

TEST_F(CtlTest, Migrate_LostAnswer_IsRepeatedWithTheSameRequestId) {
  batond_->FailNext("CreateMigration", absl::UnavailableError("restarting"));
  EXPECT_EQ(Run({"--connect-timeout", "60s", "migrate", "web1", "--to", "b", "--no-wait", "-o", "name"}).out,
            "migrations/m1\n");
  std::vector<std::string> creates;
  for (const auto& request : batond_->requests()) {
    if (request.rfind("CreateMigration", 0) == 0) creates.push_back(request);
  }
  ASSERT_EQ(creates.size(), 2u);
  EXPECT_EQ(creates[0], creates[1]);
}

TEST_F(CtlTest, MigrateDryRun_Blocker_Exits10AndSaysWhatToDo) {
  v1::Migration answer;
  v1::Finding& finding = *answer.add_findings();
  finding.set_severity(v1::BLOCKER);
  finding.set_code("BACKEND_UNREACHABLE");
  finding.set_subject("device disk0");
  finding.set_message("nothing listens on /run/qsd/disk0.sock");
  finding.set_remedy("start the storage daemon on host b");
  batond_->AnswerCreateWith(answer);
  CtlResult r = Run({"migrate", "web1", "--to", "b", "--dry-run"});
  EXPECT_EQ(r.code, 10);
  EXPECT_THAT(r.out, HasSubstr("BLOCKER  BACKEND_UNREACHABLE  device disk0: nothing listens"));
  EXPECT_THAT(r.out, HasSubstr("do: start the storage daemon"));
  EXPECT_THAT(batond_->requests(), Contains(HasSubstr("validate_only: true")));
}

TEST_F(CtlTest, MigrateDryRun_Fine_ShowsForecast) {
  v1::Migration answer;
  answer.mutable_progress()->mutable_forecast_downtime()->set_nanos(40000000);
  answer.mutable_progress()->mutable_forecast_remaining()->set_seconds(3);
  batond_->AnswerCreateWith(answer);
  CtlResult r = Run({"migrate", "web1", "--to", "b", "--dry-run"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("forecast: takes 3.00 s, blackout 40.0 ms"));
}

TEST_F(CtlTest, Migrate_Refused_SaysWhatWhereAndNext) {
  absl::Status refusal = WithMetadata(
      Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, "vms/web1 is in migrations/m7"),
      "guest_location", "SOURCE");
  refusal = WithMetadata(refusal, "source", "hosts/a");
  batond_->FailNext("CreateMigration", refusal);
  CtlResult r = Run({"migrate", "web1", "--to", "b"});
  EXPECT_EQ(r.code, 5);
  EXPECT_THAT(r.err, HasSubstr("error: vms/web1 is in migrations/m7"));
  EXPECT_THAT(r.err, HasSubstr("guest: runs at the source, host a"));
  EXPECT_THAT(r.err, HasSubstr("next:"));
  batond_->FailNext("CreateMigration", refusal);
  json error = json::parse(Run({"--json-errors", "migrate", "web1", "--to", "b"}).err);
  EXPECT_EQ(error["error"]["reason"], "VM_NOT_MIGRATABLE");
  EXPECT_EQ(error["error"]["code"], "FAILED_PRECONDITION");
}

TEST_F(CtlTest, Errors_EachKindHasItsExitCode) {
  const std::pair<absl::Status, int> cases[] = {
      {absl::InvalidArgumentError("x"), 2},
      {absl::NotFoundError("x"), 3},
      {absl::AlreadyExistsError("x"), 4},
      {absl::AbortedError("x"), 4},
      {absl::FailedPreconditionError("x"), 5},
      {absl::PermissionDeniedError("x"), 6},
      {absl::UnauthenticatedError("x"), 6},
      {absl::DeadlineExceededError("x"), 8},
      {absl::UnimplementedError("x"), 9},
      {absl::InternalError("x"), 1},
      {Error(v1::AGENT_UNREACHABLE, absl::StatusCode::kDeadlineExceeded, "x"), 7}};
  for (const auto& [status, code] : cases) {
    batond_->FailNext("GetVm", status);
    CtlResult r = Run({"get", "vm", "web1"});
    EXPECT_EQ(r.code, code) << status << r.err;
    EXPECT_THAT(r.err, HasSubstr("error: x"));
  }
}

TEST_F(CtlTest, Cancel_ByVmName_FindsItsMigration) {
  Run({"migrate", "web1", "--to", "b", "--no-wait"});
  CtlResult r = Run({"cancel", "web1"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(r.out, "migrations/m1: cancellation asked for\n");
  EXPECT_TRUE(batond_->GetMigration("migrations/m1").cancel_requested());
}

TEST_F(CtlTest, Names_PrefixOfAnId_IsEnoughWhereItIsUnambiguous) {
  batond_->PutMigration(ExampleMigration("abcd1111", v1::SUCCEEDED));
  batond_->PutMigration(ExampleMigration("abcd2222", v1::SUCCEEDED));
  EXPECT_EQ(Run({"get", "migration", "abcd1", "-o", "name"}).out, "migrations/abcd1111\n");
  CtlResult both = Run({"get", "migration", "abcd"});
  EXPECT_EQ(both.code, 2);
  EXPECT_THAT(both.err, HasSubstr("could mean migrations/abcd1111 or migrations/abcd2222"));
  CtlResult none = Run({"get", "migration", "zzzz"});
  EXPECT_EQ(none.code, 3);
  EXPECT_THAT(none.err, HasSubstr("no migration 'zzzz' and no VM 'zzzz'"));
  EXPECT_EQ(Run({"get", "migration", "hosts/a"}).code, 2);
}

TEST_F(CtlTest, RetuneAndResolve) {
  batond_->PutMigration(ExampleMigration("m1", v1::PRECOPY));
  EXPECT_EQ(Run({"retune", "m1", "--bandwidth", "unlimited", "--max-downtime", "1s"}).code, 0);
  EXPECT_THAT(batond_->requests(), Contains(HasSubstr("bandwidth: 0 max_downtime { seconds: 1 }")));
  EXPECT_EQ(Run({"retune", "m1"}).code, 2);
  EXPECT_EQ(Run({"migration", "resolve", "m1"}).code, 2) << "the confirmation must be said";
  EXPECT_EQ(Run({"migration", "resolve", "m1", "--fenced"}).code, 0);
  EXPECT_THAT(batond_->requests(),
              Contains(HasSubstr("ResolveMigration { name: \"migrations/m1\" fenced: true }")));
}

TEST_F(CtlTest, CordonAndUncordon) {
  EXPECT_EQ(Run({"cordon", "a"}).out, "hosts/a cordoned\n");
  EXPECT_THAT(Run({"get", "hosts"}).out, HasSubstr("CORDONED"));
  EXPECT_EQ(Run({"uncordon", "a"}).out, "hosts/a uncordoned\n");
}

TEST_F(CtlTest, PolicySet_ChangesOnlyWhatWasGiven_OrCreates) {
  EXPECT_EQ(Run({"policy", "set", "default", "--max-downtime", "100ms"}).code, 0);
  EXPECT_THAT(batond_->requests(), Contains(HasSubstr("update_mask { paths: \"params.max_downtime\" }")));
  EXPECT_THAT(batond_->requests(), Contains(HasSubstr("etag: \"e1\"")));
  EXPECT_EQ(Run({"policy", "set", "default"}).code, 2);
  EXPECT_EQ(Run({"policy", "set", "night", "--bandwidth", "2Gbit", "--tls"}).out, "policies/night set\n");
  EXPECT_THAT(Run({"policy", "get"}).out, HasSubstr("night"));
  EXPECT_EQ(Run({"policy", "delete", "night"}).code, 0);
  EXPECT_EQ(Run({"policy", "get", "night"}).code, 3);
}

TEST_F(CtlTest, Report_WritesOnePage) {
  v1::Migration m = ExampleMigration("m1", v1::SUCCEEDED);
  m.set_message("<script>alert(1)</script>");
  batond_->PutMigration(m);
  std::string path = directory_ / "report.html";
  EXPECT_EQ(Run({"report", "m1", "-o", path}).code, 0);
  std::stringstream page;
  page << std::ifstream(path).rdbuf();
  EXPECT_THAT(page.str(), HasSubstr("<svg"));
  EXPECT_THAT(page.str(), HasSubstr("</html>"));
  EXPECT_THAT(page.str(), Not(HasSubstr("<script")));
  EXPECT_EQ(Run({"report", "m1", "-o", directory_ / "no/such/dir/r.html"}).code, 2);
}

TEST_F(CtlTest, Top_InAPipe_PrintsOnce) {
  batond_->PutMigration(ExampleMigration("m1", v1::PRECOPY));
  CtlResult r = Run({"top"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("hosts 2/3 up"));
  EXPECT_THAT(r.out, HasSubstr("PRECOPY"));
  EXPECT_THAT(r.out, Not(HasSubstr("\x1b")));
}

TEST_F(CtlTest, Completion_OffersCommandsOptionsAndNames) {
  std::map<std::string, std::string> environment = {{"BATON_SERVER", batond_->target()}};
  EXPECT_EQ(RunCtl({"__complete", "migra"}, "", environment).out, "migrate\nmigration\n");
  EXPECT_EQ(RunCtl({"__complete", "migrate", ""}, "", environment).out, "web1\n");
  EXPECT_EQ(RunCtl({"__complete", "migrate", "web1", "--to", ""}, "", environment).out, "a\nb\nc\n");
  EXPECT_EQ(RunCtl({"__complete", "get", "vms", "-o", "j"}, "", environment).out, "json\n");
  EXPECT_EQ(RunCtl({"__complete", "-s", batond_->target(), "describe", "host", ""}).out, "a\nb\nc\n");
  EXPECT_EQ(RunCtl({"__complete", "migrate", "web1", "--max-d"}).out, "--max-downtime\n--max-duration\n");
  CtlResult script = Run({"completion", "bash"});
  EXPECT_EQ(script.code, 0) << script.err;
  EXPECT_THAT(script.out, HasSubstr("complete -o default -F _batonctl batonctl"));
}

TEST_F(CtlTest, HostileText_CannotDriveTheTerminal) {
  v1::Vm vm;
  vm.set_name("vms/evil");
  vm.set_message("\x1b]0;title\x07 and \x1b[2J");
  batond_->PutVm(vm);
  EXPECT_THAT(Run({"get", "vms", "-o", "wide"}).out, Not(HasSubstr("\x1b")));
  EXPECT_THAT(Run({"describe", "vm", "evil"}).out, Not(HasSubstr("\x1b")));
}

TEST(CtlConnection, NoServer_Exits7AndSaysWhatToCheck) {
  CtlResult r =
      RunCtl({"--server", "unix:/nonexistent/batond.sock", "--connect-timeout", "100ms", "get", "hosts"});
  EXPECT_EQ(r.code, 7);
  EXPECT_THAT(r.err, HasSubstr("cannot reach batond at unix:/nonexistent/batond.sock: No such file"));
  EXPECT_THAT(r.err, HasSubstr("BATON_SERVER"));
}

TEST(CtlConnection, WrongOptions_Exit2AndNameTheOption) {
  EXPECT_THAT(RunCtl({"--server", "10.1.2.3", "get", "hosts"}).err, HasSubstr("--ca, --cert and --key"));
  EXPECT_THAT(RunCtl({"--ca", "/tmp/ca", "get", "hosts"}).err, HasSubstr("missing: --cert --key"));
  EXPECT_THAT(RunCtl({"--server", "http://x:1", "get", "hosts"}).err, HasSubstr("no URL scheme"));
  EXPECT_THAT(RunCtl({"get", "vns"}).err, HasSubstr("did you mean 'vms'?"));
  EXPECT_THAT(RunCtl({"--bogus"}).err, HasSubstr("error: unknown option '--bogus'\n"));
  EXPECT_THAT(RunCtl({"vm", "--bogus"}).err,
              HasSubstr("error: unknown option '--bogus'\n  next:  batonctl vm --help"));
  EXPECT_THAT(RunCtl({"--serve=x"}).err, HasSubstr("unknown option '--serve=x'; did you mean '--server'?"));
  EXPECT_THAT(RunCtl({"-sx", "vns"}).err, HasSubstr("unknown command 'vns'"));
  EXPECT_THAT(RunCtl({"--server", "x"}).err, HasSubstr("error: a command is missing: get, "));
  EXPECT_THAT(RunCtl({"--server"}).err, HasSubstr("--server: 1 required"));
  EXPECT_THAT(RunCtl({"migrate", "web1"}).err, HasSubstr("--to is required"));
  EXPECT_THAT(RunCtl({"--connect-timeout", "5", "get", "vms"}).err, HasSubstr("connect timeout: '5' is not"));
  EXPECT_THAT(RunCtl({"vm", "stop", "web1", "--timeout", "5"}).err, HasSubstr("--timeout: '5' is not"));
  for (const std::vector<std::string>& wrong :
       std::vector<std::vector<std::string>>{{},
                                             {"get"},
                                             {"nonsense"},
                                             {"migrate"},
                                             {"--server", "10.1.2.3", "get", "hosts"},
                                             {"migrate", "web1", "--to", "b", "--bandwidth", "fast"},
                                             {"migrate", "web1", "--to", "b", "--max-downtime", "12"},
                                             {"migrate", "web1", "--to", "b", "--tls", "--no-tls"},
                                             {"migrate", "hosts/a", "--to", "b"},
                                             {"get", "vms", "-o", "xml"},
                                             {"get", "vm", "a b"},
                                             {"--connect-timeout", "soon", "get", "vms"}}) {
    EXPECT_EQ(RunCtl(wrong).code, 2);
  }
}

TEST_F(CtlTest, ConfigFile_GivesTheServer_CommandLineAndEnvironmentWin) {
  std::string config = WriteFile("config.yaml", "server: " + batond_->target() + "\n");
  EXPECT_EQ(RunCtl({"--config", config, "get", "hosts"}).code, 0);
  std::string other = WriteFile("other.yaml", "server: unix:/nonexistent\nconnect_timeout: 100ms\n");
  EXPECT_EQ(RunCtl({"--config", other, "get", "hosts"}).code, 7);
  EXPECT_EQ(RunCtl({"--config", other, "--server", batond_->target(), "get", "hosts"}).code, 0);
  EXPECT_EQ(RunCtl({"--config", other, "get", "hosts"}, "", {{"BATON_SERVER", batond_->target()}}).code, 0);
  std::string wrong = WriteFile("wrong.yaml", "sever: x\n");
  CtlResult r = RunCtl({"--config", wrong, "get", "hosts"});
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.err, HasSubstr("wrong.yaml:1"));
  EXPECT_EQ(RunCtl({"--config", directory_ / "none.yaml", "get", "hosts"}).code, 2);
}

TEST(CtlHelp, EveryCommandHasHelpWithAnExitOf0) {
  for (const std::vector<std::string>& command :
       std::vector<std::vector<std::string>>{{},
                                             {"get"},
                                             {"get", "hosts"},
                                             {"get", "migrations"},
                                             {"describe"},
                                             {"describe", "vm"},
                                             {"vm"},
                                             {"vm", "start"},
                                             {"vm", "stop"},
                                             {"vm", "console"},
                                             {"migrate"},
                                             {"watch"},
                                             {"cancel"},
                                             {"retune"},
                                             {"migration", "resolve"},
                                             {"cordon"},
                                             {"top"},
                                             {"policy", "set"},
                                             {"report"},
                                             {"completion"},
                                             {"version"}}) {
    std::vector<std::string> arguments = command;
    arguments.push_back("--help");
    CtlResult r = RunCtl(arguments);
    EXPECT_EQ(r.code, 0);
    EXPECT_THAT(r.out, HasSubstr("Usage: batonctl"));
    EXPECT_EQ(r.err, "");
  }
  EXPECT_THAT(RunCtl({"--help"}).out, HasSubstr("Exit status:"));
}

}  // namespace
}  // namespace baton::testing
