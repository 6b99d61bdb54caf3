// Linux's own virtio_balloon against Baton's balloon device, through the mediator: reporting makes holes, and
// a migration leaves out exactly what Linux names as free and does not write again. Frozen by SIGSTOP.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <thread>

#include "agent/migration/destination.h"
#include "agent/migration/source.h"
#include "agent/migration/state_pipe.h"
#include "agent/vhost/balloon_backend.h"
#include "common/log.h"
#include "tests/integration/vhost/peers.h"
#include "tests/temp_dir.h"
#include "tests/unit/migration/cutting_proxy.h"
#include "tests/unit/migration/fake_host.h"

namespace baton::test {
namespace {

using migration::JournalRecord;
using std::chrono::seconds;

constexpr Duration kBalloonBoot = seconds(60);
constexpr Duration kBalloonEnd = seconds(90);

// The file of User-Mode Linux's memory, which it has unlinked.
UniqueFd OpenFileOf(pid_t pid, dev_t device, ino_t inode) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(fmt::format("/proc/{}/fd", pid), ignored)) {
    struct stat st;
    if (::stat(entry.path().c_str(), &st) != 0 || st.st_dev != device || st.st_ino != inode) continue;
    return UniqueFd(::open(entry.path().c_str(), O_RDWR | O_CLOEXEC));
  }
  return UniqueFd();
}

// What was written, by comparing with a copy: guest and its processes have many mappings, and this sees all.
// All but a page that was changed and changed back between two looks (a page table that was filled and
// emptied), which may have been sent as it was in between. So once the guest is frozen everything counts as
// written that Linux has not named as free; of that, what was seen to change.
class CompareSource final : public memory::DirtySource {
 public:
  CompareSource(const memory::GuestRam& ram, const std::atomic<bool>& frozen, const memory::PageSets& named)
      : ram_(ram), frozen_(frozen), named_(named) {}
  std::string name() const override { return "comparison"; }
  absl::Status Start() override {
    const auto& block = ram_.blocks()[0];
    copy_.assign(block.base(), block.base() + block.size());
    return absl::OkStatus();
  }
  absl::Status Harvest(memory::PageSets& out) override {
    const auto& block = ram_.blocks()[0];
    for (uint64_t at = 0; at < block.size(); at += memory::kPageSize) {
      if (std::memcmp(&copy_[at], block.base() + at, memory::kPageSize) == 0) continue;
      std::memcpy(&copy_[at], block.base() + at, memory::kPageSize);
      out[0].Set(at >> memory::kPageShift);
      if (baseline_taken_) ever.Set(at >> memory::kPageShift);
    }
    // For what was named, which is busy only if it was taken back: seen to change once is written for good.
    if (baseline_taken_) out[0].Union(ever);
    if (frozen_) {
      for (uint64_t page = 0; page < block.size() >> memory::kPageShift; ++page) {
        if (!named_[0].Test(page)) out[0].Set(page);
      }
    }
    baseline_taken_ = true;
    return absl::OkStatus();
  }
  void Stop() override {}

  inline static memory::PageSet ever;  // of the last source: written since its first harvest, the baseline

 private:
  const memory::GuestRam& ram_;
  const std::atomic<bool>& frozen_;
  const memory::PageSets& named_;
  std::vector<uint8_t> copy_;
  bool baseline_taken_ = false;
};

