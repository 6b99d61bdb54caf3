// The state of a virtio-net device that is neither in its rings nor in its configuration space: what the
// driver has set through the control queue. Pure; not thread-safe.
//
//   NetState state = NetState::Default(limits);
//   NetControl(limits).Apply(request bytes, ready_pairs, &state)    agent/virtio/net_control.h
//   std::string blob = SerializeNetState({state}, limits.features);   → another host →
//   ASSIGN_OR_RETURN(NetSnapshot copy, ParseNetState(blob, limits));
//   for (const NetCommand& c : ReplayOf(copy.state, limits)) …      agent/virtio/net_replay.h
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "agent/virtio/net_protocol.h"
#include "common/status.h"

namespace baton::virtio {

// Which receive queue a packet takes.
enum class RxRule : uint8_t { kSingle = 1, kFollowsTx = 2, kHost = 3, kAutomatic = 4, kRss = 5 };
const char* NameOf(RxRule rule);

// What the device can do and what its driver accepted. Every value that a driver or a peer names is checked
// against it.
struct NetLimits {
  uint64_t features = 0;  // negotiated
  uint16_t max_pairs = 1;
  // Unicast and multicast addresses together; QEMU's MAC_TABLE_ENTRIES. A table that does not fit overflows.
  uint32_t mac_table_entries = 64;
  uint32_t vlans = 4096;
  uint16_t rss_table = 128;
  uint8_t rss_key = kNetMaxKey;
  uint32_t hash_types = 0;
  uint32_t tunnel_types = 0;
  // 0: VIRTIO_NET_F_RSS_CONTEXT (bit 64, beyond what fits into `features`) was not negotiated.
  uint16_t rss_contexts = 0;
  // The address in the configuration space.
  MacAddress mac{};

  bool Has(uint64_t feature) const { return (features & feature) == feature; }
  // Queue numbers of a pair under a rule. Standard: receive 2k, transmit 2k+1, control after the last pair.
  // Under kNetFSteering as the proposal numbers them: the default pair 0/1 of the single-queue rule, control
  // 2, 3 reserved, multiqueue pair k at 4+2k and 5+2k.
  uint32_t RxQueue(RxRule rule, uint16_t pair) const {
    return (Has(kNetFSteering) && rule != RxRule::kSingle ? 4u : 0u) + 2u * pair;
  }
  uint32_t TxQueue(RxRule rule, uint16_t pair) const { return RxQueue(rule, pair) + 1; }
  uint32_t ControlQueue() const;
  // All of them, used or not.
  uint32_t QueueCount() const;
  // InvalidArgument: features that exclude each other, or sizes that no device has.
  absl::Status Check() const;
};

struct NetRxModes {
  bool promiscuous = true;
  bool all_multicast = false;
  bool all_unicast = false;
  bool no_multicast = false;
  bool no_unicast = false;
  bool no_broadcast = false;
  bool operator==(const NetRxModes&) const = default;
};

struct MacTable {
  std::vector<MacAddress> addresses;
  // More were given than fit: none is kept, and everything of the kind passes.
  bool overflow = false;
  bool operator==(const MacTable&) const = default;
};

struct RssConfig {
  uint32_t hash_types = 0;
  uint16_t unclassified_queue = 0;
  std::vector<uint16_t> table;  // receive queues, numbered 0..pairs-1; a power of two of them
  uint16_t max_tx_queues = 1;
  std::vector<uint8_t> key;
  bool operator==(const RssConfig&) const = default;
};

struct HashConfig {
  uint32_t hash_types = 0;
  std::vector<uint8_t> key;
  bool operator==(const HashConfig&) const = default;
};

struct Coalescing {
  uint32_t max_packets = 0;
  uint32_t max_usecs = 0;
  bool operator==(const Coalescing&) const = default;
};

struct NetState {
  NetRxModes rx;
  MacAddress mac{};
  MacTable unicast;
  MacTable multicast;
  std::set<uint16_t> vlans;
  bool announce_pending = false;
  RxRule rule = RxRule::kSingle;
  // Pairs in use, from the first. Under kNetFSteering the multiqueue pairs, 0 with kSingle.
  uint16_t pairs = 1;
  RssConfig rss;    // with kRss
  HashConfig hash;  // without kRss; hash_types 0: no hash is reported
  uint64_t guest_offloads = 0;
  Coalescing tx_coalescing;
  Coalescing rx_coalescing;
  std::map<uint16_t, Coalescing> queue_coalescing;  // what VQ_SET made differ from the two above
  uint32_t hash_tunnel = 0;
  std::map<uint16_t, RssConfig> rss_contexts;  // by id, from 1

  // After a reset: one pair, every negotiated offload, empty tables, promiscuous.
  static NetState Default(const NetLimits& limits);
  bool operator==(const NetState&) const = default;
  // Whether a device of these limits can be in this state. FailedPrecondition says in words what it cannot.
  absl::Status Validate(const NetLimits& limits) const;
};

// What differs, in words for people ("queue pairs 4, not 2"); empty when equal.
std::vector<std::string> Differences(const NetState& a, const NetState& b);

// Whether the device passes a packet to its driver (the order of the tests is QEMU's receive_filter).
// `vlan`: of an 802.1Q tag, or -1.
bool PassesFilter(const NetState& state, const NetLimits& limits, const MacAddress& destination, int vlan);

// A state and what steering has learnt with it (see FlowTable).
struct NetSnapshot {
  NetState state;
  uint64_t flow_seed = 0;
  std::vector<uint64_t> flows;
};

// Version 1 of baton.v1.NetDeviceState. The same state gives the same bytes.
std::string SerializeNetState(const NetSnapshot& snapshot, uint64_t features);

// Security model: `blob` comes from another host or a file and may be anything. Its size is bounded before it
// is parsed, and the result has been validated against `limits`. InvalidArgument: not such a state.
// FailedPrecondition: a state that this device cannot be in (another feature set, more queues …).
inline constexpr size_t kMaxNetState = size_t{1} << 20;
absl::StatusOr<NetSnapshot> ParseNetState(const std::string& blob, const NetLimits& limits);

}  // namespace baton::virtio
