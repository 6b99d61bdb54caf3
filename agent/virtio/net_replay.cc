#include "agent/virtio/net_replay.h"

namespace baton::virtio {
namespace {

template <typename T>
void Put(std::vector<uint8_t>& out, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) out.push_back(static_cast<uint8_t>(value >> (8 * i)));
}

void PutMacTable(std::vector<uint8_t>& out, const MacTable& table, const NetLimits& limits, bool multicast) {
  if (!table.overflow) {
    Put(out, static_cast<uint32_t>(table.addresses.size()));
    for (const MacAddress& mac : table.addresses) out.insert(out.end(), mac.begin(), mac.end());
    return;
  }
  // One more than fit, of addresses that no one has: it overflows again (QEMU does the same).
  const uint32_t count = limits.mac_table_entries + 1;
  Put(out, count);
  for (uint32_t i = 0; i < count; ++i) {
    out.insert(out.end(),
               {static_cast<uint8_t>(multicast ? 0x03 : 0x02), 0, static_cast<uint8_t>(i >> 24),
                static_cast<uint8_t>(i >> 16), static_cast<uint8_t>(i >> 8), static_cast<uint8_t>(i)});
  }
}

void PutRssConfig(std::vector<uint8_t>& out, const RssConfig& rss) {
  Put(out, rss.hash_types);
  Put(out, static_cast<uint16_t>(rss.table.size() - 1));
  Put(out, rss.unclassified_queue);
  for (uint16_t queue : rss.table) Put(out, queue);
  Put(out, rss.max_tx_queues);
  Put(out, static_cast<uint8_t>(rss.key.size()));
  out.insert(out.end(), rss.key.begin(), rss.key.end());
}

void PutCoal(std::vector<uint8_t>& out, const Coalescing& c) {
  Put(out, c.max_packets);
  Put(out, c.max_usecs);
}

}  // namespace

std::vector<NetCommand> ReplayOf(const NetState& state, const NetLimits& limits) {
  const NetState fresh = NetState::Default(limits);
  std::vector<NetCommand> out;
  auto add = [&](NetClass net_class, uint8_t command) -> std::vector<uint8_t>& {
    out.push_back({net_class, command, {}});
    return out.back().data;
  };
  if (limits.Has(kNetFCtrlMacAddr)) {
    auto& data = add(NetClass::kMac, kNetMacAddrSet);
    data.assign(state.mac.begin(), state.mac.end());
  }
  if (limits.Has(kNetFCtrlRx) && (state.unicast != MacTable() || state.multicast != MacTable())) {
    auto& data = add(NetClass::kMac, kNetMacTableSet);
    PutMacTable(data, state.unicast, limits, false);
    PutMacTable(data, state.multicast, limits, true);
  }
  if (limits.Has(kNetFSteering)) {
    auto& data = add(NetClass::kMq, kNetSteeringSet);
    const bool single = state.rule == RxRule::kSingle;
    Put(data, static_cast<uint8_t>(single ? 0 : state.rule == RxRule::kHost ? 1 : 2));
    Put(data, uint8_t{0});
    Put(data, static_cast<uint16_t>(single ? 0 : state.pairs - 1));
  }
  if (limits.Has(kNetFMq)) Put(add(NetClass::kMq, kNetMqPairsSet), state.pairs);
  if (state.rule == RxRule::kRss) {
    PutRssConfig(add(NetClass::kMq, kNetMqRssConfig), state.rss);
  } else if (state.hash != HashConfig()) {
    auto& data = add(NetClass::kMq, kNetMqHashConfig);
    Put(data, state.hash.hash_types);
    Put(data, uint64_t{0});
    Put(data, static_cast<uint8_t>(state.hash.key.size()));
    data.insert(data.end(), state.hash.key.begin(), state.hash.key.end());
  }
  if (state.guest_offloads != fresh.guest_offloads) {
    Put(add(NetClass::kGuestOffloads, kNetOffloadsSet), state.guest_offloads);
  }
  if (limits.Has(kNetFCtrlRx)) {
    auto mode = [&](uint8_t command, bool now, bool initially) {
      if (now != initially) add(NetClass::kRx, command).push_back(now);
    };
    mode(kNetRxPromisc, state.rx.promiscuous, fresh.rx.promiscuous);
    mode(kNetRxAllMulti, state.rx.all_multicast, false);
    mode(kNetRxAllUni, state.rx.all_unicast, false);
    mode(kNetRxNoMulti, state.rx.no_multicast, false);
    mode(kNetRxNoUni, state.rx.no_unicast, false);
    mode(kNetRxNoBcast, state.rx.no_broadcast, false);
  }
  for (uint16_t vlan : state.vlans) Put(add(NetClass::kVlan, kNetVlanAdd), vlan);
  if (state.tx_coalescing != Coalescing())
    PutCoal(add(NetClass::kNotfCoal, kNetCoalTxSet), state.tx_coalescing);
  if (state.rx_coalescing != Coalescing())
    PutCoal(add(NetClass::kNotfCoal, kNetCoalRxSet), state.rx_coalescing);
  for (const auto& [queue, coalescing] : state.queue_coalescing) {
    auto& data = add(NetClass::kNotfCoal, kNetCoalVqSet);
    Put(data, queue);
    Put(data, uint16_t{0});
    PutCoal(data, coalescing);
  }
  if (state.hash_tunnel) Put(add(NetClass::kHashTunnel, kNetHashTunnelSet), state.hash_tunnel);
  for (const auto& [id, context] : state.rss_contexts) {
    auto& data = add(NetClass::kRssContext, kNetRssCtxAdd);
    Put(data, id);
    PutRssConfig(data, context);
  }
  return out;
}

}  // namespace baton::virtio
