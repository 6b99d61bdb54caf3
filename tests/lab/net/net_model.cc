#include "tests/lab/net/net_model.h"

#include <algorithm>
#include <cstring>

#include "common/log.h"

namespace baton::lab {
namespace {

using virtio::MacAddress;
using virtio::RxRule;

// What a device may keep for a driver that has no buffers ready, and what its state may carry.
constexpr size_t kBacklogFrames = 1024;
constexpr size_t kBacklogBytes = size_t{1} << 20;
constexpr auto kReconnect = std::chrono::milliseconds(50);
constexpr uint32_t kStateMagic = 0x314e4c42;  // "BLN1"
constexpr uint64_t kOffered = virtio::kNetFMac | virtio::kNetFStatus | virtio::kNetFMtu |
                              virtio::kNetFMrgRxbuf | virtio::kNetFCtrlVq | virtio::kNetFCtrlRx |
                              virtio::kNetFCtrlRxExtra | virtio::kNetFCtrlVlan | virtio::kNetFCtrlMacAddr |
                              virtio::kNetFGuestAnnounce | virtio::kNetFCtrlGuestOffloads |
                              virtio::kNetFGuestCsum | virtio::kNetFNotfCoal | virtio::kNetFVqNotfCoal;
// Protocol features (vhost-user.rst).
constexpr uint64_t kProtocolRarp = 1u << 2, kProtocolNetMtu = 1u << 4, kProtocolDeviceState = 1u << 19;

// Copies up to `size` bytes out of `segments`, from `offset` on.
std::vector<uint8_t> Gather(const std::vector<IoSegment>& segments, size_t offset, size_t size) {
  std::vector<uint8_t> out;
  for (const IoSegment& segment : segments) {
    if (offset >= segment.len) {
      offset -= segment.len;
      continue;
    }
    const size_t n = std::min<size_t>(segment.len - offset, size - out.size());
    out.insert(out.end(), segment.data + offset, segment.data + offset + n);
    offset = 0;
    if (out.size() == size) break;
  }
  return out;
}

void Scatter(const std::vector<IoSegment>& segments, size_t offset, std::span<const uint8_t> bytes) {
  for (const IoSegment& segment : segments) {
    if (bytes.empty()) return;
    if (offset >= segment.len) {
      offset -= segment.len;
      continue;
    }
    const size_t n = std::min<size_t>(segment.len - offset, bytes.size());
    std::memcpy(segment.data + offset, bytes.data(), n);
    bytes = bytes.subspan(n);
    offset = 0;
  }
}

void Append32(std::string& out, size_t value) {
  const auto v = static_cast<uint32_t>(value);
  out.append(reinterpret_cast<const char*>(&v), 4);
}

// Takes a length and so many bytes; false when they are not there.
bool TakeBlock(std::string_view& in, std::string_view* out) {
  uint32_t size;
  if (in.size() < 4) return false;
  std::memcpy(&size, in.data(), 4);
  in.remove_prefix(4);
  if (size > in.size()) return false;
  *out = in.substr(0, size);
  in.remove_prefix(size);
  return true;
}

}  // namespace

NetModel::NetModel(NetModelOptions options)
    : options_(std::move(options)),
      steering_(static_cast<uint64_t>(Clock::now().time_since_epoch().count())) {
  ports_.emplace_back();
  limits_.max_pairs = options_.max_pairs;
  limits_.mac = options_.mac;
  limits_.hash_types = virtio::kHashAllTypes;
  state_ = virtio::NetState::Default(limits_);
  started_.resize(Queues());
  delayed_.resize(Queues());
  BuildConfig();
}

absl::StatusOr<std::unique_ptr<NetModel>> NetModel::Create(NetModelOptions options) {
  if (options.max_pairs == 0 || options.max_pairs > 64)
    return Error(absl::StatusCode::kInvalidArgument, "{} queue pairs", options.max_pairs);
  std::unique_ptr<NetModel> model(new NetModel(std::move(options)));
  if (!model->options_.wire_listen.empty()) {
    ASSIGN_OR_RETURN(WireListener listener, WireListener::Listen(model->options_.wire_listen));
    model->listener_.emplace(std::move(listener));
  }
  return model;
}

void NetModel::Plug(Wire wire) { AddWire(std::move(wire), ""); }

void NetModel::Attach(DeviceHost* host) {
  host_ = host;
  if (listener_) {
    host_->Watch(listener_->fd(), [this] {
      while (auto wire = listener_->Accept()) AddWire(std::move(*wire), "");
    });
  }
  for (size_t port = 1; port < ports_.size(); ++port) {
    if (ports_[port].wire) host_->Watch(ports_[port].wire->fd(), [this, port] { ServeWire(port); });
  }
  for (const std::string& path : options_.wire_connect) ports_.push_back({std::nullopt, path});
  ConnectWires();
}

uint64_t NetModel::Features() const {
  uint64_t features = kOffered;
  if (options_.steering) {
    features = (features & ~virtio::kNetFMtu) | virtio::kNetFSteering;
  } else if (options_.max_pairs > 1) {
    features |= virtio::kNetFMq | virtio::kNetFRss | virtio::kNetFHashReport;
  }
  return features & ~options_.less_features;
}

uint64_t NetModel::ProtocolFeatures() const {
  uint64_t features = kProtocolNetMtu;
  if (options_.rarp) features |= kProtocolRarp;
  if (options_.device_state) features |= kProtocolDeviceState;
  return features;
}

uint32_t NetModel::Queues() const {
  return options_.steering ? 4u + 2u * options_.max_pairs : 2u * options_.max_pairs + 1;
}

void NetModel::BuildConfig() {
  config_.assign(28, 0);
  std::memcpy(config_.data(), state_.mac.data(), 6);
  auto put16 = [&](size_t at, uint16_t value) { std::memcpy(&config_[at], &value, 2); };
  put16(6, static_cast<uint16_t>(status_ | (state_.announce_pending ? virtio::kNetStatusAnnounce : 0)));
  put16(8, options_.max_pairs);
  if (options_.steering) {
    // "For debugging, the current steering rule can also be read from the configuration space."
    const uint8_t rule = state_.rule == RxRule::kHost ? 1 : state_.rule == RxRule::kFollowsTx ? 2 : 0;
    config_[10] = rule;
    put16(12, static_cast<uint16_t>(rule ? state_.pairs - 1 : 0));
    return;
  }
  put16(10, options_.mtu);
  config_[17] = limits_.rss_key;
  put16(18, limits_.rss_table);
  std::memcpy(&config_[20], &limits_.hash_types, 4);
}

absl::Status NetModel::WriteConfig(uint32_t offset, std::span<const uint8_t> data, bool migration) {
  // At a destination: the status, whose ANNOUNCE bit asks the guest to make itself known.
  if (migration && offset == 6 && data.size() == 2) {
    if ((data[0] & virtio::kNetStatusAnnounce) && !(features_ & virtio::kNetFGuestAnnounce))
      return absl::InvalidArgumentError("the driver did not accept GUEST_ANNOUNCE");
    state_.announce_pending = (data[0] & virtio::kNetStatusAnnounce) != 0;
    BuildConfig();
    return absl::OkStatus();
  }
  // Only the address, and only as long as the control queue is not there to set it (VIRTIO 1.4, 5.1.4).
  if (offset != 0 || data.size() != 6 || (!migration && (features_ & virtio::kNetFCtrlMacAddr)))
    return absl::InvalidArgumentError("the configuration of a NIC is read-only");
  std::copy(data.begin(), data.end(), state_.mac.begin());
  BuildConfig();
  return absl::OkStatus();
}

void NetModel::FeaturesAccepted(uint64_t features) {
  // VHOST_F_LOG_ALL and the like come and go while the device runs.
  features &= Features() | virtio::kFVersion1;
  if (features == features_) return;
  features_ = features;
  // Without a control queue of its own, nothing that is set through one is here.
  limits_.features = features & virtio::kNetFCtrlVq ? features : features & ~virtio::kNetFNeedCtrlVq;
  state_ = virtio::NetState::Default(limits_);
  BuildConfig();
}

bool NetModel::IsControl(uint32_t queue) const {
  if (options_.steering) return queue == 2;
  return (features_ & virtio::kNetFCtrlVq) && queue == limits_.ControlQueue();
}
bool NetModel::ControlHere() const {
  const uint32_t queue = limits_.ControlQueue();
  return IsControl(queue) && queue < started_.size() && started_[queue];
}
bool NetModel::IsTx(uint32_t queue) const {
  return queue % 2 == 1 && !IsControl(queue) && !(options_.steering && queue == 3);
}
uint16_t NetModel::PairOf(uint32_t queue) const {
  return static_cast<uint16_t>(options_.steering && queue >= 4 ? (queue - 4) / 2 : queue / 2);
}

uint16_t NetModel::ReadyPairs() const {
  const RxRule multiqueue = options_.steering ? RxRule::kHost : RxRule::kAutomatic;
  uint16_t pairs = 0;
  while (pairs < options_.max_pairs) {
    const uint32_t rx = limits_.RxQueue(multiqueue, pairs);
    if (rx + 1 >= started_.size() || !started_[rx] || !started_[rx + 1]) break;
    ++pairs;
  }
  return pairs;
}

virtio::NetState NetModel::Effective() const {
  if (options_.steering || ControlHere()) return state_;
  virtio::NetState state = state_;
  state.rule = RxRule::kAutomatic;
  state.pairs = 0;
  while (state.pairs < options_.max_pairs && host_->Running(2u * state.pairs)) ++state.pairs;
  state.pairs = std::max<uint16_t>(state.pairs, 1);
  return state;
}

void NetModel::Started(uint32_t queue) {
  if (queue < started_.size()) started_[queue] = true;
  loaded_ = false;
}

void NetModel::Replay(IoRequest* request) {
  // Receive buffers: nothing was in them. Transmitted packets may be sent twice, which every network does,
  // but not lost. Control commands: the driver waits for its answer.
  if (IsTx(request->queue)) {
    SendOne(request);
  } else if (IsControl(request->queue)) {
    const uint8_t error = virtio::kNetAckErr;
    if (request->writable_bytes) Scatter(request->writable, request->writable_bytes - 1, {&error, 1});
    host_->Complete(request, static_cast<uint32_t>(request->writable_bytes));
  } else {
    host_->Complete(request, 0);
  }
}

void NetModel::Available(uint32_t queue) {
  if (IsControl(queue)) {
    PumpControl();
  } else if (IsTx(queue)) {
    PumpTx(queue);
  } else {
    DeliverBacklog();
  }
}

size_t NetModel::HeaderSize() const {
  size_t size = features_ & (virtio::kFVersion1 | virtio::kNetFMrgRxbuf) ? 12 : 10;
  if (features_ & virtio::kNetFHashReport) size += 8;
  return size;
}

void NetModel::PumpTx(uint32_t queue) {
  // While packets of an old rule are under way, nothing of the new one is touched.
  if (switch_.active()) return;
  TakeTx(queue);
}

void NetModel::TakeTx(uint32_t queue) {
  while (IoRequest* request = host_->Pop(queue)) {
    if (tx_latency_ == Duration::zero() && delayed_[queue].empty()) {
      SendOne(request);
      continue;
    }
    const auto due = Clock::now() + tx_latency_;
    delayed_[queue].push_back({request, due});
    host_->TickAt(due);
  }
}

void NetModel::SendOne(IoRequest* request) {
  const size_t header = HeaderSize();
  if (request->readable_bytes > header && request->readable_bytes - header <= kMaxFrame) {
    const std::vector<uint8_t> frame =
        Gather(request->readable, header, static_cast<size_t>(request->readable_bytes) - header);
    if (auto packet = virtio::ParsePacket(frame)) {
      steering_.Transmitted(Effective(), *packet, PairOf(request->queue));
      ++host_->Counter("tx_packets");
      Forward(frame, kGuestPort);
    }
  } else {
    ++host_->Counter("tx_malformed");
  }
  host_->Complete(request, 0);
}

void NetModel::FlushDueTx(Clock::time_point now) {
  Clock::time_point next = Clock::time_point::max();
  for (uint32_t queue = 0; queue < delayed_.size(); ++queue) {
    auto& waiting = delayed_[queue];
    while (!waiting.empty() && waiting.front().due <= now) {
      IoRequest* request = waiting.front().request;
      waiting.pop_front();
      SendOne(request);
      switch_.TxProcessed(queue, 1);
    }
    if (!waiting.empty()) next = std::min(next, waiting.front().due);
  }
  if (next != Clock::time_point::max()) host_->TickAt(next);
}

void NetModel::AfterSwitch() {
  if (switch_.active()) return;
  PumpControl();
  for (uint32_t queue = 0; queue < started_.size() && !switch_.active(); ++queue) {
    if (IsTx(queue) && started_[queue]) PumpTx(queue);
  }
}

void NetModel::PumpControl() {
  const uint32_t control = limits_.ControlQueue();
  while (!switch_.active()) {
    IoRequest* request = host_->Pop(control);
    if (!request) return;
    virtio::NetReply reply;
    const RxRule old_rule = state_.rule;
    if (request->readable_bytes <= virtio::kMaxNetRequest) {
      reply = virtio::NetControl(limits_).Apply(
          Gather(request->readable, 0, static_cast<size_t>(request->readable_bytes)), ReadyPairs(), &state_);
    } else {
      reply.error = "an overlong request";
    }
    ++host_->Counter(reply.ack == virtio::kNetAckOk ? "control_ok" : "control_refused");
    if (!reply.error.empty()) LOG_INFO("net: a control command was refused: {}", reply.error);
    if (reply.steering_changed) {
      // What is in the transmit queues now was put there under the old rule.
      std::vector<virtio::QueueSwitch::OldTx> old;
      for (uint32_t queue = 0; queue < started_.size(); ++queue) {
        if (!IsTx(queue) || !started_[queue]) continue;
        TakeTx(queue);
        old.push_back({queue, static_cast<uint32_t>(delayed_[queue].size())});
      }
      switch_.Begin(old, {});
      LOG_INFO("net: steering {} → {}, {} pairs", NameOf(old_rule), NameOf(state_.rule), state_.pairs);
    }
    BuildConfig();
    if (request->writable_bytes) {
      const size_t room = static_cast<size_t>(request->writable_bytes) - 1;
      if (reply.data.size() <= room) Scatter(request->writable, 0, reply.data);
      Scatter(request->writable, room, {&reply.ack, 1});
    }
    host_->Complete(request, static_cast<uint32_t>(request->writable_bytes));
    // Packets that wait for a buffer are steered by the new rule, in their order: the driver has seen none of
    // them.
    DeliverBacklog();
  }
}

void NetModel::Forward(std::span<const uint8_t> frame, int port) {
  if (frame.size() < 14) return;
  MacAddress destination, source;
  std::memcpy(destination.data(), frame.data(), 6);
  std::memcpy(source.data(), frame.data() + 6, 6);
  learnt_.Learn(source, port);
  const int to = destination[0] & 1 ? LearningSwitch::kFlood : learnt_.Lookup(destination);
  if (to == port) return;
  for (size_t p = 0; p < ports_.size(); ++p) {
    if (static_cast<int>(p) == port || (to != LearningSwitch::kFlood && static_cast<int>(p) != to)) continue;
    if (p == kGuestPort) {
      ToGuest(frame);
    } else if (ports_[p].wire) {
      ++host_->Counter(ports_[p].wire->Send(frame) ? "wire_tx" : "wire_dropped");
    }
  }
}

void NetModel::ToGuest(std::span<const uint8_t> frame) {
  if (!(status_ & virtio::kNetStatusLinkUp)) return;
  // Nobody is there to receive, nor about to be: such packets would be old news when somebody is.
  if (!loaded_ && std::none_of(started_.begin(), started_.end(), [](bool started) { return started; }))
    return;
  if (backlog_.empty() && Deliver(frame)) return;
  if (backlog_.size() >= kBacklogFrames || backlog_bytes_ + frame.size() > kBacklogBytes) {
    ++host_->Counter("rx_dropped");
    return;
  }
  backlog_.emplace_back(frame.begin(), frame.end());
  backlog_bytes_ += frame.size();
}

void NetModel::DeliverBacklog() {
  while (!backlog_.empty() && Deliver(backlog_.front())) {
    backlog_bytes_ -= backlog_.front().size();
    backlog_.pop_front();
  }
}

// False: there is no buffer now.
bool NetModel::Deliver(std::span<const uint8_t> frame) {
  auto packet = virtio::ParsePacket(frame);
  if (!packet) return true;
  const virtio::NetState state = Effective();
  if (ControlHere() && !virtio::PassesFilter(state, limits_, packet->destination, packet->vlan)) {
    ++host_->Counter("rx_filtered");
    return true;
  }
  const auto choice = steering_.Receive(state, *packet);
  const uint32_t queue = limits_.RxQueue(state.rule, choice.pair);
  if (!host_->Running(queue)) return false;
  IoRequest* request = host_->Pop(queue);
  if (!request) return false;
  std::array<uint8_t, 20> header{};
  header[10] = 1;  // num_buffers
  const size_t header_size = HeaderSize();
  if (features_ & virtio::kNetFHashReport) {
    std::memcpy(&header[12], &choice.hash.value, 4);
    const auto report = static_cast<uint16_t>(choice.hash.report);
    std::memcpy(&header[16], &report, 2);
  }
  if (request->writable_bytes < header_size + frame.size()) {
    ++host_->Counter("rx_too_long");
    host_->Complete(request, 0);
    return true;
  }
  Scatter(request->writable, 0, std::span(header).first(header_size));
  Scatter(request->writable, header_size, frame);
  ++host_->Counter("rx_packets");
  ++host_->Counter("rx_packets_" + std::to_string(choice.pair));
  host_->Complete(request, static_cast<uint32_t>(header_size + frame.size()));
  return true;
}

void NetModel::AddWire(Wire wire, const std::string& path) {
  // A port whose wire is gone is used again.
  size_t port = 1;
  while (port < ports_.size() && (ports_[port].wire || ports_[port].path != path)) ++port;
  if (port == ports_.size()) ports_.emplace_back();
  ports_[port].path = path;
  ports_[port].wire.emplace(std::move(wire));
  if (host_) host_->Watch(ports_[port].wire->fd(), [this, port] { ServeWire(port); });
}

void NetModel::ConnectWires() {
  bool missing = false;
  for (size_t port = 1; port < ports_.size(); ++port) {
    if (ports_[port].wire || ports_[port].path.empty()) continue;
    auto wire = Wire::Connect(ports_[port].path);
    if (wire.ok()) {
      AddWire(std::move(*wire), ports_[port].path);
    } else {
      missing = true;
    }
  }
  if (missing) host_->TickAt(Clock::now() + kReconnect);
}

void NetModel::ServeWire(size_t port) {
  // Bounded: a flood on one wire must not keep the rings waiting.
  for (int i = 0; i < 256 && ports_[port].wire; ++i) {
    auto frame = ports_[port].wire->Receive();
    if (!frame.ok()) {
      host_->Unwatch(ports_[port].wire->fd());
      ports_[port].wire.reset();
      learnt_.Forget(static_cast<int>(port));
      if (!ports_[port].path.empty()) host_->TickAt(Clock::now() + kReconnect);
      return;
    }
    if (!*frame) return;
    ++host_->Counter("wire_rx");
    Forward(**frame, static_cast<int>(port));
  }
}

void NetModel::Stop(uint32_t queue, StopMode mode) {
  if (queue >= started_.size()) return;
  started_[queue] = false;
  // Sent now rather than later: a packet that was taken is not lost. Nothing of it was done yet, so that it
  // may as well stay where it is.
  auto waiting = std::move(delayed_[queue]);
  delayed_[queue].clear();
  for (DelayedTx& tx : waiting) {
    if (mode == StopMode::kDrain) {
      SendOne(tx.request);
    } else {
      host_->Abandon(tx.request);
    }
  }
  switch_.TxStopped(queue);
  AfterSwitch();
}

void NetModel::Reset() {
  features_ = limits_.features = 0;
  state_ = virtio::NetState::Default(limits_);
  steering_.flows().Clear();
  switch_.Begin({}, {});
  started_.assign(Queues(), false);
  backlog_.clear();
  backlog_bytes_ = 0;
  loaded_ = false;
  BuildConfig();
}

void NetModel::Tick(Clock::time_point now) {
  FlushDueTx(now);
  AfterSwitch();
  ConnectWires();
}

absl::Status NetModel::SendRarp(std::span<const uint8_t, 6> mac) {
  // A request "who am I" to everybody: enough for every switch to learn where the address is now (RFC 903).
  std::vector<uint8_t> frame(60, 0);
  std::fill_n(frame.begin(), 6, 0xff);
  std::copy(mac.begin(), mac.end(), frame.begin() + 6);
  const uint8_t rarp[] = {0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3};
  std::copy(std::begin(rarp), std::end(rarp), frame.begin() + 12);
  std::copy(mac.begin(), mac.end(), frame.begin() + 22);
  std::copy(mac.begin(), mac.end(), frame.begin() + 32);
  ++host_->Counter("rarp");
  Forward(frame, kGuestPort);
  return absl::OkStatus();
}

absl::Status NetModel::SetMtu(uint64_t mtu) {
  if (mtu < 68 || mtu > 65535) return Error(absl::StatusCode::kInvalidArgument, "an MTU of {}", mtu);
  return absl::OkStatus();
}

absl::StatusOr<std::string> NetModel::SaveState() {
  std::string out;
  Append32(out, kStateMagic);
  const std::string net = virtio::SerializeNetState(
      {state_, steering_.flows().seed(), steering_.flows().Export()}, limits_.features);
  Append32(out, net.size());
  out += net;
  // Which addresses live behind the guest (a bridge in it) and which outside; which wire is for the
  // destination to find out.
  std::string addresses;
  for (const auto& [mac, port] : learnt_.Export()) {
    if (port == kGuestPort) addresses.append(mac.begin(), mac.end());
  }
  Append32(out, addresses.size());
  out += addresses;
  for (const auto& frame : backlog_) {
    Append32(out, frame.size());
    out.append(frame.begin(), frame.end());
  }
  return out;
}

absl::Status NetModel::LoadState(const std::string& state) {
  std::string_view in(state), net, addresses;
  uint32_t magic = 0;
  if (in.size() >= 4) std::memcpy(&magic, in.data(), 4);
  if (magic != kStateMagic) return absl::InvalidArgumentError("not the state of a lab net device");
  in.remove_prefix(4);
  if (!TakeBlock(in, &net) || !TakeBlock(in, &addresses) || addresses.size() % 6)
    return absl::InvalidArgumentError("the state of a lab net device, cut short");
  ASSIGN_OR_RETURN(virtio::NetSnapshot snapshot, virtio::ParseNetState(std::string(net), limits_));
  std::deque<std::vector<uint8_t>> backlog;
  size_t bytes = 0;
  while (!in.empty()) {
    std::string_view frame;
    if (!TakeBlock(in, &frame)) return absl::InvalidArgumentError("the state of a lab net device, cut short");
    bytes += frame.size();
    if (backlog.size() >= kBacklogFrames || bytes > kBacklogBytes || frame.size() > kMaxFrame)
      return absl::InvalidArgumentError("more packets than a lab net device holds");
    backlog.emplace_back(frame.begin(), frame.end());
  }
  state_ = std::move(snapshot.state);
  steering_.flows().Import(snapshot.flow_seed, snapshot.flows);
  for (size_t i = 0; i < addresses.size(); i += 6) {
    MacAddress mac;
    std::memcpy(mac.data(), addresses.data() + i, 6);
    learnt_.Learn(mac, kGuestPort);
  }
  backlog_ = std::move(backlog);
  backlog_bytes_ = bytes;
  loaded_ = true;
  BuildConfig();
  return absl::OkStatus();
}

nlohmann::json NetModel::Describe() const {
  const virtio::NetState state = host_ ? Effective() : state_;
  nlohmann::json wires = nlohmann::json::array();
  for (size_t port = 1; port < ports_.size(); ++port) wires.push_back(ports_[port].wire.has_value());
  return {{"rule", NameOf(state.rule)},
          {"pairs", state.pairs},
          {"promiscuous", state.rx.promiscuous},
          {"vlans", state.vlans.size()},
          {"announce_pending", state.announce_pending},
          {"backlog", backlog_.size()},
          {"learnt", learnt_.size()},
          {"wires", wires}};
}

absl::Status NetModel::Set(const nlohmann::json& command) {
  for (const auto& [key, value] : command.items()) {
    if (key == "tx_latency_us" && value.is_number_integer() && value.get<int64_t>() >= 0) {
      tx_latency_ = std::chrono::microseconds(value.get<int64_t>());
    } else if (key == "link" && value.is_boolean()) {
      status_ = value.get<bool>() ? virtio::kNetStatusLinkUp : 0;
      BuildConfig();
      host_->ConfigChanged();
    } else if (key == "announce" && value.is_boolean()) {
      if (!(features_ & virtio::kNetFGuestAnnounce))
        return absl::FailedPreconditionError("the driver did not accept GUEST_ANNOUNCE");
      state_.announce_pending = value.get<bool>();
      BuildConfig();
      host_->ConfigChanged();
    } else {
      return Error(absl::StatusCode::kInvalidArgument, "no setting {} = {}", key, value.dump());
    }
  }
  return absl::OkStatus();
}

}  // namespace baton::lab
