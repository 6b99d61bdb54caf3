// Which receive queue a packet takes.
#pragma once

#include <cstdint>
#include <vector>

#include "agent/virtio/net_state.h"
#include "agent/virtio/packet.h"
#include "agent/virtio/toeplitz.h"

namespace baton::virtio {

// Remembers for a flow which pair transmitted last. Bounded: a fixed number of sets of four, the oldest entry
// of a set gives way. No allocation after construction. A guest that floods it forgets its own flows only.
class FlowTable {
 public:
  // `seed`: any value; of each table its own, so that collisions cannot be prepared.
  explicit FlowTable(uint64_t seed, size_t entries = 4096);
  // The same for both directions of a connection. 0 for packets that have no flow (no IP).
  uint64_t FlowOf(const PacketInfo& packet) const;
  void Learn(uint64_t flow, uint16_t pair);
  // -1: not seen.
  int Find(uint64_t flow) const;
  void Clear();
  // For another host: (flow << 16) | pair, oldest first. The seed must travel along. Import forgets what was
  // there, and keeps the youngest of what does not fit.
  std::vector<uint64_t> Export() const;
  void Import(uint64_t seed, const std::vector<uint64_t>& flows);
  uint64_t seed() const { return seed_; }

 private:
  struct Entry {
    uint64_t flow = 0;  // 48 bits; 0: free
    uint16_t pair = 0;
    uint32_t age = 0;  // of last use
  };
  uint64_t seed_;
  uint32_t clock_ = 0;
  std::vector<Entry> entries_;
};

// Not thread-safe.
class Steering {
 public:
  explicit Steering(uint64_t seed) : flows_(seed) {}

  struct Choice {
    uint16_t pair = 0;  // receive pair, 0-based: under kNetFSteering pair 0 of kSingle is the default pair
    PacketHash hash;    // to be reported with HASH_REPORT
  };
  // For a packet towards the driver.
  Choice Receive(const NetState& state, const PacketInfo& packet) const;
  // For each packet that the driver transmits on `pair`.
  void Transmitted(const NetState& state, const PacketInfo& packet, uint16_t pair);
  FlowTable& flows() { return flows_; }
  const FlowTable& flows() const { return flows_; }

 private:
  FlowTable flows_;
};

}  // namespace baton::virtio
