// baton-shim with a real QEMU and a real qemu-storage-daemon; the test plays the agent.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "agent/migration/journal.h"
#include "tests/integration/shim/shim_guest.h"

namespace baton::test {
namespace {

using std::chrono::seconds;
using testing::HasSubstr;

class ShimTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(HaveQemuAndQsd()) << "deps/packages.txt names the peers that tests need";
    image_ = dirs_.dir() + "/disk.img";
    ASSERT_TRUE(MakeImage(image_, 16u << 20).ok());
    // One writer: a back-end without an in-flight region that is killed with several requests under way
    // leaves nobody able to tell which of them it had done.
    auto spec = LabSpec("g", true, "lab.report=50 lab.writers=1");
    ASSERT_TRUE(spec.ok()) << spec.status();
    spec_ = *spec;
  }
  void TearDown() override {
    if (HasFailure() && host_) ADD_FAILURE() << "shim log:\n" << host_->ShimLog();
  }
  void StartHost() {
    host_ = std::make_unique<ShimHost>(dirs_, "a");
    ASSERT_TRUE(host_->StartDisk(image_).ok());
  }
  void StartVm() {
    StartHost();
    absl::Status status = host_->StartShim(host_->MakeConfig(spec_, v1::ShimConfig::FRESH));
    ASSERT_TRUE(status.ok()) << status;
    auto running = host_->WaitState(v1::Vm::RUNNING, Soon());
    ASSERT_TRUE(running.ok()) << running.status();
  }
  void BootVm() {
    StartVm();
    if (HasFatalFailure()) return;
    auto ready = host_->console.out.WaitFor("READY", Boot());
    ASSERT_TRUE(ready.ok()) << ready.status();
    ExpectWrites(*host_);
  }
  // Starts with `config` and expects STOPPED; returns the status.
  v1::ShimStatus ExpectStartFails(const v1::ShimConfig& config) {
    absl::Status started = host_->StartShim(config);
    EXPECT_TRUE(started.ok()) << started;
    if (!started.ok()) return {};
    auto status =
        host_->WaitStatus([](const v1::ShimStatus& s) { return s.vm().state() == v1::Vm::STOPPED; }, Soon());
    EXPECT_TRUE(status.ok()) << status.status();
    return status.ok() ? *status : v1::ShimStatus();
  }
  absl::StatusOr<v1::ShimReply> Retire() {
    v1::ShimRequest request;
    request.mutable_retire();
    return host_->Call(request);
  }
  absl::StatusOr<v1::ShimReply> Stop(bool force) {
    v1::ShimRequest request;
    request.mutable_stop()->set_force(force);
    return host_->Call(request, seconds(90));
  }

  TempDirs dirs_;
  std::string image_;
  v1::VmSpec spec_;
  std::unique_ptr<ShimHost> host_;
};

TEST_F(ShimTest, Fresh_GuestBootsThroughTheMediatorAndPowersOff) {
  BootVm();
  v1::ShimRequest request;
  request.mutable_status();
  auto reply = host_->Call(request);
  ASSERT_TRUE(reply.ok()) << reply.status();
  const v1::Vm& vm = reply->status().vm();
  EXPECT_EQ(vm.state(), v1::Vm::RUNNING);
  EXPECT_EQ(vm.epoch(), 1u);
  EXPECT_EQ(vm.driver(), "qmp");
  ASSERT_EQ(vm.devices_size(), 1);
  EXPECT_EQ(vm.devices(0).state(), v1::Device::ACTIVE);
  auto records = migration::Journal::Read(host_->state_dir() + "/journal");
  ASSERT_TRUE(records.ok());
  ASSERT_EQ(records->size(), 1u);
  EXPECT_EQ((*records)[0].kind, migration::JournalRecord::Kind::kOwner);
  auto config = host_->ReadConfig();
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->vmm_pid(), vm.vmm_pid());
  EXPECT_EQ(config->mode(), v1::ShimConfig::ADOPT);
  ExpectChecked(*host_);

  auto stopped = Stop(false);
  ASSERT_TRUE(stopped.ok()) << stopped.status();
  auto exit = host_->WaitShimExit(Soon());
  ASSERT_TRUE(exit.ok()) << exit.status();
  EXPECT_TRUE(exit->ok()) << exit->ToString();
  EXPECT_FALSE(std::filesystem::exists(host_->memory_path()));
  EXPECT_FALSE(std::filesystem::exists(host_->run_dir() + "/shim.sock"));
  EXPECT_FALSE(std::filesystem::exists(host_->run_dir() + "/dev-disk0.sock"));
  EXPECT_FALSE(std::filesystem::exists(host_->run_dir() + "/qmp.sock"));
}

