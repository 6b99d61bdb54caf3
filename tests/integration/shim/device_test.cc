// Devices of a running QEMU guest: another back-end under load, and shims and back-ends that die with
// requests in flight. The guest checks every byte that it ever wrote.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>

#include <filesystem>

#include "tests/integration/shim/shim_guest.h"

namespace baton::test {
namespace {

using std::chrono::seconds;
using testing::HasSubstr;

class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(HaveQemuAndQsd()) << "deps/packages.txt names the peers that tests need";
    ASSERT_TRUE(MakeImage(image_, 16u << 20).ok());
    host_ = std::make_unique<ShimHost>(dirs_, "a");
  }
  void TearDown() override {
    if (HasFailure() && host_) ADD_FAILURE() << "shim log:\n" << host_->ShimLog();
  }

  void BootVm(v1::BackendKind kind, int writers) {
    auto spec = LabSpec("g", true, fmt::format("lab.report=50 lab.writers={}", writers));
    ASSERT_TRUE(spec.ok()) << spec.status();
    v1::ShimConfig config = host_->MakeConfig(*spec, v1::ShimConfig::FRESH);
    config.mutable_devices(0)->mutable_backend()->set_kind(kind);
    absl::Status status = host_->StartShim(config);
    ASSERT_TRUE(status.ok()) << status;
    auto running = host_->WaitState(v1::Vm::RUNNING, Soon());
    ASSERT_TRUE(running.ok()) << running.status();
    auto ready = host_->console.out.WaitFor("READY", Boot());
    ASSERT_TRUE(ready.ok()) << ready.status();
    ExpectWrites(*host_);
  }

  // A lab device that completes late and out of order; it ends with `Process`.
  Process StartLabDevice(const std::string& socket) {
    std::filesystem::remove(socket);
    SpawnOptions spawn;
    spawn.argv = {std::string(BATON_BINARY_DIR) + "/bin/baton-lab-device",
                  "--exit-on-eof",
                  "--socket",
                  socket,
                  "--image",
                  image_,
                  "--latency-max-us",
                  "4000"};
    int fds[2];
    EXPECT_EQ(::pipe2(fds, O_CLOEXEC), 0);
    UniqueFd in(fds[0]);
    keep_.emplace_back(fds[1]);
    EXPECT_EQ(::pipe2(fds, O_CLOEXEC), 0);
    UniqueFd out(fds[0]), its_out(fds[1]);
    spawn.stdin_fd = in.get();
    spawn.stdout_fd = its_out.get();
    spawn.stderr_fd = 2;
    auto backend = Process::Spawn(spawn);
    EXPECT_TRUE(backend.ok()) << backend.status();
    its_out.reset();
    // It says "ready" when it listens; the socket's file is there a moment before that.
    pollfd ready{out.get(), POLLIN, 0};
    char word[16];
    EXPECT_EQ(::poll(&ready, 1, Soon().PollTimeoutMs()), 1) << "the lab device is not ready";
    EXPECT_GT(::read(out.get(), word, sizeof word), 0) << "the lab device has ended";
    return *std::move(backend);
  }
  void Kill(Process& process) {
    process.Signal(SIGKILL);
    (void)process.Wait(Soon());
  }

  absl::StatusOr<v1::ShimReply> Swap(const std::string& socket, bool validate_only = false) {
    v1::ShimRequest request;
    v1::SwapDeviceCommand& swap = *request.mutable_swap_device();
    swap.set_device("disk0");
    swap.mutable_backend()->set_socket(socket);
    swap.mutable_drain_timeout()->set_seconds(20);
    swap.set_validate_only(validate_only);
    return host_->Call(request, seconds(60));
  }
  std::string BackendNow() {
    v1::ShimRequest request;
    request.mutable_status();
    auto reply = host_->Call(request);
    return reply.ok() ? reply->status().vm().devices(0).backend().socket() : reply.status().ToString();
  }

  TempDirs dirs_;
  const std::string image_ = dirs_.dir() + "/disk.img";
  std::vector<UniqueFd> keep_;
  std::unique_ptr<ShimHost> host_;
};

