// The API of a real batond with scripted agents: what each call promises, and what it says when it cannot.
#include <google/protobuf/util/time_util.h>
#include <gtest/gtest.h>

#include <fstream>

#include "baton/v1/drains.grpc.pb.h"
#include "tests/integration/server/fake_agent.h"
#include "tests/integration/server/until.h"
#include "tests/integration/server/watcher.h"

namespace baton::test {
namespace {

using Kind = v1::Command::BodyCase;

class ApiTest : public ::testing::Test {
 protected:
  void SetUp() override { Boot(); }
  void Boot() {
    ASSERT_TRUE(batond_.Start().ok());
    a_ = std::make_unique<FakeAgent>("a", batond_.NewChannel());
    b_ = std::make_unique<FakeAgent>("b", batond_.NewChannel());
    ASSERT_TRUE(a_->AwaitSession() && b_->AwaitSession());
    api_ = std::make_unique<Api>(batond_.channel());
    AddVm("web1");
  }
  void AddVm(const std::string& id) {
    a_->AddVm(id, 1);
    ASSERT_TRUE(Until([&] { return api_->GetVm(id).ok(); }));
  }
  // Empty: batond does not know it (now).
  std::string HostOf(const std::string& vm) {
    auto found = api_->GetVm(vm);
    return found.ok() ? found->host() : "";
  }
  static v1::VmSpec Spec(const std::string& name) {
    v1::VmSpec spec;
    spec.set_name(name);
    spec.set_memory_bytes(256 << 20);
    spec.set_vcpus(1);
    spec.mutable_boot()->set_kernel("/boot/vmlinuz");
    return spec;
  }
  absl::StatusOr<v1::Vm> StartVm(const std::string& host, const v1::VmSpec& spec) {
    v1::StartVmRequest request;
    request.set_host("hosts/" + host);
    *request.mutable_spec() = spec;
    return api_->Call(api_->fleet(), &v1::Fleet::Stub::StartVm, request);
  }
  // Waits until the migration has ended, however.
  v1::Migration AwaitEnd(const std::string& name) {
    Watcher watcher(batond_.NewChannel(), name);
    return watcher.Await([](const v1::Migration& m) { return m.phase() >= v1::SUCCEEDED; });
  }

  BatondHarness batond_;
  std::unique_ptr<FakeAgent> a_, b_;
  std::unique_ptr<Api> api_;
};

TEST_F(ApiTest, CreateRefusesWhatCannotWorkAndSaysWhy) {
  auto expect = [](const absl::Status& status, absl::StatusCode code, v1::Reason reason,
                   const std::string& text) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_EQ(ReasonOf(status, v1::REASON_UNSPECIFIED), reason) << status;
    EXPECT_NE(Message(status).find(text), std::string::npos) << status;
  };
  using Code = absl::StatusCode;
  expect(api_->Create("nope", "b").status(), Code::kNotFound, v1::NOT_FOUND, "vms/nope");
  expect(api_->Create("web1", "nope").status(), Code::kNotFound, v1::NOT_FOUND, "hosts/nope");
  expect(api_->Create("web1", "a").status(), Code::kInvalidArgument, v1::REASON_UNSPECIFIED,
         "runs there already");
  expect(api_->Create("WEB", "b").status(), Code::kInvalidArgument, v1::REASON_UNSPECIFIED, "migration.vm");
  EXPECT_EQ(ResourceInfoOf(api_->Create("nope", "b").status()).resource_name(), "vms/nope");

  v1::SetHostCordonRequest cordon;
  cordon.set_name("hosts/b");
  cordon.set_cordoned(true);
  ASSERT_TRUE(api_->Call(api_->fleet(), &v1::Fleet::Stub::SetHostCordon, cordon).ok());
  expect(api_->Create("web1", "b").status(), Code::kFailedPrecondition, v1::VM_NOT_MIGRATABLE, "cordoned");
  cordon.set_cordoned(false);
  ASSERT_TRUE(api_->Call(api_->fleet(), &v1::Fleet::Stub::SetHostCordon, cordon).ok());

