#include "agent/virtio/net_control.h"

#include <cstring>

namespace baton::virtio {
namespace {

// Reads little-endian values off the front of a request; sticks at the first that is not there.
class RequestReader {
 public:
  explicit RequestReader(std::span<const uint8_t> data) : data_(data) {}
  template <typename T>
  T Take() {
    T value{};
    if (data_.size() < sizeof(T)) {
      short_ = true;
      data_ = {};
      return value;
    }
    std::memcpy(&value, data_.data(), sizeof(T));
    data_ = data_.subspan(sizeof(T));
    return value;
  }
  std::span<const uint8_t> Bytes(size_t n) {
    if (data_.size() < n) {
      short_ = true;
      data_ = {};
      return {};
    }
    auto out = data_.first(n);
    data_ = data_.subspan(n);
    return out;
  }
  size_t left() const { return data_.size(); }
  // Nothing was missing. What follows is ignored, as QEMU does: a driver may send a buffer of a fixed size.
  bool ok() const { return !short_; }

 private:
  std::span<const uint8_t> data_;
  bool short_ = false;
};

template <typename... Args>
NetReply Refused(fmt::format_string<Args...> format, Args&&... args) {
  NetReply reply;
  reply.error = fmt::format(format, std::forward<Args>(args)...);
  return reply;
}
NetReply Done() {
  NetReply reply;
  reply.ack = kNetAckOk;
  return reply;
}
NetReply SteeringSet() {
  NetReply reply = Done();
  reply.steering_changed = true;
  return reply;
}
NetReply TooShort(const char* what) { return Refused("{} is cut short", what); }
NetReply NotNegotiated(const char* what) { return Refused("{} was not negotiated", what); }

NetReply ReceiveMode(const NetLimits& limits, uint8_t command, RequestReader& in, NetState* state) {
  if (!limits.Has(kNetFCtrlRx)) return NotNegotiated("CTRL_RX");
  if (command > kNetRxAllMulti && !limits.Has(kNetFCtrlRxExtra)) return NotNegotiated("CTRL_RX_EXTRA");
  const uint8_t on = in.Take<uint8_t>();
  if (!in.ok()) return TooShort("a receive mode");
  bool* const modes[] = {&state->rx.promiscuous,  &state->rx.all_multicast, &state->rx.all_unicast,
                         &state->rx.no_multicast, &state->rx.no_unicast,    &state->rx.no_broadcast};
  if (command >= std::size(modes)) return Refused("no receive mode {}", command);
  *modes[command] = on != 0;
  return Done();
}

// Reads one of the two tables of TABLE_SET. `room` is what the device can still hold.
bool TakeMacTable(RequestReader& in, uint32_t room, MacTable* out) {
  const uint32_t count = in.Take<uint32_t>();
  // The bytes must be there, whether they are kept or not.
  if (!in.ok() || count > in.left() / 6) return false;
  auto bytes = in.Bytes(size_t{count} * 6);
  if (count > room) {
    out->overflow = true;
    return true;
  }
  out->addresses.resize(count);
  for (size_t i = 0; i < count; ++i) std::memcpy(out->addresses[i].data(), bytes.data() + 6 * i, 6);
  return true;
}

NetReply Mac(const NetLimits& limits, uint8_t command, RequestReader& in, NetState* state) {
  if (command == kNetMacAddrSet) {
    if (!limits.Has(kNetFCtrlMacAddr)) return NotNegotiated("CTRL_MAC_ADDR");
    auto mac = in.Take<MacAddress>();
    if (!in.ok()) return TooShort("a MAC address");
    state->mac = mac;
    return Done();
  }
  if (command != kNetMacTableSet) return Refused("no MAC command {}", command);
  if (!limits.Has(kNetFCtrlRx)) return NotNegotiated("CTRL_RX");
  MacTable unicast, multicast;
  // Both share the room; a table that overflows takes none of it.
  if (!TakeMacTable(in, limits.mac_table_entries, &unicast)) return TooShort("the unicast table");
  const uint32_t used = static_cast<uint32_t>(unicast.addresses.size());
  if (!TakeMacTable(in, limits.mac_table_entries - used, &multicast)) return TooShort("the multicast table");
  state->unicast = std::move(unicast);
  state->multicast = std::move(multicast);
  return Done();
}

NetReply Vlan(const NetLimits& limits, uint8_t command, RequestReader& in, NetState* state) {
  if (!limits.Has(kNetFCtrlVlan)) return NotNegotiated("CTRL_VLAN");
  const uint16_t vlan = in.Take<uint16_t>();
  if (!in.ok()) return TooShort("a VLAN");
  if (vlan >= kNetMaxVlan) return Refused("no VLAN {}", vlan);
  if (command == kNetVlanDel) {
    state->vlans.erase(vlan);
    return Done();
  }
  if (command != kNetVlanAdd) return Refused("no VLAN command {}", command);
  if (!state->vlans.count(vlan) && state->vlans.size() >= limits.vlans)
    return Refused("more than {} VLANs", limits.vlans);
  state->vlans.insert(vlan);
  return Done();
}

// struct virtio_net_rss_config. Validated by what of NetState it ends up in.
NetReply TakeRssConfig(const NetLimits& limits, RequestReader& in, uint16_t ready_pairs, RssConfig* out) {
  out->hash_types = in.Take<uint32_t>();
  const uint16_t mask = in.Take<uint16_t>();
  out->unclassified_queue = in.Take<uint16_t>();
  if (!in.ok()) return TooShort("an RSS configuration");
  const size_t entries = size_t{mask} + 1;
  if ((entries & mask) != 0 || entries > limits.rss_table)
    return Refused("an RSS table of {} entries, where a power of two up to {} is allowed", entries,
                   limits.rss_table);
  out->table.resize(entries);
  for (uint16_t& queue : out->table) queue = in.Take<uint16_t>();
  out->max_tx_queues = in.Take<uint16_t>();
  const uint8_t key_length = in.Take<uint8_t>();
  auto key = in.Bytes(key_length);
  if (!in.ok()) return TooShort("an RSS configuration");
  out->key.assign(key.begin(), key.end());
  if (out->hash_types & ~limits.hash_types)
    return Refused("hash types {:#x}, of which the device has {:#x}", out->hash_types, limits.hash_types);
  if (key_length > limits.rss_key || (key_length == 0 && out->hash_types != 0))
    return Refused("a key of {} bytes, where {} are allowed", key_length, limits.rss_key);
  const uint16_t pairs = std::min(limits.max_pairs, ready_pairs);
  for (uint16_t queue : out->table) {
    if (queue >= pairs) return Refused("the RSS table names receive queue {} of {}", queue, pairs);
  }
  if (out->unclassified_queue >= pairs)
    return Refused("unclassified packets to receive queue {} of {}", out->unclassified_queue, pairs);
  if (out->max_tx_queues == 0 || out->max_tx_queues > pairs)
    return Refused("{} transmit queues of {}", out->max_tx_queues, pairs);
  return Done();
}

NetReply Steer(const NetLimits& limits, uint8_t command, RequestReader& in, uint16_t ready_pairs,
               NetState* state) {
  if (command != kNetSteeringSet) return Refused("no steering command {}", command);
  const uint8_t rule = in.Take<uint8_t>();
  in.Take<uint8_t>();
  const uint16_t param = in.Take<uint16_t>();
  if (!in.ok()) return TooShort("a steering rule");
  if (rule > 2) return Refused("steering rule {} is not supported", rule);
  if (rule == 0) {
    state->rule = RxRule::kSingle;
    state->pairs = 0;
    return SteeringSet();
  }
  const uint32_t pairs = uint32_t{param} + 1;
  if (pairs > limits.max_pairs || pairs > ready_pairs)
    return Refused("steering over {} pairs, of which {} are set up", pairs,
                   std::min(limits.max_pairs, ready_pairs));
  state->rule = rule == 1 ? RxRule::kHost : RxRule::kFollowsTx;
  state->pairs = static_cast<uint16_t>(pairs);
  return SteeringSet();
}

NetReply Multiqueue(const NetLimits& limits, uint8_t command, RequestReader& in, uint16_t ready_pairs,
                    NetState* state) {
  if (limits.Has(kNetFSteering)) return Steer(limits, command, in, ready_pairs, state);
  // "The device processes the last of these commands": each takes the place of the ones before.
  switch (command) {
    case kNetMqPairsSet: {
      if (!limits.Has(kNetFMq)) return NotNegotiated("MQ");
      const uint16_t pairs = in.Take<uint16_t>();
      if (!in.ok()) return TooShort("a number of queue pairs");
      if (pairs == 0 || pairs > limits.max_pairs || pairs > ready_pairs)
        return Refused("{} queue pairs, of which {} are set up", pairs,
                       std::min(limits.max_pairs, ready_pairs));
      state->rule = RxRule::kAutomatic;
      state->pairs = pairs;
      state->rss = {};
      state->hash = {};
      return SteeringSet();
    }
    case kNetMqRssConfig: {
      if (!limits.Has(kNetFRss)) return NotNegotiated("RSS");
      RssConfig rss;
      NetReply reply = TakeRssConfig(limits, in, ready_pairs, &rss);
      if (reply.ack != kNetAckOk) return reply;
      state->rule = RxRule::kRss;
      state->pairs = rss.max_tx_queues;
      state->rss = std::move(rss);
      state->hash = {};
      return SteeringSet();
    }
    case kNetMqHashConfig: {
      if (!limits.Has(kNetFHashReport)) return NotNegotiated("HASH_REPORT");
      HashConfig hash;
      hash.hash_types = in.Take<uint32_t>();
      in.Bytes(8);
      const uint8_t key_length = in.Take<uint8_t>();
      auto key = in.Bytes(key_length);
      if (!in.ok()) return TooShort("a hash configuration");
      if (hash.hash_types & ~limits.hash_types)
        return Refused("hash types {:#x}, of which the device has {:#x}", hash.hash_types, limits.hash_types);
      if (key_length > limits.rss_key || (key_length == 0 && hash.hash_types != 0))
        return Refused("a key of {} bytes, where {} are allowed", key_length, limits.rss_key);
      hash.key.assign(key.begin(), key.end());
      // Without MQ there is one queue; RSS without MQ steered over more, and loses them here.
      state->rule = limits.Has(kNetFMq) ? RxRule::kAutomatic : RxRule::kSingle;
      if (!limits.Has(kNetFMq)) state->pairs = 1;
      state->rss = {};
      state->hash = std::move(hash);
      return SteeringSet();
    }
    default:
      return Refused("no multiqueue command {}", command);
  }
}

NetReply Coalesce(const NetLimits& limits, uint8_t command, RequestReader& in, NetState* state) {
  auto take = [&] {
    Coalescing c;
    c.max_packets = in.Take<uint32_t>();
    c.max_usecs = in.Take<uint32_t>();
    return c;
  };
  if (command == kNetCoalTxSet || command == kNetCoalRxSet) {
    if (!limits.Has(kNetFNotfCoal)) return NotNegotiated("NOTF_COAL");
    Coalescing c = take();
    if (!in.ok()) return TooShort("coalescing");
    const bool tx = command == kNetCoalTxSet;
    (tx ? state->tx_coalescing : state->rx_coalescing) = c;
    // It holds for every queue of the direction; receive queues are even.
    std::erase_if(state->queue_coalescing, [&](const auto& q) { return (q.first % 2 == 1) == tx; });
    return Done();
  }
  if (command != kNetCoalVqSet && command != kNetCoalVqGet)
    return Refused("no coalescing command {}", command);
  if (!limits.Has(kNetFVqNotfCoal)) return NotNegotiated("VQ_NOTF_COAL");
  const uint16_t queue = in.Take<uint16_t>();
  in.Take<uint16_t>();
  if (!in.ok()) return TooShort("coalescing");
  if (queue >= 2u * limits.max_pairs) return Refused("coalescing of queue {}", queue);
  const Coalescing& common = queue % 2 ? state->tx_coalescing : state->rx_coalescing;
  if (command == kNetCoalVqGet) {
    auto it = state->queue_coalescing.find(queue);
    const Coalescing& c = it == state->queue_coalescing.end() ? common : it->second;
    NetReply reply = Done();
    reply.data.resize(8);
    std::memcpy(reply.data.data(), &c.max_packets, 4);
    std::memcpy(reply.data.data() + 4, &c.max_usecs, 4);
    return reply;
  }
  Coalescing c = take();
  if (!in.ok()) return TooShort("coalescing");
  if (c == common) {
    state->queue_coalescing.erase(queue);
  } else {
    state->queue_coalescing[queue] = c;
  }
  return Done();
}

NetReply RssContext(const NetLimits& limits, uint8_t command, RequestReader& in, uint16_t ready_pairs,
                    NetState* state) {
  if (limits.rss_contexts == 0) return NotNegotiated("RSS_CONTEXT");
  if (command == kNetRssCtxCapGet) {
    NetReply reply = Done();
    reply.data = {static_cast<uint8_t>(limits.rss_contexts), static_cast<uint8_t>(limits.rss_contexts >> 8)};
    return reply;
  }
  if (command > kNetRssCtxDel) return Refused("no RSS context command {}", command);
  const uint16_t id = in.Take<uint16_t>();
  if (!in.ok()) return TooShort("an RSS context");
  if (id == 0 || id > limits.rss_contexts) return Refused("no RSS context {}", id);
  const bool known = state->rss_contexts.count(id) != 0;
  if (command == kNetRssCtxAdd && known) return Refused("RSS context {} exists", id);
  if (command != kNetRssCtxAdd && !known) return Refused("RSS context {} does not exist", id);
  if (command == kNetRssCtxDel) {
    state->rss_contexts.erase(id);
    return Done();
  }
  RssConfig rss;
  NetReply reply = TakeRssConfig(limits, in, ready_pairs, &rss);
  if (reply.ack == kNetAckOk) state->rss_contexts[id] = std::move(rss);
  return reply;
}

}  // namespace

std::vector<uint8_t> NetCommand::Encode() const {
  std::vector<uint8_t> out{static_cast<uint8_t>(net_class), command};
  out.insert(out.end(), data.begin(), data.end());
  return out;
}

NetReply NetControl::Apply(std::span<const uint8_t> request, uint16_t ready_pairs, NetState* state) const {
  if (request.size() > kMaxNetRequest) return Refused("a request of {} bytes", request.size());
  RequestReader in(request);
  const auto net_class = static_cast<NetClass>(in.Take<uint8_t>());
  const uint8_t command = in.Take<uint8_t>();
  if (!in.ok()) return TooShort("a control request");
  switch (net_class) {
    case NetClass::kRx:
      return ReceiveMode(limits_, command, in, state);
    case NetClass::kMac:
      return Mac(limits_, command, in, state);
    case NetClass::kVlan:
      return Vlan(limits_, command, in, state);
    case NetClass::kAnnounce:
      if (!limits_.Has(kNetFGuestAnnounce)) return NotNegotiated("GUEST_ANNOUNCE");
      if (command != kNetAnnounceAck) return Refused("no announce command {}", command);
      state->announce_pending = false;
      return Done();
    case NetClass::kMq:
      return Multiqueue(limits_, command, in, ready_pairs, state);
    case NetClass::kGuestOffloads: {
      if (!limits_.Has(kNetFCtrlGuestOffloads)) return NotNegotiated("CTRL_GUEST_OFFLOADS");
      if (command != kNetOffloadsSet) return Refused("no offload command {}", command);
      const uint64_t offloads = in.Take<uint64_t>();
      if (!in.ok()) return TooShort("a set of offloads");
      if (uint64_t extra = offloads & ~(limits_.features & kNetGuestOffloads); extra)
        return Refused("offloads {:#x} were not negotiated", extra);
      state->guest_offloads = offloads;
      return Done();
    }
    case NetClass::kNotfCoal:
      return Coalesce(limits_, command, in, state);
    case NetClass::kHashTunnel: {
      if (!limits_.Has(kNetFHashTunnel)) return NotNegotiated("HASH_TUNNEL");
      if (command != kNetHashTunnelSet) return Refused("no hash tunnel command {}", command);
      const uint32_t types = in.Take<uint32_t>();
      if (!in.ok()) return TooShort("a set of tunnel types");
      if (types & ~limits_.tunnel_types)
        return Refused("tunnel types {:#x}, of which the device has {:#x}", types, limits_.tunnel_types);
      state->hash_tunnel = types;
      return Done();
    }
    case NetClass::kStats:
      // Read-only, and nothing that belongs to the state: counters start again at the destination.
      return NotNegotiated("DEVICE_STATS");
    case NetClass::kRssContext:
      return RssContext(limits_, command, in, ready_pairs, state);
  }
  return Refused("no command class {}", static_cast<int>(net_class));
}

}  // namespace baton::virtio
