// The mediator between QEMU and qemu-storage-daemon, through every step that a migration takes of a device.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "agent/vhost/mediator.h"
#include "agent/vhost/probe.h"
#include "agent/virtio/features.h"
#include "agent/vmm/qmp/qmp_driver.h"
#include "common/log.h"
#include "tests/integration/shim/real_peers.h"
#include "tests/integration/vhost/peers.h"
#include "tests/lab/device/control_client.h"
#include "tests/lab/device/journal.h"

namespace baton::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

Deadline Soon() { return Deadline::After(seconds(60)); }

// A host: back-end, mediator, guest memory, QEMU.
struct Side {
  std::string run_dir, backend;
  std::optional<Qsd> qsd;
  std::optional<Process> lab;  // instead of it
  std::unique_ptr<memory::GuestRam> ram;
  std::unique_ptr<vhost::Mediator> mediator;
  std::unique_ptr<Console> console;
  std::unique_ptr<vmm::QmpDriver> driver;
};

class QemuMediator : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    InitLogging({.program = "qemu_test", .level = "info", .json = false, .context = ""});
  }

  void SetUp() override {
    ASSERT_TRUE(HaveQemuAndQsd()) << "deps/packages.txt names the peers that tests need";
    ASSERT_TRUE(MakeImage(image_, 16u << 20).ok());
    auto spec = LabSpec("g", true, "lab.report=50");
    ASSERT_TRUE(spec.ok()) << spec.status();
    spec_ = *spec;
  }

  void TearDown() override {
    for (Side* side : {&a_, &b_}) {
      if (side->qsd) side->qsd->Signal(SIGCONT);
      if (side->driver) side->driver->Kill();
    }
  }

  // With control socket; returns when it listens.
  void StartLab(Side& side) {
    side.lab.reset();
    int out[2];
    ASSERT_EQ(::pipe2(out, O_CLOEXEC), 0);
    UniqueFd in(out[0]), theirs(out[1]);
    SpawnOptions spawn;
    spawn.argv = {BATON_LAB_DEVICE, "--socket",    side.backend, "--image",      image_,
                  "--control",      Control(side), "--journal",  image_ + ".log"};
    spawn.argv.insert(spawn.argv.end(), lab_args_.begin(), lab_args_.end());
    spawn.stdout_fd = theirs.get();
    spawn.stderr_fd = 2;
    auto process = Process::Spawn(spawn);
    ASSERT_TRUE(process.ok()) << process.status();
    side.lab.emplace(*std::move(process));
    theirs.reset();
    char ready[6];
    ASSERT_EQ(::read(in.get(), ready, sizeof ready), static_cast<ssize_t>(sizeof ready));
  }
  static std::string Control(const Side& side) { return side.backend + ".ctl"; }
  nlohmann::json AskLab(Side& side, const nlohmann::json& command) {
    auto answer = lab::CallLabDevice(Control(side), command, Soon());
    EXPECT_TRUE(answer.ok()) << answer.status();
    return answer.ok() ? *answer : nlohmann::json::object();
  }

  void StartQsd(Side& side, int iops = 0) {
    if (use_lab_) return StartLab(side);
    side.qsd.reset();
    auto qsd = Qsd::Start({.socket = side.backend, .image = image_, .queues = 1, .iops = iops});
    ASSERT_TRUE(qsd.ok()) << qsd.status();
    side.qsd.emplace(std::move(*qsd));
  }

  void Launch(Side& side, const std::string& name, bool incoming, int iops = 0) {
    side.run_dir = dirs_.dir() + "/" + name;
    side.backend = side.run_dir + "/qsd.sock";
    std::filesystem::create_directories(side.run_dir);
    const std::string memory = dirs_.shm() + "/" + name + ".ram";
    auto block = memory::RamBlock::Create("mem", memory, spec_.memory_bytes());
    ASSERT_TRUE(block.ok()) << block.status();
    std::vector<memory::RamBlock> blocks;
    blocks.push_back(std::move(*block));
    side.ram = std::make_unique<memory::GuestRam>(std::move(blocks));
    ASSERT_NO_FATAL_FAILURE(StartQsd(side, iops));

    vhost::MediatorOptions options;
    options.spec = spec_.devices(0);
    options.backend.set_socket(side.backend);
    options.backend.set_kind(use_lab_ ? v1::LAB : v1::QEMU_STORAGE_DAEMON);
    options.listen_path = vmm::DeviceSocketPath(side.run_dir, "disk0");
    options.request_timeout = seconds(2);
    options.ram = side.ram.get();
    vhost::MediatorCallbacks callbacks;
    callbacks.on_memory = [&side](const std::vector<vhost::MemoryRegionInfo>& regions) {
      auto layout = vhost::LayoutFor(regions, *side.ram);
      ASSERT_TRUE(layout.ok()) << layout.status();
      absl::Status set = side.ram->SetLayout(*layout);
      ASSERT_TRUE(set.ok()) << set;
    };
    auto mediator = vhost::Mediator::Start(std::move(options), std::move(callbacks));
    ASSERT_TRUE(mediator.ok()) << mediator.status();
    side.mediator = std::move(*mediator);

    side.console =
        std::make_unique<Console>(side.run_dir + "/console.log", vmm::ConsoleSocketPath(side.run_dir));
    vmm::QemuLaunch launch;
    launch.command.spec = spec_;
    launch.command.qemu_path = QemuPath();
    launch.command.run_dir = side.run_dir;
    launch.command.memory_path = memory;
    launch.command.incoming = incoming;
    launch.log_path = side.run_dir + "/qemu.log";
    auto driver = vmm::QmpDriver::Launch(launch, Soon());
    ASSERT_TRUE(driver.ok()) << driver.status();
    side.driver = *std::move(driver);
  }

  void Boot(Side& side, int iops = 0) {
    ASSERT_NO_FATAL_FAILURE(Launch(side, "a", false, iops));
    absl::Status status = side.driver->Start(Soon());
    ASSERT_TRUE(status.ok()) << status;
    auto ready = side.console->out.WaitFor("READY", Deadline::After(seconds(120)));
    ASSERT_TRUE(ready.ok()) << ready.status();
  }

  void ExpectRuns(Side& side) {
    for (int i = 0; i < 2; ++i) {
      side.console->out.SkipToEnd();
      auto line = side.console->out.WaitFor("PROGRESS", Soon());
      ASSERT_TRUE(line.ok()) << line.status() << " " << side.mediator->Describe().ShortDebugString();
      EXPECT_EQ(NumberIn(*line, "errors"), 0u) << *line;
    }
  }

  // The guest may go on before the mediator has sent the last message to the back-end and says so.
  void ExpectReconnects(uint32_t count) {
    EXPECT_TRUE(Eventually([&] { return a_.mediator->Describe().reconnects() == count; }, Soon().Left()))
        << a_.mediator->Describe().ShortDebugString();
  }

  void ExpectChecked(Side& side) {
    auto result = side.console->Ask("q", "RESULT", Deadline::After(seconds(120)));
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(NumberIn(*result, "errors"), 0u) << *result;
  }

  TempDirs dirs_;
  const std::string image_ = dirs_.dir() + "/disk.img";
  v1::VmSpec spec_;
  bool use_lab_ = false;
  std::vector<std::string> lab_args_;
  Side a_, b_;
};

