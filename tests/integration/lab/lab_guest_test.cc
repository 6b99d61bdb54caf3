// The lab guest, in process and as a program, with the mediator, the lab's back-end and Baton's driver for
// QEMU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "agent/vmm/qmp/qmp_driver.h"
#include "common/unix_socket.h"
#include "tests/integration/shim/real_peers.h"
#include "tests/lab/vm/harness.h"
#include "tests/temp_dir.h"

namespace baton::lab {
namespace {

using std::chrono::seconds;
using testing::HasSubstr;

Deadline Soon() { return Deadline::After(seconds(60)); }

std::string Bin(const std::string& name) { return std::string(BATON_BINARY_DIR) + "/bin/" + name; }

HarnessOptions Options() {
  HarnessOptions options;
  options.backend = {Bin("baton-lab-device"), "--exit-on-eof", "--latency-max-us", "200"};
  options.backend_says_ready = true;
  options.queues = 2;
  options.workload.writers = 8;
  options.workload.blocks = 128;
  options.workload.pages = 64;
  return options;
}

class LabGuestTest : public testing::Test {
 protected:
  void Start(HarnessOptions options) {
    harness_ = std::make_unique<Harness>(std::move(options));
    absl::Status started = harness_->Start();
    ASSERT_TRUE(started.ok()) << started;
  }
  void ExpectOk(const absl::Status& status) {
    EXPECT_TRUE(status.ok()) << status << "\n" << harness_->Console();
  }
  std::unique_ptr<Harness> harness_;
};

TEST_F(LabGuestTest, WritesAndVerifies) {
  Start(Options());
  ExpectOk(harness_->AwaitWrites(500));
  ExpectOk(harness_->Verify());
  ExpectOk(harness_->AwaitWrites(100));
  ExpectOk(harness_->Verify());
  auto figures = harness_->guest().Figures(Soon());
  ASSERT_TRUE(figures.ok());
  EXPECT_GT(figures->reads, figures->writes);
  EXPECT_GT(figures->memory_writes, 0u);
}

TEST_F(LabGuestTest, StopsAndGoesOn) {
  Start(Options());
  for (int i = 0; i < 5; ++i) {
    ExpectOk(harness_->guest().Pause(Soon()));
    auto before = harness_->guest().Figures(Soon());
    ExpectOk(harness_->guest().Run(Soon()));
    ExpectOk(harness_->AwaitWrites(20));
    auto after = harness_->guest().Figures(Soon());
    ASSERT_TRUE(before.ok() && after.ok());
    EXPECT_EQ(after->stops, before->stops + 1);
  }
  ExpectOk(harness_->Verify());
}

TEST_F(LabGuestTest, ABackendThatIsKilledIsReplaced) {
  Start(Options());
  for (int i = 0; i < 5; ++i) {
    ExpectOk(harness_->AwaitWrites(20));
    harness_->backend().Kill();
    ExpectOk(harness_->StartBackend());
    ExpectOk(harness_->AwaitWrites(20));
    ExpectOk(harness_->Verify());
  }
}

TEST_F(LabGuestTest, AMediatorThatDiesIsReplaced) {
  Start(Options());
  for (int i = 0; i < 5; ++i) {
    ExpectOk(harness_->AwaitWrites(20));
    harness_->DropMediator();
    ExpectOk(harness_->StartMediator(/*returns=*/true));
    ExpectOk(harness_->AwaitWrites(20));
    ExpectOk(harness_->Verify());
  }
}

TEST_F(LabGuestTest, MovesToAnotherMediatorAndBackend) {
  Start(Options());
  for (int i = 0; i < 4; ++i) {
    ExpectOk(harness_->AwaitWrites(50));
    ExpectOk(harness_->Move());
    ExpectOk(harness_->Verify());
  }
  auto figures = harness_->guest().Figures(Soon());
  ASSERT_TRUE(figures.ok());
  EXPECT_EQ(figures->stops, 4u);
  EXPECT_GT(figures->longest_stop, Duration(0));
}

TEST_F(LabGuestTest, RequestsOfPackedRingsAreHandedOver) {
  // The destination's back-end has not heard of the guest's features yet, and a region for packed rings is
  // laid out differently.
  HarnessOptions options = Options();
  options.workload.packed = true;
  options.backend.insert(options.backend.end(), {"--latency-us", "5000"});
  Start(options);
  for (int i = 0; i < 3; ++i) {
    ExpectOk(harness_->AwaitWrites(10));
    ExpectOk(harness_->Move(/*handoff=*/true));
    ExpectOk(harness_->Verify());
  }
}

TEST_F(LabGuestTest, AWriteThatTheBackendForgetsIsFound) {
  // The judgement is not blind in this place: an image that goes back in time behind the guest's back.
  Start(Options());
  ExpectOk(harness_->AwaitWrites(200));
  ExpectOk(harness_->Verify());
  std::filesystem::copy_file(harness_->image(), harness_->dir() + "/old");
  ExpectOk(harness_->AwaitWrites(200));
  ExpectOk(harness_->guest().Pause(Soon()));
  std::ifstream old(harness_->dir() + "/old", std::ios::binary);
  std::fstream image(harness_->image(), std::ios::binary | std::ios::in | std::ios::out);
  image << old.rdbuf();
  image.flush();
  ExpectOk(harness_->guest().Run(Soon()));
  absl::Status verified = harness_->Verify();
  EXPECT_THAT(Message(verified), HasSubstr("older than the last acknowledged write"));
}

TEST_F(LabGuestTest, ADamagedStateIsRefused) {
  Start(Options());
  ExpectOk(harness_->guest().Pause(Soon()));
  auto state = harness_->guest().Save(Soon());
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_TRUE(LabGuest::Complete(*state));
  EXPECT_FALSE(LabGuest::Complete(state->substr(0, state->size() - 1)));
  // Another guest on the same memory, as a destination would be.
  GuestConfig config;
  config.memory_path = harness_->dir() + "/ram0";
  config.memory_bytes = 16 << 20;
  config.incoming = true;
  auto other = LabGuest::Create(config, {}, Soon());
  ASSERT_TRUE(other.ok()) << other.status();
  std::string damaged = *state;
  damaged[damaged.size() / 2] ^= 1;
  EXPECT_EQ((*other)->Load(damaged, Soon()).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ((*other)->Load(state->substr(0, 10), Soon()).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ((*other)->Load("QEVM" + *state, Soon()).code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message((*other)->Load(*state, Soon())), HasSubstr("another machine"));
  EXPECT_FALSE((*other)->Run(Soon()).ok()) << "nothing has arrived";
  ExpectOk(harness_->guest().Run(Soon()));
  ExpectOk(harness_->Verify());
}

// The program, driven as QEMU is.
class LabProgramTest : public testing::Test {
 protected:
  LabProgramTest() {
    for (const char* host : {"a", "b"}) std::filesystem::create_directory(dir_ + "/" + host);
    std::ofstream(dir_ + "/image").close();
    std::filesystem::resize_file(dir_ + "/image", 8 << 20);
  }
  ~LabProgramTest() override {
    for (auto& driver : {std::ref(a_), std::ref(b_)}) {
      if (driver.get()) driver.get()->Kill();
    }
    backends_.clear();
  }
  absl::StatusOr<std::unique_ptr<vmm::QmpDriver>> Launch(const std::string& host, bool incoming) {
    const std::string run = dir_ + "/" + host;
    auto backend = BackendProcess::Start({Bin("baton-lab-device"), "--exit-on-eof"},
                                         vmm::DeviceSocketPath(run, "disk0"), dir_ + "/image", true, Soon());
    if (!backend.ok()) return backend.status();
    backends_.push_back(*std::move(backend));
    vmm::QemuLaunch launch;
    launch.command.qemu_path = Bin("baton-lab-guest");
    launch.command.spec.set_name("lab");
    launch.command.spec.set_memory_bytes(16 << 20);
    launch.command.spec.set_vcpus(1);
    launch.command.spec.mutable_boot()->set_kernel("/dev/null");
    launch.command.spec.mutable_boot()->set_cmdline("lab.blocks=64 lab.writers=4");
    auto* disk = launch.command.spec.add_devices();
    disk->set_name("disk0");
    disk->set_class_(v1::BLK);
    launch.command.run_dir = run;
    launch.command.memory_path = run + "/ram";
    std::ofstream(launch.command.memory_path).close();
    std::filesystem::resize_file(launch.command.memory_path, 16 << 20);
    launch.command.incoming = incoming;
    launch.log_path = run + "/log";
    return vmm::QmpDriver::Launch(std::move(launch), Soon());
  }
  // The first line of a host's console with `word`, once it is there.
  std::string Heard(const std::string& host, const std::string& word) {
    auto line = test::GrowingFile(dir_ + "/" + host + "/console.log").WaitFor(word, Soon());
    EXPECT_TRUE(line.ok()) << line.status();
    return line.value_or("");
  }
  void Type(const std::string& host, char key) {
    auto console = ConnectUnix(vmm::ConsoleSocketPath(dir_ + "/" + host), Soon());
    ASSERT_TRUE(console.ok()) << console.status();
    ASSERT_EQ(::write(console->get(), &key, 1), 1);
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  std::vector<BackendProcess> backends_;
  std::unique_ptr<vmm::QmpDriver> a_, b_;
};

TEST_F(LabProgramTest, MovesAndComesBackAsQemuDoes) {
  auto a = Launch("a", false);
  ASSERT_TRUE(a.ok()) << a.status();
  a_ = *std::move(a);
  EXPECT_THAT(a_->version(), HasSubstr("10.0.0"));
  EXPECT_EQ(a_->RunState(Soon()).value(), "prelaunch");
  ASSERT_TRUE(a_->Obstacles(Soon()).ok());
  ASSERT_TRUE(a_->Start(Soon()).ok());
  EXPECT_THAT(Heard("a", "READY"), HasSubstr("READY"));
  // A migration that is given up.
  {
    auto state = a_->Freeze(Soon());
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_GT(a_->frozen_at_ns(), 0);
    EXPECT_FALSE(a_->IsRunning(Soon()).value());
    ASSERT_TRUE(a_->Resume(Soon()).ok());
    EXPECT_TRUE(a_->IsRunning(Soon()).value());
  }
  // And one that is not.
  auto b = Launch("b", true);
  ASSERT_TRUE(b.ok()) << b.status();
  b_ = *std::move(b);
  auto in = b_->BeginLoad(Soon());
  ASSERT_TRUE(in.ok()) << in.status();
  auto out = a_->Freeze(Soon());
  ASSERT_TRUE(out.ok()) << out.status();
  std::filesystem::copy_file(dir_ + "/a/ram", dir_ + "/b/ram",
                             std::filesystem::copy_options::overwrite_existing);
  ASSERT_TRUE(a_->ContinueState(Soon()).ok());
  for (char chunk[4096];;) {
    ssize_t n = ::read(out->get(), chunk, sizeof chunk);
    if (n <= 0) break;
    ASSERT_EQ(::write(in->get(), chunk, static_cast<size_t>(n)), n);
  }
  in->reset();
  absl::Status loaded = b_->FinishLoad(Soon());
  ASSERT_TRUE(loaded.ok()) << loaded;
  EXPECT_EQ(a_->MigrationState(Soon()).value(), "completed");
  ASSERT_TRUE(b_->Start(Soon()).ok());
  ASSERT_TRUE(b_->Announce(Soon()).ok());
  a_->Kill();
  Type("b", 'q');
  const std::string result = Heard("b", "RESULT");
  EXPECT_THAT(result, HasSubstr(" errors=0"));
  EXPECT_THAT(result, HasSubstr(" memory_errors=0"));
  EXPECT_THAT(result, HasSubstr(" stops=2"));
  ASSERT_TRUE(b_->PowerDown(Soon()).ok());
  ASSERT_TRUE(WaitPidfd(b_->exit_fd(), Soon()).ok());
  EXPECT_TRUE(b_->GuestShutDown());
  EXPECT_THAT(b_->DescribeExit(), HasSubstr("after the guest powered off"));
}

}  // namespace
}  // namespace baton::lab