TEST_F(ShimTest, Stop_Force_EndsAGuestThatDoesNotListen) {
  StartVm();  // still in its firmware
  auto stopped = Stop(true);
  ASSERT_TRUE(stopped.ok()) << stopped.status();
  EXPECT_TRUE(host_->WaitShimExit(Soon()).ok());
  EXPECT_FALSE(std::filesystem::exists(host_->memory_path()));
}

TEST_F(ShimTest, GuestPowersOff_ReportsStoppedAndRetires) {
  BootVm();
  EXPECT_EQ(Retire().status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(host_->console.Type("x").ok());
  auto status =
      host_->WaitStatus([](const v1::ShimStatus& s) { return s.vm().state() == v1::Vm::STOPPED; }, Soon());
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_THAT(status->vm().message(), HasSubstr("after the guest powered off"));
  EXPECT_EQ(status->reason(), v1::NONE);
  EXPECT_FALSE(std::filesystem::exists(host_->memory_path()));
  ASSERT_TRUE(Retire().ok());
  EXPECT_TRUE(host_->WaitShimExit(Soon()).ok());
}

TEST_F(ShimTest, QemuIsKilled_ReportsHow) {
  StartVm();
  ::kill(static_cast<pid_t>(host_->ReadConfig()->vmm_pid()), SIGKILL);
  auto status = host_->WaitStatus(
      [](const v1::ShimStatus& s) { return s.vm().state() == v1::Vm::STOPPED && s.reason() != 0; }, Soon());
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_THAT(status->vm().message(), HasSubstr("SIGKILL"));
  EXPECT_EQ(status->reason(), v1::SOURCE_VMM_FAILED);
}

TEST_F(ShimTest, KilledShim_GuestLivesAndTheNextShimAdoptsIt) {
  BootVm();
  uint64_t pid = host_->ReadConfig()->vmm_pid();
  host_->KillShim();
  absl::Status status = host_->StartShimAgain(v1::ShimConfig::ADOPT);
  ASSERT_TRUE(status.ok()) << status;
  auto running = host_->WaitState(v1::Vm::RUNNING, Soon());
  ASSERT_TRUE(running.ok()) << running.status();
  EXPECT_EQ(running->vm().vmm_pid(), pid);
  ExpectWrites(*host_);
  ExpectChecked(*host_);
}

TEST_F(ShimTest, Sigterm_ShimLeavesAndTheGuestStays) {
  BootVm();
  auto config = host_->ReadConfig();
  ::kill(host_->shim_pid(), SIGTERM);
  auto exit = host_->WaitShimExit(Soon());
  ASSERT_TRUE(exit.ok()) << exit.status();
  EXPECT_TRUE(exit->ok()) << exit->ToString();
  EXPECT_TRUE(ProcessAlive({static_cast<pid_t>(config->vmm_pid()), config->vmm_start_time()}));
  ASSERT_TRUE(host_->StartShimAgain(v1::ShimConfig::ADOPT).ok());
  ASSERT_TRUE(host_->WaitState(v1::Vm::RUNNING, Soon()).ok());
  ExpectWrites(*host_);
  ExpectChecked(*host_);
}

TEST_F(ShimTest, KilledBackend_ComesBackAndNothingIsLost) {
  BootVm();
  host_->disk().Kill();
  auto lost = host_->WaitStatus(
      [](const v1::ShimStatus& s) {
        return s.vm().devices_size() == 1 && s.vm().devices(0).state() == v1::Device::BACKEND_LOST;
      },
      Soon());
  ASSERT_TRUE(lost.ok()) << lost.status();
  ASSERT_TRUE(host_->StartDisk(image_).ok());
  auto back = host_->WaitStatus(
      [](const v1::ShimStatus& s) {
        return s.vm().devices_size() == 1 && s.vm().devices(0).state() == v1::Device::ACTIVE;
      },
      Soon());
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_GE(back->vm().devices(0).reconnects(), 1u);
  ExpectWrites(*host_);
  ExpectChecked(*host_);
}

// A sanitizer has shadow memory, and ThreadSanitizer a thread of its own that wakes up: nothing to measure.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

// Fields of /proc/PID/status and /proc/PID/stat.
uint64_t RssAnonKb(pid_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("RssAnon:", 0) == 0) return std::stoull(line.substr(8));
  }
  return 0;
}
uint64_t CpuTicks(pid_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/stat");
  std::string all((std::istreambuf_iterator<char>(in)), {});
  std::istringstream fields(all.substr(all.rfind(')') + 2));
  std::string field;
  for (int i = 3; i < 14; ++i) fields >> field;
  uint64_t user = 0, system = 0;
  fields >> user >> system;
  return user + system;
}
uint64_t ContextSwitches(pid_t pid) {
  uint64_t sum = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/task")) {
    std::ifstream in(task.path() / "status");
    for (std::string line; std::getline(in, line);) {
      if (line.rfind("voluntary_ctxt_switches:", 0) == 0) sum += std::stoull(line.substr(24));
    }
  }
  return sum;
}