// Freezes a process group; loads nothing at all.
class SignalDriver final : public vmm::VmmDriver {
 public:
  explicit SignalDriver(pid_t group) : group_(group), exited_(::eventfd(0, EFD_CLOEXEC)) {}
  ~SignalDriver() override {
    if (reader_.joinable()) reader_.join();
  }
  pid_t pid() const override { return group_; }
  int exit_fd() const override { return exited_.get(); }
  std::string version() const override { return "signals"; }
  absl::StatusOr<bool> IsRunning(Deadline) override { return true; }
  absl::StatusOr<UniqueFd> Freeze(Deadline) override {
    ::kill(-group_, SIGSTOP);
    // The signal is only sent so far; the processes of the guest stop one after the other.
    if (!Eventually([this] { return AllStopped(); }, seconds(10)))
      return absl::DeadlineExceededError("the guest does not stop");
    frozen = true;
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return ErrnoError(errno, "pair");
    out_.reset(pair[0]);
    return UniqueFd(pair[1]);
  }
  absl::Status ContinueState(Deadline deadline) override {
    RETURN_IF_ERROR(migration::WriteState(out_.get(), "state", deadline));
    out_.reset();
    return absl::OkStatus();
  }
  absl::Status Resume(Deadline) override {
    ::kill(-group_, SIGCONT);
    return absl::OkStatus();
  }
  absl::StatusOr<UniqueFd> BeginLoad(Deadline) override {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return ErrnoError(errno, "pair");
    reader_ = std::thread([fd = UniqueFd(pair[0])] {
      (void)migration::ReadToEnd(fd.get(), Deadline::After(kBalloonEnd),
                                 [](std::string) { return absl::OkStatus(); });
    });
    return UniqueFd(pair[1]);
  }
  absl::Status FinishLoad(Deadline) override { return absl::OkStatus(); }
  absl::Status Start(Deadline) override { return absl::OkStatus(); }
  absl::Status Announce(Deadline) override { return absl::OkStatus(); }
  absl::Status PowerDown(Deadline) override { return absl::OkStatus(); }
  // The test looks at the source's memory afterwards.
  void Kill() override {}

  std::atomic<bool> frozen{false};

 private:
  bool AllStopped() const {
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      std::ifstream file(entry.path() / "stat");
      std::string line;
      if (!std::getline(file, line)) continue;
      char state = 0;
      int parent = 0, group = 0;
      // After the name, which may contain anything.
      if (std::sscanf(line.c_str() + line.rfind(')') + 1, " %c %d %d", &state, &parent, &group) != 3)
        continue;
      if (group == group_ && state != 'T' && state != 't' && state != 'Z') return false;
    }
    return true;
  }

  const pid_t group_;
  UniqueFd exited_, out_;
  std::thread reader_;
};

// The balloon's log and hints; nothing to stop, because a stopped process asks for nothing.
class BalloonOnly final : public migration::DeviceSet {
 public:
  BalloonOnly(vhost::Mediator* mediator, memory::HintSource* hints, const memory::GuestRam& ram)
      : mediator_(mediator), hints_(hints), ram_(ram) {}
  memory::HintSource* hints() override { return hints_; }
  std::vector<std::unique_ptr<memory::DirtySource>> MakeDirtySources() override {
    std::vector<std::unique_ptr<memory::DirtySource>> sources;
    sources.push_back(mediator_->MakeDirtySource());
    return sources;
  }
  absl::Status ArmStop(const migration::StopOrders&) override { return absl::OkStatus(); }
  absl::StatusOr<v1::DeviceStates> CollectStates(const memory::GuestRam&, Deadline) override {
    v1::DeviceStates states;
    for (const memory::GpaRange& range : ram_.layout()) {
      v1::RamRange* out = states.add_layout();
      out->set_gpa(range.gpa);
      out->set_size(range.size);
      out->set_block(range.block);
      out->set_offset(range.offset);
    }
    return states;
  }
  Duration stop_duration() const override { return Duration(0); }
  std::vector<v1::DeviceStop> stops() const override { return {}; }
  std::vector<std::string> TakesInflight() const override { return {}; }
  std::vector<std::string> OrdersInflight() const override { return {}; }
  absl::Status DisarmStop() override { return absl::OkStatus(); }
  absl::Status ExpectStates(const v1::DeviceStates&) override { return absl::OkStatus(); }
  absl::Status VerifyAgainstMemory(const v1::DeviceStates&, const memory::GuestRam&) override {
    return absl::OkStatus();
  }
  absl::Status CheckStarted() const override { return absl::OkStatus(); }

 private:
  vhost::Mediator* const mediator_;
  memory::HintSource* const hints_;
  const memory::GuestRam& ram_;
};

