// The lab guest's balloon driver against Baton's balloon device: what the guest has freed is what it names.
#include <gtest/gtest.h>

#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <optional>
#include <thread>

#include "agent/vhost/balloon_backend.h"
#include "tests/lab/vm/guest.h"
#include "tests/temp_dir.h"

namespace baton::lab {
namespace {

using std::chrono::seconds;

constexpr uint64_t kGuestBytes = uint64_t{64} << 20, kFreedBytes = uint64_t{24} << 20;

struct Listener final : memory::HintListener {
  explicit Listener(uint64_t pages) : hinted(pages) {}
  void OnStart() override { started = true; }
  void OnHint(uint32_t, uint64_t first, uint64_t pages) override { hinted.SetRange(first, pages); }
  void OnStop() override {
    std::lock_guard lock(mutex);
    stopped = true;
    changed.notify_all();
  }
  void OnLost(const std::string&) override {
    std::lock_guard lock(mutex);
    lost = true;
    changed.notify_all();
  }
  // True at the in-band stop, false if the session was lost or nothing came.
  bool Await() {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, seconds(60), [&] { return stopped || lost; }) && stopped;
  }
  memory::PageSet hinted;
  std::mutex mutex;
  std::condition_variable changed;
  bool started = false, stopped = false, lost = false;
};

class LabBalloon : public testing::Test {
 protected:
  LabBalloon() {
    std::ofstream(dir_ + "/mem").close();
    std::filesystem::resize_file(dir_ + "/mem", kGuestBytes);
    std::vector<memory::RamBlock> blocks;
    blocks.push_back(*memory::RamBlock::Open("mem", dir_ + "/mem"));
    ram_.emplace(std::move(blocks));
    EXPECT_TRUE(ram_->SetLayout({{0, kGuestBytes, 0, 0}}).ok());
    vhost::BalloonBackendOptions options;
    options.listen_path = dir_ + "/balloon.sock";
    options.ram = &*ram_;
    balloon_ = *vhost::BalloonBackend::Start(std::move(options));
    GuestConfig config;
    config.memory_path = dir_ + "/mem";
    config.memory_bytes = kGuestBytes;
    config.options.freed = kFreedBytes;
    config.options.pages = 64;
    DeviceOptions device;
    device.name = "balloon";
    device.class_ = v1::BALLOON;
    device.socket = dir_ + "/balloon.sock";
    device.queues = vhost::BalloonBackend::kQueues;
    device.queue_size = 4;  // less than there are blocks: the driver waits for room
    config.devices = {device};
    auto guest = LabGuest::Create(std::move(config), {}, Deadline::After(seconds(60)));
    EXPECT_TRUE(guest.ok()) << guest.status();
    if (guest.ok()) guest_ = *std::move(guest);
  }
  ~LabBalloon() override {
    guest_.reset();
    balloon_.reset();
  }
  // The first session once the guest's balloon runs.
  bool Ask(Listener& listener) {
    const Deadline deadline = Deadline::After(seconds(60));
    absl::Status asked = balloon_->Publish(listener);
    while (!asked.ok() && !deadline.Expired()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      asked = balloon_->Publish(listener);
    }
    return asked.ok() && listener.Await();
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  std::optional<memory::GuestRam> ram_;
  std::unique_ptr<vhost::BalloonBackend> balloon_;
  std::unique_ptr<LabGuest> guest_;
};

TEST_F(LabBalloon, NamesWhatIsFree_EachTimeItIsAsked) {
  ASSERT_NE(guest_, nullptr);
  ASSERT_TRUE(guest_->Run(Deadline::After(seconds(60))).ok());
  for (int session = 0; session < 3; ++session) {
    Listener listener(kGuestBytes >> memory::kPageShift);
    ASSERT_TRUE(Ask(listener)) << session;
    EXPECT_EQ(listener.hinted.Count(), kFreedBytes >> memory::kPageShift) << session;
    balloon_->Finish();
  }
  EXPECT_EQ(balloon_->state().open_ids_size(), 0);
}

TEST_F(LabBalloon, StoppedGuest_LosesTheSessionAndCanBeAskedLater) {
  ASSERT_NE(guest_, nullptr);
  Listener early(kGuestBytes >> memory::kPageShift);
  EXPECT_FALSE(balloon_->Publish(early).ok());
  ASSERT_TRUE(guest_->Run(Deadline::After(seconds(60))).ok());
  Listener first(kGuestBytes >> memory::kPageShift);
  ASSERT_TRUE(Ask(first));
  balloon_->Finish();
  ASSERT_TRUE(guest_->Pause(Deadline::After(seconds(60))).ok());
  EXPECT_FALSE(balloon_->Publish(early).ok());
  ASSERT_TRUE(guest_->Run(Deadline::After(seconds(60))).ok());
  Listener second(kGuestBytes >> memory::kPageShift);
  ASSERT_TRUE(Ask(second));
  EXPECT_EQ(second.hinted.Count(), kFreedBytes >> memory::kPageShift);
  balloon_->Finish();
}

}  // namespace
}  // namespace baton::lab
