// A NIC of the lab under a real Linux driver: User-Mode Linux, the mediator, the lab net device, and a peer
// at the other end of the wire that returns every frame.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "common/log.h"
#include "tests/integration/vhost/peers.h"
#include "tests/lab/device/lab_device.h"
#include "tests/lab/net/net_model.h"
#include "tests/temp_dir.h"

namespace baton::test {
namespace {

using std::chrono::seconds;

constexpr uint16_t kEcho = 0x88b5, kArp = 0x0806, kRarp = 0x8035;

// The rest of the network: a listener that wires are plugged into, and a station that answers.
class Network {
 public:
  explicit Network(const std::string& path) {
    auto listener = lab::WireListener::Listen(path);
    EXPECT_TRUE(listener.ok()) << listener.status();
    if (listener.ok()) listener_.emplace(std::move(*listener));
    thread_ = std::thread([this] { Loop(); });
  }
  ~Network() {
    quit_ = true;
    thread_.join();
  }
  // How many frames of this type were seen.
  int Seen(uint16_t type) const {
    std::lock_guard lock(mutex_);
    auto it = seen_.find(type);
    return it == seen_.end() ? 0 : it->second;
  }

 private:
  void Loop() {
    std::vector<lab::Wire> wires;
    while (!quit_) {
      std::vector<pollfd> p{{listener_->fd(), POLLIN, 0}};
      for (const lab::Wire& wire : wires) p.push_back({wire.fd(), POLLIN, 0});
      ::poll(p.data(), p.size(), 20);
      while (auto wire = listener_->Accept()) wires.push_back(std::move(*wire));
      std::erase_if(wires, [this](lab::Wire& wire) { return !Serve(wire); });
    }
  }
  // False: the wire is gone.
  bool Serve(lab::Wire& wire) {
    for (;;) {
      auto frame = wire.Receive();
      if (!frame.ok()) return false;
      if (!*frame) return true;
      std::vector<uint8_t>& f = **frame;
      if (f.size() < 14) continue;
      const auto type = static_cast<uint16_t>(f[12] << 8 | f[13]);
      {
        std::lock_guard lock(mutex_);
        ++seen_[type];
      }
      if (type != kEcho) continue;
      std::swap_ranges(f.begin(), f.begin() + 6, f.begin() + 6);
      // The echo must not be dropped here: the guest's window bounds what is on its way.
      for (const Deadline deadline = Deadline::After(seconds(2)); !wire.Send(f) && !deadline.Expired();) {
        pollfd out{wire.fd(), POLLOUT, 0};
        // What a device that has ended sent before takes up no time: the next one has a wire of its own.
        if (::poll(&out, 1, deadline.PollTimeoutMs()) > 0 && (out.revents & (POLLHUP | POLLERR)))
          return false;
      }
    }
  }
  std::optional<lab::WireListener> listener_;
  std::atomic<bool> quit_{false};
  mutable std::mutex mutex_;
  std::map<uint16_t, int> seen_;  // guarded by mutex_
  std::thread thread_;
};

// A lab net device on a thread.
class NetDevice {
 public:
  NetDevice(const std::string& socket, const std::string& wire, uint64_t less_features) {
    lab::NetModelOptions net;
    net.max_pairs = 2;
    net.less_features = less_features;
    net.wire_connect = {wire};
    auto model = lab::NetModel::Create(net);
    EXPECT_TRUE(model.ok()) << model.status();
    model_ = model->get();
    lab::LabDeviceOptions options;
    options.socket = socket;
    // User-Mode Linux starts a packed ring at base 0, which no back-end takes.
    options.without_features = virtio::kFRingPacked;
    auto device = lab::LabDevice::Create(options, std::move(*model));
    EXPECT_TRUE(device.ok()) << device.status();
    device_ = std::move(*device);
    stop_.reset(::eventfd(0, EFD_CLOEXEC));
    thread_ = std::thread([this] { EXPECT_TRUE(device_->Run(stop_.get()).ok()); });
  }
  ~NetDevice() {
    uint64_t one = 1;
    if (::write(stop_.get(), &one, sizeof one) == sizeof one) thread_.join();
  }
  // Until Thaw the device's thread does nothing, and its model can be looked at.
  lab::NetModel& Freeze() {
    EXPECT_EQ(device_->Command({{"cmd", "freeze"}})["ok"], true);
    return *model_;
  }
  void Thaw() { EXPECT_EQ(device_->Command({{"cmd", "thaw"}})["ok"], true); }
  nlohmann::json Stats() { return device_->Command({{"cmd", "stats"}}); }

