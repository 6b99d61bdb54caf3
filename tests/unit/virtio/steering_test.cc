// Which queue a packet takes, and what a change of the rule waits for.
#include "agent/virtio/steering.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <deque>

#include "agent/virtio/queue_switch.h"

namespace baton::virtio {
namespace {

// The key and the vectors that Microsoft publishes for verifying an RSS hash.
constexpr uint8_t kKey[40] = {0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67,
                              0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b, 0xcb,
                              0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
                              0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa};

std::vector<uint8_t> Ipv4(std::array<uint8_t, 4> source, uint16_t sport, std::array<uint8_t, 4> destination,
                          uint16_t dport, uint8_t protocol = 6, uint16_t fragment = 0) {
  std::vector<uint8_t> f{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0};
  f.insert(f.end(), {0x45, 0, 0, 40, 0, 0, static_cast<uint8_t>(fragment >> 8),
                     static_cast<uint8_t>(fragment), 64, protocol, 0, 0});
  f.insert(f.end(), source.begin(), source.end());
  f.insert(f.end(), destination.begin(), destination.end());
  f.insert(f.end(), {static_cast<uint8_t>(sport >> 8), static_cast<uint8_t>(sport),
                     static_cast<uint8_t>(dport >> 8), static_cast<uint8_t>(dport)});
  f.resize(f.size() + 16);
  return f;
}

// `middle`: extension headers between the IPv6 header and TCP, the first of type `first`.
std::vector<uint8_t> Ipv6(const std::array<uint8_t, 16>& source, uint16_t sport,
                          const std::array<uint8_t, 16>& destination, uint16_t dport, uint8_t first = 6,
                          std::vector<uint8_t> middle = {}) {
  std::vector<uint8_t> f{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, first, 64};
  f.insert(f.end(), source.begin(), source.end());
  f.insert(f.end(), destination.begin(), destination.end());
  f.insert(f.end(), middle.begin(), middle.end());
  f.insert(f.end(), {static_cast<uint8_t>(sport >> 8), static_cast<uint8_t>(sport),
                     static_cast<uint8_t>(dport >> 8), static_cast<uint8_t>(dport)});
  f.resize(f.size() + 16);
  return f;
}

uint32_t Hash(const std::vector<uint8_t>& frame, uint32_t types, HashReport report) {
  PacketHash hash = HashPacket(*ParsePacket(frame), types, kKey);
  EXPECT_EQ(hash.report, report);
  return hash.value;
}

TEST(ToeplitzVectors, Ipv4) {
  struct Vector {
    std::array<uint8_t, 4> destination;
    uint16_t dport;
    std::array<uint8_t, 4> source;
    uint16_t sport;
    uint32_t ip, tcp;
  };
  const Vector vectors[] = {
      {{161, 142, 100, 80}, 1766, {66, 9, 149, 187}, 2794, 0x323e8fc2, 0x51ccc178},
      {{65, 69, 140, 83}, 4739, {199, 92, 111, 2}, 14230, 0xd718262a, 0xc626b0ea},
      {{12, 22, 207, 184}, 38024, {24, 19, 198, 95}, 12898, 0xd2d0a5de, 0x5c2b394a},
      {{209, 142, 163, 6}, 2217, {38, 27, 205, 30}, 48228, 0x82989176, 0xafc7327f},
      {{202, 188, 127, 2}, 1303, {153, 39, 163, 191}, 44251, 0x5d1809c5, 0x10e828a2},
  };
  for (const Vector& v : vectors) {
    auto frame = Ipv4(v.source, v.sport, v.destination, v.dport);
    EXPECT_EQ(Hash(frame, kHashIpv4, HashReport::kIpv4), v.ip);
    EXPECT_EQ(Hash(frame, kHashIpv4 | kHashTcpv4, HashReport::kTcpv4), v.tcp) << "the most specific wins";
    auto udp = Ipv4(v.source, v.sport, v.destination, v.dport, 17);
    EXPECT_EQ(Hash(udp, kHashUdpv4, HashReport::kUdpv4), v.tcp);
  }
}

TEST(ToeplitzVectors, Ipv6) {
  using A = std::array<uint8_t, 16>;
  struct Vector {
    A destination;
    uint16_t dport;
    A source;
    uint16_t sport;
    uint32_t ip, tcp;
  };
  const Vector vectors[] = {
      {A{0x3f, 0xfe, 0x25, 0x01, 0x02, 0, 0, 0x03, 0, 0, 0, 0, 0, 0, 0, 1}, 1766,
       A{0x3f, 0xfe, 0x25, 0x01, 0x02, 0, 0x1f, 0xff, 0, 0, 0, 0, 0, 0, 0, 7}, 2794, 0x2cc18cd5, 0x40207d3d},
      {A{0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, 4739,
       A{0x3f, 0xfe, 0x05, 0x01, 0, 8, 0, 0, 0x02, 0x60, 0x97, 0xff, 0xfe, 0x40, 0xef, 0xab}, 14230,
       0x0f0c461c, 0xdde51bbf},
      {A{0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x02, 0, 0xf8, 0xff, 0xfe, 0x21, 0x67, 0xcf}, 38024,
       A{0x3f, 0xfe, 0x19, 0, 0x45, 0x45, 0, 3, 0x02, 0, 0xf8, 0xff, 0xfe, 0x21, 0x67, 0xcf}, 44251,
       0x4b61e985, 0x02d1feef},
  };
  for (const Vector& v : vectors) {
    auto frame = Ipv6(v.source, v.sport, v.destination, v.dport);
    EXPECT_EQ(Hash(frame, kHashIpv6, HashReport::kIpv6), v.ip);
    EXPECT_EQ(Hash(frame, kHashIpv6 | kHashTcpv6, HashReport::kTcpv6), v.tcp);
    // Mobile IPv6: the addresses that count are in a destination option and in a routing header.
    std::vector<uint8_t> middle{43, 2, 0xc9, 16};  // home address option, then a routing header
    middle.insert(middle.end(), v.source.begin(), v.source.end());
    middle.insert(middle.end(), {1, 2, 0, 0});  // PadN
    std::vector<uint8_t> routing{6, 2, 2, 1, 0, 0, 0, 0};
    routing.insert(routing.end(), v.destination.begin(), v.destination.end());
    middle.insert(middle.end(), routing.begin(), routing.end());
    auto mobile = Ipv6(A{9}, v.sport, A{8}, v.dport, 60, middle);
    EXPECT_EQ(Hash(mobile, kHashTcpEx, HashReport::kTcpv6Ex), v.tcp);
    EXPECT_EQ(Hash(mobile, kHashIpEx | kHashIpv6, HashReport::kIpv6Ex), v.ip);
  }
}

TEST(PacketParser, Fragments_HaveNoPorts) {
  for (uint16_t fragment : {0x2000, 0x0001, 0x2010}) {
    auto info = ParsePacket(Ipv4({1, 2, 3, 4}, 5, {6, 7, 8, 9}, 10, 6, fragment));
    EXPECT_EQ(info->l4, PacketInfo::L4::kNone);
    EXPECT_EQ(HashPacket(*info, kHashTcpv4, kKey).report, HashReport::kNone);
  }
  EXPECT_EQ(ParsePacket(Ipv4({1, 2, 3, 4}, 5, {6, 7, 8, 9}, 10, 6, 0x4000))->l4, PacketInfo::L4::kTcp)
      << "\"do not fragment\" is no fragment";
}

TEST(PacketParser, TagIsReadAndPassed) {
  auto frame = Ipv4({1, 2, 3, 4}, 5, {6, 7, 8, 9}, 10);
  frame.insert(frame.begin() + 12, {0x81, 0, 0x20, 7});
  auto info = ParsePacket(frame);
  EXPECT_EQ(info->vlan, 7);
  EXPECT_EQ(info->l4, PacketInfo::L4::kTcp);
}

RC_GTEST_PROP(PacketParserProperty, AnyBytes_HaveAnAnswer, ()) {
  auto bytes = *rc::gen::container<std::vector<uint8_t>>(rc::gen::arbitrary<uint8_t>());
  auto info = ParsePacket(bytes);
  RC_ASSERT(info.has_value() == (bytes.size() >= 14));
}

NetState Rule(RxRule rule, uint16_t pairs) {
  NetState state;
  state.rule = rule;
  state.pairs = pairs;
  return state;
}

TEST(SteeringRules, Single_IsTheFirstQueueForEverything) {
  Steering steering(1);
  NetState state = Rule(RxRule::kSingle, 1);
  for (uint16_t port = 0; port < 100; ++port) {
    EXPECT_EQ(steering.Receive(state, *ParsePacket(Ipv4({1, 1, 1, 1}, port, {2, 2, 2, 2}, 80))).pair, 0);
  }
}

TEST(SteeringRules, ReceiveFollowsTransmit_ByTheFlowOfTheAnswer) {
  for (RxRule rule : {RxRule::kFollowsTx, RxRule::kAutomatic}) {
    Steering steering(1);
    NetState state = Rule(rule, 4);
    for (uint16_t port = 0; port < 100; ++port) {
      auto sent = *ParsePacket(Ipv4({1, 1, 1, 1}, port, {2, 2, 2, 2}, 80));
      auto answer = *ParsePacket(Ipv4({2, 2, 2, 2}, 80, {1, 1, 1, 1}, port));
      steering.Transmitted(state, sent, port % 4);
      EXPECT_EQ(steering.Receive(state, answer).pair, port % 4);
      steering.Transmitted(state, sent, (port + 1) % 4);
      EXPECT_EQ(steering.Receive(state, answer).pair, (port + 1) % 4) << "the last transmission counts";
    }
  }
}

TEST(SteeringRules, PairOfBeforeASwitchToFewer_IsNotUsed) {
  Steering steering(1);
  auto sent = *ParsePacket(Ipv4({1, 1, 1, 1}, 5, {2, 2, 2, 2}, 80));
  steering.Transmitted(Rule(RxRule::kFollowsTx, 4), sent, 3);
  EXPECT_LT(steering.Receive(Rule(RxRule::kFollowsTx, 2), sent).pair, 2);
}

TEST(SteeringRules, Host_KeepsAFlowTogetherAndUsesAllPairs) {
  Steering steering(1);
  NetState state = Rule(RxRule::kHost, 4);
  std::array<int, 4> seen{};
  for (uint16_t port = 0; port < 400; ++port) {
    auto packet = *ParsePacket(Ipv4({1, 1, 1, 1}, port, {2, 2, 2, 2}, 80));
    steering.Transmitted(state, packet, 1);  // of no concern to this rule
    const uint16_t pair = steering.Receive(state, packet).pair;
    EXPECT_EQ(steering.Receive(state, packet).pair, pair);
    ++seen[pair];
  }
  for (int count : seen) EXPECT_GT(count, 50);
}

TEST(SteeringRules, Rss_TakesTheTableEntryOfTheHash) {
  Steering steering(1);
  NetState state = Rule(RxRule::kRss, 4);
  state.rss = {kHashTcpv4, 2, {0, 1, 3, 0}, 4, {std::begin(kKey), std::end(kKey)}};
  auto choice =
      steering.Receive(state, *ParsePacket(Ipv4({199, 92, 111, 2}, 14230, {65, 69, 140, 83}, 4739)));
  EXPECT_EQ(choice.hash.value, 0xc626b0ea);
  EXPECT_EQ(choice.pair, 3) << "0xea & 3 = 2";
  EXPECT_EQ(steering.Receive(state, *ParsePacket(Ipv4({1, 1, 1, 1}, 1, {2, 2, 2, 2}, 2, 17))).pair, 2)
      << "unclassified";
}

TEST(SteeringRules, HashWithoutRss_IsReportedOnly) {
  Steering steering(1);
  NetState state = Rule(RxRule::kAutomatic, 1);
  state.hash = {kHashTcpv4, {std::begin(kKey), std::end(kKey)}};
  auto choice =
      steering.Receive(state, *ParsePacket(Ipv4({199, 92, 111, 2}, 14230, {65, 69, 140, 83}, 4739)));
  EXPECT_EQ(choice.hash.report, HashReport::kTcpv4);
  EXPECT_EQ(choice.pair, 0);
}

TEST(FlowTableTest, IsBoundedAndForgetsTheOldest) {
  FlowTable table(3, 64);
  for (uint64_t flow = 1; flow <= 10000; ++flow) table.Learn(flow, static_cast<uint16_t>(flow % 7));
  EXPECT_LE(table.Export().size(), 64u);
  EXPECT_EQ(table.Find(10000), 10000 % 7);
  EXPECT_EQ(table.Find(1), -1);
}

TEST(FlowTableTest, ArrivesAtAnotherHostWithItsSeed) {
  FlowTable here(3), there(99);
  auto packet = *ParsePacket(Ipv4({1, 1, 1, 1}, 1, {2, 2, 2, 2}, 2));
  here.Learn(here.FlowOf(packet), 5);
  there.Import(here.seed(), here.Export());
  EXPECT_EQ(there.Find(there.FlowOf(packet)), 5);
}

TEST(QueueSwitchTest, TransmitQueuesOfTheOldRuleComeFirst) {
  QueueSwitch s;
  s.Begin({{1, 3}, {3, 0}}, {});
  EXPECT_TRUE(s.active());
  EXPECT_EQ(s.TxBudget(5, 10), 0u) << "a queue of the new rule waits";
  EXPECT_EQ(s.TxBudget(3, 10), 0u) << "so does a queue of both, with what came after the command";
  EXPECT_EQ(s.TxBudget(1, 10), 3u);
  s.TxProcessed(1, 2);
  EXPECT_EQ(s.TxBudget(1, 10), 1u);
  s.TxProcessed(1, 1);
  EXPECT_FALSE(s.active());
  EXPECT_EQ(s.TxBudget(5, 10), 10u);
}

TEST(QueueSwitchTest, AQueueThatIsStoppedHoldsNothingUp) {
  QueueSwitch s;
  s.Begin({{1, 3}}, {{0, 2}});
  s.TxStopped(1);
  EXPECT_FALSE(s.RxNewAllowed());
  s.RxStopped(0);
  EXPECT_FALSE(s.active());
}

TEST(QueueSwitchTest, ReceivedUnderTheOldRuleIsDeliveredFirst) {
  QueueSwitch s;
  s.Begin({}, {{0, 1}, {2, 1}});
  EXPECT_FALSE(s.RxNewAllowed());
  s.RxOldDone(0);
  EXPECT_FALSE(s.RxNewAllowed());
  s.RxOldDone(2);
  EXPECT_TRUE(s.RxNewAllowed());
}

// Random schedules of a driver that changes rules while it sends, and of a device that obeys QueueSwitch: the
// packets leave in the order of the rules under which they were queued.
RC_GTEST_PROP(QueueSwitchProperty, NoPacketOfANewRuleOvertakesOneOfAnOld, ()) {
  QueueSwitch s;
  constexpr uint32_t kQueues = 4;
  std::array<std::deque<int>, kQueues> ring;  // epoch of each queued packet
  int epoch = 0;
  int processed_epoch = 0;
  uint32_t active = 1;
  const int count = *rc::gen::inRange(1, 200);
  for (int i = 0; i < count; ++i) {
    const uint32_t queue = static_cast<uint32_t>(*rc::gen::inRange(0, static_cast<int>(kQueues)));
    switch (*rc::gen::inRange(0, 5)) {
      case 0:
        if (s.active()) break;  // the control queue waits
        {
          std::vector<QueueSwitch::OldTx> old;
          for (uint32_t q = 0; q < active; ++q) old.push_back({q, static_cast<uint32_t>(ring[q].size())});
          s.Begin(old, {});
          active = static_cast<uint32_t>(*rc::gen::inRange(1, static_cast<int>(kQueues) + 1));
          ++epoch;
        }
        break;
      case 1:
      case 2:
        ring[queue % active].push_back(epoch);
        break;
      default: {
        const uint32_t budget = s.TxBudget(queue, static_cast<uint32_t>(ring[queue].size()));
        if (budget == 0) break;
        RC_ASSERT(ring[queue].front() >= processed_epoch);
        processed_epoch = ring[queue].front();
        ring[queue].pop_front();
        s.TxProcessed(queue, 1);
      }
    }
  }
  // Nothing is stuck.
  for (bool progress = true; progress;) {
    progress = false;
    for (uint32_t q = 0; q < kQueues; ++q) {
      while (!ring[q].empty() && s.TxBudget(q, static_cast<uint32_t>(ring[q].size()))) {
        RC_ASSERT(ring[q].front() >= processed_epoch);
        processed_epoch = ring[q].front();
        ring[q].pop_front();
        s.TxProcessed(q, 1);
        progress = true;
      }
    }
  }
  for (const auto& r : ring) RC_ASSERT(r.empty());
}

}  // namespace
}  // namespace baton::virtio