TEST_F(QemuMediator, LogsStopsAndGoesOn) {
  ASSERT_NO_FATAL_FAILURE(Boot(a_));
  ASSERT_TRUE(a_.mediator->StartLogging(Soon()).ok());
  ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
  memory::PageSets dirty = a_.ram->MakeSets();
  ASSERT_TRUE(a_.mediator->HarvestLog(dirty).ok());
  // The workload reads back what it wrote: buffers and the used ring.
  EXPECT_GE(dirty[0].Count(), 3u);
  EXPECT_LT(dirty[0].Count(), dirty[0].pages() / 2);

  ASSERT_TRUE(a_.mediator->ArmStop(seconds(5)).ok());
  auto frozen = a_.driver->Freeze(Soon());
  ASSERT_TRUE(frozen.ok()) << frozen.status();
  auto state = a_.mediator->CollectState(Soon());
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_EQ(state->vrings_size(), 1) << state->ShortDebugString();
  EXPECT_EQ(state->vrings(0).last_avail(), state->vrings(0).used_idx());
  EXPECT_TRUE(vhost::VerifyAgainstMemory(*state, *a_.ram).ok());
  EXPECT_GT(state->layout_size(), 0);
  std::printf("device stop: %.3f ms\n", static_cast<double>(a_.mediator->stop().duration().nanos()) / 1e6);

  // Nothing may be written to memory from now on.
  ASSERT_TRUE(a_.mediator->HarvestLog(dirty).ok());
  memory::PageSets late = a_.ram->MakeSets();
  ASSERT_TRUE(a_.mediator->HarvestLog(late).ok());
  EXPECT_EQ(late[0].Count(), 0u);

  ASSERT_TRUE(a_.driver->Resume(Soon()).ok());
  ASSERT_TRUE(a_.mediator->DisarmStop().ok());
  ASSERT_TRUE(a_.mediator->StopLogging(Soon()).ok());
  ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
  ExpectChecked(a_);
}