 private:
  lab::NetModel* model_ = nullptr;
  std::unique_ptr<lab::LabDevice> device_;
  UniqueFd stop_;
  std::thread thread_;
};

class UmlNet : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    InitLogging({.program = "net_test", .level = "info", .json = false, .context = ""});
  }
  void StartDevice(uint64_t less_features = 0) {
    device_ = std::make_unique<NetDevice>(backend_, wire_, less_features);
  }
  void StartGuest() {
    vhost::MediatorOptions options;
    options.spec.set_name("net0");
    options.spec.set_class_(v1::NET);
    options.backend.set_socket(backend_);
    options.backend.set_kind(v1::LAB);
    options.listen_path = front_;
    auto mediator = vhost::Mediator::Start(options, {});
    ASSERT_TRUE(mediator.ok()) << mediator.status();
    mediator_ = std::move(*mediator);
    auto guest = UmlGuest::Start(
        {.socket = front_, .threads = 1, .report = 500, .directory = work_ / "", .net = true});
    ASSERT_TRUE(guest.ok()) << guest.status();
    guest_.emplace(std::move(*guest));
    auto started = guest_->WaitFor("PROGRESS", Deadline::After(seconds(90)));
    ASSERT_TRUE(started.ok()) << started.status();
  }
  void ExpectResult(bool may_lose) {
    auto result = guest_->Finish(Deadline::After(seconds(60)));
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_NE(result->find("RESULT OK"), std::string::npos) << guest_->output();
    EXPECT_EQ(NumberAfter(*result, "twice").value_or(99), 0u) << *result;
    if (!may_lose) {
      EXPECT_EQ(NumberAfter(*result, "lost").value_or(99), 0u)
          << guest_->output() << device_->Stats()["counters"].dump();
    }
  }

  const TempDir work_;
  const std::string backend_ = work_ / "net.sock", front_ = work_ / "vmm.sock", wire_ = work_ / "wire.sock";
  Network network_{wire_};
  std::unique_ptr<NetDevice> device_;
  std::unique_ptr<vhost::Mediator> mediator_;
  std::optional<UmlGuest> guest_;
};

TEST_F(UmlNet, FramesReturnWholeAndInOrder_AcrossChangesOfTheRule) {
  StartDevice();
  ASSERT_NO_FATAL_FAILURE(StartGuest());
  for (char key : {'2', '1', '2'}) {
    ASSERT_TRUE(guest_->Type(key).ok());
    auto changed = guest_->WaitFor("CHANNELS", Deadline::After(seconds(60)));
    ASSERT_TRUE(changed.ok()) << changed.status();
    ASSERT_TRUE(guest_->Progress(2, Deadline::After(seconds(60))).ok());
  }
  EXPECT_EQ(device_->Stats()["model"]["pairs"], 2);
  EXPECT_EQ(device_->Stats()["model"]["promiscuous"], false);
  ASSERT_TRUE(guest_->Type('p').ok());
  EXPECT_TRUE(Eventually([&] { return device_->Stats()["model"]["promiscuous"] == true; }, seconds(60)));
  ExpectResult(/*may_lose=*/false);
}

TEST_F(UmlNet, StateMovesToAnotherDeviceUnderTheRunningGuest) {
  StartDevice();
  ASSERT_NO_FATAL_FAILURE(StartGuest());
  ASSERT_TRUE(guest_->Type('2').ok());
  ASSERT_TRUE(guest_->WaitFor("CHANNELS 2", Deadline::After(seconds(60))).ok());
  ASSERT_TRUE(guest_->Progress(2, Deadline::After(seconds(60))).ok());
  // This front-end stops no rings, so that the state is taken from a device that stands still, and given to
  // the mediator as if it had arrived from another host: it hands it to the next back-end before the rings.
  lab::NetModel& old = device_->Freeze();
  const virtio::NetState before = old.state();
  auto blob = old.SaveState();
  ASSERT_TRUE(blob.ok()) << blob.status();
  device_.reset();
  ASSERT_TRUE(
      Eventually([&] { return mediator_->Describe().state() == v1::Device::BACKEND_LOST; }, seconds(60)));
  v1::DeviceState state;
  state.set_name("net0");
  state.set_acked_features(mediator_->Describe().acked_features());
  state.set_backend_state(*blob);
  EXPECT_TRUE(absl::IsUnavailable(mediator_->ExpectState(state))) << "no back-end to give it to yet";
  StartDevice();
  ASSERT_TRUE(guest_->Progress(4, Deadline::After(seconds(90))).ok()) << mediator_->Describe().message();
  // Now, because a guest that has ended takes its connection along, and the device forgets what it was told.
  const virtio::NetState after = device_->Freeze().state();
  device_->Thaw();
  EXPECT_TRUE(virtio::Differences(after, before).empty())
      << fmt::format("{}", fmt::join(virtio::Differences(after, before), "; "));
  EXPECT_EQ(after.pairs, 2);
  // What was on the wire of the device that ended is gone, as in any network.
  ExpectResult(/*may_lose=*/true);
}

TEST_F(UmlNet, GuestThatCan_IsAskedToAnnounceItself) {
  StartDevice();
  ASSERT_NO_FATAL_FAILURE(StartGuest());
  const int before = network_.Seen(kArp);
  ASSERT_TRUE(mediator_->Announce(Deadline::After(seconds(60))).ok());
  EXPECT_TRUE(Eventually([&] { return network_.Seen(kArp) > before; }, seconds(60)));
  EXPECT_TRUE(Eventually([&] { return device_->Stats()["model"]["announce_pending"] == false; }, seconds(60)))
      << "the driver acknowledges it";
  EXPECT_EQ(network_.Seen(kRarp), 0);
  ExpectResult(/*may_lose=*/false);
}

TEST_F(UmlNet, GuestThatCannot_IsAnnouncedByRarp) {
  StartDevice(virtio::kNetFGuestAnnounce);
  ASSERT_NO_FATAL_FAILURE(StartGuest());
  ASSERT_TRUE(mediator_->Announce(Deadline::After(seconds(60))).ok());
  EXPECT_TRUE(Eventually([&] { return network_.Seen(kRarp) == 5; }, seconds(60)));
  ExpectResult(/*may_lose=*/false);
}

}  // namespace
}  // namespace baton::test