TEST_F(DeviceTest, SwapUnderLoadThereAndBack_TheGuestNoticesNothing) {
  ASSERT_TRUE(host_->StartDisk(image_).ok());
  ASSERT_NO_FATAL_FAILURE(BootVm(v1::QEMU_STORAGE_DAEMON, 4));
  const std::string first = host_->disk_socket(), second = dirs_.dir() + "/second.sock";
  auto other = StorageDaemon::Start(second, image_);
  ASSERT_TRUE(other.ok()) << other.status();
  for (int round = 0; round < 3; ++round) {
    auto there = Swap(second);
    ASSERT_TRUE(there.ok()) << there.status();
    EXPECT_EQ(there->swapped().device().backend().socket(), second);
    ASSERT_NO_FATAL_FAILURE(ExpectWrites(*host_));
    auto back = Swap(first);
    ASSERT_TRUE(back.ok()) << back.status();
    ASSERT_NO_FATAL_FAILURE(ExpectWrites(*host_));
  }
  // The one that is left may be ended, and a new shim begins with the other one.
  ASSERT_TRUE(Swap(second).ok());
  host_->disk().Kill();
  ASSERT_NO_FATAL_FAILURE(ExpectWrites(*host_));
  EXPECT_EQ(host_->ReadConfig()->devices(0).backend().socket(), second);
  host_->KillShim();
  ASSERT_TRUE(host_->StartShimAgain(v1::ShimConfig::ADOPT).ok());
  ASSERT_TRUE(host_->WaitState(v1::Vm::RUNNING, Soon()).ok());
  ASSERT_NO_FATAL_FAILURE(ExpectWrites(*host_));
  EXPECT_EQ(BackendNow(), second);
  ExpectChecked(*host_);
}

TEST_F(DeviceTest, SwapToWhatCannotTakeOver_TheOldOneServesOn) {
  ASSERT_TRUE(host_->StartDisk(image_).ok());
  ASSERT_NO_FATAL_FAILURE(BootVm(v1::QEMU_STORAGE_DAEMON, 2));
  auto absent = Swap(dirs_.dir() + "/nowhere.sock");
  EXPECT_EQ(ReasonOf(absent.status()), v1::DESTINATION_BACKEND_FAILED) << absent.status();
  EXPECT_THAT(Message(absent.status()), HasSubstr("stays at back-end"));
  // Another disk.
  const std::string small = dirs_.dir() + "/small.img", socket = dirs_.dir() + "/small.sock";
  ASSERT_TRUE(MakeImage(small, 8u << 20).ok());
  auto other = StorageDaemon::Start(socket, small);
  ASSERT_TRUE(other.ok()) << other.status();
  auto smaller = Swap(socket);
  EXPECT_THAT(Message(smaller.status()), HasSubstr("capacity"));
  auto checked = Swap(socket, /*validate_only=*/true);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_EQ(checked->swapped().findings(0).code(), "CAPACITY_DIFFERS");
  // One that does not answer.
  other->Signal(SIGSTOP);
  auto silent = Swap(socket, /*validate_only=*/true);
  ASSERT_TRUE(silent.ok()) << silent.status();
  EXPECT_EQ(silent->swapped().findings(0).code(), "BACKEND_SILENT");
  EXPECT_FALSE(Swap(socket).ok());
  other->Signal(SIGCONT);
  EXPECT_EQ(BackendNow(), host_->disk_socket());
  ASSERT_NO_FATAL_FAILURE(ExpectWrites(*host_));
  ExpectChecked(*host_);
}

TEST_F(DeviceTest, ShimAndBackendDieWithRequestsInFlight_NothingIsLostOrRepeated) {
  const std::string socket = host_->disk_socket();
  Process backend = StartLabDevice(socket);
  ASSERT_NO_FATAL_FAILURE(BootVm(v1::LAB, 8));
  for (int round = 0; round < 3; ++round) {
    host_->KillShim();
    if (round > 0) {
      Kill(backend);
      backend = StartLabDevice(socket);
    }
    ASSERT_TRUE(host_->StartShimAgain(v1::ShimConfig::ADOPT).ok());
    ASSERT_TRUE(host_->WaitState(v1::Vm::RUNNING, Soon()).ok());
    ASSERT_NO_FATAL_FAILURE(ExpectWrites(*host_));
    Kill(backend);
    backend = StartLabDevice(socket);
    ASSERT_NO_FATAL_FAILURE(ExpectWrites(*host_));
  }
  // And a swap among them: out of order, with a region.
  const std::string second = dirs_.dir() + "/second.sock";
  Process other = StartLabDevice(second);
  auto swapped = Swap(second);
  ASSERT_TRUE(swapped.ok()) << swapped.status();
  Kill(backend);
  ASSERT_NO_FATAL_FAILURE(ExpectWrites(*host_));
  ExpectChecked(*host_);
}

}  // namespace
}  // namespace baton::test