  b_->Pause();
  ASSERT_TRUE(Until([&] { return !api_->GetHost("b")->connected(); }));
  absl::Status away = api_->Create("web1", "b").status();
  expect(away, Code::kUnavailable, v1::AGENT_UNREACHABLE, "hosts/b has no agent session");
  EXPECT_GT(RetryDelayOf(away).count(), 0);
  b_->Resume();
  ASSERT_TRUE(b_->AwaitSession(2));

  a_->Hold(Kind::kInspectVm);
  auto created = api_->Create("web1", "b");
  ASSERT_TRUE(created.ok()) << created.status();
  expect(api_->Create("web1", "b").status(), Code::kFailedPrecondition, v1::VM_NOT_MIGRATABLE,
         created->name());
  EXPECT_EQ(api_->GetVm("web1")->migration(), created->name());
}

TEST_F(ApiTest, CreateIsIdempotentByRequestId) {
  a_->Hold(Kind::kInspectVm);
  auto first = api_->Create("web1", "b", "id-1");
  auto second = api_->Create("web1", "b", "id-1");
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(first->name(), second->name());
  EXPECT_FALSE(first->etag().empty());
  EXPECT_GT(first->revision(), 0);
  absl::Status other = api_->Create("web2", "b", "id-1").status();
  EXPECT_EQ(other.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(ResourceInfoOf(other).resource_name(), first->name());
}

TEST_F(ApiTest, DryRunChecksWithoutARecord) {
  v1::Finding finding;
  finding.set_severity(v1::BLOCKER);
  finding.set_code("BACKEND_UNREACHABLE");
  finding.set_subject("device disk0");
  b_->SetFindings({finding});
  auto dry = api_->Create("web1", "b", "", true);
  ASSERT_TRUE(dry.ok()) << dry.status();
  EXPECT_EQ(dry->name(), "");
  ASSERT_EQ(dry->findings_size(), 2);
  EXPECT_EQ(dry->findings(0).code(), "BACKEND_UNREACHABLE");
  EXPECT_EQ(dry->findings(1).code(), "FORECAST");
  EXPECT_TRUE(dry->progress().has_forecast_remaining());
  EXPECT_EQ(dry->progress().dirty_rate(), 1u << 20);
  EXPECT_TRUE(b_->LastCommand(Kind::kPrepareIncoming).prepare_incoming().validate_only());
  EXPECT_GT(a_->LastCommand(Kind::kInspectVm).inspect_vm().dirty_sample().seconds(), 0);
  EXPECT_EQ(a_->CommandCount(Kind::kStartOutgoing), 0);
  v1::ListMigrationsRequest list;
  EXPECT_EQ(api_->Call(api_->migrations(), &v1::Migrations::Stub::ListMigrations, list)->migrations_size(),
            0);

  // The same with a record: it fails and names the blocker.
  auto created = api_->Create("web1", "b");
  ASSERT_TRUE(created.ok());
  v1::Migration end = AwaitEnd(created->name());
  EXPECT_EQ(end.phase(), v1::FAILED);
  EXPECT_EQ(end.reason(), v1::VALIDATION_FAILED);
  EXPECT_EQ(end.guest_location(), v1::SOURCE);
  EXPECT_EQ(b_->CommandCount(Kind::kAbortIncoming), 1);
  EXPECT_EQ(a_->CommandCount(Kind::kStartOutgoing), 0);
}

TEST_F(ApiTest, ListsNewestFirstInPagesWithFilters) {
  a_->Hold(Kind::kInspectVm);
  std::vector<std::string> names;
  for (int i = 0; i < 5; ++i) {
    std::string vm = "vm" + std::to_string(i);
    AddVm(vm);
    auto created = api_->Create(vm, "b");
    ASSERT_TRUE(created.ok());
    names.push_back(created->name());
  }
  ASSERT_TRUE(api_->Cancel(names[4]).ok());
  v1::ListMigrationsRequest list;
  list.set_page_size(2);
  std::vector<std::string> seen;
  do {
    auto page = api_->Call(api_->migrations(), &v1::Migrations::Stub::ListMigrations, list);
    ASSERT_TRUE(page.ok()) << page.status();
    EXPECT_GT(page->revision(), 0);
    for (const auto& m : page->migrations()) seen.push_back(m.name());
    list.set_page_token(page->next_page_token());
  } while (!list.page_token().empty());
  EXPECT_EQ(seen, std::vector<std::string>(names.rbegin(), names.rend()));
  list.Clear();
  list.set_filter("active=true AND vm=vm3");
  EXPECT_EQ(api_->Call(api_->migrations(), &v1::Migrations::Stub::ListMigrations, list)->migrations_size(),
            1);
  list.set_filter("phase=CANCELLED");
  EXPECT_EQ(api_->Call(api_->migrations(), &v1::Migrations::Stub::ListMigrations, list)->migrations(0).name(),
            names[4]);
  list.set_filter("size=big");
  EXPECT_EQ(api_->Call(api_->migrations(), &v1::Migrations::Stub::ListMigrations, list).status().code(),
            absl::StatusCode::kInvalidArgument);
  v1::ListVmsRequest vms;
  vms.set_page_size(4);
  vms.set_filter("host=hosts/a");
  auto page = api_->Call(api_->fleet(), &v1::Fleet::Stub::ListVms, vms);
  ASSERT_TRUE(page.ok());
  EXPECT_EQ(page->vms_size(), 4);
  vms.set_page_token(page->next_page_token());
  EXPECT_EQ(api_->Call(api_->fleet(), &v1::Fleet::Stub::ListVms, vms)->vms_size(), 2);
}

TEST_F(ApiTest, CancelWhilePreparingCleansTheDestination) {
  b_->Hold(Kind::kPrepareIncoming);
  auto created = api_->Create("web1", "b");
  ASSERT_TRUE(created.ok());
  ASSERT_TRUE(b_->AwaitCommand(Kind::kPrepareIncoming));
  auto cancelled = api_->Cancel(created->name());
  ASSERT_TRUE(cancelled.ok());
  EXPECT_TRUE(cancelled->cancel_requested());
  EXPECT_TRUE(api_->Cancel(created->name()).ok());  // twice is no error
  b_->Release(Kind::kPrepareIncoming);
  v1::Migration end = AwaitEnd(created->name());
  EXPECT_EQ(end.phase(), v1::CANCELLED);
  EXPECT_EQ(end.guest_location(), v1::SOURCE);
  EXPECT_EQ(b_->CommandCount(Kind::kAbortIncoming), 1);
  EXPECT_EQ(api_->Cancel(created->name()).status().code(), absl::StatusCode::kFailedPrecondition);
  // The VM is free for the next attempt.
  EXPECT_TRUE(api_->Create("web1", "b").ok());
}

TEST_F(ApiTest, RetuneReachesTheSource) {
  auto created = api_->Create("web1", "b");
  ASSERT_TRUE(created.ok());
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing));
  v1::SideReport report;
  report.set_migration_id(created->name().substr(11));
  report.set_role(v1::ROLE_SOURCE);
  report.set_phase(v1::PRECOPY);
  report.set_handover(v1::IDLE);
  report.set_guest_running(true);
  a_->Report(report);
  v1::RetuneMigrationRequest retune;
  retune.set_name(created->name());
  EXPECT_EQ(api_->Call(api_->migrations(), &v1::Migrations::Stub::RetuneMigration, retune).status().code(),
            absl::StatusCode::kInvalidArgument);
  retune.set_bandwidth(1 << 20);
  auto retuned = api_->Call(api_->migrations(), &v1::Migrations::Stub::RetuneMigration, retune);
  ASSERT_TRUE(retuned.ok());
  EXPECT_EQ(retuned->params().bandwidth(), 1u << 20);
  ASSERT_TRUE(a_->AwaitCommand(Kind::kRetune));
  EXPECT_EQ(a_->LastCommand(Kind::kRetune).retune().bandwidth(), 1u << 20);
  v1::ResolveMigrationRequest resolve;
  resolve.set_name(created->name());
  resolve.set_fenced(true);
  EXPECT_EQ(api_->Call(api_->migrations(), &v1::Migrations::Stub::ResolveMigration, resolve).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(ApiTest, FencedResolveOrdersTheSourceToResume) {
  auto created = api_->Create("web1", "b");
  ASSERT_TRUE(created.ok());
  ASSERT_TRUE(a_->AwaitCommand(Kind::kStartOutgoing));
  v1::SideReport report;
  report.set_migration_id(created->name().substr(11));
  report.set_role(v1::ROLE_SOURCE);
  report.set_phase(v1::SWITCHOVER);
  report.set_handover(v1::YIELDED);
  b_->Pause();
  a_->Report(report);
  Watcher watcher(batond_.NewChannel(), created->name());
  EXPECT_EQ(watcher.AwaitPhase(v1::SWITCHOVER).guest_location(), v1::UNKNOWN);
  v1::ResolveMigrationRequest resolve;
  resolve.set_name(created->name());
  EXPECT_EQ(api_->Call(api_->migrations(), &v1::Migrations::Stub::ResolveMigration, resolve).status().code(),
            absl::StatusCode::kInvalidArgument);
  resolve.set_fenced(true);
  ASSERT_TRUE(api_->Call(api_->migrations(), &v1::Migrations::Stub::ResolveMigration, resolve).ok());
  ASSERT_TRUE(a_->AwaitCommand(Kind::kResolve));
  EXPECT_TRUE(a_->LastCommand(Kind::kResolve).resolve().fenced());
  EXPECT_EQ(a_->LastCommand(Kind::kResolve).resolve().verdict(), v1::REFUSED);
  report.set_phase(v1::FAILED);
  report.set_handover(v1::REFUSED);
  report.set_guest_running(true);
  report.set_done(true);
  a_->Report(report);
  v1::Migration end = watcher.AwaitPhase(v1::FAILED);
  EXPECT_EQ(end.reason(), v1::RESOLVED_BY_OPERATOR);
  EXPECT_EQ(end.guest_location(), v1::SOURCE);
  // The fenced destination comes back and claims the guest at the higher epoch: it does not get it.
  b_->AddVm("web1", 2);
  b_->Resume();
  ASSERT_TRUE(b_->AwaitSession(2));
  EXPECT_EQ(api_->GetVm("web1")->host(), "hosts/a");
}

TEST_F(ApiTest, DomainThatLibvirtMoved_FollowsIt) {
  a_->AddDomain("db1", "4dea22b3");
  ASSERT_TRUE(Until([&] { return api_->GetVm("db1").ok(); }));
  // While it moves, the other host has it as well: incoming, then running, before the first one lets go.
  b_->AddDomain("db1", "4dea22b3", v1::Vm::INCOMING);
  b_->AddDomain("db1", "4dea22b3");
  a_->RemoveVm("db1");
  ASSERT_TRUE(Until([&] { return HostOf("db1") == "hosts/b"; }));
  EXPECT_EQ(api_->GetVm("db1")->state(), v1::Vm::RUNNING);
  EXPECT_EQ(api_->GetVm("db1")->message(), "");
  // With a definition that stays behind, shut off.
  b_->AddDomain("db1", "4dea22b3", v1::Vm::STOPPED);
  ASSERT_TRUE(Until([&] { return api_->GetVm("db1")->state() == v1::Vm::STOPPED; }));
  a_->AddDomain("db1", "4dea22b3");
  ASSERT_TRUE(Until([&] { return HostOf("db1") == "hosts/a"; }));
  // The same, but the other host is heard first.
  b_->AddDomain("db1", "4dea22b3");
  ASSERT_TRUE(Until([&] { return api_->GetVm("db1")->message() != ""; }));
  a_->AddDomain("db1", "4dea22b3", v1::Vm::STOPPED);
  ASSERT_TRUE(Until([&] { return HostOf("db1") == "hosts/b"; }));
  EXPECT_EQ(api_->GetVm("db1")->message(), "");
}

TEST_F(ApiTest, DomainsOfOneName_AreTwoVms) {
  a_->AddDomain("db1", "4dea22b3");
  ASSERT_TRUE(Until([&] { return api_->GetVm("db1").ok(); }));
  b_->AddDomain("db1", "77ab1200");
  ASSERT_TRUE(Until([&] { return api_->GetVm("77ab1200").ok(); }));
  EXPECT_EQ(api_->GetVm("db1")->host(), "hosts/a");
  EXPECT_EQ(api_->GetVm("db1")->message(), "");
  EXPECT_EQ(api_->GetVm("77ab1200")->host(), "hosts/b");
  b_->RemoveVm("db1");
  ASSERT_TRUE(Until([&] { return !api_->GetVm("77ab1200").ok(); }));
  EXPECT_TRUE(api_->GetVm("db1").ok());
}

TEST_F(ApiTest, AStaleOwnerIsRefused) {
  a_->AddVm("web1", 5);
  ASSERT_TRUE(Until([&] { return api_->GetVm("web1")->epoch() == 5; }));
  b_->AddVm("web1", 4);
  b_->AddVm("other", 1);
  ASSERT_TRUE(Until([&] { return api_->GetVm("other").ok(); }));
  v1::Vm owned = *api_->GetVm("web1");
  EXPECT_EQ(owned.host(), "hosts/a");
  EXPECT_NE(owned.message().find("runs at hosts/b as well, at epoch 4"), std::string::npos)
      << owned.message();
  // Until that copy is ended, nothing is begun with the VM: neither here nor there, not even on trial.
  for (const absl::Status& refused :
       {api_->Create("web1", "b").status(), api_->Create("web1", "b", "", true).status(),
        StartVm("b", Spec("web1")).status(), StartVm("a", Spec("web1")).status()}) {
    EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
    EXPECT_EQ(ReasonOf(refused), v1::VM_NOT_MIGRATABLE);
    EXPECT_NE(Message(refused).find("end the copy at hosts/b first"), std::string::npos) << refused;
  }
  EXPECT_EQ(b_->CommandCount(Kind::kStartVm) + a_->CommandCount(Kind::kInspectVm), 0);
  b_->RemoveVm("web1");
  ASSERT_TRUE(Until([&] { return api_->GetVm("web1")->message().empty(); }));
  // A session that comes back without it says the same.
  b_->AddVm("web1", 4);
  ASSERT_TRUE(Until([&] { return !api_->GetVm("web1")->message().empty(); }));
  b_->Pause();
  ASSERT_TRUE(Until([&] { return !api_->GetHost("b")->connected(); }));
  EXPECT_FALSE(api_->GetVm("web1")->message().empty());
  b_->RemoveVm("web1");
  b_->Resume();
  ASSERT_TRUE(b_->AwaitSession(2));
  EXPECT_EQ(api_->GetVm("web1")->message(), "");
  EXPECT_TRUE(api_->Create("web1", "b", "", true).ok());
  b_->AddVm("web1", 6);
  ASSERT_TRUE(Until([&] { return api_->GetVm("web1")->epoch() == 6; }));
  EXPECT_EQ(api_->GetVm("web1")->host(), "hosts/b");
}

TEST_F(ApiTest, VmsStartOnceAndStop) {
  auto vm = StartVm("a", Spec("db1"));
  ASSERT_TRUE(vm.ok()) << vm.status();
  EXPECT_EQ(vm->state(), v1::Vm::RUNNING);
  EXPECT_EQ(vm->host(), "hosts/a");
  ASSERT_TRUE(StartVm("a", Spec("db1")).ok());
  EXPECT_EQ(a_->CommandCount(Kind::kStartVm), 1);
  // It runs, but not where it was asked for.
  EXPECT_EQ(StartVm("b", Spec("db1")).status().code(), absl::StatusCode::kAlreadyExists);
  v1::VmSpec other = Spec("db1");
  other.set_vcpus(2);
  EXPECT_EQ(StartVm("b", other).status().code(), absl::StatusCode::kAlreadyExists);
  other.set_name("Bad Name");
  EXPECT_EQ(StartVm("b", other).status().code(), absl::StatusCode::kInvalidArgument);

  v1::CommandResult failure;
  failure.set_code(static_cast<int>(absl::StatusCode::kFailedPrecondition));
  failure.set_message("no such kernel");
  b_->AnswerNext(Kind::kStartVm, failure);
  absl::Status failed = StartVm("b", Spec("db2")).status();
  EXPECT_EQ(failed.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(Message(failed).find("no such kernel"), std::string::npos);
  EXPECT_EQ(api_->GetVm("db2").status().code(), absl::StatusCode::kNotFound);

  v1::StopVmRequest stop;
  stop.set_name("vms/db1");
  ASSERT_TRUE(api_->Call(api_->fleet(), &v1::Fleet::Stub::StopVm, stop).ok());
  EXPECT_EQ(api_->GetVm("db1").status().code(), absl::StatusCode::kNotFound);
  a_->Hold(Kind::kInspectVm);
  ASSERT_TRUE(api_->Create("web1", "b").ok());
  stop.set_name("vms/web1");
  EXPECT_EQ(api_->Call(api_->fleet(), &v1::Fleet::Stub::StopVm, stop).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(ApiTest, AHostWithoutSessionKeepsItsVmsAsUnreachable) {
  EXPECT_TRUE(api_->GetHost("a")->connected());
  EXPECT_EQ(api_->GetHost("a")->vm_count(), 1u);
  a_->Pause();
  ASSERT_TRUE(Until([&] { return !api_->GetHost("a")->connected(); }));
  EXPECT_EQ(api_->GetVm("web1")->state(), v1::Vm::HOST_UNREACHABLE);
  batond_.Restart();
  EXPECT_EQ(api_->GetVm("web1")->state(), v1::Vm::HOST_UNREACHABLE);
  a_->Resume();
  ASSERT_TRUE(a_->AwaitSession(2));
  EXPECT_EQ(api_->GetVm("web1")->state(), v1::Vm::RUNNING);
  a_->RemoveVm("web1");
  ASSERT_TRUE(Until([&] { return !api_->GetVm("web1").ok(); }));
}

// An agent that hangs, or whose host was cut off without a word: its stream stays open and nothing comes.
class SilentAgentTest : public ApiTest {
 protected:
  void SetUp() override {
    batond_.set_heartbeat("2s");
    Boot();
  }
};

TEST_F(SilentAgentTest, IsMarkedUnreachableAndTakenBackAtItsNextWord) {
  ASSERT_EQ(api_->GetVm("web1")->state(), v1::Vm::RUNNING);
  a_->Hang();
  ASSERT_TRUE(Until([&] { return !api_->GetHost("a")->connected(); }));
  EXPECT_EQ(api_->GetVm("web1")->state(), v1::Vm::HOST_UNREACHABLE);
  EXPECT_EQ(ReasonOf(api_->Create("web1", "b").status()), v1::AGENT_UNREACHABLE);
  // The other one kept talking.
  EXPECT_TRUE(api_->GetHost("b")->connected());
  ASSERT_TRUE(Until([&] { return !a_->last_status().ok(); }));
  EXPECT_EQ(a_->last_status().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  a_->Wake();
  ASSERT_TRUE(Until([&] { return api_->GetHost("a")->connected(); }));
  EXPECT_EQ(api_->GetVm("web1")->state(), v1::Vm::RUNNING);
}

TEST_F(ApiTest, ANewerSessionReplacesTheOldOne) {
  FakeAgent again("a", batond_.NewChannel());
  ASSERT_TRUE(again.AwaitSession());
  // Both dial again and again with equal counters; whoever came last has the session, and batond lives.
  EXPECT_TRUE(api_->GetHost("a")->connected());
}

TEST_F(ApiTest, AProtocolVersionNobodySpeaksIsRefused) {
  auto stub = v1::AgentSession::NewStub(batond_.channel());
  auto first = [&](const v1::AgentMessage& message) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    auto stream = stub->Session(&context);
    stream->Write(message);
    v1::ServerMessage reply;
    while (stream->Read(&reply)) {
    }
    return FromGrpc(stream->Finish());
  };
  v1::AgentMessage hello;
  hello.mutable_hello()->set_version(99);
  hello.mutable_hello()->mutable_host()->set_name("hosts/x");
  EXPECT_EQ(first(hello).code(), absl::StatusCode::kFailedPrecondition);
  hello.mutable_hello()->set_version(1);
  hello.mutable_hello()->mutable_host()->set_name("hosts/NOT A NAME");
  EXPECT_EQ(first(hello).code(), absl::StatusCode::kInvalidArgument);
  v1::AgentMessage beat;
  beat.mutable_heartbeat();
  EXPECT_EQ(first(beat).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ApiTest, ConsoleRelaysBothWays) {
  auto stub = v1::Fleet::NewStub(batond_.channel());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  auto stream = stub->Console(&context);
  v1::ConsoleRequest request;
  request.set_vm("vms/web1");
  request.set_input("early");
  stream->Write(request);
  ASSERT_TRUE(a_->AwaitCommand(Kind::kConsoleOpen));
  a_->ConsoleOutput("login: ");
  v1::ConsoleResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.output(), "login: ");
  request.clear_vm();
  request.set_input("root\n");
  stream->Write(request);
  ASSERT_TRUE(Until([&] { return a_->console_input() == "earlyroot\n"; }));
  a_->ConsoleOutput("bye", true);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.output(), "bye");
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_TRUE(stream->Finish().ok());

  grpc::ClientContext wrong;
  wrong.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  auto none = stub->Console(&wrong);
  request.set_vm("vms/none");
  none->Write(request);
  EXPECT_FALSE(none->Read(&response));
  EXPECT_EQ(none->Finish().error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(ApiTest, PoliciesAreChangedWithEtagAndMask) {
  auto& stub = api_->policies();
  v1::CreatePolicyRequest create;
  create.set_policy_id("gold");
  create.mutable_policy()->mutable_params()->set_bandwidth(100 << 20);
  create.set_request_id("p1");
  auto made = api_->Call(stub, &v1::Policies::Stub::CreatePolicy, create);
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_EQ(made->params().max_downtime().nanos(), 300'000'000);
  EXPECT_EQ(api_->Call(stub, &v1::Policies::Stub::CreatePolicy, create)->etag(), made->etag());
  create.set_request_id("p2");
  EXPECT_EQ(api_->Call(stub, &v1::Policies::Stub::CreatePolicy, create).status().code(),
            absl::StatusCode::kAlreadyExists);
  v1::UpdatePolicyRequest update;
  update.mutable_policy()->set_name("policies/gold");
  update.mutable_policy()->set_etag(made->etag());
  update.mutable_policy()->mutable_params()->mutable_max_downtime()->set_seconds(1);
  update.mutable_update_mask()->add_paths("params.max_downtime");
  auto changed = api_->Call(stub, &v1::Policies::Stub::UpdatePolicy, update);
  ASSERT_TRUE(changed.ok()) << changed.status();
  EXPECT_EQ(changed->params().max_downtime().seconds(), 1);
  EXPECT_EQ(changed->params().bandwidth(), 100u << 20);
  EXPECT_EQ(api_->Call(stub, &v1::Policies::Stub::UpdatePolicy, update).status().code(),
            absl::StatusCode::kAborted);
  update.mutable_policy()->clear_etag();
  update.mutable_update_mask()->add_paths("colour");
  EXPECT_EQ(api_->Call(stub, &v1::Policies::Stub::UpdatePolicy, update).status().code(),
            absl::StatusCode::kInvalidArgument);
  v1::ListPoliciesRequest list;
  EXPECT_EQ(api_->Call(stub, &v1::Policies::Stub::ListPolicies, list)->policies_size(), 2);
  v1::DeletePolicyRequest remove;
  remove.set_name("policies/default");
  EXPECT_EQ(api_->Call(stub, &v1::Policies::Stub::DeletePolicy, remove).status().code(),
            absl::StatusCode::kFailedPrecondition);

  // A migration takes the policy's parameters, with its own on top.
  a_->Hold(Kind::kInspectVm);
  v1::CreateMigrationRequest migrate;
  migrate.mutable_migration()->set_vm("vms/web1");
  migrate.mutable_migration()->set_destination("hosts/b");
  migrate.mutable_migration()->set_policy("policies/gold");
  migrate.mutable_migration()->mutable_params()->set_channels(2);
  auto m = api_->Call(api_->migrations(), &v1::Migrations::Stub::CreateMigration, migrate);
  ASSERT_TRUE(m.ok());
  EXPECT_EQ(m->params().bandwidth(), 100u << 20);
  EXPECT_EQ(m->params().channels(), 2u);
  remove.set_name("policies/gold");
  EXPECT_TRUE(api_->Call(stub, &v1::Policies::Stub::DeletePolicy, remove).ok());

  // Kept, but not carried out yet.
  create.set_policy_id("later");
  create.set_request_id("");
  create.mutable_policy()->add_schedule()->set_throttle_percent(20);
  ASSERT_TRUE(api_->Call(stub, &v1::Policies::Stub::CreatePolicy, create).ok());
  AddVm("web2");
  migrate.mutable_migration()->set_vm("vms/web2");
  migrate.mutable_migration()->set_policy("policies/later");
  EXPECT_EQ(api_->Call(api_->migrations(), &v1::Migrations::Stub::CreateMigration, migrate).status().code(),
            absl::StatusCode::kUnimplemented);
}

TEST_F(ApiTest, DrainsAnswerUnimplemented) {
  auto stub = v1::Drains::NewStub(batond_.channel());
  v1::ListDrainsRequest list;
  EXPECT_EQ(api_->Call(*stub, &v1::Drains::Stub::ListDrains, list).status().code(),
            absl::StatusCode::kUnimplemented);
}

TEST_F(ApiTest, WatchSaysThatItIsOpenBeforeAnythingChanges) {
  // What `batonctl watch` says "connected again" by.
  auto created = api_->Create("web1", "b");
  ASSERT_TRUE(created.ok());
  ASSERT_TRUE(api_->Cancel(created->name()).ok());
  v1::Migration end = AwaitEnd(created->name());
  batond_.Restart();
  grpc::ClientContext context;
  context.set_wait_for_ready(true);
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  v1::WatchMigrationsRequest request;
  request.set_start_revision(end.revision());
  auto reader = api_->migrations().WatchMigrations(&context, request);
  reader->WaitForInitialMetadata();
  context.TryCancel();
  v1::WatchMigrationsResponse response;
  while (reader->Read(&response)) {
  }
  // Not the deadline.
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(ApiTest, WatchBeginsWithThePresentAndRefusesWhatIsGone) {
  a_->Hold(Kind::kInspectVm);
  auto first = api_->Create("web1", "b");
  ASSERT_TRUE(first.ok());
  Watcher watcher(batond_.NewChannel(), "");
  EXPECT_EQ(watcher.AwaitPhase(v1::PREPARING).name(), first->name());
  ASSERT_TRUE(api_->Cancel(first->name()).ok());
  watcher.AwaitPhase(v1::CANCELLED);
  auto watch = [&](const std::string& name, int64_t revision) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    v1::WatchMigrationsRequest request;
    request.set_name(name);
    request.set_start_revision(revision);
    auto stream = api_->migrations().WatchMigrations(&context, request);
    v1::WatchMigrationsResponse response;
    while (stream->Read(&response)) {
    }
    return stream->Finish().error_code();
  };
  EXPECT_EQ(watch("", 1'000'000), grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_EQ(watch("migrations/none", 0), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(watch("none", 0), grpc::StatusCode::INVALID_ARGUMENT);
}

}  // namespace
}  // namespace baton::test
