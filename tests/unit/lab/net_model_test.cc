// The lab net device without its vhost-user side: packets between two of them, steering under a change of the
// rule, state from one to the other.
#include "tests/lab/net/net_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <functional>
#include <map>
#include <numeric>

namespace baton::lab {
namespace {

constexpr uint64_t kGuestFeatures = virtio::kFVersion1 | virtio::kNetFCtrlVq | virtio::kNetFMq |
                                    virtio::kNetFMac | virtio::kNetFStatus | virtio::kNetFMrgRxbuf |
                                    virtio::kNetFGuestAnnounce | virtio::kNetFCtrlRx;

// A driver and the lab device's host in one: chains are vectors, time is what the test says.
class FakeHost : public DeviceHost {
 public:
  struct Chain {
    IoRequest request;
    std::vector<uint8_t> out, in;
    std::optional<uint32_t> written;
    bool abandoned = false;
  };
  IoRequest* Pop(uint32_t queue) override {
    if (!running[queue] || available[queue].empty()) return nullptr;
    auto chain = available[queue].front();
    available[queue].pop_front();
    taken.push_back(chain);
    return &chain->request;
  }
  void Complete(IoRequest* request, uint32_t written) override {
    for (auto& chain : taken) {
      if (&chain->request != request) continue;
      chain->written = written;
      completed[request->queue].push_back(chain);
    }
  }
  void Abandon(IoRequest* request) override {
    for (auto& chain : taken) chain->abandoned |= &chain->request == request;
  }
  bool Running(uint32_t queue) const override {
    auto it = running.find(queue);
    return it != running.end() && it->second;
  }
  uint64_t features() const override { return kGuestFeatures; }
  void TickAt(Clock::time_point when) override { tick = std::min(tick, when); }
  void Watch(int fd, std::function<void()> ready) override { watched[fd] = std::move(ready); }
  void Unwatch(int fd) override { watched.erase(fd); }
  void ConfigChanged() override { ++config_changes; }
  void QueueError(uint32_t) override {}
  void CrashPoint(const char*) override {}
  int64_t& Counter(const std::string& name) override { return counters[name]; }

  std::shared_ptr<Chain> Add(uint32_t queue, std::vector<uint8_t> out, size_t in) {
    auto chain = std::make_shared<Chain>();
    chain->out = std::move(out);
    chain->in.resize(in);
    chain->request.queue = queue;
    // Two segments each, to see that both ends are walked.
    auto split = [](std::vector<uint8_t>& bytes, std::vector<IoSegment>& to) {
      const auto first = static_cast<uint32_t>(bytes.size() / 3);
      if (first) to.push_back({bytes.data(), first, 0});
      if (bytes.size() > first)
        to.push_back({bytes.data() + first, static_cast<uint32_t>(bytes.size()) - first, 0});
    };
    split(chain->out, chain->request.readable);
    split(chain->in, chain->request.writable);
    chain->request.readable_bytes = chain->out.size();
    chain->request.writable_bytes = in;
    available[queue].push_back(chain);
    return chain;
  }
  void ServeWires() {
    for (bool any = true; any;) {
      any = false;
      for (auto [fd, ready] : std::map(watched)) {
        pollfd p{fd, POLLIN, 0};
        if (::poll(&p, 1, 0) == 1) {
          ready();
          any = true;
        }
      }
    }
  }

