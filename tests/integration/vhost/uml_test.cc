// The mediator between a User-Mode Linux guest and qemu-storage-daemon: real front-end, real drivers, real
// back-end.
#include <gtest/gtest.h>

#include "agent/vhost/probe.h"
#include "common/log.h"
#include "tests/integration/vhost/peers.h"
#include "tests/lab/vm/harness.h"
#include "tests/temp_dir.h"

namespace baton::test {
namespace {

using std::chrono::seconds;

constexpr auto kBoot = seconds(120);
constexpr auto kSoon = seconds(60);

class UmlMediator : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    InitLogging({.program = "uml_test", .level = "info", .json = false, .context = ""});
  }

  void SetUp() override {
    ASSERT_TRUE(HaveUmlAndQsd()) << "deps/packages.txt names the peers that tests need";
    ASSERT_TRUE(MakeSparseFile(image_, 64 << 20).ok());
  }

  void StartQsd(int iops = 0) {
    qsd_.reset();
    auto qsd = Qsd::Start({.socket = backend_, .image = image_, .queues = 1, .iops = iops});
    ASSERT_TRUE(qsd.ok()) << qsd.status();
    qsd_.emplace(std::move(*qsd));
  }

  // The lab device, which suspends without completing.
  absl::StatusOr<lab::BackendProcess> StartLabDevice(const std::string& socket,
                                                     const std::string& latency_max_us) {
    // User-Mode Linux starts a packed ring at base 0, which no back-end takes.
    return lab::BackendProcess::Start({BATON_LAB_DEVICE, "--exit-on-eof", "--latency-max-us", latency_max_us,
                                       "--without", "packed", "--base", "ignored"},
                                      socket, image_, /*says_ready=*/true, Deadline::After(kSoon));
  }

  vhost::MediatorOptions Options() {
    vhost::MediatorOptions options;
    options.spec.set_name("disk0");
    options.spec.set_class_(v1::BLK);
    options.backend.set_socket(backend_);
    options.backend.set_kind(v1::QEMU_STORAGE_DAEMON);
    options.listen_path = front_;
    return options;
  }

  void StartMediator(vhost::MediatorOptions options) {
    auto mediator = vhost::Mediator::Start(std::move(options), {});
    ASSERT_TRUE(mediator.ok()) << mediator.status();
    mediator_ = std::move(*mediator);
  }

  void StartGuest(int threads = 1, int report = 50) {
    auto guest =
        UmlGuest::Start({.socket = front_, .threads = threads, .report = report, .directory = work_ / ""});
    ASSERT_TRUE(guest.ok()) << guest.status();
    guest_.emplace(std::move(*guest));
    auto started = guest_->WaitFor("PROGRESS", Deadline::After(kBoot));
    ASSERT_TRUE(started.ok()) << started.status();
  }

  // A back-end serves the rings as soon as it has them, so that the guest may go on before the mediator has
  // sent the last message and says so.
  void ExpectActive(uint32_t reconnects) {
    EXPECT_TRUE(Eventually(
        [&] {
          const v1::Device device = mediator_->Describe();
          return device.state() == v1::Device::ACTIVE && device.reconnects() == reconnects;
        },
        kSoon))
        << mediator_->Describe().ShortDebugString();
  }

  void AwaitLost() {
    ASSERT_TRUE(Eventually([&] { return mediator_->Describe().state() == v1::Device::BACKEND_LOST; }, kSoon));
  }

  void ExpectClean() {
    auto result = guest_->Finish(Deadline::After(kSoon));
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_NE(result->find("RESULT OK"), std::string::npos) << guest_->output();
  }

  const TempDir work_;
  const std::string image_ = work_ / "image", backend_ = work_ / "qsd.sock", front_ = work_ / "vmm.sock";
  std::optional<Qsd> qsd_;
  std::unique_ptr<vhost::Mediator> mediator_;
  std::optional<UmlGuest> guest_;
};

TEST_F(UmlMediator, GuestBootsAndItsDataIsRight) {
  StartQsd();
  StartMediator(Options());
  StartGuest();
  ASSERT_TRUE(guest_->Progress(3, Deadline::After(kSoon)).ok());
  ExpectActive(/*reconnects=*/0);
  v1::Device device = mediator_->Describe();
  EXPECT_EQ(device.queues_size(), 1);
  EXPECT_NE(device.acked_features(), 0u);
  ExpectClean();
}

TEST_F(UmlMediator, NoBatonThreadRunsForTheGuestsRequests) {
  StartQsd();
  StartMediator(Options());
  StartGuest();
  const uint64_t before = mediator_->wakeups();
  ASSERT_TRUE(guest_->Progress(10, Deadline::After(kSoon)).ok());
  EXPECT_EQ(mediator_->wakeups(), before);
  ExpectClean();
}