// Between the balloon and the engine: remembers what Linux said.
class Eavesdropper final : public memory::HintSource, private memory::HintListener {
 public:
  Eavesdropper(memory::HintSource& real, memory::PageSets none) : real_(real), heard(std::move(none)) {}
  uint32_t poison() const override { return real_.poison(); }
  absl::Status Publish(memory::HintListener& listener) override {
    to_ = &listener;
    return real_.Publish(*this);
  }
  void PublishStop() override { real_.PublishStop(); }
  void Finish() override { real_.Finish(); }
  void AllowDiscard(bool allow) override { real_.AllowDiscard(allow); }

 private:
  void OnStart() override { to_->OnStart(); }
  void OnHint(uint32_t block, uint64_t first, uint64_t pages) override {
    if (heard[block].Empty()) on_first();
    heard[block].SetRange(first, pages);
    to_->OnHint(block, first, pages);
  }
  void OnStop() override { to_->OnStop(); }
  void OnLost(const std::string& why) override { to_->OnLost(why); }
  memory::HintSource& real_;
  memory::HintListener* to_ = nullptr;

 public:
  memory::PageSets heard;
  std::function<void()> on_first;
};

class UmlBalloon : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    InitLogging({.program = "uml_balloon_test", .level = "info", .json = false, .context = ""});
  }
  void SetUp() override {
    ASSERT_TRUE(HaveUmlAndQsd()) << "deps/packages.txt names the peers that tests need";
    StartDevice();
    pid_ready_ = pid_.get_future().share();
    vhost::MediatorOptions options;
    options.spec.set_name("balloon");
    options.spec.set_class_(v1::BALLOON);
    options.backend.set_socket(work_ / "balloon.sock");
    options.backend.set_recovery(v1::RECOVERY_ORDERED);
    options.listen_path = work_ / "vmm.sock";
    options.ram = &ram_;
    vhost::MediatorCallbacks callbacks;
    callbacks.on_memory = [this](const auto& regions) { TakeMemory(regions); };
    auto mediator = vhost::Mediator::Start(std::move(options), std::move(callbacks));
    ASSERT_TRUE(mediator.ok()) << mediator.status();
    mediator_ = *std::move(mediator);
    auto guest = UmlGuest::Start({.socket = work_ / "vmm.sock", .directory = work_ / "", .balloon = true});
    ASSERT_TRUE(guest.ok()) << guest.status();
    guest_.emplace(*std::move(guest));
    pid_.set_value(guest_->process().pid());
    auto started = guest_->WaitFor("STARTED", Deadline::After(kBalloonBoot));
    ASSERT_TRUE(started.ok()) << started.status();
    ASSERT_TRUE(Eventually([&] { return mediator_->Describe().state() == v1::Device::ACTIVE; }, seconds(10)))
        << mediator_->Describe().ShortDebugString();
  }
  void TearDown() override {
    if (guest_) ::kill(-guest_->process().pid(), SIGCONT);
  }
  void StartDevice() {
    vhost::BalloonBackendOptions options;
    options.listen_path = work_ / "balloon.sock";
    options.ram = &ram_;
    options.state = state_;
    auto balloon = vhost::BalloonBackend::Start(std::move(options));
    ASSERT_TRUE(balloon.ok()) << balloon.status();
    balloon_ = *std::move(balloon);
  }
  void TakeMemory(const std::vector<vhost::MemoryRegionInfo>& regions) {
    if (ram_.blocks().empty()) {
      UniqueFd fd = OpenFileOf(pid_ready_.get(), regions.at(0).device, regions.at(0).inode);
      auto block = memory::RamBlock::FromFd("mem", std::move(fd));
      ASSERT_TRUE(block.ok()) << block.status();
      std::vector<memory::RamBlock> blocks;
      blocks.push_back(*std::move(block));
      ram_ = memory::GuestRam(std::move(blocks));
    }
    auto layout = vhost::LayoutFor(regions, ram_);
    ASSERT_TRUE(layout.ok()) << layout.status();
    ASSERT_TRUE(ram_.SetLayout(*std::move(layout)).ok());
  }
  void Dirty() {
    ASSERT_TRUE(guest_->Type('d').ok());
    auto dirtied = guest_->WaitFor("DIRTIED", Deadline::After(kBalloonBoot));
    ASSERT_TRUE(dirtied.ok()) << dirtied.status();
  }

  const TempDir work_;
  std::promise<pid_t> pid_;
  std::shared_future<pid_t> pid_ready_;
  memory::GuestRam ram_{std::vector<memory::RamBlock>{}};
  v1::BalloonState state_;
  std::unique_ptr<vhost::BalloonBackend> balloon_;
  std::unique_ptr<vhost::Mediator> mediator_;
  std::optional<UmlGuest> guest_;
};

