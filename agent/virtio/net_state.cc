#include "agent/virtio/net_state.h"

#include <algorithm>

#include "baton/v1/net_state.pb.h"

namespace baton::virtio {
namespace {

constexpr uint32_t kNetStateVersion = 1;
constexpr size_t kMaxFlows = 65536;

bool PowerOfTwo(size_t n) { return n != 0 && (n & (n - 1)) == 0; }

std::string MacText(const MacAddress& mac) {
  return fmt::format("{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", mac[0], mac[1], mac[2], mac[3], mac[4],
                     mac[5]);
}

template <typename... Args>
absl::Status CannotBe(fmt::format_string<Args...> format, Args&&... args) {
  return Error(absl::StatusCode::kFailedPrecondition, "net state: {}",
               fmt::format(format, std::forward<Args>(args)...));
}

absl::Status ValidateRss(const RssConfig& rss, const NetLimits& limits) {
  if (rss.hash_types & ~limits.hash_types) {
    return CannotBe("RSS hash types {:#x}, of which the device has {:#x}", rss.hash_types, limits.hash_types);
  }
  if (!PowerOfTwo(rss.table.size()) || rss.table.size() > limits.rss_table) {
    return CannotBe("an RSS table of {} entries, where a power of two up to {} is allowed", rss.table.size(),
                    limits.rss_table);
  }
  for (uint16_t queue : rss.table) {
    if (queue >= limits.max_pairs) return CannotBe("an RSS table that names receive queue {}", queue);
  }
  if (rss.unclassified_queue >= limits.max_pairs) {
    return CannotBe("RSS sends what it cannot classify to receive queue {}", rss.unclassified_queue);
  }
  if (rss.max_tx_queues == 0 || rss.max_tx_queues > limits.max_pairs) {
    return CannotBe("RSS with {} transmit queues of {}", rss.max_tx_queues, limits.max_pairs);
  }
  if (rss.key.size() > limits.rss_key || (rss.key.empty() && rss.hash_types)) {
    return CannotBe("an RSS key of {} bytes, where {} are allowed", rss.key.size(), limits.rss_key);
  }
  return absl::OkStatus();
}

void PutRss(const RssConfig& from, v1::NetRss* to) {
  to->set_hash_types(from.hash_types);
  to->set_unclassified_queue(from.unclassified_queue);
  for (uint16_t queue : from.table) to->add_table(queue);
  to->set_max_tx_queues(from.max_tx_queues);
  to->set_key(std::string(from.key.begin(), from.key.end()));
}

// A u16 out of a varint field of a hostile message.
absl::StatusOr<uint16_t> Narrow(uint32_t value, const char* what) {
  if (value > 0xffff) return Error(absl::StatusCode::kInvalidArgument, "net state: {} is {}", what, value);
  return static_cast<uint16_t>(value);
}

absl::StatusOr<RssConfig> TakeRss(const v1::NetRss& from) {
  RssConfig to;
  if (from.table_size() > static_cast<int>(kNetMaxTable) || from.key().size() > 0xff) {
    return absl::InvalidArgumentError("net state: an RSS table or key that no device has");
  }
  to.hash_types = from.hash_types();
  ASSIGN_OR_RETURN(to.unclassified_queue, Narrow(from.unclassified_queue(), "the unclassified queue"));
  for (uint32_t entry : from.table()) {
    ASSIGN_OR_RETURN(uint16_t queue, Narrow(entry, "an RSS table entry"));
    to.table.push_back(queue);
  }
  ASSIGN_OR_RETURN(to.max_tx_queues, Narrow(from.max_tx_queues(), "the number of transmit queues"));
  to.key.assign(from.key().begin(), from.key().end());
  return to;
}

void PutTable(const MacTable& from, v1::NetMacTable* to) {
  std::string bytes;
  for (const MacAddress& mac : from.addresses) bytes.append(mac.begin(), mac.end());
  to->set_addresses(bytes);
  to->set_overflow(from.overflow);
}

absl::StatusOr<MacTable> TakeTable(const v1::NetMacTable& from) {
  const std::string& bytes = from.addresses();
  if (bytes.size() % 6) return absl::InvalidArgumentError("net state: a MAC table of a broken length");
  MacTable to;
  to.overflow = from.overflow();
  to.addresses.resize(bytes.size() / 6);
  for (size_t i = 0; i < to.addresses.size(); ++i) {
    std::copy_n(bytes.begin() + static_cast<ptrdiff_t>(6 * i), 6, to.addresses[i].begin());
  }
  return to;
}

void PutCoalescing(const Coalescing& from, v1::NetCoalescing* to) {
  to->set_max_packets(from.max_packets);
  to->set_max_usecs(from.max_usecs);
}

Coalescing TakeCoalescing(const v1::NetCoalescing& from) { return {from.max_packets(), from.max_usecs()}; }

std::string CoalescingText(const Coalescing& c) {
  return fmt::format("{} packets/{} us", c.max_packets, c.max_usecs);
}

std::string TableText(const MacTable& table) {
  if (table.overflow) return "an overflow";
  std::string text = fmt::format("{} addresses", table.addresses.size());
  for (const MacAddress& mac : table.addresses) text += " " + MacText(mac);
  return text;
}

}  // namespace

uint32_t NetLimits::ControlQueue() const {
  if (Has(kNetFSteering)) return 2;
  return Has(kNetFMq) || Has(kNetFRss) ? 2u * max_pairs : 2u;
}

uint32_t NetLimits::QueueCount() const {
  if (Has(kNetFSteering)) return 2u * max_pairs + 4;
  return 2u * max_pairs + (Has(kNetFCtrlVq) ? 1 : 0);
}

absl::Status NetLimits::Check() const {
  auto bad = [](const char* what) {
    return Error(absl::StatusCode::kInvalidArgument, "net device: {}", what);
  };
  if (max_pairs == 0 || max_pairs > kNetMaxPairs) return bad("the number of queue pairs is out of range");
  if (rss_table > kNetMaxTable || (Has(kNetFRss) && !PowerOfTwo(rss_table)))
    return bad("the RSS table length is no power of two in range");
  if (hash_types & ~kHashAllTypes) return bad("it has hash types that do not exist");
  if (Has(kNetFSteering) && (features & (kNetFMq | kNetFRss | kNetFMtu))) {
    return bad("STEERING (experimental) excludes MQ, RSS and MTU");
  }
  if ((features & kNetFNeedCtrlVq) && !Has(kNetFCtrlVq))
    return bad("features that need the control queue were accepted without CTRL_VQ");
  return absl::OkStatus();
}

const char* NameOf(RxRule rule) {
  switch (rule) {
    case RxRule::kSingle:
      return "single queue";
    case RxRule::kFollowsTx:
      return "receive follows transmit";
    case RxRule::kHost:
      return "chosen by the host";
    case RxRule::kAutomatic:
      return "automatic";
    case RxRule::kRss:
      return "RSS";
  }
  return "unknown";
}

NetState NetState::Default(const NetLimits& limits) {
  NetState state;
  state.mac = limits.mac;
  state.guest_offloads = limits.features & kNetGuestOffloads;
  // One pair either way; what distinguishes the two rules begins with a second.
  state.rule = limits.Has(kNetFMq) ? RxRule::kAutomatic : RxRule::kSingle;
  state.pairs = limits.Has(kNetFSteering) ? 0 : 1;
  return state;
}

absl::Status NetState::Validate(const NetLimits& limits) const {
  RETURN_IF_ERROR(limits.Check());
  if (unicast.addresses.size() + multicast.addresses.size() > limits.mac_table_entries) {
    return CannotBe("{} MAC addresses, where {} fit", unicast.addresses.size() + multicast.addresses.size(),
                    limits.mac_table_entries);
  }
  if ((unicast.overflow && !unicast.addresses.empty()) ||
      (multicast.overflow && !multicast.addresses.empty()))
    return CannotBe("a MAC table that overflowed and holds addresses");
  if (!limits.Has(kNetFCtrlRx) &&
      !(unicast == MacTable() && multicast == MacTable() && rx.promiscuous && !rx.all_multicast))
    return CannotBe("receive modes without CTRL_RX");
  if (!limits.Has(kNetFCtrlRxExtra) &&
      (rx.all_unicast || rx.no_multicast || rx.no_unicast || rx.no_broadcast))
    return CannotBe("receive modes without CTRL_RX_EXTRA");
  if (!vlans.empty() && !limits.Has(kNetFCtrlVlan)) return CannotBe("VLANs without CTRL_VLAN");
  if (vlans.size() > limits.vlans) return CannotBe("{} VLANs, where {} fit", vlans.size(), limits.vlans);
  if (!vlans.empty() && *vlans.rbegin() >= kNetMaxVlan) return CannotBe("VLAN {}", *vlans.rbegin());
  if (announce_pending && !limits.Has(kNetFGuestAnnounce))
    return CannotBe("a pending announcement without GUEST_ANNOUNCE");
  switch (rule) {
    case RxRule::kSingle:
      if (pairs != (limits.Has(kNetFSteering) ? 0 : 1) || limits.Has(kNetFMq))
        return CannotBe("a single queue with {} pairs", pairs);
      break;
    case RxRule::kFollowsTx:
    case RxRule::kHost:
      if (!limits.Has(kNetFSteering)) return CannotBe("steering \"{}\" without STEERING", NameOf(rule));
      if (pairs == 0) return CannotBe("steering \"{}\" over no pair", NameOf(rule));
      break;
    case RxRule::kAutomatic:
      if (!limits.Has(kNetFMq)) return CannotBe("automatic steering without MQ");
      break;
    case RxRule::kRss:
      if (!limits.Has(kNetFRss)) return CannotBe("RSS that was not negotiated");
      RETURN_IF_ERROR(ValidateRss(rss, limits));
      if (rss.max_tx_queues != pairs) return CannotBe("{} pairs, but {} in RSS", pairs, rss.max_tx_queues);
      if (hash != HashConfig()) return CannotBe("RSS and a hash configuration of its own");
      break;
    default:
      return CannotBe("steering rule {}", static_cast<int>(rule));
  }
  if (rule != RxRule::kRss && rss != RssConfig()) return CannotBe("an RSS configuration that is not in use");
  if (pairs > limits.max_pairs || (pairs == 0 && rule != RxRule::kSingle))
    return CannotBe("{} queue pairs of {}", pairs, limits.max_pairs);
  if (hash != HashConfig()) {
    if (!limits.Has(kNetFHashReport)) return CannotBe("a hash configuration without HASH_REPORT");
    if (hash.hash_types & ~limits.hash_types)
      return CannotBe("hash types {:#x}, of which the device has {:#x}", hash.hash_types, limits.hash_types);
    if (hash.key.size() > limits.rss_key || (hash.key.empty() && hash.hash_types))
      return CannotBe("a hash key of {} bytes", hash.key.size());
  }
  if (guest_offloads & ~(limits.features & kNetGuestOffloads))
    return CannotBe("offloads {:#x} that were not negotiated", guest_offloads);
  if (!limits.Has(kNetFCtrlGuestOffloads) && guest_offloads != (limits.features & kNetGuestOffloads))
    return CannotBe("offloads switched without CTRL_GUEST_OFFLOADS");
  if (!limits.Has(kNetFNotfCoal) && (tx_coalescing != Coalescing() || rx_coalescing != Coalescing()))
    return CannotBe("interrupt coalescing without NOTF_COAL");
  if (!queue_coalescing.empty()) {
    if (!limits.Has(kNetFVqNotfCoal)) return CannotBe("coalescing of a queue without VQ_NOTF_COAL");
    if (queue_coalescing.rbegin()->first >= 2u * limits.max_pairs)
      return CannotBe("coalescing of queue {}", queue_coalescing.rbegin()->first);
  }
  if (hash_tunnel && (!limits.Has(kNetFHashTunnel) || (hash_tunnel & ~limits.tunnel_types)))
    return CannotBe("hash tunnel types {:#x}, of which the device has {:#x}", hash_tunnel,
                    limits.tunnel_types);
  if (rss_contexts.size() > limits.rss_contexts)
    return CannotBe("{} RSS contexts of {}", rss_contexts.size(), limits.rss_contexts);
  for (const auto& [id, context] : rss_contexts) {
    if (id == 0 || id > limits.rss_contexts) return CannotBe("RSS context {}", id);
    RETURN_IF_ERROR(Annotate(ValidateRss(context, limits), fmt::format("RSS context {}", id)));
  }
  return absl::OkStatus();
}

std::vector<std::string> Differences(const NetState& a, const NetState& b) {
  std::vector<std::string> out;
  auto differ = [&](const char* what, const std::string& x, const std::string& y) {
    out.push_back(fmt::format("{} {}, not {}", what, x, y));
  };
  auto flag = [&](const char* what, bool x, bool y) {
    if (x != y) differ(what, x ? "on" : "off", y ? "on" : "off");
  };
  flag("promiscuous", a.rx.promiscuous, b.rx.promiscuous);
  flag("all multicast", a.rx.all_multicast, b.rx.all_multicast);
  flag("all unicast", a.rx.all_unicast, b.rx.all_unicast);
  flag("no multicast", a.rx.no_multicast, b.rx.no_multicast);
  flag("no unicast", a.rx.no_unicast, b.rx.no_unicast);
  flag("no broadcast", a.rx.no_broadcast, b.rx.no_broadcast);
  if (a.mac != b.mac) differ("MAC address", MacText(a.mac), MacText(b.mac));
  if (a.unicast != b.unicast) differ("unicast table", TableText(a.unicast), TableText(b.unicast));
  if (a.multicast != b.multicast) differ("multicast table", TableText(a.multicast), TableText(b.multicast));
  if (a.vlans != b.vlans)
    differ("VLANs", fmt::format("{}", fmt::join(a.vlans, ",")), fmt::format("{}", fmt::join(b.vlans, ",")));
  flag("announcement pending", a.announce_pending, b.announce_pending);
  if (a.rule != b.rule) differ("steering", NameOf(a.rule), NameOf(b.rule));
  if (a.pairs != b.pairs) differ("queue pairs", std::to_string(a.pairs), std::to_string(b.pairs));
  auto rss = [&](const std::string& where, const RssConfig& x, const RssConfig& y) {
    auto of = [&](const char* what) { return where + what; };
    if (x.hash_types != y.hash_types)
      differ(of("hash types").c_str(), fmt::format("{:#x}", x.hash_types),
             fmt::format("{:#x}", y.hash_types));
    if (x.unclassified_queue != y.unclassified_queue)
      differ(of("unclassified queue").c_str(), std::to_string(x.unclassified_queue),
             std::to_string(y.unclassified_queue));
    if (x.table != y.table)
      differ(of("indirection table").c_str(), fmt::format("[{}]", fmt::join(x.table, ",")),
             fmt::format("[{}]", fmt::join(y.table, ",")));
    if (x.max_tx_queues != y.max_tx_queues)
      differ(of("transmit queues").c_str(), std::to_string(x.max_tx_queues), std::to_string(y.max_tx_queues));
    if (x.key != y.key) out.push_back(of("key differs"));
  };
  rss("RSS ", a.rss, b.rss);
  if (a.hash.hash_types != b.hash.hash_types)
    differ("hash types", fmt::format("{:#x}", a.hash.hash_types), fmt::format("{:#x}", b.hash.hash_types));
  if (a.hash.key != b.hash.key) out.push_back("hash key differs");
  if (a.guest_offloads != b.guest_offloads)
    differ("guest offloads", fmt::format("{:#x}", a.guest_offloads), fmt::format("{:#x}", b.guest_offloads));
  if (a.tx_coalescing != b.tx_coalescing)
    differ("transmit coalescing", CoalescingText(a.tx_coalescing), CoalescingText(b.tx_coalescing));
  if (a.rx_coalescing != b.rx_coalescing)
    differ("receive coalescing", CoalescingText(a.rx_coalescing), CoalescingText(b.rx_coalescing));
  if (a.queue_coalescing != b.queue_coalescing) out.push_back("coalescing of single queues differs");
  if (a.hash_tunnel != b.hash_tunnel)
    differ("hash tunnel", fmt::format("{:#x}", a.hash_tunnel), fmt::format("{:#x}", b.hash_tunnel));
  if (a.rss_contexts.size() != b.rss_contexts.size())
    differ("RSS contexts", std::to_string(a.rss_contexts.size()), std::to_string(b.rss_contexts.size()));
  for (const auto& [id, context] : a.rss_contexts) {
    auto it = b.rss_contexts.find(id);
    if (it == b.rss_contexts.end()) {
      out.push_back(fmt::format("RSS context {} only on one side", id));
    } else {
      rss(fmt::format("RSS context {} ", id), context, it->second);
    }
  }
  return out;
}

bool PassesFilter(const NetState& state, const NetLimits& limits, const MacAddress& destination, int vlan) {
  const NetRxModes& rx = state.rx;
  if (rx.promiscuous) return true;
  if (vlan >= 0 && limits.Has(kNetFCtrlVlan) && !state.vlans.count(static_cast<uint16_t>(vlan))) return false;
  auto in = [&](const MacTable& table) {
    return table.overflow ||
           std::find(table.addresses.begin(), table.addresses.end(), destination) != table.addresses.end();
  };
  if (destination[0] & 1) {
    if (std::all_of(destination.begin(), destination.end(), [](uint8_t b) { return b == 0xff; }))
      return !rx.no_broadcast;
    if (rx.no_multicast) return false;
    return rx.all_multicast || in(state.multicast);
  }
  if (rx.no_unicast) return false;
  return rx.all_unicast || destination == state.mac || in(state.unicast);
}

std::string SerializeNetState(const NetSnapshot& snapshot, uint64_t features) {
  const NetState& state = snapshot.state;
  v1::NetDeviceState out;
  out.set_version(kNetStateVersion);
  out.set_features(features);
  out.mutable_rx()->set_promiscuous(state.rx.promiscuous);
  out.mutable_rx()->set_all_multicast(state.rx.all_multicast);
  out.mutable_rx()->set_all_unicast(state.rx.all_unicast);
  out.mutable_rx()->set_no_multicast(state.rx.no_multicast);
  out.mutable_rx()->set_no_unicast(state.rx.no_unicast);
  out.mutable_rx()->set_no_broadcast(state.rx.no_broadcast);
  out.set_mac(std::string(state.mac.begin(), state.mac.end()));
  PutTable(state.unicast, out.mutable_unicast());
  PutTable(state.multicast, out.mutable_multicast());
  for (uint16_t vlan : state.vlans) out.add_vlans(vlan);
  out.set_announce_pending(state.announce_pending);
  out.set_rx_rule(static_cast<v1::NetRxRule>(state.rule));
  out.set_pairs(state.pairs);
  if (state.rule == RxRule::kRss) PutRss(state.rss, out.mutable_rss());
  out.mutable_hash()->set_hash_types(state.hash.hash_types);
  out.mutable_hash()->set_key(std::string(state.hash.key.begin(), state.hash.key.end()));
  out.set_guest_offloads(state.guest_offloads);
  PutCoalescing(state.tx_coalescing, out.mutable_tx_coalescing());
  PutCoalescing(state.rx_coalescing, out.mutable_rx_coalescing());
  for (const auto& [queue, coalescing] : state.queue_coalescing) {
    auto* q = out.add_queue_coalescing();
    q->set_queue(queue);
    PutCoalescing(coalescing, q->mutable_coalescing());
  }
  out.set_hash_tunnel(state.hash_tunnel);
  for (const auto& [id, context] : state.rss_contexts) {
    auto* c = out.add_rss_contexts();
    c->set_id(id);
    PutRss(context, c->mutable_rss());
  }
  for (uint64_t flow : snapshot.flows) out.add_flows(flow);
  out.set_flow_seed(snapshot.flow_seed);
  return out.SerializeAsString();
}

absl::StatusOr<NetSnapshot> ParseNetState(const std::string& blob, const NetLimits& limits) {
  if (blob.size() > kMaxNetState) {
    return Error(absl::StatusCode::kInvalidArgument, "net state: {} bytes, more than any device has",
                 blob.size());
  }
  v1::NetDeviceState in;
  if (!in.ParseFromString(blob)) return absl::InvalidArgumentError("net state: not a state");
  if (in.version() == 0 || in.version() > kNetStateVersion) {
    return Error(absl::StatusCode::kInvalidArgument, "net state: version {}, this program knows {}",
                 in.version(), kNetStateVersion);
  }
  if (in.features() != limits.features) {
    return CannotBe("it belongs to features {}, the device has {}", FeatureNames(in.features(), v1::NET),
                    FeatureNames(limits.features, v1::NET));
  }
  NetSnapshot out;
  NetState& state = out.state;
  state.rx = {in.rx().promiscuous(),  in.rx().all_multicast(), in.rx().all_unicast(),
              in.rx().no_multicast(), in.rx().no_unicast(),    in.rx().no_broadcast()};
  if (in.mac().size() != 6) return absl::InvalidArgumentError("net state: a MAC address of a broken length");
  std::copy(in.mac().begin(), in.mac().end(), state.mac.begin());
  ASSIGN_OR_RETURN(state.unicast, TakeTable(in.unicast()));
  ASSIGN_OR_RETURN(state.multicast, TakeTable(in.multicast()));
  for (uint32_t entry : in.vlans()) {
    ASSIGN_OR_RETURN(uint16_t vlan, Narrow(entry, "a VLAN"));
    state.vlans.insert(vlan);
  }
  state.announce_pending = in.announce_pending();
  if (in.rx_rule() < v1::NET_RX_SINGLE || in.rx_rule() > v1::NET_RX_RSS) {
    return Error(absl::StatusCode::kInvalidArgument, "net state: steering rule {}",
                 static_cast<int>(in.rx_rule()));
  }
  state.rule = static_cast<RxRule>(in.rx_rule());
  ASSIGN_OR_RETURN(state.pairs, Narrow(in.pairs(), "the number of pairs"));
  if (state.rule == RxRule::kRss) {
    ASSIGN_OR_RETURN(state.rss, TakeRss(in.rss()));
  } else if (in.has_rss()) {
    return absl::InvalidArgumentError("net state: an RSS configuration that is not in use");
  }
  if (in.hash().key().size() > 0xff) return absl::InvalidArgumentError("net state: a hash key too long");
  state.hash.hash_types = in.hash().hash_types();
  state.hash.key.assign(in.hash().key().begin(), in.hash().key().end());
  state.guest_offloads = in.guest_offloads();
  state.tx_coalescing = TakeCoalescing(in.tx_coalescing());
  state.rx_coalescing = TakeCoalescing(in.rx_coalescing());
  for (const v1::NetQueueCoalescing& q : in.queue_coalescing()) {
    ASSIGN_OR_RETURN(uint16_t queue, Narrow(q.queue(), "a queue"));
    state.queue_coalescing[queue] = TakeCoalescing(q.coalescing());
  }
  state.hash_tunnel = in.hash_tunnel();
  for (const v1::NetRssContext& c : in.rss_contexts()) {
    ASSIGN_OR_RETURN(uint16_t id, Narrow(c.id(), "an RSS context"));
    ASSIGN_OR_RETURN(RssConfig context, TakeRss(c.rss()));
    state.rss_contexts[id] = std::move(context);
  }
  if (in.flows_size() > static_cast<int>(kMaxFlows))
    return absl::InvalidArgumentError("net state: too many flows");
  for (uint64_t flow : in.flows()) {
    if ((flow & 0xffff) >= limits.max_pairs)
      return Error(absl::StatusCode::kInvalidArgument, "net state: a flow of pair {}", flow & 0xffff);
    out.flows.push_back(flow);
  }
  out.flow_seed = in.flow_seed();
  RETURN_IF_ERROR(state.Validate(limits));
  return out;
}

}  // namespace baton::virtio