TEST_F(UmlMediator, KilledBackendIsReplacedUnderTheRunningGuest) {
  StartQsd();
  StartMediator(Options());
  StartGuest();
  for (uint32_t round = 1; round <= 3; ++round) {
    ASSERT_TRUE(guest_->Progress(2, Deadline::After(kSoon)).ok());
    qsd_->Kill();
    ASSERT_NO_FATAL_FAILURE(AwaitLost());
    StartQsd();
    auto went_on = guest_->Progress(2, Deadline::After(kSoon));
    ASSERT_TRUE(went_on.ok()) << went_on << " " << mediator_->Describe().message();
    ExpectActive(round);
  }
  ExpectClean();
}

// Sixteen requests deep, completed out of order, and the back-end killed among them: with an in-flight region
// nothing is guessed.
TEST_F(UmlMediator, KilledBackendWithInflightRegionLosesNothingAtDepth) {
  auto backend = StartLabDevice(backend_, "3000");
  ASSERT_TRUE(backend.ok()) << backend.status();
  vhost::MediatorOptions options = Options();
  options.backend.set_kind(v1::LAB);
  StartMediator(options);
  StartGuest(/*threads=*/16, /*report=*/200);
  for (uint32_t round = 1; round <= 5; ++round) {
    ASSERT_TRUE(guest_->Progress(1, Deadline::After(kSoon)).ok());
    backend->Kill();
    ASSERT_NO_FATAL_FAILURE(AwaitLost());
    backend = StartLabDevice(backend_, "3000");
    ASSERT_TRUE(backend.ok()) << backend.status();
    auto went_on = guest_->Progress(1, Deadline::After(kSoon));
    ASSERT_TRUE(went_on.ok()) << went_on << " " << mediator_->Describe().message();
    ExpectActive(round);
  }
  ExpectClean();
}

// Linux's own driver keeps sixteen requests in flight, and its disk is given from one back-end to another and
// back.
TEST_F(UmlMediator, SwappedBackendUnderTheRunningGuest) {
  StartQsd();
  const std::string second = work_ / "second.sock";
  auto other = Qsd::Start({.socket = second, .image = image_, .queues = 1, .iops = 0});
  ASSERT_TRUE(other.ok()) << other.status();
  StartMediator(Options());
  StartGuest(/*threads=*/16, /*report=*/200);
  for (int round = 0; round < 6; ++round) {
    vhost::SwapOptions wanted;
    wanted.backend.set_socket(round % 2 ? backend_ : second);
    wanted.backend.set_kind(v1::QEMU_STORAGE_DAEMON);
    wanted.drain_bound = seconds(10);
    auto swapped = mediator_->Swap(wanted, nullptr, Deadline::After(seconds(10)));
    ASSERT_TRUE(swapped.ok()) << swapped.status();
    auto went_on = guest_->Progress(1, Deadline::After(kSoon));
    ASSERT_TRUE(went_on.ok()) << went_on << " " << mediator_->Describe().message();
  }
  EXPECT_EQ(mediator_->Describe().swaps(), 6u);
  EXPECT_EQ(mediator_->Describe().reconnects(), 0u);
  ExpectClean();
}

// What is in flight at the old back-end is neither finished nor cancelled there: the new one does it.
TEST_F(UmlMediator, RequestsInFlightAreHandedToAnotherBackend) {
  const std::string second = work_ / "second.sock";
  auto one = StartLabDevice(backend_, "50000"), other = StartLabDevice(second, "50000");
  ASSERT_TRUE(one.ok() && other.ok()) << one.status() << other.status();
  vhost::MediatorOptions options = Options();
  options.backend.set_kind(v1::LAB);
  StartMediator(options);
  StartGuest(/*threads=*/16, /*report=*/100);
  uint32_t handed_off = 0;
  for (int round = 0; round < 6; ++round) {
    vhost::SwapOptions wanted;
    wanted.backend.set_socket(round % 2 ? backend_ : second);
    wanted.backend.set_kind(v1::LAB);
    wanted.inflight = v1::HANDOFF;
    auto swapped = mediator_->Swap(wanted, nullptr, Deadline::After(seconds(10)));
    ASSERT_TRUE(swapped.ok()) << swapped.status();
    handed_off += swapped->handed_off;
    auto went_on = guest_->Progress(1, Deadline::After(kSoon));
    ASSERT_TRUE(went_on.ok()) << went_on << " " << mediator_->Describe().message();
  }
  EXPECT_GT(handed_off, 0u);
  ExpectClean();
}

TEST_F(UmlMediator, LostBackendCostsNoProcessorTime) {
  StartQsd();
  StartMediator(Options());
  StartGuest();
  qsd_->Kill();
  ASSERT_NO_FATAL_FAILURE(AwaitLost());
  // What was done before may be printed now.
  Deadline quiet = Deadline::After(kSoon);
  while (guest_->Progress(1, Deadline::After(seconds(1))).ok()) ASSERT_FALSE(quiet.Expired());
  const uint64_t before = mediator_->wakeups();
  EXPECT_FALSE(guest_->Progress(1, Deadline::After(seconds(3))).ok());
  EXPECT_LT(mediator_->wakeups() - before, 20u);
  StartQsd();
  ASSERT_TRUE(guest_->Progress(2, Deadline::After(kSoon)).ok());
  ExpectClean();
}

}  // namespace
}  // namespace baton::test