TEST_F(UmlBalloon, ReportedPagesBecomeHoles_AndTheGuestKeepsItsData) {
  Dirty();
  // Linux reports what has been free for two seconds, in blocks of several MiB.
  EXPECT_TRUE(Eventually([&] { return balloon_->counts().discarded >= (24u << 20); }, seconds(60)))
      << balloon_->counts().discarded;
  auto populated = ram_.blocks()[0].Populated();
  ASSERT_TRUE(populated.ok());
  EXPECT_LT(populated->Count() * memory::kPageSize, ram_.blocks()[0].size() - (24u << 20));
  auto result = guest_->Finish(Deadline::After(kBalloonEnd));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_NE(result->find("RESULT OK"), std::string::npos) << *result;
}

TEST_F(UmlBalloon, DeviceIsReplacedUnderTheGuest_AndItCanBeAskedAgain) {
  struct Listener final : memory::HintListener {
    void OnStart() override {}
    void OnHint(uint32_t, uint64_t, uint64_t n) override { pages += n; }
    void OnStop() override { stopped = true; }
    void OnLost(const std::string&) override { lost = true; }
    std::atomic<uint64_t> pages{0};
    std::atomic<bool> stopped{false}, lost{false};
  };
  uint32_t last = 0;
  for (int round = 0; round < 2; ++round) {
    // A driver that has not looked at DONE yet still has what it named before, and names nothing.
    EXPECT_TRUE(Eventually(
        [&] {
          Listener listener;
          if (!balloon_->Publish(listener).ok()) return false;
          EXPECT_TRUE(Eventually([&] { return listener.stopped.load(); }, seconds(30)));
          EXPECT_FALSE(listener.lost);
          balloon_->Finish();
          return listener.pages * memory::kPageSize > (32u << 20);
        },
        seconds(30)));
    state_ = balloon_->state();
    EXPECT_GT(state_.last_id(), last);
    EXPECT_EQ(state_.open_ids_size(), 0);
    last = state_.last_id();
    // As when a shim is replaced.
    balloon_.reset();
    StartDevice();
  }
  auto result = guest_->Finish(Deadline::After(kBalloonEnd));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_NE(result->find("RESULT OK"), std::string::npos) << *result;
}

