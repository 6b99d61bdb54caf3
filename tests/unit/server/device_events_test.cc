// Swaps of back-ends and events of devices as batond sees them, with agents that are only links.
#include "server/control/device_events.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <mutex>

#include "server/store/sqlite_store.h"
#include "tests/temp_dir.h"

namespace baton::server {
namespace {

// What batond sends, and the answers to it.
class TestLink : public AgentLink {
 public:
  void Send(v1::ServerMessage message) override {
    if (message.has_command()) commands.push_back(message.command());
  }
  void Close(absl::Status) override {}
  std::vector<v1::Command> commands;
};

class DeviceEventsTest : public ::testing::Test {
 protected:
  DeviceEventsTest() { Open(); }
  ~DeviceEventsTest() override { Shut(); }

  void On(const std::function<void()>& work) {
    loop_->Post(work);
    loop_->Drain();
  }
  // Timers that are due at once run in their turn.
  void Settle() {
    for (int i = 0; i < 5; ++i) {
      loop_->At(Clock::now(), [] {});
      loop_->Drain();
      ::usleep(1000);
    }
  }

  void Open() {
    loop_ = std::make_unique<EventLoop>();
    metrics_ = std::make_unique<ServerMetrics>();
    On([this] {
      SqliteOptions options;
      options.directory = dir_.path();
      auto store = SqliteStore::Open(options);
      ASSERT_TRUE(store.ok()) << store.status();
      store_ = *std::move(store);
      fleet_ = std::make_unique<Fleet>(*loop_, *store_, *metrics_, FleetOptions());
      policies_ = std::make_unique<Policies>(*store_, false);
      controller_ =
          std::make_unique<Controller>(*loop_, *store_, *fleet_, *policies_, *metrics_, ControllerOptions());
      ASSERT_TRUE(fleet_->Load().ok());
      ASSERT_TRUE(policies_->Load().ok());
      ASSERT_TRUE(controller_->Load().ok());
      events_ = std::make_unique<DeviceEvents>(*loop_, *store_, *fleet_, *policies_, *controller_, *metrics_);
      ASSERT_TRUE(events_->Load().ok());
      for (const char* host : {"a", "b", "c"}) Connect(host);
    });
  }
  void Shut() {
    loop_->Stop();
    events_.reset();
    controller_.reset();
    policies_.reset();
    fleet_.reset();
    store_.reset();
    loop_.reset();
    metrics_.reset();
  }
  void Connect(const std::string& host) {
    v1::Hello hello;
    hello.set_version(1);
    hello.mutable_host()->set_name("hosts/" + host);
    hello.mutable_host()->set_memory_free(host == "c" ? 2000 : 1000);
    hello.set_start_counter(++starts_);
    if (host == "a" && vm_.has_spec()) *hello.add_vms() = vm_;
    links_[host] = std::make_shared<TestLink>();
    auto session = fleet_->Connect(hello, links_[host]);
    ASSERT_TRUE(session.ok()) << session.status();
    sessions_[host] = *session;
  }
  // The VM on host a, whose disk has told of `events` errors.
  void Vm(uint64_t events, uint64_t held = 3) {
    vm_.set_name("vms/web1");
    vm_.set_state(v1::Vm::RUNNING);
    vm_.set_epoch(1);
    vm_.mutable_spec()->set_name("web1");
    vm_.mutable_spec()->clear_devices();
    vm_.mutable_spec()->add_devices()->set_name("disk0");
    vm_.clear_devices();
    v1::Device& device = *vm_.add_devices();
    device.set_name("disk0");
    device.mutable_backend()->set_socket("/run/old.sock");
    device.set_state(v1::Device::ACTIVE);
    device.set_events(events);
    if (events > 0) {
      device.mutable_last_event()->set_kind(v1::DeviceEvent::QUEUE_ERROR);
      device.mutable_last_event()->set_sequence(events);
      device.mutable_last_event()->set_held(held);
      device.mutable_last_event()->mutable_time()->set_seconds(1000 + static_cast<int64_t>(events));
    }
    v1::AgentMessage message;
    *message.mutable_vm() = vm_;
    On([&] { fleet_->Receive(sessions_["a"], message); });
    Settle();
  }
  void Policy(const std::string& id, const std::function<void(v1::Policy&)>& change) {
    On([&] {
      v1::Policy policy;
      change(policy);
      absl::Status done;
      if (id == "default") {
        v1::UpdatePolicyRequest request;
        *request.mutable_policy() = policy;
        request.mutable_policy()->set_name("policies/default");
        request.mutable_update_mask()->add_paths("on_device_error");
        request.mutable_update_mask()->add_paths("observe_only");
        done = policies_->Update(request).status();
      } else {
        v1::CreatePolicyRequest request;
        request.set_policy_id(id);
        *request.mutable_policy() = policy;
        done = policies_->Create(request).status();
      }
      ASSERT_TRUE(done.ok()) << done;
    });
  }
  std::vector<v1::Migration> Migrations() {
    std::vector<v1::Migration> out;
    On([&] {
      auto page = controller_->List(MigrationFilter(), "", 100);
      ASSERT_TRUE(page.ok());
      out = page->migrations;
    });
    return out;
  }
  // The agent of host a refuses whatever it was asked: the migration fails, the guest stays.
  void FailMigration() {
    for (int i = 0; i < 5; ++i) {
      On([&] {
        auto commands = std::exchange(links_["a"]->commands, {});
        for (const v1::Command& command : commands) {
          v1::AgentMessage message;
          message.mutable_result()->set_id(command.id());
          message.mutable_result()->set_code(static_cast<int>(absl::StatusCode::kFailedPrecondition));
          message.mutable_result()->set_message("no");
          fleet_->Receive(sessions_["a"], message);
        }
      });
      Settle();
    }
  }
  DeviceEventRecord Record() {
    DeviceEventRecord record;
    On([&] {
      auto item = store_->Get("events/web1");
      if (item.ok()) record.ParseFromString(item->value);
    });
    return record;
  }

