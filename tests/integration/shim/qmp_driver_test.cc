// The QMP driver against a real QEMU (TCG) with a vhost-user disk from a real qemu-storage-daemon. Devices
// connect to the daemon directly: what is tested here is how QEMU is driven through each state of a
// migration.
#include "agent/vmm/qmp/qmp_driver.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <filesystem>

#include "common/log.h"
#include "tests/integration/shim/real_peers.h"

namespace baton::vmm {
namespace {

using std::chrono::seconds;
using testing::HasSubstr;

Deadline Soon() { return Deadline::After(seconds(60)); }

class QmpDriverTest : public testing::Test {
 protected:
  struct Side {
    std::string run_dir;
    std::unique_ptr<test::StorageDaemon> disk;
    std::unique_ptr<test::Console> console;
    QemuLaunch launch;
    std::unique_ptr<QmpDriver> driver;
  };

  void SetUp() override {
    ASSERT_TRUE(test::HaveQemuAndQsd()) << "deps/packages.txt names the peers that tests need";
    image_ = dirs_.dir() + "/disk.img";
    ASSERT_TRUE(test::MakeImage(image_, 16u << 20).ok());
    // Writes are far between. qemu-storage-daemon closes the call descriptor of a ring that QEMU stops, and
    // breaks the device if a request is completed after that (libvhost-user, "Error writing eventfd"); a
    // mediator would let the rings run empty first.
    auto spec = test::LabSpec("g", true, "lab.report=5 lab.delay_us=50000");
    ASSERT_TRUE(spec.ok()) << spec.status();
    spec_ = *spec;
  }
  void TearDown() override {
    for (Side* side : {&a_, &b_}) {
      if (side->driver) side->driver->Kill();
    }
  }

  // Everything but QEMU itself.
  void Prepare(Side& side, const std::string& name, bool incoming) {
    side.run_dir = dirs_.dir() + "/" + name;
    std::filesystem::create_directories(side.run_dir);
    std::string memory = dirs_.shm() + "/" + name + ".ram";
    ASSERT_TRUE(test::MakeImage(memory, spec_.memory_bytes()).ok());
    auto disk = test::StorageDaemon::Start(DeviceSocketPath(side.run_dir, "disk0"), image_);
    ASSERT_TRUE(disk.ok()) << disk.status();
    side.disk = std::make_unique<test::StorageDaemon>(*std::move(disk));
    side.console =
        std::make_unique<test::Console>(side.run_dir + "/console.log", ConsoleSocketPath(side.run_dir));
    side.launch.command.spec = spec_;
    side.launch.command.qemu_path = test::QemuPath();
    side.launch.command.run_dir = side.run_dir;
    side.launch.command.memory_path = memory;
    side.launch.command.incoming = incoming;
    side.launch.log_path = side.run_dir + "/qemu.log";
  }
  void Launch(Side& side, const std::string& name, bool incoming) {
    Prepare(side, name, incoming);
    auto driver = QmpDriver::Launch(side.launch, Soon());
    ASSERT_TRUE(driver.ok()) << driver.status();
    side.driver = *std::move(driver);
  }
  void Boot(Side& side) {
    Launch(side, "a", false);
    if (HasFatalFailure()) return;
    absl::Status status = side.driver->Start(Soon());
    ASSERT_TRUE(status.ok()) << status;
    auto ready = side.console->out.WaitFor("READY", Deadline::After(seconds(60)));
    ASSERT_TRUE(ready.ok()) << ready.status();
  }
  // The guest executes and its disk answers: the count of writes grows.
  void ExpectRuns(Side& side) {
    auto running = side.driver->IsRunning(Soon());
    ASSERT_TRUE(running.ok()) << running.status();
    EXPECT_TRUE(*running);
    for (int i = 0; i < 2; ++i) {
      side.console->out.SkipToEnd();
      auto line = side.console->out.WaitFor("PROGRESS", Soon());
      ASSERT_TRUE(line.ok()) << line.status();
      EXPECT_EQ(test::NumberIn(*line, "errors"), 0u) << *line;
    }
  }
  void ExpectChecked(Side& side) {
    auto result = side.console->Ask("q", "RESULT", Deadline::After(seconds(60)));
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(test::NumberIn(*result, "errors"), 0u) << *result;
    EXPECT_EQ(test::NumberIn(*result, "memory_errors").value_or(0), 0u) << *result;
  }
  static std::string ReadAll(int fd) {
    std::string all;
    for (;;) {
      char chunk[65536];
      ssize_t n = ::read(fd, chunk, sizeof(chunk));
      if (n <= 0) break;
      all.append(chunk, static_cast<size_t>(n));
    }
    return all;
  }
  static std::string ReadAvailable(int fd) {
    std::string all;
    for (;;) {
      pollfd item{fd, POLLIN, 0};
      char chunk[65536];
      if (::poll(&item, 1, 0) <= 0) return all;
      ssize_t n = ::read(fd, chunk, sizeof(chunk));
      if (n <= 0) return all;
      all.append(chunk, static_cast<size_t>(n));
    }
  }

