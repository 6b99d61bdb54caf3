// baton-agent as a program: what it says when it cannot start, and that being killed costs no VM. Its batond
// is scripted and its shims are fake (tests/unit/daemon/fake_shim.cc) unless a test says otherwise; the rest
// is real.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <memory>

#include "agent/daemon/vm_entry.h"
#include "common/config.h"
#include "common/durable_file.h"
#include "common/process.h"
#include "common/unix_socket.h"
#include "tests/temp_dir.h"
#include "tests/unit/daemon/fake_batond.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;
using ::testing::HasSubstr;

Deadline Soon() { return Deadline::After(seconds(60)); }

class AgentProgram : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(
        WriteFileDurable(dir_ + "/qemu",
                         "#!/bin/sh\ncase \"$*\" in *--version*) echo 'QEMU emulator version 7.2.22';;"
                         "*) printf 'Supported machines are:\\nq35  Standard PC\\n';; esac\n")
            .ok());
    ASSERT_EQ(::chmod((dir_ + "/qemu").c_str(), 0755), 0);
    WriteConfig("");
  }
  void TearDown() override {
    agent_.reset();
    batond_.reset();
    for (const ProcessId& id : FindByCommandLine(dir_ + "/")) (void)KillProcess(id, Soon());
  }

  void WriteConfig(const std::string& more) {
    std::string text = fmt::format(
        "name: a\nbatond: unix:{0}/batond.sock\nrun_dir: {0}/run\nstate_dir: {0}/state\nmemory_dir: "
        "{0}/memory\n"
        "peer: {{listen: \"unix:{0}/peer.sock\"}}\nqemu: {{default: {{path: {1}}}}}\nshim: {2}\n{3}",
        dir_, qemu_.empty() ? dir_ + "/qemu" : qemu_, shim_, more);
    ASSERT_TRUE(WriteFileDurable(dir_ + "/agent.yaml", text).ok());
  }
  // With `mount`, in a mount namespace of its own in which this command has been run.
  std::vector<std::string> Argv(const std::string& mount) {
    if (mount.empty()) return {BATON_AGENT, "--config", dir_ + "/agent.yaml"};
    EXPECT_TRUE(MakeDirectories(dir_ + "/state").ok());
    return {
        "unshare",   "--mount",  "--propagation",     "private", "sh", "-c", mount + R"( && exec "$0" "$@")",
        BATON_AGENT, "--config", dir_ + "/agent.yaml"};
  }
  // Runs it to its end: exit and stderr.
  CommandOutput RunToEnd(const std::vector<std::string>& extra = {}, const std::string& mount = "") {
    SpawnOptions options;
    options.argv = Argv(mount);
    options.argv.insert(options.argv.end(), extra.begin(), extra.end());
    auto output = RunCommand(options, Soon());
    EXPECT_TRUE(output.ok()) << output.status();
    return output.ok() ? *output : CommandOutput();
  }
  void StartAgent(const std::string& mount = "") {
    SpawnOptions options;
    options.argv = Argv(mount);
    auto started = Process::Spawn(options);
    ASSERT_TRUE(started.ok()) << started.status();
    agent_ = std::make_unique<Process>(*std::move(started));
  }
  void StartBatond() { batond_ = std::make_unique<FakeBatond>("unix:" + dir_ + "/batond.sock"); }
  v1::Hello NextHello() {
    return batond_->Next([](const v1::AgentMessage& m) { return m.has_hello(); }).hello();
  }
  v1::CommandResult Order(const v1::Command& command) {
    v1::ServerMessage message;
    *message.mutable_command() = command;
    batond_->Say(message);
    return batond_
        ->Next([&](const v1::AgentMessage& m) { return m.has_result() && m.result().id() == command.id(); })
        .result();
  }
  // Fills the file system under state_dir, as the agent and its children see it.
  UniqueFd FillState() {
    const std::string path = fmt::format("/proc/{}/root{}/state/fill", agent_->pid(), dir_);
    UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    EXPECT_TRUE(fd.valid()) << path;
    const std::string page(4096, 'x');
    while (::write(fd.get(), page.data(), page.size()) > 0) {
    }
    EXPECT_EQ(errno, ENOSPC);
    return fd;
  }
  static v1::Command StartVm(uint64_t id) {
    v1::Command command;
    command.set_id(id);
    v1::VmSpec* spec = command.mutable_start_vm()->mutable_spec();
    spec->set_name("vm1");
    spec->set_memory_bytes(64 << 20);
    spec->set_vcpus(1);
    return command;
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  std::string qemu_;  // empty: a script that answers the agent's questions
  std::string shim_ = FAKE_SHIM;
  std::unique_ptr<FakeBatond> batond_;
  std::unique_ptr<Process> agent_;
};