TEST_F(QemuMediator, SilentBackendEndsTheStopAtItsBoundAndTheGuestGoesOn) {
  ASSERT_NO_FATAL_FAILURE(Boot(a_));
  for (int round = 0; round < 2; ++round) {
    ASSERT_TRUE(a_.mediator->StartLogging(Soon()).ok());
    ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
    a_.qsd->Signal(SIGSTOP);
    ASSERT_TRUE(a_.mediator->ArmStop(milliseconds(300)).ok());
    auto began = Clock::now();
    auto frozen = a_.driver->Freeze(Soon());
    ASSERT_TRUE(frozen.ok()) << frozen.status();
    EXPECT_LT(Clock::now() - began, seconds(15));
    auto state = a_.mediator->CollectState(Soon());
    ASSERT_FALSE(state.ok());
    EXPECT_EQ(ReasonOf(state.status()), v1::DRAIN_TIMEOUT) << state.status();
    EXPECT_NE(a_.mediator->Describe().message(), "");
    began = Clock::now();
    ASSERT_TRUE(a_.driver->Resume(Soon()).ok());
    EXPECT_LT(Clock::now() - began, seconds(15));
    ASSERT_TRUE(a_.mediator->DisarmStop().ok());
    a_.qsd->Signal(SIGCONT);
    ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
    ASSERT_TRUE(a_.mediator->StopLogging(Soon()).ok());
  }
  ExpectChecked(a_);
}

TEST_F(QemuMediator, SlowBackendEndsTheStopAtItsBoundAndTheGuestGoesOn) {
  // Two requests a second: a stop finds one in flight for longer than its bound.
  ASSERT_NO_FATAL_FAILURE(Boot(a_));
  ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
  a_.qsd->Kill();
  ASSERT_NO_FATAL_FAILURE(StartQsd(a_, /*iops=*/2));
  ExpectReconnects(1);
  ASSERT_TRUE(a_.mediator->StartLogging(Soon()).ok());
  absl::StatusOr<v1::DeviceState> state = v1::DeviceState();
  // A guest that has not got to it yet has nothing in flight; that stop ends well.
  for (const Deadline deadline = Soon(); state.ok() && !deadline.Expired();) {
    ASSERT_TRUE(a_.mediator->ArmStop(milliseconds(50)).ok());
    auto frozen = a_.driver->Freeze(Soon());
    ASSERT_TRUE(frozen.ok()) << frozen.status();
    state = a_.mediator->CollectState(Soon());
    ASSERT_TRUE(a_.driver->Resume(Soon()).ok());
    ASSERT_TRUE(a_.mediator->DisarmStop().ok());
  }
  EXPECT_EQ(ReasonOf(state.status()), v1::DRAIN_TIMEOUT) << state.status();
  ASSERT_TRUE(a_.mediator->StopLogging(Soon()).ok());
  // With a longer bound it drains.
  ASSERT_TRUE(a_.mediator->ArmStop(seconds(40)).ok());
  auto frozen = a_.driver->Freeze(Soon());
  ASSERT_TRUE(frozen.ok()) << frozen.status();
  state = a_.mediator->CollectState(Soon());
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_TRUE(a_.driver->Resume(Soon()).ok());
  ASSERT_TRUE(a_.mediator->DisarmStop().ok());
  a_.qsd->Kill();
  ASSERT_NO_FATAL_FAILURE(StartQsd(a_));
  ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
  ExpectChecked(a_);
}

TEST_F(QemuMediator, KilledBackendIsReplacedUnderTheRunningGuest) {
  ASSERT_NO_FATAL_FAILURE(Boot(a_));
  for (uint32_t round = 1; round <= 3; ++round) {
    ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
    a_.qsd->Kill();
    ASSERT_NO_FATAL_FAILURE(StartQsd(a_));
    ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
    ExpectReconnects(round);
  }
  ExpectChecked(a_);
}