  test::TempDirs dirs_;
  std::string image_;
  v1::VmSpec spec_;
  Side a_, b_;
};

TEST_F(QmpDriverTest, BootsTheGuestAndNamesItsVersion) {
  Boot(a_);
  EXPECT_THAT(a_.driver->version(), testing::MatchesRegex("QEMU emulator version [0-9]+\\.[0-9]+\\.[0-9]+"));
  ExpectRuns(a_);
  ExpectChecked(a_);
}

TEST_F(QmpDriverTest, Resume_FromEveryStateOfAMigration_GuestRunsAndCanMigrateAgain) {
  Boot(a_);
  // Nothing to undo.
  ASSERT_TRUE(a_.driver->Resume(Soon()).ok());
  ExpectRuns(a_);
  for (int round = 0; round < 2; ++round) {
    {  // pre-switchover
      auto state = a_.driver->Freeze(Soon());
      ASSERT_TRUE(state.ok()) << state.status();
      EXPECT_EQ(*a_.driver->MigrationState(Soon()), "pre-switchover");
      EXPECT_FALSE(*a_.driver->IsRunning(Soon()));
      absl::Status status = a_.driver->Resume(Soon());
      ASSERT_TRUE(status.ok()) << status;
      ExpectRuns(a_);
    }
    {  // device: the state is being written
      auto state = a_.driver->Freeze(Soon());
      ASSERT_TRUE(state.ok()) << state.status();
      ASSERT_TRUE(a_.driver->ContinueState(Soon()).ok());
      absl::Status status = a_.driver->Resume(Soon());
      ASSERT_TRUE(status.ok()) << status;
      ExpectRuns(a_);
    }
    {  // completed
      auto state = a_.driver->Freeze(Soon());
      ASSERT_TRUE(state.ok()) << state.status();
      ASSERT_TRUE(a_.driver->ContinueState(Soon()).ok());
      EXPECT_GT(ReadAll(state->get()).size(), 10000u);
      const absl::Status whole = a_.driver->ConfirmState(Soon());
      EXPECT_TRUE(whole.ok()) << whole;
      EXPECT_EQ(*a_.driver->RunState(Soon()), "postmigrate");
      absl::Status status = a_.driver->Resume(Soon());
      ASSERT_TRUE(status.ok()) << status;
      ExpectRuns(a_);
    }
    {  // the reader hung up
      auto state = a_.driver->Freeze(Soon());
      ASSERT_TRUE(state.ok()) << state.status();
      state->reset();
      ASSERT_TRUE(a_.driver->ContinueState(Soon()).ok());
      const absl::Status whole = a_.driver->ConfirmState(Soon());
      EXPECT_EQ(whole.code(), absl::StatusCode::kUnavailable) << whole;
      absl::Status status = a_.driver->Resume(Soon());
      ASSERT_TRUE(status.ok()) << status;
      ExpectRuns(a_);
    }
    // setup and active: given up while QEMU is on its way to pre-switchover, at whatever point that is.
    for (int wait_us : {0, 300, 1000, 2000, 3000}) {
      auto state = a_.driver->Freeze(Deadline::After(std::chrono::microseconds(wait_us)));
      absl::Status status = a_.driver->Resume(Soon());
      ASSERT_TRUE(status.ok()) << status;
    }
    ExpectRuns(a_);
  }
  ExpectChecked(a_);
}

TEST_F(QmpDriverTest, Obstacles_NamesDirectIoOfQemusOwnAndWhatQemuItselfRefuses) {
  Prepare(a_, "a", false);
  if (HasFatalFailure()) return;
  const std::string own = dirs_.dir() + "/own.img";
  ASSERT_TRUE(test::MakeImage(own, 1u << 20).ok());
  for (const std::string& word :
       std::vector<std::string>{"-blockdev", "driver=file,node-name=plain,filename=" + image_, "-blockdev",
                                "driver=file,node-name=bypass,cache.direct=on,filename=" + own, "-device",
                                "nvme,drive=bypass,serial=1"})
    *a_.launch.command.spec.add_extra_args() = word;
  auto driver = QmpDriver::Launch(a_.launch, Soon());
  ASSERT_TRUE(driver.ok()) << driver.status();
  a_.driver = *std::move(driver);
  auto found = a_.driver->Obstacles(Soon());
  ASSERT_TRUE(found.ok()) << found.status();
  std::vector<std::string> codes;
  for (const Obstacle& o : *found) codes.push_back(o.code + " " + o.subject);
  EXPECT_THAT(codes, testing::UnorderedElementsAre("VMM_BLOCKS_MIGRATION VMM", "VMM_DIRECT_IO disk " + own));
}

TEST_F(QmpDriverTest, MovesTheStateToAWaitingQemu) {
  Boot(a_);
  Launch(b_, "b", true);
  ASSERT_TRUE(b_.driver);
  auto load = b_.driver->BeginLoad(Soon());
  ASSERT_TRUE(load.ok()) << load.status();

  int64_t t0 = MonotonicNs();
  auto state = a_.driver->Freeze(Soon());
  ASSERT_TRUE(state.ok()) << state.status();
  int64_t t1 = MonotonicNs();
  std::string setup = ReadAvailable(state->get());
  ASSERT_EQ(::write(load->get(), setup.data(), setup.size()), static_cast<ssize_t>(setup.size()));
  std::error_code error;
  std::filesystem::copy_file(a_.launch.command.memory_path, b_.launch.command.memory_path,
                             std::filesystem::copy_options::overwrite_existing, error);
  ASSERT_FALSE(error) << error.message();
  int64_t t2 = MonotonicNs();
  ASSERT_TRUE(a_.driver->ContinueState(Soon()).ok());
  std::string rest = ReadAll(state->get());
  ASSERT_EQ(::write(load->get(), rest.data(), rest.size()), static_cast<ssize_t>(rest.size()));
  load->reset();
  int64_t t3 = MonotonicNs();
  absl::Status status = b_.driver->FinishLoad(Soon());
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_FALSE(*b_.driver->IsRunning(Soon()));
  int64_t t4 = MonotonicNs();
  status = b_.driver->Start(Soon());
  ASSERT_TRUE(status.ok()) << status;
  int64_t t5 = MonotonicNs();
  LOG_INFO("freeze {} us, setup {} bytes, save {} us ({} bytes), load {} us, start {} us", (t1 - t0) / 1000,
           setup.size(), (t3 - t2) / 1000, rest.size(), (t4 - t3) / 1000, (t5 - t4) / 1000);
  a_.driver->Kill();
  a_.driver.reset();
  ExpectRuns(b_);
  ExpectChecked(b_);

  // And it can leave again.
  auto again = b_.driver->Freeze(Soon());
  ASSERT_TRUE(again.ok()) << again.status();
  ASSERT_TRUE(b_.driver->Resume(Soon()).ok());
}

TEST_F(QmpDriverTest, FinishLoad_TruncatedState_QuotesQemu) {
  Launch(b_, "b", true);
  auto load = b_.driver->BeginLoad(Soon());
  ASSERT_TRUE(load.ok()) << load.status();
  ASSERT_EQ(::write(load->get(), "garbage-garbage-", 16), 16);
  load->reset();
  absl::Status status = b_.driver->FinishLoad(Soon());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Message(status), HasSubstr("Not a migration stream"));
}

TEST_F(QmpDriverTest, Adopt_TakesOverARunningQemu) {
  Boot(a_);
  ProcessId id = a_.driver->process();
  a_.driver.reset();  // as if the shim had died
  auto adopted = QmpDriver::Adopt(id, a_.run_dir, a_.launch.log_path, Soon());
  ASSERT_TRUE(adopted.ok()) << adopted.status();
  a_.driver = *std::move(adopted);
  ExpectRuns(a_);
  auto state = a_.driver->Freeze(Soon());
  ASSERT_TRUE(state.ok()) << state.status();
  a_.driver.reset();  // died while the guest was frozen
  adopted = QmpDriver::Adopt(id, a_.run_dir, a_.launch.log_path, Soon());
  ASSERT_TRUE(adopted.ok()) << adopted.status();
  a_.driver = *std::move(adopted);
  absl::Status status = a_.driver->Resume(Soon());
  ASSERT_TRUE(status.ok()) << status;
  ExpectRuns(a_);
  a_.driver->Kill();
  EXPECT_EQ(QmpDriver::Adopt(id, a_.run_dir, a_.launch.log_path, Soon()).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(QmpDriverTest, PowerDown_GuestEndsAndTheExitSaysSo) {
  Boot(a_);
  ExpectRuns(a_);  // the guest listens to its power button a little after READY
  ASSERT_TRUE(a_.driver->PowerDown(Soon()).ok());
  ASSERT_TRUE(WaitPidfd(a_.driver->exit_fd(), Deadline::After(seconds(60))).ok());
  EXPECT_THAT(a_.driver->DescribeExit(), HasSubstr("after the guest powered off"));
  EXPECT_TRUE(a_.driver->GuestShutDown());
}

TEST_F(QmpDriverTest, KilledQemu_CallsFailAndNameTheEnd) {
  Boot(a_);
  ::kill(a_.driver->pid(), SIGKILL);
  absl::Status status = a_.driver->Freeze(Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(Message(status), HasSubstr("SIGKILL"));
  EXPECT_FALSE(a_.driver->GuestShutDown());
}

TEST_F(QmpDriverTest, Launch_NoSuchBinary_NamesIt) {
  Prepare(a_, "a", false);
  a_.launch.command.qemu_path = "/nonexistent/qemu";
  absl::Status status = QmpDriver::Launch(a_.launch, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << status;
  EXPECT_THAT(Message(status), HasSubstr("/nonexistent/qemu"));
}

TEST_F(QmpDriverTest, Launch_QemuExitsAtOnce_QuotesItsWords) {
  Prepare(a_, "a", false);
  a_.launch.command.spec.add_extra_args("-device");
  a_.launch.command.spec.add_extra_args("no-such-device");
  absl::Status status = QmpDriver::Launch(a_.launch, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(Message(status), HasSubstr("'no-such-device' is not a valid device model name"));
}

TEST_F(QmpDriverTest, Launch_NoKernel_NamesIt) {
  Prepare(a_, "a", false);
  a_.launch.command.spec.mutable_boot()->set_kernel("/nonexistent/vmlinuz");
  absl::Status status = QmpDriver::Launch(a_.launch, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(status), HasSubstr("kernel /nonexistent/vmlinuz on this host"));
}

}  // namespace
}  // namespace baton::vmm