TEST_F(AgentProgram, WrongConfigurationNamesFileLineAndField) {
  WriteConfig("kwm: on\n");
  CommandOutput wrong = RunToEnd();
  EXPECT_EQ(wrong.status.code, 2);
  EXPECT_EQ(wrong.err, dir_ + "/agent.yaml:9: kwm: unknown field; did you mean 'kvm'?\n");
  WriteConfig("backend_hook: {command: [x], timeout: soon}\n");
  EXPECT_THAT(RunToEnd().err, HasSubstr(dir_ + "/agent.yaml:9: backend_hook.timeout: 'soon'"));
  WriteConfig("");
  EXPECT_EQ(RunToEnd({"--check-config"}).status.code, 0);
  EXPECT_EQ(RunToEnd({"--frobnicate"}).status.code, 2);
  ::unlink((dir_ + "/agent.yaml").c_str());
  EXPECT_THAT(RunToEnd().err, HasSubstr(dir_ + "/agent.yaml: No such file or directory"));
}

TEST_F(AgentProgram, UnusableDirectoriesAndProgramsAreNamed) {
  ASSERT_TRUE(WriteFileDurable(dir_ + "/state", "a file").ok());
  CommandOutput state = RunToEnd();
  EXPECT_EQ(state.status.code, 1);
  EXPECT_THAT(state.err,
              HasSubstr("cannot start: state_dir cannot be used: " + dir_ + "/state: File exists"));
  ::unlink((dir_ + "/state").c_str());
  // One that exists and may not be written; root may write anywhere, but not to a read-only file system.
  CommandOutput read_only = RunToEnd({}, "mount -t tmpfs -o ro none " + dir_ + "/state");
  EXPECT_EQ(read_only.status.code, 1);
  EXPECT_THAT(read_only.err, HasSubstr("cannot start: state_dir " + dir_ + "/state cannot be written"));
  EXPECT_THAT(read_only.err, HasSubstr("Read-only file system"));
  ::unlink((dir_ + "/qemu").c_str());
  EXPECT_THAT(RunToEnd().err, HasSubstr("qemu.default: install QEMU"));
}