TEST_F(ShimTest, IdleShim_HoldsLittleMemoryAndUsesNoCpu) {
  BootVm();
  pid_t pid = host_->shim_pid();
  // The guest writes to its disk all the time meanwhile: none of that may pass the shim.
  uint64_t ticks = CpuTicks(pid);
  uint64_t switches = ContextSwitches(pid);
  host_->console.out.SkipToEnd();
  for (int i = 0; i < 10; ++i) {
    auto line = host_->console.out.WaitFor("PROGRESS", Soon());
    ASSERT_TRUE(line.ok()) << line.status();
  }
  EXPECT_EQ(CpuTicks(pid), ticks);
  EXPECT_EQ(ContextSwitches(pid), switches);
  RecordProperty("rss_anon_kb", static_cast<int>(RssAnonKb(pid)));
  EXPECT_LT(RssAnonKb(pid), 8u << 10);
  EXPECT_GT(RssAnonKb(pid), 0u);
}

#endif

TEST_F(ShimTest, Control_ManyConnectionsAndBadOnes) {
  StartVm();
  std::string path = host_->run_dir() + "/shim.sock";
  std::vector<std::unique_ptr<shim::ControlClient>> clients;
  for (int i = 0; i < 20; ++i) {
    auto client = shim::ControlClient::Connect(path, {}, Soon());
    ASSERT_TRUE(client.ok()) << client.status();
    clients.push_back(*std::move(client));
  }
  auto bad = ConnectUnix(path, Soon());
  ASSERT_TRUE(bad.ok());
  ASSERT_EQ(::send(bad->get(), "\xff\xff\xff\xff", 4, MSG_NOSIGNAL), 4);
  ASSERT_TRUE(WaitFd(bad->get(), 1, Soon(), "close").ok());
  char c;
  EXPECT_EQ(::recv(bad->get(), &c, 1, 0), 0);
  for (auto& client : clients) {
    v1::ShimRequest request;
    request.mutable_status();
    auto reply = client->Call(request, Soon());
    ASSERT_TRUE(reply.ok()) << reply.status();
    EXPECT_EQ(reply->status().vm().state(), v1::Vm::RUNNING);
  }
  v1::ShimRequest empty;
  EXPECT_EQ(clients[0]->Call(empty, Soon()).status().code(), absl::StatusCode::kUnimplemented);
}

TEST_F(ShimTest, SecondShim_IsKeptOut) {
  StartVm();
  SpawnOptions options;
  options.argv = {std::string(BATON_BINARY_DIR) + "/bin/baton-shim", "--dir", host_->state_dir()};
  auto output = RunCommand(options, Soon());
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_EQ(output->status.code, 1);
  EXPECT_THAT(output->err, HasSubstr("journal"));
}

// --- what can be wrong when a VM is started ---