  std::map<uint32_t, bool> running;
  std::map<uint32_t, std::deque<std::shared_ptr<Chain>>> available;
  std::map<uint32_t, std::vector<std::shared_ptr<Chain>>> completed;
  std::vector<std::shared_ptr<Chain>> taken;
  std::map<int, std::function<void()>> watched;
  std::map<std::string, int64_t> counters;
  Clock::time_point tick = Clock::time_point::max();
  int config_changes = 0;
};

// One guest with its device.
class Side {
 public:
  explicit Side(uint8_t number, uint16_t pairs = 4) : mac{0x52, 0x54, 0, 0, 0, number} {
    auto created = NetModel::Create({.max_pairs = pairs,
                                     .mac = mac,
                                     .mtu = 1500,
                                     .steering = false,
                                     .less_features = 0,
                                     .device_state = true,
                                     .rarp = true,
                                     .wire_listen = "",
                                     .wire_connect = {}});
    EXPECT_TRUE(created.ok());
    model = std::move(*created);
  }
  void Begin() {
    model->Attach(&host);
    model->FeaturesAccepted(kGuestFeatures);
  }
  void StartRings() {
    for (uint32_t q = 0; q < model->Queues(); ++q) {
      host.running[q] = true;
      model->Started(q);
    }
    for (uint32_t q = 0; q < model->Queues(); ++q) model->Available(q);
  }
  void StopRings() {
    for (uint32_t q = 0; q < model->Queues(); ++q) {
      host.running[q] = false;
      model->Stop(q, StopMode::kDrain);
    }
  }
  void Buffers(uint32_t queue, int count) {
    for (int i = 0; i < count; ++i) host.Add(queue, {}, 1600);
    model->Available(queue);
  }
  uint8_t Control(std::vector<uint8_t> request) {
    auto chain = host.Add(2u * 4, std::move(request), 1);
    model->Available(2u * 4);
    return chain->written ? chain->in[0] : 0xff;
  }
  void Send(uint32_t queue, const virtio::MacAddress& to, uint8_t stamp, uint16_t port = 7) {
    std::vector<uint8_t> out(12, 0);
    auto frame = Frame(to, mac, stamp, port);
    out.insert(out.end(), frame.begin(), frame.end());
    host.Add(queue, out, 0);
    model->Available(queue);
  }
  static std::vector<uint8_t> Frame(const virtio::MacAddress& to, const virtio::MacAddress& from,
                                    uint8_t stamp, uint16_t port) {
    std::vector<uint8_t> f;
    f.insert(f.end(), to.begin(), to.end());
    f.insert(f.end(), from.begin(), from.end());
    f.insert(f.end(), {8,
                       0,
                       0x45,
                       0,
                       0,
                       46,
                       0,
                       0,
                       0,
                       0,
                       64,
                       17,
                       0,
                       0,
                       10,
                       0,
                       0,
                       1,
                       10,
                       0,
                       0,
                       2,
                       static_cast<uint8_t>(port >> 8),
                       static_cast<uint8_t>(port),
                       0,
                       9});
    f.resize(60);
    f.back() = stamp;
    return f;
  }
  // Stamps of what arrived at a receive queue, in order.
  std::vector<int> Stamps(uint32_t queue) {
    std::vector<int> out;
    for (const auto& chain : host.completed[queue]) out.push_back(chain->in[*chain->written - 1]);
    return out;
  }
  virtio::MacAddress mac;
  FakeHost host;
  std::unique_ptr<NetModel> model;
};

class NetModelTest : public testing::Test {
 protected:
  void Join(Side& a, Side& b) {
    auto wire = Wire::Pair();
    ASSERT_TRUE(wire.ok());
    a.model->Plug(std::move(wire->first));
    b.model->Plug(std::move(wire->second));
  }
};

TEST_F(NetModelTest, PacketsCrossTheSwitchBothWays) {
  Side a(1), b(2);
  Join(a, b);
  for (Side* s : {&a, &b}) {
    s->Begin();
    s->StartRings();
    s->Buffers(0, 300);
  }
  for (int i = 0; i < 200; ++i) a.Send(1, b.mac, static_cast<uint8_t>(i));
  b.host.ServeWires();
  std::vector<int> expected(200);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(b.Stamps(0), expected);
  b.Send(1, a.mac, 42);
  a.host.ServeWires();
  EXPECT_EQ(a.Stamps(0), std::vector<int>{42});
}

TEST_F(NetModelTest, PacketsWithoutABufferWaitForOne) {
  Side a(1), b(2);
  Join(a, b);
  for (Side* s : {&a, &b}) {
    s->Begin();
    s->StartRings();
  }
  for (uint8_t i = 0; i < 3; ++i) a.Send(1, b.mac, i);
  b.host.ServeWires();
  EXPECT_TRUE(b.host.completed[0].empty());
  b.Buffers(0, 2);
  EXPECT_EQ(b.Stamps(0), (std::vector<int>{0, 1}));
  b.Buffers(0, 1);
  EXPECT_EQ(b.Stamps(0), (std::vector<int>{0, 1, 2}));
}

TEST_F(NetModelTest, ReceiveFollowsTransmit) {
  Side a(1), b(2);
  Join(a, b);
  for (Side* s : {&a, &b}) {
    s->Begin();
    s->StartRings();
    for (uint32_t q = 0; q < 8; q += 2) s->Buffers(q, 50);
  }
  EXPECT_EQ(b.Control({4, 0, 4, 0}), virtio::kNetAckOk);
  b.Send(5, a.mac, 1, 77);  // pair 2
  a.host.ServeWires();
  a.Send(1, b.mac, 9, 77);  // the same two addresses; the fake's frames name them in one order only
  b.host.ServeWires();
  EXPECT_EQ(b.Stamps(4), std::vector<int>{9});
}

// "Device is recommended to complete processing of the transmit queue(s) utilized by the original steering
// before processing any packets delivered by the modified steering rule."
TEST_F(NetModelTest, ChangeOfTheRule_OldTransmitQueuesAreCompletedFirst) {
  Side a(1), b(2);
  Join(a, b);
  for (Side* s : {&a, &b}) {
    s->Begin();
    s->StartRings();
    s->Buffers(0, 50);
  }
  ASSERT_TRUE(a.model->Set({{"tx_latency_us", 50000}}).ok());
  for (uint8_t i = 0; i < 5; ++i) a.Send(1, b.mac, i);
  EXPECT_EQ(a.Control({4, 0, 2, 0}), virtio::kNetAckOk);
  ASSERT_TRUE(a.model->Set({{"tx_latency_us", 0}}).ok());
  a.Send(3, b.mac, 100);  // at once, were it not for the old ones
  a.Send(1, b.mac, 101);
  EXPECT_EQ(a.Control({4, 0, 1, 0}), 0xff) << "the control queue waits as well";
  b.host.ServeWires();
  EXPECT_TRUE(b.host.completed[0].empty());
  a.model->Tick(Clock::now() + std::chrono::milliseconds(60));
  b.host.ServeWires();
  auto stamps = b.Stamps(0);
  ASSERT_EQ(stamps.size(), 7u);
  EXPECT_EQ(std::vector<int>(stamps.begin(), stamps.begin() + 5), (std::vector<int>{0, 1, 2, 3, 4}));
  EXPECT_EQ(a.model->state().pairs, 1) << "the second command was taken after the first had ended";
}

TEST_F(NetModelTest, ChangeOfTheRule_WaitingPacketsKeepTheirOrderOnTheNewQueue) {
  Side a(1), b(2);
  Join(a, b);
  for (Side* s : {&a, &b}) {
    s->Begin();
    s->StartRings();
  }
  EXPECT_EQ(b.Control({4, 0, 4, 0}), virtio::kNetAckOk);
  for (uint8_t i = 0; i < 4; ++i) a.Send(1, b.mac, i, 77);
  b.host.ServeWires();
  EXPECT_EQ(b.Control({4, 0, 1, 0}), virtio::kNetAckOk);
  for (uint32_t q = 2; q < 8; q += 2) b.Buffers(q, 10);
  for (uint32_t q = 2; q < 8; q += 2) EXPECT_TRUE(b.host.completed[q].empty()) << "no longer used";
  b.Buffers(0, 10);
  EXPECT_EQ(b.Stamps(0), (std::vector<int>{0, 1, 2, 3}));
}

TEST_F(NetModelTest, StateMovesToAnotherDevice_WithWhatWaited) {
  Side a(1), b(2), c(2);
  Join(a, b);
  Join(a, c);
  for (Side* s : {&a, &b, &c}) s->Begin();
  a.StartRings();
  b.StartRings();
  EXPECT_EQ(b.Control({4, 0, 3, 0}), virtio::kNetAckOk);
  EXPECT_EQ(b.Control({0, 0, 0}), virtio::kNetAckOk);
  EXPECT_EQ(b.Control({0, 1, 1}), virtio::kNetAckOk);
  b.Send(5, a.mac, 1, 77);
  for (uint8_t i = 0; i < 3; ++i) a.Send(1, b.mac, i, 77);
  b.host.ServeWires();
  b.StopRings();
  auto state = b.model->SaveState();
  ASSERT_TRUE(state.ok());
  ASSERT_TRUE(c.model->LoadState(*state).ok());
  EXPECT_EQ(c.model->state(), b.model->state());
  c.StartRings();
  c.Buffers(4, 10);
  EXPECT_EQ(c.Stamps(4), (std::vector<int>{0, 1, 2})) << "the flow's queue came along";
}

// As behind QEMU, which keeps the control queue to itself and passes on what a driver may accept only with
// one.
TEST_F(NetModelTest, StateMoves_WhereTheVmmKeepsTheControlQueue) {
  Side a(1), b(1);
  for (Side* s : {&a, &b}) {
    s->model->Attach(&s->host);
    s->model->FeaturesAccepted(virtio::kFVersion1 | virtio::kNetFGuestAnnounce | virtio::kNetFMq);
  }
  for (uint32_t ring = 0; ring < 4; ++ring) {
    a.host.running[ring] = true;
    a.model->Started(ring);
  }
  EXPECT_EQ(a.model->Describe()["pairs"], 2) << "those whose rings run";
  auto state = a.model->SaveState();
  ASSERT_TRUE(state.ok());
  const absl::Status loaded = b.model->LoadState(*state);
  EXPECT_TRUE(loaded.ok()) << loaded;
}

TEST_F(NetModelTest, BrokenState_IsRefusedAndChangesNothing) {
  Side a(1), b(1);
  a.Begin();
  b.Begin();
  const std::string sound = *a.model->SaveState();
  const virtio::NetState before = b.model->state();
  for (size_t length = 0; length < sound.size(); ++length) {
    EXPECT_FALSE(b.model->LoadState(sound.substr(0, length)).ok()) << length;
    EXPECT_EQ(b.model->state(), before);
  }
  EXPECT_FALSE(b.model->LoadState(sound + "xyz").ok());
  EXPECT_TRUE(b.model->LoadState(sound).ok());
  Side other(1, 2);
  other.Begin();
  EXPECT_TRUE(other.model->LoadState(sound).ok()) << "one pair in use fits a smaller device";
}

TEST_F(NetModelTest, PacketsForNobody_AreNotKept) {
  Side a(1), b(2);
  Join(a, b);
  a.Begin();
  b.Begin();
  a.StartRings();
  a.Send(1, b.mac, 1);
  b.host.ServeWires();
  b.StartRings();
  b.Buffers(0, 4);
  EXPECT_TRUE(b.host.completed[0].empty());
}

TEST_F(NetModelTest, SteeringProposal_RuleIsInTheConfigurationSpace) {
  FakeHost host;
  NetModelOptions options;
  options.max_pairs = 4;
  options.steering = true;
  auto model = NetModel::Create(options);
  ASSERT_TRUE(model.ok());
  (*model)->Attach(&host);
  (*model)->FeaturesAccepted(virtio::kFVersion1 | virtio::kNetFCtrlVq | virtio::kNetFSteering);
  for (uint32_t queue = 0; queue < (*model)->Queues(); ++queue) {
    host.running[queue] = true;
    (*model)->Started(queue);
  }
  auto chain = host.Add(2, {4, 0, 2, 0, 3, 0}, 1);
  (*model)->Available(2);
  EXPECT_EQ(chain->in[0], virtio::kNetAckOk);
  auto config = (*model)->Config();
  EXPECT_EQ(config[8], 4) << "max_virtqueue_pairs";
  EXPECT_EQ(config[10], 2) << "receive follows transmit";
  EXPECT_EQ(config[12], 3) << "param";
}

TEST_F(NetModelTest, Rarp_IsSeenOnTheWireWithTheAddress) {
  Side a(1), b(2);
  Join(a, b);
  a.Begin();
  b.Begin();
  b.StartRings();
  b.Buffers(0, 4);
  ASSERT_TRUE(a.model->SendRarp(std::span<const uint8_t, 6>(a.mac)).ok());
  b.host.ServeWires();
  ASSERT_EQ(b.host.completed[0].size(), 1u);
  const auto& in = b.host.completed[0][0]->in;
  EXPECT_EQ(in[12 + 12], 0x80);
  EXPECT_EQ(in[12 + 13], 0x35);
  EXPECT_EQ(virtio::MacAddress({in[18], in[19], in[20], in[21], in[22], in[23]}), a.mac);
}

TEST_F(NetModelTest, Announce_IsInTheStatusUntilTheDriverAcknowledges) {
  Side a(1);
  a.Begin();
  a.StartRings();
  ASSERT_TRUE(a.model->Set({{"announce", true}}).ok());
  EXPECT_EQ(a.host.config_changes, 1);
  EXPECT_EQ(a.model->Config()[6], virtio::kNetStatusLinkUp | virtio::kNetStatusAnnounce);
  EXPECT_EQ(a.Control({3, 0}), virtio::kNetAckOk);
  EXPECT_EQ(a.model->Config()[6], virtio::kNetStatusLinkUp);
}

TEST(LearningSwitchTest, IsBoundedAndFollowsAnAddress) {
  LearningSwitch s(3);
  for (uint8_t i = 0; i < 5; ++i) s.Learn({2, 0, 0, 0, 0, i}, i);
  EXPECT_EQ(s.size(), 3u);
  EXPECT_EQ(s.Lookup({2, 0, 0, 0, 0, 0}), LearningSwitch::kFlood);
  s.Learn({2, 0, 0, 0, 0, 4}, 9);
  EXPECT_EQ(s.Lookup({2, 0, 0, 0, 0, 4}), 9);
  s.Learn({0xff, 0, 0, 0, 0, 4}, 1);
  EXPECT_EQ(s.Lookup({0xff, 0, 0, 0, 0, 4}), LearningSwitch::kFlood);
  s.Forget(9);
  EXPECT_EQ(s.size(), 2u);
}

}  // namespace
}  // namespace baton::lab