TEST_F(AgentProgram, PortsInUseAreNamed) {
  auto taken = UnixListener::Listen(dir_ + "/peer.sock");
  ASSERT_TRUE(taken.ok());
  CommandOutput peer = RunToEnd();
  EXPECT_EQ(peer.status.code, 1);
  EXPECT_THAT(peer.err, HasSubstr("cannot start: peer.listen: "));
  EXPECT_THAT(peer.err, HasSubstr(dir_ + "/peer.sock"));
  taken->Close();
  UniqueFd tcp(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(::bind(tcp.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(::listen(tcp.get(), 1), 0);
  socklen_t length = sizeof(address);
  ASSERT_EQ(::getsockname(tcp.get(), reinterpret_cast<sockaddr*>(&address), &length), 0);
  const std::string port = fmt::format("127.0.0.1:{}", ntohs(address.sin_port));
  WriteConfig("metrics: " + port + "\n");
  CommandOutput metrics = RunToEnd();
  EXPECT_EQ(metrics.status.code, 1);
  EXPECT_THAT(metrics.err, HasSubstr("cannot start: metrics: "));
  EXPECT_THAT(metrics.err, HasSubstr(port));
  EXPECT_THAT(metrics.err, HasSubstr("in use"));
}

TEST_F(AgentProgram, AbsentBackendIsNamed) {
  StartBatond();
  StartAgent();
  NextHello();
  v1::Command command = StartVm(1);
  v1::DeviceSpec* device = command.mutable_start_vm()->mutable_spec()->add_devices();
  device->set_name("disk0");
  device->set_class_(v1::BLK);
  device->mutable_backend()->set_socket(dir_ + "/absent.sock");
  v1::CommandResult result = Order(command);
  EXPECT_EQ(result.reason(), v1::SOURCE_BACKEND_FAILED);
  EXPECT_THAT(result.message(), HasSubstr("VM vm1 was not started: device disk0"));
  EXPECT_THAT(result.message(), HasSubstr(dir_ + "/absent.sock"));
}

TEST_F(AgentProgram, DiskFullUnderTheStateIsSaidAndGetsBetter) {
  StartBatond();
  StartAgent("mount -t tmpfs -o size=64k none " + dir_ + "/state");
  NextHello();
  UniqueFd fd = FillState();
  v1::CommandResult full = Order(StartVm(1));
  EXPECT_EQ(full.reason(), v1::STATE_WRITE_FAILED) << full.message();
  EXPECT_THAT(full.message(), HasSubstr(dir_ + "/state"));
  EXPECT_THAT(full.message(), HasSubstr("No space left on device"));
  // Nothing is left that would stand in the way once there is room again.
  ASSERT_EQ(::ftruncate(fd.get(), 0), 0);
  v1::CommandResult started = Order(StartVm(2));
  EXPECT_EQ(started.code(), 0) << started.message();
}

TEST_F(AgentProgram, DiskFullUnderTheJournalIsSaidBeforeTheGuestStarts) {
  shim_ = BATON_SHIM;
  WriteConfig("");
  StartBatond();
  StartAgent("mount -t tmpfs -o size=64k none " + dir_ + "/state");
  NextHello();
  // Room for the configuration and the journal's first page, not for the records that it sets aside.
  UniqueFd fd = FillState();
  ASSERT_EQ(::ftruncate(fd.get(), ::lseek(fd.get(), 0, SEEK_END) - 2 * 4096), 0);
  v1::CommandResult full = Order(StartVm(1));
  EXPECT_EQ(full.reason(), v1::STATE_WRITE_FAILED) << full.message();
  EXPECT_THAT(full.message(), HasSubstr("journal " + dir_ + "/state/vms/vm1/journal"));
  EXPECT_THAT(full.message(), HasSubstr("the disk under the state directory is full"));
}

// With the real baton-shim and QEMU: what stands in their way is told by its name.
TEST_F(AgentProgram, MissingKernelAndRefusedArgumentsReachTheUser) {
  shim_ = BATON_SHIM;
  qemu_ = "/usr/bin/qemu-system-x86_64";
  ASSERT_EQ(::access(qemu_.c_str(), X_OK), 0) << "deps/packages.txt names the peers that tests need";
  WriteConfig("");
  StartBatond();
  StartAgent();
  NextHello();
  v1::Command command = StartVm(1);
  v1::VmSpec* spec = command.mutable_start_vm()->mutable_spec();
  spec->mutable_boot()->set_kernel(dir_ + "/no-vmlinuz");
  v1::CommandResult no_kernel = Order(command);
  EXPECT_EQ(no_kernel.reason(), v1::SOURCE_VMM_FAILED);
  EXPECT_THAT(no_kernel.message(), HasSubstr("VM vm1 was not started: kernel " + dir_ +
                                             "/no-vmlinuz on this host: No such file or directory"));
  command.set_id(2);
  spec->mutable_boot()->set_kernel(dir_ + "/agent.yaml");
  spec->mutable_boot()->set_initrd(dir_ + "/no-initrd");
  EXPECT_THAT(Order(command).message(),
              HasSubstr("initrd " + dir_ + "/no-initrd on this host: No such file"));
  command.set_id(3);
  spec->clear_boot();
  spec->add_extra_args("-frobnicate");
  v1::CommandResult refused = Order(command);
  EXPECT_EQ(refused.reason(), v1::SOURCE_VMM_FAILED);
  EXPECT_THAT(refused.message(), HasSubstr("-frobnicate: invalid option"));
}

TEST_F(AgentProgram, HelpNamesEveryOption) {
  CommandOutput help = RunToEnd({"--help"});
  EXPECT_EQ(help.status.code, 0);
  for (const char* option :
       {"--config", "--check-config", "--log-level", "--log-json", "--version", "Exit codes"})
    EXPECT_THAT(help.out, HasSubstr(option));
}

TEST_F(AgentProgram, SecondAgentOnTheSameStateIsRefused) {
  StartBatond();
  StartAgent();
  NextHello();
  CommandOutput second = RunToEnd();
  EXPECT_EQ(second.status.code, 1);
  EXPECT_THAT(second.err, HasSubstr("another baton-agent runs with state_dir " + dir_ + "/state"));
}

TEST_F(AgentProgram, KilledAgentFindsItsVmAgain) {
  StartBatond();
  StartAgent();
  EXPECT_TRUE(NextHello().vms().empty());
  v1::CommandResult started = Order(StartVm(1));
  ASSERT_EQ(started.code(), 0) << started.message();
  uint64_t shim = started.vm().shim_pid();
  agent_->Signal(SIGKILL);
  ASSERT_TRUE(agent_->Wait(Soon()).ok());
  StartAgent();
  v1::Hello hello = NextHello();
  ASSERT_EQ(hello.vms_size(), 1);
  EXPECT_EQ(hello.vms(0).state(), v1::Vm::RUNNING);
  EXPECT_EQ(hello.vms(0).shim_pid(), shim);
  EXPECT_EQ(hello.host().vmms().at("default"), "7.2.22");
  // Repeating the command changes nothing.
  EXPECT_EQ(Order(StartVm(2)).vm().shim_pid(), shim);
}

TEST_F(AgentProgram, OrderlyEndLeavesShimsRunning) {
  StartBatond();
  StartAgent();
  NextHello();
  uint64_t shim = Order(StartVm(1)).vm().shim_pid();
  ASSERT_GT(shim, 0u);
  agent_->Signal(SIGTERM);
  auto end = agent_->Wait(Soon());
  ASSERT_TRUE(end.ok());
  EXPECT_TRUE(end->ok()) << end->ToString();
  EXPECT_TRUE(ProcessStartTime(static_cast<pid_t>(shim)).ok());
}

TEST_F(AgentProgram, BatondAwayAndBackLosesNoReport) {
  StartBatond();
  StartAgent();
  NextHello();
  ASSERT_EQ(Order(StartVm(1)).code(), 0);
  v1::Command outgoing;
  outgoing.set_id(2);
  outgoing.mutable_start_outgoing()->set_migration_id("m1");
  outgoing.mutable_start_outgoing()->set_vm("vm1");
  ASSERT_EQ(Order(outgoing).code(), 0);
  // Its shim is killed while batond is away; the agent is killed, too, after it has said so on its disk.
  batond_.reset();
  std::vector<ProcessId> shims = FindByCommandLine(dir_ + "/state/vms/vm1" + '\0');
  ASSERT_EQ(shims.size(), 1u);
  agent_->Signal(SIGKILL);
  ASSERT_TRUE(agent_->Wait(Soon()).ok());
  ASSERT_TRUE(KillProcess(shims[0], Soon()).ok());
  StartAgent();
  StartBatond();
  v1::Hello hello = NextHello();
  ASSERT_EQ(hello.reports_size(), 1);
  EXPECT_TRUE(hello.reports(0).done());
  EXPECT_EQ(hello.reports(0).reason(), v1::SOURCE_SHIM_FAILED);
  EXPECT_TRUE(hello.reports(0).guest_running());
  v1::ServerMessage ack;
  ack.mutable_report_ack()->set_migration_id("m1");
  ack.mutable_report_ack()->set_role(v1::ROLE_SOURCE);
  ack.mutable_report_ack()->set_sequence(hello.reports(0).sequence());
  batond_->Say(ack);
  // Messages are handled in order: once this is answered, the acknowledgement was.
  ASSERT_EQ(Order(StartVm(3)).code(), 0);
  agent_->Signal(SIGKILL);
  ASSERT_TRUE(agent_->Wait(Soon()).ok());
  StartAgent();
  EXPECT_EQ(NextHello().reports_size(), 0);
}

}  // namespace
}  // namespace baton::daemon