TEST_F(ShimTest, BackendAbsent_NamesDeviceAndSocket) {
  host_ = std::make_unique<ShimHost>(dirs_, "a");
  v1::ShimStatus status = ExpectStartFails(host_->MakeConfig(spec_, v1::ShimConfig::FRESH));
  EXPECT_THAT(status.vm().message(), testing::AllOf(HasSubstr("disk0"), HasSubstr(host_->disk_socket())));
  EXPECT_EQ(status.reason(), v1::SOURCE_BACKEND_FAILED);
  EXPECT_TRUE(Retire().ok());
  EXPECT_TRUE(host_->WaitShimExit(Soon()).ok());
  EXPECT_FALSE(std::filesystem::exists(host_->memory_path()));
}

TEST_F(ShimTest, BackendSilent_EndsAtABound) {
  StartHost();
  host_->disk().Signal(SIGSTOP);
  v1::ShimStatus status = ExpectStartFails(host_->MakeConfig(spec_, v1::ShimConfig::FRESH));
  EXPECT_THAT(status.vm().message(), HasSubstr("disk0"));
  EXPECT_EQ(status.reason(), v1::SOURCE_BACKEND_FAILED);
}

TEST_F(ShimTest, NoRoomForMemory_SaysHowMuchIsLeft) {
  StartHost();
  spec_.set_memory_bytes(uint64_t{8} << 40);
  v1::ShimStatus status = ExpectStartFails(host_->MakeConfig(spec_, v1::ShimConfig::FRESH));
  EXPECT_THAT(status.vm().message(),
              testing::AllOf(HasSubstr("guest memory"), HasSubstr("has"), HasSubstr("left")));
  EXPECT_EQ(status.reason(), v1::RESOURCE_EXHAUSTED_REASON);
}

TEST_F(ShimTest, QemuMissing_NamesIt) {
  StartHost();
  v1::ShimConfig config = host_->MakeConfig(spec_, v1::ShimConfig::FRESH);
  config.set_qemu_path("/nonexistent/qemu-system-x86_64");
  v1::ShimStatus status = ExpectStartFails(config);
  EXPECT_THAT(status.vm().message(), HasSubstr("/nonexistent/qemu-system-x86_64"));
}

TEST_F(ShimTest, QemuExitsAtOnce_QuotesIt) {
  StartHost();
  spec_.set_machine("no-such-machine");
  v1::ShimStatus status = ExpectStartFails(host_->MakeConfig(spec_, v1::ShimConfig::FRESH));
  EXPECT_THAT(status.vm().message(), HasSubstr("unsupported machine type"));
  EXPECT_EQ(status.reason(), v1::SOURCE_VMM_FAILED);
}

TEST_F(ShimTest, RunDirectoryMissing_SaysSo) {
  StartHost();
  v1::ShimConfig config = host_->MakeConfig(spec_, v1::ShimConfig::FRESH);
  config.set_run_dir(host_->run_dir() + "/none");
  absl::Status status = host_->StartShim(config);
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(host_->ShimLog(), HasSubstr(host_->run_dir() + "/none"));
}

TEST_F(ShimTest, SocketPathTooLong_SaysSo) {
  StartHost();
  v1::ShimConfig config = host_->MakeConfig(spec_, v1::ShimConfig::FRESH);
  config.set_run_dir(host_->run_dir() + "/" + std::string(80, 'x'));
  std::filesystem::create_directories(config.run_dir());
  absl::Status status = host_->StartShim(config);
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(host_->ShimLog(), HasSubstr("too long for a unix socket"));
}

TEST_F(ShimTest, JournalUnwritable_SaysSo) {
  StartHost();
  std::filesystem::create_directory(host_->state_dir() + "/journal");
  absl::Status status = host_->StartShim(host_->MakeConfig(spec_, v1::ShimConfig::FRESH));
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(host_->ShimLog(), HasSubstr(host_->state_dir() + "/journal"));
}

TEST(ShimProgram, WrongArguments_Exit2) {
  for (std::vector<std::string> wrong : {std::vector<std::string>{},
                                         {"--dir"},
                                         {"--dir", "/", "--bogus"},
                                         {"--dir", "/", "--log-level", "loud"}}) {
    wrong.insert(wrong.begin(), std::string(BATON_BINARY_DIR) + "/bin/baton-shim");
    auto ended = RunCommand({.argv = wrong}, Soon());
    ASSERT_TRUE(ended.ok()) << ended.status();
    EXPECT_EQ(ended->status.code, 2) << ended->err;
    EXPECT_THAT(ended->err, HasSubstr("--help"));
  }
}

}  // namespace
}  // namespace baton::test
