// The parts of the agent that stand alone: back-end lookup and hooks, report store, decisions after a shim's
// death, checks of a destination, task queue.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <atomic>
#include <future>

#include "agent/daemon/backend_resolver.h"
#include "agent/daemon/destination_checks.h"
#include "agent/daemon/recovery.h"
#include "agent/daemon/report_store.h"
#include "agent/daemon/task_queue.h"
#include "common/config.h"
#include "common/durable_file.h"
#include "tests/temp_dir.h"

namespace baton::daemon {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using State = migration::Ownership::State;
using test::TempDir;

Deadline Soon() { return Deadline::After(std::chrono::seconds(20)); }

v1::DeviceSpec Disk(const std::string& socket = "") {
  v1::DeviceSpec device;
  device.set_name("disk0");
  device.set_class_(v1::BLK);
  if (!socket.empty()) device.mutable_backend()->set_socket(socket);
  return device;
}

TEST(BackendResolver, MostSpecificEntryWins) {
  AgentConfig config;
  config.backends["*"].set_socket("/any/{vm}-{device}.sock");
  BackendResolver resolver(config);
  EXPECT_EQ(resolver.Resolve("web1", Disk(), "", Soon())->backend().socket(), "/any/web1-disk0.sock");
  config.backends["disk0"].set_socket("/disk0");
  config.backends["disk0"].set_kind(v1::SPDK);
  EXPECT_EQ(resolver.Resolve("web1", Disk(), "", Soon())->backend().socket(), "/disk0");
  EXPECT_EQ(resolver.Resolve("web1", Disk(), "", Soon())->backend().kind(), v1::SPDK);
  // The fence comes from the configuration only, the most specific one.
  EXPECT_TRUE(resolver.Resolve("web1", Disk(), "", Soon())->fence().empty());
  config.fences["*"] = FenceHook{{"/fence", "all"}};
  EXPECT_EQ(resolver.Resolve("web1", Disk(), "", Soon())->fence(1), "all");
  config.fences["web1/disk0"] = FenceHook{{"/fence", "web1"}, std::chrono::seconds(2)};
  EXPECT_EQ(resolver.Resolve("web1", Disk(), "", Soon())->fence(1), "web1");
  EXPECT_EQ(resolver.Resolve("web1", Disk(), "", Soon())->fence_timeout().seconds(), 2);
  config.backends["web1/disk0"].set_socket("/web1");
  EXPECT_EQ(resolver.Resolve("web1", Disk(), "", Soon())->backend().socket(), "/web1");
  EXPECT_EQ(resolver.Resolve("web2", Disk(), "", Soon())->backend().socket(), "/disk0");
}

TEST(BackendResolver, SpecsSocketIsFirstAtStartAndLastAtArrival) {
  AgentConfig config;
  BackendResolver resolver(config);
  EXPECT_EQ(resolver.Resolve("v", Disk("/spec"), "m1", Soon())->backend().socket(), "/spec");
  config.backends["disk0"].set_socket("/config");
  EXPECT_EQ(resolver.Resolve("v", Disk("/spec"), "", Soon())->backend().socket(), "/spec");
  EXPECT_EQ(resolver.Resolve("v", Disk("/spec"), "m1", Soon())->backend().socket(), "/config");
}

TEST(BackendResolver, KindOfANamedSocketIsWhatIsSaidOfThatSocket) {
  AgentConfig config;
  config.backends["disk0"].set_socket("/there/{vm}");
  config.backends["disk0"].set_kind(v1::SPDK);
  BackendResolver resolver(config);
  EXPECT_EQ(resolver.Resolve("v", Disk("/there/v"), "", Soon())->backend().kind(), v1::SPDK);
  EXPECT_EQ(resolver.Resolve("v", Disk("/other"), "", Soon())->backend().kind(),
            v1::BACKEND_KIND_UNSPECIFIED);
  EXPECT_EQ(resolver.Resolve("v", Disk("/other"), "", Soon())->backend().socket(), "/other");
}

TEST(BackendResolver, NothingNamesOne) {
  AgentConfig config;
  auto none = BackendResolver(config).Resolve("v", Disk(), "m1", Soon());
  EXPECT_EQ(none.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Message(none.status()),
            "neither `backends` nor `backend_hook` of this host's configuration names a back-end");
}

TEST(BackendResolver, HookCreatesAndRemoves) {
  TempDir dir;
  AgentConfig config;
  config.name = "a";
  config.backend_hook = BackendHook{{"/bin/sh", dir / "hook"}};
  ASSERT_TRUE(WriteFileDurable(
                  dir / "hook",
                  "echo \"$1 $BATON_ACTION $BATON_VM $BATON_DEVICE $BATON_DEVICE_CLASS $BATON_NUM_QUEUES "
                  "$BATON_MIGRATION $BATON_HOST\" >> " +
                      (dir / "calls") + "\necho /run/made.sock\n")
                  .ok());
  BackendResolver resolver(config);
  auto made = resolver.Resolve("web1", Disk(), "m7", Soon());
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_EQ(made->backend().socket(), "/run/made.sock");
  EXPECT_TRUE(made->from_hook());
  resolver.Release("web1", *made, "m7");
  v1::ResolvedDevice configured;
  resolver.Release("web1", configured, "m7");  // not the hook's: no call
  EXPECT_EQ(*ReadFileLimited(dir / "calls", 4096),
            "create create web1 disk0 blk 1 m7 a\nremove remove web1 disk0 blk 1 m7 a\n");
}

TEST(BackendResolver, HookFailures) {
  TempDir dir;
  AgentConfig config;
  config.backend_hook = BackendHook{{"/bin/sh", "-c", "echo no space on array >&2; exit 4"}};
  BackendResolver resolver(config);
  EXPECT_EQ(Message(resolver.Resolve("v", Disk(), "", Soon()).status()),
            "backend_hook create exited with 4: no space on array");
  config.backend_hook = BackendHook{{"/bin/sh", "-c", "sleep 1000"}, std::chrono::milliseconds(100)};
  EXPECT_EQ(resolver.Resolve("v", Disk(), "", Soon()).status().code(), absl::StatusCode::kDeadlineExceeded);
  config.backend_hook = BackendHook{{"/bin/sh", "-c", "echo done"}};
  EXPECT_THAT(Message(resolver.Resolve("v", Disk(), "", Soon()).status()),
              HasSubstr("printed 'done'; expected one"));
}

TEST(BackendResolver, HookOutput) {
  EXPECT_EQ(ParseHookOutput(" /run/x.sock \n")->socket(), "/run/x.sock");
  auto json = ParseHookOutput(R"({"socket": "/run/x.sock", "kind": "spdk", "recovery": "exact"})");
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ(json->kind(), v1::SPDK);
  EXPECT_EQ(json->recovery(), v1::RECOVERY_EXACT);
  EXPECT_EQ(Message(ParseHookOutput(R"({"kind": "spdk"})").status()),
            "output:1: the field 'socket' is missing");
  for (const char* text : {"", "\n", "relative", "/a\n/b", "{", "{\"socket\": 1, \"x\": 2}"})
    EXPECT_FALSE(ParseHookOutput(text).ok()) << text;
}

v1::SideReport Report(const std::string& id, v1::Phase phase, uint64_t sequence, bool done = false) {
  v1::SideReport report;
  report.set_migration_id(id);
  report.set_vm("vm1");
  report.set_role(v1::ROLE_SOURCE);
  report.set_phase(phase);
  report.set_sequence(sequence);
  report.set_done(done);
  return report;
}

TEST(ReportStore, KeepsFinalReportsUntilAcknowledged) {
  TempDir dir;
  {
    ReportStore store(dir / "reports");
    ASSERT_TRUE(store.Load().ok());
    EXPECT_TRUE(store.Update(Report("m1", v1::PRECOPY, 1)));
    EXPECT_EQ(store.OpenOf("vm1").size(), 1u);
    EXPECT_EQ(store.Update(Report("m1", v1::FAILED, 2, true))->sequence(), 2u);
    EXPECT_FALSE(store.Update(Report("m1", v1::PRECOPY, 3)));  // nothing after the final one
    EXPECT_TRUE(store.OpenOf("vm1").empty());
  }
  ReportStore store(dir / "reports");
  ASSERT_TRUE(store.Load().ok());
  ASSERT_TRUE(store.Find("m1", v1::ROLE_SOURCE));
  EXPECT_TRUE(store.Find("m1", v1::ROLE_SOURCE)->done());
  EXPECT_FALSE(store.Acknowledge("m1", v1::ROLE_SOURCE, 1));
  EXPECT_FALSE(store.Acknowledge("m1", v1::ROLE_DESTINATION, 9));
  EXPECT_TRUE(store.Acknowledge("m1", v1::ROLE_SOURCE, 2));
  ReportStore empty(dir / "reports");
  ASSERT_TRUE(empty.Load().ok());
  EXPECT_TRUE(empty.All().empty());
}

TEST(ReportStore, SequenceGrowsOverShims) {
  TempDir dir;
  ReportStore store(dir / "reports");
  ASSERT_TRUE(store.Load().ok());
  EXPECT_EQ(store.Update(Report("m1", v1::PRECOPY, 7))->sequence(), 7u);
  EXPECT_EQ(store.Update(Report("m1", v1::SWITCHOVER, 1))->sequence(), 8u);  // a new shim begins again
  EXPECT_FALSE(store.Update(Report("m1", v1::SWITCHOVER, 1)));               // only repeated
}

TEST(ReportStore, WhatIsTakenIsKeptLater) {
  TempDir dir;
  ReportStore store(dir / "reports");
  ASSERT_TRUE(store.Load().ok());
  ASSERT_TRUE(store.Take(Report("m1", v1::PRECOPY, 1)));
  EXPECT_TRUE(store.Find("m1", v1::ROLE_SOURCE));
  EXPECT_FALSE(ReadFileLimited(dir / "reports/m1.source", 1000).ok());
  // What came meanwhile is written with it.
  ASSERT_TRUE(store.Take(Report("m1", v1::FAILED, 2, true)));
  store.Keep("m1", v1::ROLE_SOURCE);
  ReportStore next(dir / "reports");
  ASSERT_TRUE(next.Load().ok());
  ASSERT_TRUE(next.Find("m1", v1::ROLE_SOURCE));
  EXPECT_TRUE(next.Find("m1", v1::ROLE_SOURCE)->done());
  // One that batond has recorded before it was written is not wanted any more.
  ASSERT_TRUE(store.Take(Report("m2", v1::FAILED, 1, true)));
  EXPECT_TRUE(store.Acknowledge("m2", v1::ROLE_SOURCE, 1));
  store.Keep("m2", v1::ROLE_SOURCE);
  EXPECT_FALSE(ReadFileLimited(dir / "reports/m2.source", 1000).ok());
}

TEST(ReportStore, DamagedFilesAreSetAside) {
  TempDir dir;
  ASSERT_TRUE(MakeDirectories(dir / "reports").ok());
  ASSERT_TRUE(WriteFileDurable(dir / "reports/m1.source", "\xff\xff\xff").ok());
  ReportStore store(dir / "reports");
  EXPECT_TRUE(store.Load().ok());
  EXPECT_TRUE(store.All().empty());
  EXPECT_TRUE(ReadFileLimited(dir / "reports/m1.source.damaged", 100).ok());
  // An id that is no file name is kept in memory only.
  EXPECT_TRUE(store.Update(Report("../x", v1::FAILED, 1, true)));
  EXPECT_FALSE(ReadFileLimited(dir / "x.source", 100).ok());
}

migration::Ownership Own(State state, const std::string& migration = "m1") { return {state, 3, migration}; }

TEST(Recovery, Decisions) {
  using A = ShimDeathAction;
  EXPECT_EQ(DecideAfterShimDeath(Own(State::kOwner), false, true), A::kAdopt);
  EXPECT_EQ(DecideAfterShimDeath(Own(State::kOwner), true, true), A::kAdopt);
  EXPECT_EQ(DecideAfterShimDeath(Own(State::kOwner), false, false), A::kGuestLost);
  EXPECT_EQ(DecideAfterShimDeath(Own(State::kYielded), false, true), A::kAdopt);
  EXPECT_EQ(DecideAfterShimDeath(Own(State::kYielded), false, false), A::kYieldedLost);
  for (bool alive : {false, true}) {
    EXPECT_EQ(DecideAfterShimDeath(Own(State::kReleased), false, alive), A::kCleanUp);
    EXPECT_EQ(DecideAfterShimDeath(Own(State::kRefused), true, alive), A::kCleanUp);
    EXPECT_EQ(DecideAfterShimDeath(Own(State::kIncoming), true, alive), A::kRefuse);
    EXPECT_EQ(DecideAfterShimDeath(Own(State::kNothing), true, alive), A::kRefuse);
    EXPECT_EQ(DecideAfterShimDeath(Own(State::kNothing), false, alive), A::kNeverStarted);
  }
}

TEST(Recovery, FinalReports) {
  v1::SideReport open = Report("m1", v1::PRECOPY, 5);
  v1::SideReport lost =
      FinalReportAfterShimDeath(open, ShimDeathAction::kGuestLost, Own(State::kOwner), false);
  EXPECT_TRUE(lost.done());
  EXPECT_TRUE(lost.guest_lost());
  EXPECT_EQ(lost.reason(), v1::SOURCE_SHIM_FAILED);
  v1::SideReport goes_on = FinalReportAfterShimDeath(open, ShimDeathAction::kAdopt, Own(State::kOwner), true);
  EXPECT_TRUE(goes_on.guest_running());
  EXPECT_FALSE(goes_on.guest_lost());
  EXPECT_EQ(goes_on.handover(), v1::IDLE);
  v1::SideReport yielded =
      FinalReportAfterShimDeath(open, ShimDeathAction::kYieldedLost, Own(State::kYielded), false);
  EXPECT_EQ(yielded.handover(), v1::YIELDED);
  EXPECT_FALSE(yielded.guest_running());
  v1::SideReport released =
      FinalReportAfterShimDeath(open, ShimDeathAction::kCleanUp, Own(State::kReleased), false);
  EXPECT_EQ(released.handover(), v1::RELEASED);
  EXPECT_EQ(released.phase(), v1::SUCCEEDED);
  open.set_role(v1::ROLE_DESTINATION);
  v1::SideReport refused =
      FinalReportAfterShimDeath(open, ShimDeathAction::kRefuse, Own(State::kIncoming), false);
  EXPECT_EQ(refused.handover(), v1::REFUSED);
  EXPECT_EQ(refused.reason(), v1::DESTINATION_SHIM_FAILED);
  v1::SideReport owner = FinalReportAfterShimDeath(open, ShimDeathAction::kAdopt, Own(State::kOwner), true);
  EXPECT_EQ(owner.handover(), v1::OWNER);
  EXPECT_TRUE(owner.guest_running());
  EXPECT_EQ(owner.phase(), v1::SUCCEEDED);
}

class DestinationChecks : public testing::Test {
 protected:
  DestinationChecks() {
    v1::VmSpec* spec = source_.mutable_vm()->mutable_spec();
    spec->set_name("web1");
    spec->set_memory_bytes(1ull << 30);
    spec->set_vcpus(2);
    spec->set_machine("q35");
    source_.set_vmm_version("QEMU emulator version 7.2.22");
    source_.set_accelerator(v1::ACCELERATOR_TCG);
    facts_.host = "b";
    facts_.memory_available = facts_.memory_dir_free = 4ull << 30;
    facts_.state_dir_free = 1ull << 30;
    facts_.cpus = 4;
    QemuFacts qemu;
    qemu.version = "QEMU emulator version 7.2.22 (Debian 1:7.2)";
    qemu.machines = {"q35"};
    facts_.qemu = qemu;
  }
  std::vector<std::string> Codes() {
    std::vector<std::string> codes;
    for (const v1::Finding& finding : CheckDestination(source_, params_, facts_)) {
      EXPECT_FALSE(finding.message().empty());
      codes.push_back(finding.code());
    }
    return codes;
  }
  v1::Inspection source_;
  v1::MigrationParams params_;
  DestinationFacts facts_;
};

TEST_F(DestinationChecks, NothingInTheWay) { EXPECT_THAT(Codes(), ElementsAre()); }

TEST_F(DestinationChecks, EachObstacleIsFound) {
  auto with = [&](const std::function<void()>& change) {
    v1::Inspection source = source_;
    v1::MigrationParams params = params_;
    DestinationFacts facts = facts_;
    change();
    std::vector<std::string> codes = Codes();
    source_ = source;
    params_ = params;
    facts_ = facts;
    return codes;
  };
  EXPECT_THAT(with([&] { facts_.memory_available = 1ull << 30; }), ElementsAre("MEMORY_INSUFFICIENT"));
  EXPECT_THAT(with([&] { facts_.memory_dir_free = 1; }), ElementsAre("MEMORY_DIR_FULL"));
  EXPECT_THAT(with([&] { facts_.state_dir_free = 1; }), ElementsAre("STATE_DIR_FULL"));
  EXPECT_THAT(with([&] { facts_.vm_in_use = "RUNNING"; }), ElementsAre("NAME_IN_USE"));
  EXPECT_THAT(with([&] { facts_.qemu = absl::NotFoundError("no"); }), ElementsAre("VMM_UNUSABLE"));
  EXPECT_THAT(with([&] { source_.set_vmm_version("QEMU emulator version 10.0.2"); }),
              ElementsAre("VMM_VERSION_DIFFERS"));
  EXPECT_THAT(with([&] { source_.set_vmm_version("QEMU emulator version 7.2.1"); }),
              ElementsAre("VMM_PATCH_DIFFERS"));
  EXPECT_THAT(with([&] { source_.clear_vmm_version(); }), ElementsAre("VMM_VERSION_UNKNOWN"));
  EXPECT_THAT(with([&] { source_.mutable_vm()->mutable_spec()->set_machine("pc-9"); }),
              ElementsAre("MACHINE_UNKNOWN"));
  EXPECT_THAT(with([&] { facts_.missing_files = {"/boot/k"}; }), ElementsAre("BOOT_FILE_MISSING"));
  EXPECT_THAT(with([&] { source_.set_accelerator(v1::ACCELERATOR_KVM); }),
              ElementsAre("ACCELERATOR_DIFFERS"));
  EXPECT_THAT(with([&] { facts_.kvm = true; }), ElementsAre("ACCELERATOR_KEPT"));
  EXPECT_THAT(with([&] { facts_.cpus = 1; }), ElementsAre("CPUS_OVERCOMMITTED"));
  EXPECT_THAT(with([&] { params_.set_tls(true); }), ElementsAre("TLS_NOT_CONFIGURED"));
  EXPECT_THAT(with([&] { facts_.require_tls = facts_.peer_tls = true; }), ElementsAre("TLS_REQUIRED"));
  // Worst first.
  EXPECT_THAT(with([&] { facts_.cpus = 1, facts_.memory_dir_free = 1; }),
              ElementsAre("MEMORY_DIR_FULL", "CPUS_OVERCOMMITTED"));
}

TEST(QemuInfo, VersionNumbers) {
  EXPECT_EQ(VersionNumber("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"), "7.2.22");
  EXPECT_EQ(VersionNumber("QEMU emulator version 10.0.2"), "10.0.2");
  EXPECT_EQ(VersionNumber("something else"), "");
}

TEST(TaskQueue, RunsInOrderOfTimeAndDropsTheRest) {
  std::promise<void> second;
  std::vector<int> order;
  TaskQueue queue(1);
  queue.PostAfter(std::chrono::milliseconds(20), [&] {
    order.push_back(2);
    second.set_value();
  });
  queue.Post([&] { order.push_back(1); });
  queue.PostAfter(std::chrono::hours(1), [&] { order.push_back(3); });
  second.get_future().wait();
  queue.Stop();
  EXPECT_THAT(order, ElementsAre(1, 2));
  queue.Post([&] { order.push_back(4); });
  EXPECT_EQ(order.size(), 2u);
}

}  // namespace
}  // namespace baton::daemon