TEST_F(QemuMediator, DeviceMovesToAnotherBackend) {
  ASSERT_NO_FATAL_FAILURE(Boot(a_));
  ASSERT_NO_FATAL_FAILURE(Launch(b_, "b", true));
  ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
  ASSERT_TRUE(vhost::CompareForMigration(a_.mediator->Describe(), b_.mediator->Describe()).empty());

  ASSERT_TRUE(a_.mediator->ArmStop(seconds(5)).ok());
  auto out = a_.driver->Freeze(Soon());
  ASSERT_TRUE(out.ok()) << out.status();
  auto state = a_.mediator->CollectState(Soon());
  ASSERT_TRUE(state.ok()) << state.status();
  auto in = b_.driver->BeginLoad(Soon());
  ASSERT_TRUE(in.ok()) << in.status();
  std::memcpy(b_.ram->blocks()[0].base(), a_.ram->blocks()[0].base(), spec_.memory_bytes());
  std::vector<memory::GpaRange> layout;
  for (const v1::GuestRange& r : state->layout())
    layout.push_back({r.gpa(), r.size(), r.block(), r.offset()});
  ASSERT_TRUE(b_.ram->SetLayout(layout).ok());
  ASSERT_TRUE(vhost::VerifyAgainstMemory(*state, *b_.ram).ok());
  ASSERT_TRUE(b_.mediator->ExpectState(*state).ok());
  EXPECT_TRUE(absl::IsUnavailable(b_.mediator->CheckExpected()));

  std::thread pump([&] {
    char buffer[65536];
    for (ssize_t n; (n = ::read(out->get(), buffer, sizeof buffer)) > 0;) {
      for (ssize_t sent = 0; sent < n;) {
        ssize_t w = ::write(in->get(), buffer + sent, static_cast<size_t>(n - sent));
        if (w <= 0) return;
        sent += w;
      }
    }
    in->reset();
  });
  absl::Status given = a_.driver->ContinueState(Soon());
  pump.join();
  ASSERT_TRUE(given.ok()) << given;
  ASSERT_TRUE(b_.driver->FinishLoad(Soon()).ok());
  a_.driver->Kill();
  ASSERT_TRUE(b_.driver->Start(Soon()).ok());
  ASSERT_NO_FATAL_FAILURE(ExpectRuns(b_));
  EXPECT_TRUE(Eventually([&] { return b_.mediator->CheckExpected().ok(); }, Soon().Left()))
      << b_.mediator->CheckExpected();
  ExpectChecked(b_);
}

// The lab device under a real Linux guest: what other tests take for granted when they use it.
TEST_F(QemuMediator, LabDeviceServesAndStopsPackedRings) {
  use_lab_ = true;
  lab_args_ = {"--latency-max-us", "500"};
  spec_.add_extra_args("-global");
  spec_.add_extra_args("vhost-user-blk.packed=on");
  ASSERT_NO_FATAL_FAILURE(Boot(a_));
  ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
  EXPECT_NE(AskLab(a_, {{"cmd", "stats"}})["features"].get<uint64_t>() & virtio::kFRingPacked, 0u);
  ASSERT_TRUE(a_.mediator->ArmStop(seconds(5)).ok());
  auto frozen = a_.driver->Freeze(Soon());
  ASSERT_TRUE(frozen.ok()) << frozen.status();
  auto state = a_.mediator->CollectState(Soon());
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_TRUE(a_.driver->Resume(Soon()).ok());
  ASSERT_TRUE(a_.mediator->DisarmStop().ok());
  ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
  ExpectChecked(a_);
}

// Killed at points where a completion is half published; the next one goes on from the in-flight region.
TEST_F(QemuMediator, LabDeviceKilledAtAnyPointLosesNothing) {
  use_lab_ = true;
  lab_args_ = {"--latency-max-us", "500", "--without", "packed", "--base", "ignored"};
  ASSERT_NO_FATAL_FAILURE(Boot(a_));
  uint32_t round = 0;
  for (const char* point : {"fetch_flag", "after_io", "after_link", "after_publish"}) {
    ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
    AskLab(a_, {{"cmd", "set"}, {"crash_at", point}, {"crash_after", 3}});
    auto ended = a_.lab->Wait(Soon());
    ASSERT_TRUE(ended.ok()) << point << ": " << ended.status();
    ASSERT_NO_FATAL_FAILURE(StartQsd(a_));
    ASSERT_NO_FATAL_FAILURE(ExpectRuns(a_));
    ExpectReconnects(++round);
  }
  ExpectChecked(a_);
  auto records = lab::ReadJournal(image_ + ".log");
  ASSERT_TRUE(records.ok()) << records.status();
  auto verdict = lab::CheckJournal(*records);
  EXPECT_TRUE(verdict.ok()) << verdict.status();
}

}  // namespace
}  // namespace baton::test