  const test::TempDir dir_;
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<ServerMetrics> metrics_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<Fleet> fleet_;
  std::unique_ptr<Policies> policies_;
  std::unique_ptr<Controller> controller_;
  std::unique_ptr<DeviceEvents> events_;
  std::map<std::string, std::shared_ptr<TestLink>> links_;
  std::map<std::string, uint64_t> sessions_;
  uint64_t starts_ = 0;
  v1::Vm vm_;
};

TEST_F(DeviceEventsTest, WithoutAPolicyNothingIsDone) {
  Vm(1);
  EXPECT_TRUE(Migrations().empty());
  EXPECT_TRUE(Record().settled());
  // A policy made afterwards is about events to come.
  Policy("default", [](v1::Policy& p) { p.mutable_on_device_error()->set_migrate(true); });
  Vm(1);
  EXPECT_TRUE(Migrations().empty());
  Vm(2);
  EXPECT_EQ(Migrations().size(), 1u);
}

TEST_F(DeviceEventsTest, APolicyMovesTheVmAndSaysWhy) {
  Policy("default", [](v1::Policy& p) { p.mutable_on_device_error()->set_migrate(true); });
  Vm(0);
  EXPECT_TRUE(Migrations().empty());
  Vm(1, 7);
  auto migrations = Migrations();
  ASSERT_EQ(migrations.size(), 1u);
  EXPECT_EQ(migrations[0].vm(), "vms/web1");
  EXPECT_EQ(migrations[0].destination(), "hosts/c");  // most free memory
  EXPECT_EQ(migrations[0].labels().at("cause"), "device-event");
  EXPECT_EQ(migrations[0].labels().at("device"), "disk0");
  EXPECT_THAT(migrations[0].labels().at("event"), testing::HasSubstr("7 requests"));
  // More of the same, and the same told again after a session broke: one migration.
  Vm(2);
  Vm(5);
  On([&] { Connect("a"); });
  Settle();
  EXPECT_EQ(Migrations().size(), 1u);
}

TEST_F(DeviceEventsTest, AFailedAttemptIsRepeatedAfterAPauseOnly) {
  Policy("default", [](v1::Policy& p) {
    p.mutable_on_device_error()->set_migrate(true);
    p.mutable_on_device_error()->mutable_backoff()->set_seconds(3600);
  });
  Vm(1);
  ASSERT_EQ(Migrations().size(), 1u);
  FailMigration();
  ASSERT_EQ(Migrations()[0].phase(), v1::FAILED);
  for (uint64_t n = 2; n < 6; ++n) Vm(n);
  EXPECT_EQ(Migrations().size(), 1u);
  EXPECT_FALSE(Record().settled());
  EXPECT_GT(Record().not_before_ns(), 0);
}

TEST_F(DeviceEventsTest, AttemptsEnd) {
  Policy("default", [](v1::Policy& p) {
    p.mutable_on_device_error()->set_migrate(true);
    p.mutable_on_device_error()->mutable_backoff()->set_nanos(1000);
  });
  for (uint64_t n = 1; n < 12 && !Record().settled(); ++n) {
    Vm(n);
    FailMigration();
  }
  EXPECT_TRUE(Record().settled());
  EXPECT_EQ(Migrations().size(), DeviceEvents::kMaxAttempts);
}

TEST_F(DeviceEventsTest, ObserveOnlyDoesNothing) {
  Policy("default", [](v1::Policy& p) {
    p.mutable_on_device_error()->set_migrate(true);
    p.set_observe_only(true);
  });
  Vm(1);
  EXPECT_TRUE(Migrations().empty());
  EXPECT_TRUE(Record().settled());
}

TEST_F(DeviceEventsTest, TheFirstPolicyThatCoversTheVmCounts) {
  Policy("default", [](v1::Policy& p) {
    p.mutable_on_device_error()->set_migrate(true);
    p.mutable_on_device_error()->add_hosts("hosts/b");
  });
  Policy("zz", [](v1::Policy& p) {
    p.mutable_on_device_error()->set_migrate(true);
    p.mutable_on_device_error()->add_vms("web*");
    p.mutable_on_device_error()->add_hosts("hosts/gone");
    p.mutable_on_device_error()->add_hosts("hosts/a");
    p.mutable_on_device_error()->add_hosts("hosts/c");
  });
  Policy("aa", [](v1::Policy& p) {
    p.mutable_on_device_error()->set_migrate(true);
    p.mutable_on_device_error()->add_vms("db1");
  });
  Vm(1);
  ASSERT_EQ(Migrations().size(), 1u);
  EXPECT_EQ(Migrations()[0].policy(), "policies/zz");
  EXPECT_EQ(Migrations()[0].destination(), "hosts/c");
}

TEST_F(DeviceEventsTest, ARestartNeitherForgetsNorRepeats) {
  Policy("default", [](v1::Policy& p) { p.mutable_on_device_error()->set_migrate(true); });
  Vm(1);
  ASSERT_EQ(Migrations().size(), 1u);
  Shut();
  Open();
  Settle();
  EXPECT_EQ(Migrations().size(), 1u);
  EXPECT_FALSE(Record().settled());
  EXPECT_EQ(Record().migration(), Migrations()[0].name());
}

TEST_F(DeviceEventsTest, NonsenseInAPolicyIsRefused) {
  auto refused = [&](const std::function<void(v1::OnDeviceError&)>& change) {
    bool out = false;
    On([&] {
      v1::CreatePolicyRequest request;
      request.set_policy_id("x");
      request.mutable_policy()->mutable_on_device_error()->set_migrate(true);
      change(*request.mutable_policy()->mutable_on_device_error());
      out = absl::IsInvalidArgument(policies_->Create(request).status());
    });
    return out;
  };
  EXPECT_TRUE(refused([](auto& e) { e.add_vms("*web"); }));
  EXPECT_TRUE(refused([](auto& e) { e.add_vms(""); }));
  EXPECT_TRUE(refused([](auto& e) { e.add_hosts("vms/a"); }));
  EXPECT_TRUE(refused([](auto& e) { e.mutable_backoff()->set_seconds(7200); }));
}

// --- swaps ---

class SwapTest : public DeviceEventsTest {
 protected:
  v1::SwapDeviceRequest Request(const std::string& request_id = "r1") {
    v1::SwapDeviceRequest request;
    request.set_vm("vms/web1");
    request.set_device("disk0");
    request.mutable_backend()->set_socket("/run/new.sock");
    request.set_request_id(request_id);
    return request;
  }
  void Swap(const v1::SwapDeviceRequest& request) {
    answer_.reset();
    On([&] {
      fleet_->SwapDevice(
          request, [this](absl::StatusOr<v1::SwapDeviceResponse> answer) { answer_ = std::move(answer); });
    });
    Settle();
  }
  // The agent's answer to the command that it was sent last.
  void Answer(absl::StatusCode code = absl::StatusCode::kOk) {
    On([&] {
      ASSERT_FALSE(links_["a"]->commands.empty());
      const v1::Command command = links_["a"]->commands.back();
      ASSERT_TRUE(command.has_swap_device());
      v1::AgentMessage message;
      message.mutable_result()->set_id(command.id());
      message.mutable_result()->set_code(static_cast<int>(code));
      if (code == absl::StatusCode::kOk) {
        *message.mutable_result()->mutable_swapped()->mutable_device() = vm_.devices(0);
        message.mutable_result()->mutable_swapped()->mutable_device()->mutable_backend()->set_socket(
            command.swap_device().backend().socket());
      }
      fleet_->Receive(sessions_["a"], message);
    });
  }
  size_t Commands() { return links_["a"]->commands.size(); }
  std::optional<absl::StatusOr<v1::SwapDeviceResponse>> answer_;
};

TEST_F(SwapTest, IsDoneOnceForARequestId) {
  Vm(0);
  Swap(Request());
  EXPECT_FALSE(answer_);
  Answer();
  ASSERT_TRUE(answer_ && answer_->ok()) << answer_->status();
  EXPECT_EQ((*answer_)->device().backend().socket(), "/run/new.sock");
  On([&] { EXPECT_EQ(fleet_->GetVm("web1")->devices(0).backend().socket(), "/run/new.sock"); });
  EXPECT_EQ(Commands(), 1u);
  // The same again, also after a restart, does nothing.
  Swap(Request());
  ASSERT_TRUE(answer_ && answer_->ok());
  EXPECT_EQ(Commands(), 1u);
  vm_.mutable_devices(0)->mutable_backend()->set_socket("/run/new.sock");
  Shut();
  Open();
  Swap(Request());
  ASSERT_TRUE(answer_ && answer_->ok());
  EXPECT_EQ(Commands(), 0u);
  // Another body under that id is refused.
  v1::SwapDeviceRequest other = Request();
  other.mutable_backend()->set_socket("/run/third.sock");
  Swap(other);
  ASSERT_TRUE(answer_);
  EXPECT_EQ(answer_->status().code(), absl::StatusCode::kAlreadyExists);
}

TEST_F(SwapTest, RequestIdsAreForgottenWithTheVm) {
  Vm(0);
  Swap(Request());
  Answer();
  auto remembered = [this] {
    size_t count = 0;
    On([&] { count = store_->Scan("requests/swaps.", "", 10)->size(); });
    return count;
  };
  EXPECT_EQ(remembered(), 1u);
  // As long as the VM is known, also over a restart.
  Shut();
  Open();
  EXPECT_EQ(remembered(), 1u);
  v1::AgentMessage gone;
  gone.mutable_vm_gone()->set_vm("web1");
  On([&] { fleet_->Receive(sessions_["a"], gone); });
  vm_.Clear();
  Shut();
  Open();
  EXPECT_EQ(remembered(), 0u);
}

TEST_F(SwapTest, AFailedOneMayBeRepeated) {
  Vm(0);
  Swap(Request());
  Answer(absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(answer_);
  EXPECT_EQ(answer_->status().code(), absl::StatusCode::kFailedPrecondition);
  Swap(Request());
  Answer();
  EXPECT_TRUE(answer_ && answer_->ok());
  EXPECT_EQ(Commands(), 2u);
}

TEST_F(SwapTest, ExcludesMigrations) {
  Vm(0);
  v1::CreateMigrationRequest migrate;
  migrate.mutable_migration()->set_vm("vms/web1");
  migrate.mutable_migration()->set_destination("hosts/b");
  absl::Status created;
  auto create = [&] {
    On([&] { controller_->Create(migrate, [&](absl::StatusOr<v1::Migration> m) { created = m.status(); }); });
  };
  Swap(Request());
  create();
  EXPECT_EQ(ReasonOf(created), v1::VM_NOT_MIGRATABLE) << created;
  Answer();
  create();
  ASSERT_TRUE(created.ok()) << created;
  Swap(Request("r2"));
  ASSERT_TRUE(answer_);
  EXPECT_EQ(ReasonOf(answer_->status()), v1::VM_NOT_MIGRATABLE) << answer_->status();
}

TEST_F(SwapTest, OfWhatIsNotThere) {
  Vm(0);
  v1::SwapDeviceRequest request = Request();
  request.set_device("disk9");
  Swap(request);
  ASSERT_TRUE(answer_);
  EXPECT_TRUE(absl::IsInvalidArgument(answer_->status()));
  request = Request();
  request.set_vm("vms/none");
  Swap(request);
  EXPECT_TRUE(absl::IsNotFound(answer_->status()));
  On([&] { fleet_->Disconnect(sessions_["a"]); });
  Swap(Request());
  EXPECT_TRUE(absl::IsUnavailable(answer_->status()));
}

TEST_F(SwapTest, ACheckChangesNothing) {
  Vm(0);
  v1::SwapDeviceRequest request = Request();
  request.set_validate_only(true);
  Swap(request);
  Answer();
  ASSERT_TRUE(answer_ && answer_->ok());
  On([&] { EXPECT_EQ(fleet_->GetVm("web1")->devices(0).backend().socket(), "/run/old.sock"); });
}

}  // namespace
}  // namespace baton::server
