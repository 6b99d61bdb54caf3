// A VmManager over temporary directories and fake shims, for the tests of the agent.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "agent/daemon/vm_manager.h"
#include "common/durable_file.h"
#include "common/process.h"
#include "tests/temp_dir.h"

namespace baton::daemon {

inline Deadline Soon() { return Deadline::After(std::chrono::seconds(30)); }

// Everything an agent told batond, and waiting for it.
class Heard {
 public:
  VmEvents Events() {
    VmEvents events;
    events.on_vm = [this](const v1::Vm& vm) { Add([&] { vms.push_back(vm); }); };
    events.on_gone = [this](const std::string& vm, const std::string&) { Add([&] { gone.push_back(vm); }); };
    events.on_report = [this](const v1::SideReport& report) { Add([&] { reports.push_back(report); }); };
    return events;
  }
  bool Wait(const std::function<bool()>& condition) {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, std::chrono::seconds(30), condition);
  }
  // The final report of a migration, waited for; a default one if none comes.
  v1::SideReport WaitFinal(const std::string& migration) {
    v1::SideReport found;
    Wait([&] {
      for (const auto& report : reports) {
        if (report.migration_id() != migration || !report.done()) continue;
        found = report;
        return true;
      }
      return false;
    });
    return found;
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<v1::Vm> vms;
  std::vector<std::string> gone;
  std::vector<v1::SideReport> reports;

 private:
  void Add(const std::function<void()>& add) {
    std::lock_guard lock(mutex);
    add();
    changed.notify_all();
  }
};

// What an agent is made of, without session and port; destroying one and making another is an agent's
// restart.
class TestAgent {
 public:
  explicit TestAgent(const AgentConfig& config)
      : config_(config),
        store_(config_),
        reports_(config_.state_dir + "/reports"),
        backends_(config_),
        launcher_(MakeShimLauncher(config_)) {
    EXPECT_TRUE(reports_.Load().ok());
    vms_ = std::make_unique<VmManager>(
        VmManagerParts{config_, store_, reports_, backends_, qemu_, *launcher_, metrics, tasks_},
        heard.Events());
  }
  ~TestAgent() {
    tasks_.Stop();
    vms_.reset();
  }
  VmManager& vms() { return *vms_; }
  VmStore& store() { return store_; }
  ReportStore& reports() { return reports_; }

  Heard heard;
  AgentMetrics metrics;

 private:
  const AgentConfig config_;
  QemuInfo qemu_;
  VmStore store_;
  ReportStore reports_;
  BackendResolver backends_;
  std::unique_ptr<ShimLauncher> launcher_;
  TaskQueue tasks_{4};
  std::unique_ptr<VmManager> vms_;
};

class AgentTest : public testing::Test {
 protected:
  void SetUp() override {
    config_.name = "a";
    config_.run_dir = dir_ + "/run";
    config_.state_dir = dir_ + "/state";
    config_.memory_dir = dir_ + "/memory";
    config_.peer.advertise = "127.0.0.1:7410";
    config_.shim = FAKE_SHIM;
    config_.qemu["default"].path = dir_ + "/qemu";
    for (const std::string& sub : {config_.run_dir, config_.state_dir, config_.memory_dir})
      ASSERT_TRUE(MakeDirectories(sub).ok());
    ASSERT_TRUE(WriteFileDurable(
                    config_.qemu["default"].path,
                    "#!/bin/sh\ncase \"$*\" in *--version*) echo 'QEMU emulator version 7.2.22 (Debian)';;"
                    "*) printf 'Supported machines are:\\nq35  Standard PC\\n';; esac\n")
                    .ok());
    ASSERT_EQ(::chmod(config_.qemu["default"].path.c_str(), 0755), 0);
    ::unsetenv("BATON_FAKE_SHIM");
    agent_ = std::make_unique<TestAgent>(config_);
  }
  void TearDown() override {
    agent_.reset();
    ::unsetenv("BATON_FAKE_SHIM");
    // Shims and VMMs of a failed test as well.
    for (const ProcessId& id : FindByCommandLine(dir_ + "/")) (void)KillProcess(id, Soon());
  }

  void Restart() {
    agent_.reset();
    agent_ = std::make_unique<TestAgent>(config_);
    ASSERT_TRUE(agent_->vms().FindAgain(Soon()).ok());
  }

  static v1::VmSpec Spec(const std::string& name = "vm1") {
    v1::VmSpec spec;
    spec.set_name(name);
    spec.set_memory_bytes(64 << 20);
    spec.set_vcpus(1);
    return spec;
  }
  absl::StatusOr<v1::Vm> Start(const v1::VmSpec& spec = Spec()) {
    v1::StartVmCommand command;
    *command.mutable_spec() = spec;
    return agent_->vms().StartVm(command, Soon());
  }
  absl::Status Stop(const std::string& vm = "vm1", bool force = false) {
    v1::StopVmCommand command;
    command.set_vm(vm);
    command.set_force(force);
    return agent_->vms().StopVm(command, Soon());
  }
  absl::StatusOr<v1::Prepared> Prepare(const std::string& migration, bool validate_only = false,
                                       const v1::VmSpec& spec = Spec()) {
    v1::PrepareIncomingCommand command;
    command.set_migration_id(migration);
    command.set_validate_only(validate_only);
    *command.mutable_source()->mutable_vm()->mutable_spec() = spec;
    command.mutable_source()->set_epoch(1);
    command.mutable_source()->set_vmm_version("QEMU emulator version 7.2.22");
    command.mutable_source()->set_accelerator(v1::ACCELERATOR_TCG);
    return agent_->vms().PrepareIncoming(command, Soon());
  }
  // See fake_shim.cc.
  absl::Status Drive(int step, const std::string& migration, const std::string& vm = "vm1") {
    v1::ShimRequest request;
    request.mutable_retune()->set_migration_id(migration);
    request.mutable_retune()->set_bandwidth(static_cast<uint64_t>(step));
    return agent_->vms().Forward(vm, request, Soon());
  }
  ProcessId Shim(const std::string& vm = "vm1") {
    auto entry = agent_->vms().Find(vm);
    return entry == nullptr ? ProcessId() : entry->shim();
  }
  ProcessId Vmm(const std::string& vm = "vm1") {
    auto conf = agent_->store().Read(vm);
    return conf.ok() ? ProcessId{static_cast<pid_t>(conf->vmm_pid()), conf->vmm_start_time()} : ProcessId();
  }
  v1::Vm Only() {
    std::vector<v1::Vm> vms = agent_->vms().Inventory();
    EXPECT_EQ(vms.size(), 1u);
    return vms.empty() ? v1::Vm() : vms[0];
  }
  // Nothing of the VM is left: no files, no processes, not in the inventory.
  void ExpectGone(const std::string& vm = "vm1") {
    EXPECT_EQ(agent_->vms().Find(vm), nullptr);
    VmPaths paths = PathsOf(config_, vm);
    for (const std::string& path : {paths.run_dir, paths.state_dir, paths.memory})
      EXPECT_NE(::access(path.c_str(), F_OK), 0) << path;
    EXPECT_TRUE(FindByCommandLine(paths.state_dir).empty());
    EXPECT_TRUE(FindByCommandLine("mem-path=" + paths.memory).empty());
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  AgentConfig config_;
  std::unique_ptr<TestAgent> agent_;
};

}  // namespace baton::daemon
