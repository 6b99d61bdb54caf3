// The VMs of a host over fake shims: real processes, files, journals and sockets, no guest.
#include <gmock/gmock.h>
#include <signal.h>
#include <sys/socket.h>

#include "agent/migration/journal.h"
#include "common/config.h"
#include "common/unix_socket.h"
#include "tests/unit/daemon/agent_fixture.h"

namespace baton::daemon {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

using VmManagerTest = AgentTest;

stream::Token TokenOf(const v1::Prepared& prepared) { return *stream::MakeToken(prepared.token()); }

TEST_F(VmManagerTest, StartsIdempotentlyAndStops) {
  auto vm = Start();
  ASSERT_TRUE(vm.ok()) << vm.status();
  EXPECT_EQ(vm->name(), "vms/vm1");
  EXPECT_EQ(vm->host(), "hosts/a");
  EXPECT_EQ(vm->state(), v1::Vm::RUNNING);
  EXPECT_EQ(vm->epoch(), 1u);
  EXPECT_EQ(vm->spec().machine(), "q35");
  ProcessId shim = Shim();
  EXPECT_TRUE(ProcessAlive(shim));
  // The shim is nobody's child and in a session of its own: the agent's end does not reach it.
  EXPECT_NE(::getsid(shim.pid), ::getsid(0));
  ASSERT_TRUE(Start().ok());
  EXPECT_EQ(Shim().pid, shim.pid);
  v1::VmSpec other = Spec();
  other.set_vcpus(2);
  EXPECT_EQ(Start(other).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_TRUE(Stop().ok());
  ExpectGone();
  EXPECT_THAT(agent_->heard.gone, Contains("vm1"));
  EXPECT_EQ(Stop().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(Start().ok());
}

TEST_F(VmManagerTest, FailedStartsSayWhyAndLeaveNothing) {
  v1::VmSpec bad = Spec();
  bad.set_memory_bytes(1);
  EXPECT_EQ(Start(bad).status().code(), absl::StatusCode::kInvalidArgument);
  v1::VmSpec named = Spec();
  named.set_qemu("11.0");
  EXPECT_THAT(Message(Start(named).status()), HasSubstr("host a has no QEMU named '11.0'"));
  v1::VmSpec kvm = Spec();
  kvm.set_accelerator(v1::ACCELERATOR_KVM);
  EXPECT_THAT(Message(Start(kvm).status()), HasSubstr("needs KVM"));
  ::setenv("BATON_FAKE_SHIM", "exit", 1);
  EXPECT_THAT(Message(Start().status()), HasSubstr("the fake shim was told to fail"));
  ::setenv("BATON_FAKE_SHIM", "stopped", 1);
  EXPECT_THAT(Message(Start().status()), HasSubstr("the fake VMM says no"));
  ::unsetenv("BATON_FAKE_SHIM");
  v1::VmSpec disk = Spec();
  v1::DeviceSpec* device = disk.add_devices();
  device->set_name("disk0");
  device->set_class_(v1::BLK);
  EXPECT_THAT(Message(Start(disk).status()), HasSubstr("device disk0: neither `backends` nor"));
  device->mutable_backend()->set_socket(dir_ + "/absent.sock");
  absl::Status absent = Start(disk).status();
  EXPECT_THAT(Message(absent), HasSubstr("device disk0: back-end: " + dir_ + "/absent.sock: "));
  EXPECT_EQ(ReasonOf(absent), v1::SOURCE_BACKEND_FAILED);
  ExpectGone();
}

TEST_F(VmManagerTest, SilentBackendIsNamed) {
  // Listens and accepts (backlog), never answers.
  auto listener = UnixListener::Listen(dir_ + "/silent.sock");
  ASSERT_TRUE(listener.ok());
  v1::VmSpec disk = Spec();
  v1::DeviceSpec* device = disk.add_devices();
  device->set_name("disk0");
  device->set_class_(v1::BLK);
  device->mutable_backend()->set_socket(dir_ + "/silent.sock");
  EXPECT_THAT(Message(Start(disk).status()),
              HasSubstr("device disk0: back-end " + dir_ +
                        "/silent.sock: accepts the connection but does not answer"));
  ExpectGone();
}

TEST_F(VmManagerTest, HangingShimIsGivenUp) {
  ::setenv("BATON_FAKE_SHIM", "hang", 1);
  v1::StartVmCommand command;
  *command.mutable_spec() = Spec();
  auto started = agent_->vms().StartVm(command, Deadline::After(std::chrono::milliseconds(500)));
  EXPECT_EQ(started.status().code(), absl::StatusCode::kDeadlineExceeded);
  ExpectGone();
}

TEST_F(VmManagerTest, DiskFullUnderStateDirIsSaid) {
  // A file where the VM's directory should be fails the same way for root as a full disk for everybody.
  ASSERT_TRUE(WriteFileDurable(config_.state_dir + "/vms", "x").ok());
  absl::Status failed = Start().status();
  EXPECT_EQ(ReasonOf(failed), v1::STATE_WRITE_FAILED);
  EXPECT_THAT(Message(failed), HasSubstr(config_.state_dir + "/vms"));
}

TEST_F(VmManagerTest, GracefulStopMayFailForceDoesNot) {
  ::setenv("BATON_FAKE_SHIM", "stubborn", 1);
  ASSERT_TRUE(Start().ok());
  EXPECT_EQ(Stop().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(ProcessAlive(Vmm()));
  EXPECT_TRUE(Stop("vm1", true).ok());
  ExpectGone();
}

TEST_F(VmManagerTest, RestartedAgentFindsItsShims) {
  ASSERT_TRUE(Start().ok());
  ASSERT_TRUE(Start(Spec("vm2")).ok());
  ProcessId shim = Shim();
  Restart();
  EXPECT_EQ(agent_->vms().Inventory().size(), 2u);
  EXPECT_EQ(Shim().pid, shim.pid);
  EXPECT_EQ(agent_->vms().Find("vm1")->Describe("a").state(), v1::Vm::RUNNING);
  EXPECT_TRUE(Stop("vm2").ok());
  ExpectGone("vm2");
}

TEST_F(VmManagerTest, DeadShimIsReplacedWhileItsVmmLives) {
  ASSERT_TRUE(Start().ok());
  ProcessId shim = Shim(), vmm = Vmm();
  ASSERT_TRUE(KillProcess(shim, Soon()).ok());
  ASSERT_TRUE(agent_->heard.Wait([&] {
    return !agent_->heard.vms.empty() &&
           agent_->heard.vms.back().shim_pid() != static_cast<uint64_t>(shim.pid) &&
           agent_->heard.vms.back().shim_pid() != 0;
  }));
  EXPECT_EQ(Only().state(), v1::Vm::RUNNING);
  EXPECT_TRUE(ProcessAlive(vmm));
  EXPECT_EQ(agent_->store().Read("vm1")->mode(), v1::ShimConfig::ADOPT);
}

TEST_F(VmManagerTest, ShimThatDiedWhileNoAgentRanIsReplaced) {
  ASSERT_TRUE(Start().ok());
  ProcessId shim = Shim();
  agent_.reset();
  ASSERT_TRUE(KillProcess(shim, Soon()).ok());
  Restart();
  EXPECT_EQ(Only().state(), v1::Vm::RUNNING);
  EXPECT_NE(Shim().pid, shim.pid);
}

TEST_F(VmManagerTest, LostGuestIsReportedAndListedUntilStopped) {
  ASSERT_TRUE(Start().ok());
  v1::StartOutgoingCommand outgoing;
  outgoing.set_migration_id("m1");
  outgoing.set_vm("vm1");
  ASSERT_TRUE(agent_->vms().StartOutgoing(outgoing, Soon()).ok());
  ASSERT_TRUE(agent_->vms().StartOutgoing(outgoing, Soon()).ok());  // repeated
  ASSERT_TRUE(agent_->heard.Wait([&] { return !agent_->heard.reports.empty(); }));
  EXPECT_EQ(Stop().code(), absl::StatusCode::kFailedPrecondition);  // during a migration
  ProcessId shim = Shim(), vmm = Vmm();
  ASSERT_TRUE(KillProcess(vmm, Soon()).ok());
  ASSERT_TRUE(KillProcess(shim, Soon()).ok());
  v1::SideReport final = agent_->heard.WaitFinal("m1");
  EXPECT_TRUE(final.guest_lost());
  EXPECT_EQ(final.reason(), v1::SOURCE_SHIM_FAILED);
  EXPECT_EQ(Only().state(), v1::Vm::STOPPED);
  // Still so for the next agent, until somebody deals with it.
  Restart();
  EXPECT_EQ(Only().state(), v1::Vm::STOPPED);
  EXPECT_TRUE(agent_->reports().Find("m1", v1::ROLE_SOURCE)->guest_lost());
  EXPECT_TRUE(Start().ok());
  EXPECT_EQ(Only().state(), v1::Vm::RUNNING);
}

TEST_F(VmManagerTest, SourceShimDiesInPrecopyGuestGoesOn) {
  ASSERT_TRUE(Start().ok());
  ASSERT_TRUE(Drive(3, "m1").ok());
  ASSERT_TRUE(KillProcess(Shim(), Soon()).ok());
  v1::SideReport final = agent_->heard.WaitFinal("m1");
  EXPECT_FALSE(final.guest_lost());
  EXPECT_TRUE(final.guest_running());
  EXPECT_EQ(final.handover(), v1::IDLE);
  EXPECT_EQ(final.reason(), v1::SOURCE_SHIM_FAILED);
  EXPECT_EQ(Only().state(), v1::Vm::RUNNING);
}

TEST_F(VmManagerTest, YieldedSourceGoesOnAskingThroughANewShim) {
  ASSERT_TRUE(Start().ok());
  ASSERT_TRUE(Drive(3, "m1").ok());
  ASSERT_TRUE(Drive(1, "m1").ok());
  ProcessId shim = Shim();
  ASSERT_TRUE(KillProcess(shim, Soon()).ok());
  ASSERT_TRUE(agent_->heard.Wait([&] {
    const v1::Vm& vm = agent_->heard.vms.back();
    return vm.shim_pid() != 0 && vm.shim_pid() != static_cast<uint64_t>(shim.pid);
  }));
  // Nothing final is said: the outcome is not known.
  EXPECT_FALSE(agent_->reports().Find("m1", v1::ROLE_SOURCE)->done());
}

TEST_F(VmManagerTest, YieldedGuestIsNotStartedASecondTime) {
  ASSERT_TRUE(Start().ok());
  ASSERT_TRUE(Drive(3, "m1").ok());
  ASSERT_TRUE(Drive(1, "m1").ok());
  ProcessId shim = Shim();
  ASSERT_TRUE(KillProcess(Vmm(), Soon()).ok());
  ASSERT_TRUE(KillProcess(shim, Soon()).ok());
  v1::SideReport final = agent_->heard.WaitFinal("m1");
  EXPECT_EQ(final.handover(), v1::YIELDED);
  EXPECT_TRUE(final.guest_lost());
  EXPECT_THAT(Message(Start().status()), HasSubstr("was given away by host a in migration m1"));
  Restart();
  EXPECT_THAT(Message(Start().status()), HasSubstr("was given away by host a in migration m1"));
  EXPECT_TRUE(Stop().ok());
  ExpectGone();
}

TEST_F(VmManagerTest, YieldedGuestIsNotSaidToBeStarted) {
  // As long as its VMM stands still here, too: the answer to "start" must not be "it is there".
  ASSERT_TRUE(Start().ok());
  ASSERT_TRUE(Drive(3, "m1").ok());
  ASSERT_TRUE(Drive(1, "m1").ok());
  EXPECT_EQ(Start().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(ProcessAlive(Vmm()));
}

TEST_F(VmManagerTest, GuestStartedAfterALostOneIsANewerOne) {
  ASSERT_TRUE(Prepare("m1").ok());
  ASSERT_TRUE(Drive(2, "").ok());  // OWNER of epoch 2
  ASSERT_TRUE(KillProcess(Vmm(), Soon()).ok());
  ASSERT_TRUE(KillProcess(Shim(), Soon()).ok());
  ASSERT_TRUE(agent_->heard.Wait(
      [&] { return !agent_->heard.vms.empty() && agent_->heard.vms.back().state() == v1::Vm::STOPPED; }));
  auto vm = Start();
  ASSERT_TRUE(vm.ok()) << vm.status();
  // Whoever recorded the lost one at epoch 2 must not take this one for an older copy.
  EXPECT_EQ(vm->epoch(), 3u);
}

TEST_F(VmManagerTest, OldMigrationIsNotReportedAsRefused) {
  // Came in m1, was given away in m2: when everything dies, only m2 has something to say.
  ASSERT_TRUE(Prepare("m1").ok());
  ASSERT_TRUE(Drive(2, "").ok());
  ASSERT_TRUE(Drive(3, "m2").ok());
  ASSERT_TRUE(Drive(1, "m2").ok());
  ASSERT_TRUE(KillProcess(Vmm(), Soon()).ok());
  ASSERT_TRUE(KillProcess(Shim(), Soon()).ok());
  EXPECT_TRUE(agent_->heard.WaitFinal("m2").guest_lost());
  EXPECT_FALSE(agent_->reports().Find("m1", v1::ROLE_DESTINATION));
  for (const auto& report : agent_->heard.reports) EXPECT_EQ(report.migration_id(), "m2");
}

TEST_F(VmManagerTest, ReleasedVmLeavesNothingBehind) {
  ASSERT_TRUE(Start().ok());
  ASSERT_TRUE(Drive(4, "m1").ok());
  EXPECT_EQ(agent_->heard.WaitFinal("m1").handover(), v1::RELEASED);
  ASSERT_TRUE(agent_->heard.Wait([&] { return !agent_->heard.gone.empty(); }));
  ExpectGone();
  // It runs elsewhere: nothing says that it stopped here.
  for (const v1::Vm& vm : agent_->heard.vms) EXPECT_NE(vm.state(), v1::Vm::STOPPED);
  // Kept until batond has it.
  EXPECT_TRUE(agent_->reports().Find("m1", v1::ROLE_SOURCE));
}

TEST_F(VmManagerTest, AgentKilledBeforeTheRemovalRemovesAtItsNextStart) {
  ASSERT_TRUE(Start().ok());
  ProcessId process = Shim();
  agent_.reset();
  auto direct = shim::ControlClient::Connect(PathsOf(config_, "vm1").control, {}, Soon());
  ASSERT_TRUE(direct.ok());
  for (int step : {1, 4}) {
    v1::ShimRequest request;
    request.mutable_retune()->set_migration_id("m1");
    request.mutable_retune()->set_bandwidth(step);
    ASSERT_TRUE((*direct)->Call(request, Soon()).ok());
  }
  agent_ = std::make_unique<TestAgent>(config_);
  ASSERT_TRUE(agent_->vms().FindAgain(Soon()).ok());
  // Not its VM any more from the first moment.
  EXPECT_TRUE(agent_->vms().Inventory().empty());
  ASSERT_TRUE(agent_->heard.Wait([&] { return !agent_->heard.gone.empty(); }));
  ExpectGone();
  EXPECT_FALSE(ProcessAlive(process));
}

TEST_F(VmManagerTest, FailedMigrationKeepsTheVm) {
  ASSERT_TRUE(Start().ok());
  ASSERT_TRUE(Drive(3, "m1").ok());
  ASSERT_TRUE(Drive(5, "m1").ok());
  EXPECT_EQ(agent_->heard.WaitFinal("m1").reason(), v1::PEER_CONNECTION_FAILED);
  EXPECT_EQ(Only().state(), v1::Vm::RUNNING);
  EXPECT_TRUE(Stop().ok());
}

TEST_F(VmManagerTest, PrepareAndAbort) {
  auto dry = Prepare("m1", true);
  ASSERT_TRUE(dry.ok()) << dry.status();
  EXPECT_TRUE(dry->token().empty());
  ExpectGone();
  auto prepared = Prepare("m1");
  ASSERT_TRUE(prepared.ok()) << prepared.status();
  EXPECT_EQ(prepared->token().size(), 32u);
  EXPECT_EQ(prepared->peer_address(), "127.0.0.1:7410");
  EXPECT_EQ(Only().state(), v1::Vm::INCOMING);
  EXPECT_EQ(Prepare("m1")->token(), prepared->token());  // repeated
  auto second = Prepare("m2");
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->findings(0).code(), "NAME_IN_USE");
  EXPECT_TRUE(second->token().empty());
  v1::AbortIncomingCommand abort;
  abort.set_migration_id("m1");
  abort.set_vm("vm1");
  EXPECT_TRUE(agent_->vms().AbortIncoming(abort, Soon()).ok());
  ExpectGone();
  EXPECT_TRUE(agent_->vms().AbortIncoming(abort, Soon()).ok());
  // Refused stays refused; the next attempt is another migration.
  EXPECT_EQ(Prepare("m1").status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Prepare("m2").ok());
  EXPECT_EQ(Only().state(), v1::Vm::INCOMING);
}

TEST_F(VmManagerTest, HookIsNotAskedForTheBackendsOfALiveVm) {
  const std::string calls = dir_ + "/calls";
  config_.backend_hook =
      BackendHook{{"/bin/sh", "-c", "echo $1 >> " + calls + "; echo /nowhere.sock", "hook"}};
  ASSERT_TRUE(Start().ok());
  Restart();
  v1::VmSpec spec = Spec();
  v1::DeviceSpec* device = spec.add_devices();
  device->set_name("disk0");
  device->set_class_(v1::BLK);
  for (bool dry : {true, false}) {
    auto prepared = Prepare("m1", dry, spec);
    ASSERT_TRUE(prepared.ok()) << prepared.status();
    ASSERT_EQ(prepared->findings_size(), 1);
    EXPECT_EQ(prepared->findings(0).code(), "NAME_IN_USE");
  }
  EXPECT_NE(::access(calls.c_str(), F_OK), 0);
  EXPECT_EQ(Only().state(), v1::Vm::RUNNING);
  // And it is asked for those of another VM, before and after.
  spec.set_name("vm2");
  ASSERT_TRUE(Prepare("m2", true, spec).ok());
  EXPECT_EQ(*ReadFileLimited(calls, 4096), "create\nremove\n");
}

TEST_F(VmManagerTest, AbortEndsAShimThatCannotAnswer) {
  ASSERT_TRUE(Prepare("m1").ok());
  ProcessId shim = Shim();
  ASSERT_EQ(::kill(shim.pid, SIGSTOP), 0);
  v1::AbortIncomingCommand abort;
  abort.set_migration_id("m1");
  abort.set_vm("vm1");
  absl::Status aborted = agent_->vms().AbortIncoming(abort, Deadline::After(std::chrono::milliseconds(300)));
  EXPECT_TRUE(aborted.ok()) << aborted;
  EXPECT_FALSE(ProcessAlive(shim));
  EXPECT_EQ(agent_->heard.WaitFinal("m1").handover(), v1::REFUSED);
  ExpectGone();
}

TEST_F(VmManagerTest, AbortOfAMigrationThatNeverCameKeepsItOut) {
  v1::AbortIncomingCommand abort;
  abort.set_migration_id("m1");
  abort.set_vm("vm1");
  EXPECT_TRUE(agent_->vms().AbortIncoming(abort, Soon()).ok());
  EXPECT_EQ(ReasonOf(Prepare("m1").status()), v1::DESTINATION_REFUSED);
}

TEST_F(VmManagerTest, AbortAfterOwnerIsRefused) {
  ASSERT_TRUE(Prepare("m1").ok());
  ASSERT_TRUE(Drive(2, "").ok());
  v1::AbortIncomingCommand abort;
  abort.set_migration_id("m1");
  abort.set_vm("vm1");
  EXPECT_EQ(agent_->vms().AbortIncoming(abort, Soon()).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(ProcessAlive(Vmm()));
  // Also when it is the shim's journal alone that says so.
  ASSERT_TRUE(KillProcess(Shim(), Soon()).ok());
  EXPECT_EQ(agent_->vms().AbortIncoming(abort, Soon()).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(ProcessAlive(Vmm()));
}

TEST_F(VmManagerTest, BlockersStopThePreparation) {
  v1::VmSpec spec = Spec();
  spec.mutable_boot()->set_kernel("/nonexistent/vmlinuz");
  v1::DeviceSpec* device = spec.add_devices();
  device->set_name("disk0");
  device->set_class_(v1::BLK);
  auto prepared = Prepare("m1", false, spec);
  ASSERT_TRUE(prepared.ok()) << prepared.status();
  std::vector<std::string> codes;
  for (const auto& finding : prepared->findings()) codes.push_back(finding.code());
  EXPECT_THAT(codes, Contains("BOOT_FILE_MISSING"));
  EXPECT_THAT(codes, Contains("BACKEND_UNKNOWN"));
  EXPECT_TRUE(prepared->token().empty());
  ExpectGone();
  ::setenv("BATON_FAKE_SHIM", "blocker", 1);
  absl::Status blocked = Prepare("m2").status();
  EXPECT_THAT(Message(blocked), HasSubstr("device disk0: is not to the fake shim's taste"));
  EXPECT_EQ(ReasonOf(blocked), v1::DESTINATION_START_FAILED);
  ExpectGone();
}

TEST_F(VmManagerTest, AbsentAndSilentBackendsOfADestinationAreToldApart) {
  auto silent = UnixListener::Listen(dir_ + "/silent.sock");
  ASSERT_TRUE(silent.ok());
  v1::VmSpec spec = Spec();
  for (const char* name : {"absent", "silent"}) {
    v1::DeviceSpec* device = spec.add_devices();
    device->set_name(name);
    device->set_class_(v1::BLK);
    device->mutable_backend()->set_socket(dir_ + "/" + name + ".sock");
  }
  auto prepared = Prepare("m1", true, spec);
  ASSERT_TRUE(prepared.ok()) << prepared.status();
  ASSERT_EQ(prepared->findings_size(), 2);
  EXPECT_EQ(prepared->findings(0).code(), "BACKEND_UNREACHABLE");
  EXPECT_EQ(prepared->findings(0).subject(), "device absent");
  EXPECT_THAT(prepared->findings(0).message(), HasSubstr(dir_ + "/absent.sock"));
  EXPECT_EQ(prepared->findings(1).code(), "BACKEND_SILENT");
  EXPECT_THAT(prepared->findings(1).message(), HasSubstr("accepts the connection but does not answer"));
  for (const v1::Finding& finding : prepared->findings()) {
    EXPECT_EQ(finding.severity(), v1::BLOCKER);
    // Whoever shows a finding writes its subject before it.
    EXPECT_THAT(finding.message(), Not(HasSubstr("device ")));
  }
}

TEST_F(VmManagerTest, DeadIncomingShimIsARefusal) {
  auto prepared = Prepare("m1");
  ASSERT_TRUE(prepared.ok());
  ProcessId vmm = Vmm();
  ASSERT_TRUE(KillProcess(Shim(), Soon()).ok());
  v1::SideReport final = agent_->heard.WaitFinal("m1");
  EXPECT_EQ(final.handover(), v1::REFUSED);
  EXPECT_EQ(final.reason(), v1::DESTINATION_SHIM_FAILED);
  ASSERT_TRUE(agent_->heard.Wait([&] { return !agent_->heard.gone.empty(); }));
  EXPECT_FALSE(ProcessAlive(vmm));
  ExpectGone();
  // A source that asks late still hears it, if it has the token.
  auto ended = agent_->vms().Settle("m1", TokenOf(*prepared), Soon());
  ASSERT_TRUE(ended.ok()) << ended.status();
  EXPECT_EQ(ended->verdict(), v1::REFUSED);
  EXPECT_EQ(agent_->vms().Settle("m1", stream::Token{}, Soon()).status().code(),
            absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(agent_->vms().Settle("m9", TokenOf(*prepared), Soon()).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(VmManagerTest, WhatCannotBeRemovedNowIsRemovedLater) {
  ASSERT_TRUE(Prepare("m1").ok());
  // No place for the verdict, as on a full disk.
  const std::string ended = config_.state_dir + "/ended";
  ASSERT_TRUE(RemoveTree(ended).ok());
  ASSERT_TRUE(WriteFileDurable(ended, "x").ok());
  ASSERT_TRUE(KillProcess(Shim(), Soon()).ok());
  ASSERT_TRUE(agent_->heard.Wait([&] {
    return !agent_->heard.vms.empty() &&
           agent_->heard.vms.back().message().find("cannot be removed") != std::string::npos;
  }));
  ASSERT_EQ(::unlink(ended.c_str()), 0);
  ASSERT_TRUE(agent_->heard.Wait([&] { return !agent_->heard.gone.empty(); }));
  ExpectGone();
}

TEST_F(VmManagerTest, DeadIncomingShimIsARefusalForTheNextAgentToo) {
  auto prepared = Prepare("m1");
  ASSERT_TRUE(prepared.ok());
  ProcessId shim = Shim(), vmm = Vmm();
  agent_.reset();
  ASSERT_TRUE(KillProcess(shim, Soon()).ok());
  Restart();
  EXPECT_FALSE(ProcessAlive(vmm));
  ExpectGone();
  EXPECT_EQ(agent_->reports().Find("m1", v1::ROLE_DESTINATION)->handover(), v1::REFUSED);
  EXPECT_EQ(agent_->vms().Settle("m1", TokenOf(*prepared), Soon())->verdict(), v1::REFUSED);
}

TEST_F(VmManagerTest, OwnerAnswersVerdictsAlsoAfterItsVmIsGone) {
  auto prepared = Prepare("m1");
  ASSERT_TRUE(prepared.ok());
  EXPECT_EQ(agent_->vms().Settle("m1", TokenOf(*prepared), Soon()).status().code(),
            absl::StatusCode::kFailedPrecondition);  // undecided, its shim lives
  ASSERT_TRUE(Drive(2, "").ok());
  EXPECT_EQ(agent_->vms().Settle("m1", TokenOf(*prepared), Soon())->verdict(), v1::OWNER);
  ASSERT_TRUE(Stop("vm1", true).ok());
  ExpectGone();
  auto ended = agent_->vms().Settle("m1", TokenOf(*prepared), Soon());
  ASSERT_TRUE(ended.ok()) << ended.status();
  EXPECT_EQ(ended->verdict(), v1::OWNER);
  EXPECT_EQ(ended->epoch(), 2u);
}

TEST_F(VmManagerTest, UnreadableStateIsLeftAlone) {
  ASSERT_TRUE(Start().ok());
  ProcessId vmm = Vmm(), shim = Shim();
  agent_.reset();
  ASSERT_TRUE(KillProcess(shim, Soon()).ok());
  // A journal that lost what it had acknowledged: nobody may guess who owns the guest.
  std::string garbage(1024, 'x');
  ASSERT_TRUE(WriteFileDurable(PathsOf(config_, "vm1").journal, garbage).ok());
  Restart();
  EXPECT_EQ(Only().state(), v1::Vm::PAUSED);
  EXPECT_THAT(Only().message(), HasSubstr("its state is unreadable"));
  EXPECT_TRUE(ProcessAlive(vmm));
}

TEST_F(VmManagerTest, LeftoversOfAnUnfinishedStartAreRemoved) {
  VmPaths paths = PathsOf(config_, "half");
  ASSERT_TRUE(MakeDirectories(paths.state_dir).ok());
  ASSERT_TRUE(WriteFileDurable(paths.state_dir + "/journal", "x").ok());
  Restart();
  EXPECT_TRUE(agent_->vms().Inventory().empty());
  EXPECT_NE(::access(paths.state_dir.c_str(), F_OK), 0);
}

TEST_F(VmManagerTest, InspectionNamesWhatTheAgentKnows) {
  ASSERT_TRUE(Start().ok());
  v1::InspectVmCommand command;
  command.set_vm("vm1");
  auto inspection = agent_->vms().Inspect(command, Soon());
  ASSERT_TRUE(inspection.ok());
  EXPECT_EQ(inspection->vm().name(), "vms/vm1");
  EXPECT_EQ(inspection->vm().spec().name(), "vm1");
  EXPECT_EQ(inspection->accelerator(), v1::ACCELERATOR_TCG);
  EXPECT_EQ(inspection->epoch(), 1u);
  command.set_vm("none");
  EXPECT_EQ(agent_->vms().Inspect(command, Soon()).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace baton::daemon
