#include "tests/integration/client/fixture.h"

#include <fstream>

namespace baton::testing {
namespace {

constexpr int64_t kStart = 1767225600;  // 2026-01-01 00:00:00 UTC

v1::Host ExampleHost(const std::string& name, bool connected) {
  v1::Host host;
  host.set_name("hosts/" + name);
  host.set_connected(connected);
  host.set_peer_address(name + ".example:7410");
  host.set_agent_version("0.1.0");
  host.set_cpus(8);
  host.set_memory_total(64ull << 30);
  host.set_memory_free(32ull << 30);
  host.set_kernel("6.1.0");
  (*host.mutable_vmms())["default"] = "7.2.22";
  host.add_capabilities("uffd-wp-async");
  host.set_vm_count(1);
  return host;
}

}  // namespace

CtlTest::CtlTest() {
  batond_ = std::make_unique<FakeBatond>("unix:" + directory_ / "batond.sock");
  batond_->PutHost(ExampleHost("a", true));
  batond_->PutHost(ExampleHost("b", true));
  batond_->PutHost(ExampleHost("c", false));
  v1::Vm vm;
  vm.set_name("vms/web1");
  vm.set_host("hosts/a");
  vm.set_state(v1::Vm::RUNNING);
  vm.mutable_spec()->set_name("web1");
  vm.mutable_spec()->set_memory_bytes(256 << 20);
  vm.mutable_spec()->set_vcpus(2);
  vm.set_epoch(3);
  v1::Device& disk = *vm.add_devices();
  disk.set_name("disk0");
  disk.set_class_(v1::BLK);
  disk.set_state(v1::Device::ACTIVE);
  disk.mutable_backend()->set_socket("/run/qsd/disk0.sock");
  disk.mutable_backend()->set_kind(v1::QEMU_STORAGE_DAEMON);
  batond_->PutVm(vm);
  v1::Policy policy;
  policy.set_name("policies/default");
  policy.mutable_params()->mutable_max_downtime()->set_nanos(300000000);
  policy.set_etag("e1");
  batond_->PutPolicy(policy);
  batond_->Start();
}

CtlTest::~CtlTest() { batond_->Stop(); }

CtlResult CtlTest::Run(const std::vector<std::string>& arguments, const std::string& input) {
  std::vector<std::string> all = {"--server", batond_->target()};
  all.insert(all.end(), arguments.begin(), arguments.end());
  return RunCtl(all, input);
}

std::unique_ptr<CtlProcess> CtlTest::StartPiped(const std::vector<std::string>& arguments, bool keep_input) {
  CtlProcess::Options options;
  options.keep_input = keep_input;
  options.environment = {{"BATON_SERVER", batond_->target()}};
  return std::make_unique<CtlProcess>(arguments, options);
}

std::unique_ptr<CtlProcess> CtlTest::StartOnTerminal(const std::vector<std::string>& arguments, int columns) {
  CtlProcess::Options options;
  options.terminal = true;
  options.columns = columns;
  options.environment = {{"BATON_SERVER", batond_->target()}};
  return std::make_unique<CtlProcess>(arguments, options);
}

std::string CtlTest::WriteFile(const std::string& name, const std::string& text) {
  std::string path = directory_ / name;
  std::ofstream(path) << text;
  return path;
}

v1::Migration ExampleMigration(const std::string& id, v1::Phase phase) {
  v1::Migration m;
  m.set_name("migrations/" + id);
  m.set_vm("vms/web1");
  m.set_source("hosts/a");
  m.set_destination("hosts/b");
  m.set_policy("policies/default");
  m.mutable_params()->mutable_max_downtime()->set_nanos(300000000);
  m.set_phase(phase);
  m.set_guest_location(phase == v1::SUCCEEDED ? v1::DESTINATION : v1::SOURCE);
  m.mutable_create_time()->set_seconds(kStart);
  for (v1::Phase p : {v1::QUEUED, v1::PREPARING, v1::PRECOPY, v1::SWITCHOVER, v1::FINISHING, v1::SUCCEEDED}) {
    if (p > phase) break;
    v1::PhaseTime& time = *m.add_phase_times();
    time.set_phase(p);
    time.mutable_time()->set_seconds(kStart + p - v1::QUEUED);
  }
  v1::Progress& progress = *m.mutable_progress();
  progress.set_memory_total(256 << 20);
  if (phase >= v1::PRECOPY) {
    progress.set_round(1);
    progress.set_remaining(64 << 20);
    progress.set_rate(100 << 20);
    progress.set_dirty_rate(10 << 20);
    progress.mutable_forecast_downtime()->set_nanos(34000000);
    progress.mutable_forecast_remaining()->set_nanos(640000000);
    progress.mutable_bytes()->set_data(192 << 20);
    progress.mutable_bytes()->set_wire(193 << 20);
    v1::RoundStats& round = *progress.add_rounds();
    round.set_number(0);
    round.mutable_duration()->set_nanos(500000000);
    round.set_bytes(192 << 20);
    round.set_rate(384 << 20);
  }
  if (phase >= v1::SWITCHOVER) {
    v1::Decision& decision = *progress.add_decisions();
    decision.mutable_time()->set_seconds(kStart + 2);
    decision.mutable_time()->set_nanos(600000000);
    decision.set_round(0);
    decision.set_action("switchover");
    decision.set_why("what is left fits into the downtime limit");
  }
  if (phase == v1::SUCCEEDED) {
    m.set_reason(v1::NONE);
    progress.set_remaining(0);
    progress.mutable_downtimes()->mutable_vcpu()->set_nanos(21000000);
    progress.mutable_downtimes()->mutable_device()->set_nanos(19000000);
    m.mutable_end_time()->set_seconds(kStart + 6);
  }
  return m;
}

v1::Migration FailedMigration(const std::string& id, v1::Reason reason, v1::GuestLocation location,
                              const std::string& message) {
  v1::Migration m = ExampleMigration(id, v1::SWITCHOVER);
  m.set_phase(v1::FAILED);
  v1::PhaseTime& time = *m.add_phase_times();
  time.set_phase(v1::FAILED);
  time.mutable_time()->set_seconds(kStart + 5);
  m.mutable_end_time()->set_seconds(kStart + 5);
  m.set_reason(reason);
  m.set_guest_location(location);
  m.set_message(message);
  return m;
}

}  // namespace baton::testing