TEST_F(UmlBalloon, WhatLinuxReportsIsWhatIsSkipped_AndAllElseIsEqual) {
  balloon_->AllowDiscard(false);
  Dirty();
  // --- the migration, in one process over loopback ---
  const uint64_t size = ram_.blocks()[0].size();
  UniqueFd there_fd(::memfd_create("there", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(there_fd.get(), static_cast<off_t>(size)), 0);
  std::vector<memory::RamBlock> blocks;
  blocks.push_back(*memory::RamBlock::FromFd("mem", std::move(there_fd)));
  memory::GuestRam there(std::move(blocks));
  Eavesdropper hints(*balloon_, ram_.MakeSets());
  // The guest asks for 48 MiB and writes them while nearly all that is free is in the balloon's queue.
  hints.on_first = [this] { (void)guest_->Type('d'); };
  SignalDriver driver(guest_->process().pid()), other_driver(0);
  BalloonOnly devices(mediator_.get(), &hints, ram_), other_devices(mediator_.get(), nullptr, ram_);
  migration::test::Faults none;
  migration::test::MemoryLog journal(none, {{JournalRecord::Kind::kOwner, 1, ""}}), other_journal(none, {});
  migration::test::CuttingProxy proxy;
  migration::DestinationOptions to;
  to.migration_id = "m1";
  to.vm = "uml";
  to.epoch = 1;
  to.token.fill(7);
  auto in = migration::IncomingMigration::Start(
      to, {other_driver, there, other_devices, other_journal, [](const v1::SideReport&) {}});
  ASSERT_TRUE(in.ok()) << in.status();
  proxy.set_accept([&](const stream::PreambleBytes& preamble, UniqueFd fd) {
    return (*in)->AcceptChannel(preamble, std::move(fd));
  });
  CompareSource::ever = memory::PageSet(ram_.blocks()[0].pages());
  migration::SourceOptions from;
  from.migration_id = "m1";
  from.vm = "uml";
  from.epoch = 1;
  from.dial.address = proxy.address();
  from.dial.token.fill(7);
  // Slow enough that the guest gets to it before round 0 ends, and with it the session.
  from.params.set_bandwidth(24u << 20);
  from.params.set_on_stall(v1::ON_STALL_SWITCHOVER);
  from.params.set_max_stalled_rounds(1);
  auto out = migration::OutgoingMigration::Start(
      from, {driver, ram_, devices, journal,
             [&]() -> absl::StatusOr<std::unique_ptr<memory::DirtySource>> {
               return std::make_unique<CompareSource>(ram_, driver.frozen, hints.heard);
             },
             [](const v1::SideReport&) {}});
  auto end = out->Wait(Deadline::After(kBalloonEnd));
  ASSERT_TRUE(end.ok()) << end.status() << out->report().ShortDebugString();
  ASSERT_EQ(*end, migration::OutgoingMigration::Outcome::kReleased) << out->report().ShortDebugString();
  proxy.set_accept(nullptr);

  // --- every page, source against destination, with the guest frozen ---
  const v1::Progress progress = out->report().progress();
  uint64_t skipped = 0, unequal = 0, hinted = 0, rewritten = 0;
  static const uint8_t kZero[memory::kPageSize] = {};
  for (uint64_t page = 0; page < size >> memory::kPageShift; ++page) {
    const uint8_t* here = ram_.blocks()[0].base() + page * memory::kPageSize;
    const uint8_t* copy = there.blocks()[0].base() + page * memory::kPageSize;
    hinted += hints.heard[0].Test(page);
    rewritten += hints.heard[0].Test(page) && CompareSource::ever.Test(page);
    if (std::memcmp(here, copy, memory::kPageSize) == 0) continue;
    // Only what Linux named, was not written since it was asked, and then all of it: zeroes.
    if (hints.heard[0].Test(page) && !CompareSource::ever.Test(page) &&
        std::memcmp(copy, kZero, memory::kPageSize) == 0) {
      ++skipped;
    } else {
      ++unequal;
    }
  }
  EXPECT_EQ(unequal, 0u);
  EXPECT_GT(progress.bytes().hint_skipped(), 24u << 20) << progress.ShortDebugString();
  EXPECT_EQ(progress.hints().hinted(), hinted * memory::kPageSize);
  EXPECT_LE(progress.bytes().hint_skipped(), hinted * memory::kPageSize);
  EXPECT_GE(progress.bytes().hint_skipped(), skipped * memory::kPageSize);
  EXPECT_GT(skipped, 0u);
  // The guest took pages back while it was asked: what the algorithm is for.
  EXPECT_GT(rewritten, 0u);
  std::printf("hinted %llu KiB, skipped %llu KiB, taken back and written %llu KiB, answer %.1f ms\n",
              static_cast<unsigned long long>(hinted) * 4,
              static_cast<unsigned long long>(progress.bytes().hint_skipped() >> 10),
              static_cast<unsigned long long>(rewritten) * 4,
              static_cast<double>(progress.hints().answer().seconds()) * 1e3 +
                  static_cast<double>(progress.hints().answer().nanos()) / 1e6);
  // A guest whose processes were stopped together with it cannot go on: it ends with the test.
}

}  // namespace
}  // namespace baton::test
