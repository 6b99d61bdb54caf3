// virtio-net for the lab device: queue pairs with every steering rule, control queue, a learning switch with
// wires to other such devices, announcements, and device-state transfer.
//
// Receive buffers are taken one at a time, when a packet goes into them: a stopped receive queue never has a
// buffer in flight. A packet that finds no buffer waits in a backlog (bounded, and part of the device state).
// Transmitted packets may be delayed (`set` tx_latency_us), which is what makes a change of the steering rule
// wait for those of the old one (see QueueSwitch).
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agent/virtio/net_control.h"
#include "agent/virtio/queue_switch.h"
#include "agent/virtio/steering.h"
#include "tests/lab/device/device_model.h"
#include "tests/lab/net/net_switch.h"

namespace baton::lab {

struct NetModelOptions {
  uint16_t max_pairs = 1;
  virtio::MacAddress mac{0x52, 0x54, 0x00, 0xba, 0x70, 0x01};
  uint16_t mtu = 1500;
  // Offers the steering command of the 2012 proposal (experimental) instead of MQ, RSS and MTU.
  bool steering = false;
  uint64_t less_features = 0;  // not offered
  bool device_state = true;    // offers DEVICE_STATE
  bool rarp = true;            // offers RARP
  // Wires: a path to listen at, and paths to connect to (again and again until somebody listens).
  std::string wire_listen;
  std::vector<std::string> wire_connect;
};

class NetModel : public DeviceModel {
 public:
  static absl::StatusOr<std::unique_ptr<NetModel>> Create(NetModelOptions options);
  // A wire end from elsewhere (Wire::Pair). Before the device runs.
  void Plug(Wire wire);

  void Attach(DeviceHost* host) override;
  uint64_t Features() const override;
  uint64_t ProtocolFeatures() const override;
  uint32_t Queues() const override;
  uint32_t QueueNum() const override { return options_.max_pairs; }
  std::span<const uint8_t> Config() const override { return config_; }
  absl::Status WriteConfig(uint32_t offset, std::span<const uint8_t> data, bool migration) override;
  void FeaturesAccepted(uint64_t features) override;
  void Started(uint32_t queue) override;
  void Replay(IoRequest* request) override;
  void Available(uint32_t queue) override;
  void Stop(uint32_t queue, StopMode mode) override;
  void Reset() override;
  void Tick(Clock::time_point now) override;
  absl::Status SendRarp(std::span<const uint8_t, 6> mac) override;
  absl::Status SetMtu(uint64_t mtu) override;
  absl::StatusOr<std::string> SaveState() override;
  absl::Status LoadState(const std::string& state) override;
  nlohmann::json Describe() const override;
  absl::Status Set(const nlohmann::json& command) override;

  const virtio::NetState& state() const { return state_; }

 private:
  explicit NetModel(NetModelOptions options);
  static constexpr int kGuestPort = 0;
  struct Port {
    std::optional<Wire> wire;
    std::string path;  // to connect to again; empty: plugged in from outside
  };
  struct DelayedTx {
    IoRequest* request;
    Clock::time_point due;
  };

  size_t HeaderSize() const;
  // The state, or what can be told of it where the driver's commands do not come here (QEMU keeps the control
  // queue of a vhost-user NIC to itself, and enables the rings in use).
  virtio::NetState Effective() const;
  uint16_t ReadyPairs() const;
  bool IsControl(uint32_t queue) const;
  bool ControlHere() const;  // it is, and runs
  bool IsTx(uint32_t queue) const;
  uint16_t PairOf(uint32_t queue) const;
  void BuildConfig();

  void PumpTx(uint32_t queue);
  void TakeTx(uint32_t queue);
  void SendOne(IoRequest* request);
  void FlushDueTx(Clock::time_point now);
  void PumpControl();
  void AfterSwitch();

  // A frame that arrived at `port`.
  void Forward(std::span<const uint8_t> frame, int port);
  void ToGuest(std::span<const uint8_t> frame);
  bool Deliver(std::span<const uint8_t> frame);
  void DeliverBacklog();
  void ServeWire(size_t port);
  void ConnectWires();
  void AddWire(Wire wire, const std::string& path);

  const NetModelOptions options_;
  DeviceHost* host_ = nullptr;
  uint64_t features_ = 0;
  virtio::NetLimits limits_;
  virtio::NetState state_;
  virtio::Steering steering_;
  virtio::QueueSwitch switch_;
  LearningSwitch learnt_;
  std::vector<uint8_t> config_;
  uint16_t status_ = virtio::kNetStatusLinkUp;
  std::vector<bool> started_;
  bool loaded_ = false;                         // a state is there whose driver will come
  std::vector<std::deque<DelayedTx>> delayed_;  // by queue
  std::deque<std::vector<uint8_t>> backlog_;    // towards the driver, oldest first
  size_t backlog_bytes_ = 0;
  std::vector<Port> ports_;  // kGuestPort first, without a wire
  std::optional<WireListener> listener_;
  Duration tx_latency_{};
};

}  // namespace baton::lab
