#include "agent/virtio/steering.h"

#include <algorithm>
#include <cstring>

namespace baton::virtio {
namespace {

constexpr size_t kWays = 4;

// The finalizer of SplitMix64: every input bit reaches every output bit.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

FlowTable::FlowTable(uint64_t seed, size_t entries) : seed_(seed) {
  size_t size = kWays;
  while (size < entries) size *= 2;
  entries_.resize(size);
}

uint64_t FlowTable::FlowOf(const PacketInfo& packet) const {
  if (packet.l3 == PacketInfo::L3::kOther) return 0;
  auto end = [&](const std::array<uint8_t, 16>& address, uint16_t port) {
    uint64_t words[2];
    std::memcpy(words, address.data(), sizeof words);
    return Mix(Mix(Mix(seed_ ^ words[0]) + words[1]) + port);
  };
  // A sum does not care which end sent the packet.
  const uint64_t both = end(packet.source_address, packet.source_port) +
                        end(packet.destination_address, packet.destination_port);
  const uint64_t flow = Mix(both + static_cast<uint64_t>(packet.l4)) >> 16;
  return flow ? flow : 1;
}

void FlowTable::Learn(uint64_t flow, uint16_t pair) {
  if (flow == 0) return;
  Entry* const set = &entries_[(flow * kWays) & (entries_.size() - 1)];
  Entry* victim = set;
  ++clock_;
  for (Entry* e = set; e != set + kWays; ++e) {
    if (e->flow == flow) {
      e->pair = pair;
      e->age = clock_;
      return;
    }
    if (e->flow == 0 ? victim->flow != 0 : victim->flow != 0 && clock_ - e->age > clock_ - victim->age)
      victim = e;
  }
  *victim = {flow, pair, clock_};
}

int FlowTable::Find(uint64_t flow) const {
  if (flow == 0) return -1;
  const Entry* const set = &entries_[(flow * kWays) & (entries_.size() - 1)];
  for (const Entry* e = set; e != set + kWays; ++e) {
    if (e->flow == flow) return e->pair;
  }
  return -1;
}

void FlowTable::Clear() { std::fill(entries_.begin(), entries_.end(), Entry()); }

std::vector<uint64_t> FlowTable::Export() const {
  std::vector<const Entry*> used;
  for (const Entry& e : entries_) {
    if (e.flow) used.push_back(&e);
  }
  std::sort(used.begin(), used.end(),
            [&](const Entry* a, const Entry* b) { return clock_ - a->age > clock_ - b->age; });
  std::vector<uint64_t> out;
  for (const Entry* e : used) out.push_back(e->flow << 16 | e->pair);
  return out;
}

void FlowTable::Import(uint64_t seed, const std::vector<uint64_t>& flows) {
  Clear();
  seed_ = seed;
  for (uint64_t flow : flows) Learn(flow >> 16, static_cast<uint16_t>(flow & 0xffff));
}

Steering::Choice Steering::Receive(const NetState& state, const PacketInfo& packet) const {
  Choice choice;
  const bool rss = state.rule == RxRule::kRss;
  const uint32_t hash_types = rss ? state.rss.hash_types : state.hash.hash_types;
  if (hash_types) choice.hash = HashPacket(packet, hash_types, rss ? state.rss.key : state.hash.key);
  if (rss) {
    choice.pair = choice.hash.report == HashReport::kNone
                      ? state.rss.unclassified_queue
                      : state.rss.table[choice.hash.value & (state.rss.table.size() - 1)];
    return choice;
  }
  if (state.rule == RxRule::kSingle || state.pairs <= 1) return choice;
  const uint64_t flow = flows_.FlowOf(packet);
  if (state.rule != RxRule::kHost) {
    // A pair of before a switch to fewer of them is not in use any more.
    if (int seen = flows_.Find(flow); seen >= 0 && seen < state.pairs) {
      choice.pair = static_cast<uint16_t>(seen);
      return choice;
    }
  }
  choice.pair = static_cast<uint16_t>(flow % state.pairs);
  return choice;
}

void Steering::Transmitted(const NetState& state, const PacketInfo& packet, uint16_t pair) {
  if (state.rule != RxRule::kFollowsTx && state.rule != RxRule::kAutomatic) return;
  if (state.pairs > 1) flows_.Learn(flows_.FlowOf(packet), pair);
}

}  // namespace baton::virtio
