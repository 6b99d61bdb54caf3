// Capture, serialise, replay: a random history of commands arrives at the other device as it was.
#include "agent/virtio/net_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <cstdlib>
#include <random>

#include "agent/virtio/net_replay.h"
#include "baton/v1/net_state.pb.h"

namespace baton::virtio {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

NetLimits FullLimits() {
  NetLimits limits;
  limits.features = kNetFCtrlVq | kNetFCtrlRx | kNetFCtrlRxExtra | kNetFCtrlVlan | kNetFCtrlMacAddr |
                    kNetFGuestAnnounce | kNetFMq | kNetFRss | kNetFHashReport | kNetFCtrlGuestOffloads |
                    kNetFGuestCsum | kNetFGuestTso4 | kNetFGuestTso6 | kNetFNotfCoal | kNetFVqNotfCoal |
                    kNetFHashTunnel | kFVersion1;
  limits.max_pairs = 8;
  limits.mac_table_entries = 6;
  limits.vlans = 16;
  limits.rss_table = 16;
  limits.hash_types = kHashAllTypes;
  limits.tunnel_types = 0xff;
  limits.rss_contexts = 3;
  limits.mac = {0x52, 0x54, 0, 1, 2, 3};
  return limits;
}

// Mostly sound commands, some of them broken: of every class, with sizes around the limits.
std::vector<uint8_t> RandomRequest(const NetLimits& limits, std::mt19937_64& random) {
  auto byte = [&] { return static_cast<uint8_t>(random()); };
  auto upto = [&](uint64_t most) { return static_cast<uint16_t>(random() % (most + 1)); };
  std::vector<uint8_t> r;
  auto put16 = [&](uint16_t v) {
    r.push_back(static_cast<uint8_t>(v));
    r.push_back(static_cast<uint8_t>(v >> 8));
  };
  auto put32 = [&](uint32_t v) {
    put16(static_cast<uint16_t>(v));
    put16(static_cast<uint16_t>(v >> 16));
  };
  auto rss = [&] {
    put32(upto(kHashAllTypes));
    const uint16_t entries = static_cast<uint16_t>(1u << upto(4));
    put16(entries - 1);
    put16(upto(limits.max_pairs - 1));
    for (int i = 0; i < entries; ++i) put16(upto(limits.max_pairs - 1));
    put16(upto(limits.max_pairs));
    const uint8_t key = static_cast<uint8_t>(upto(40));
    r.push_back(key);
    for (int i = 0; i < key; ++i) r.push_back(byte());
  };
  const uint8_t net_class = static_cast<uint8_t>(upto(9));
  r.push_back(net_class);
  switch (static_cast<NetClass>(net_class)) {
    case NetClass::kRx:
      r.push_back(static_cast<uint8_t>(upto(6)));
      r.push_back(static_cast<uint8_t>(upto(1)));
      break;
    case NetClass::kMac:
      r.push_back(static_cast<uint8_t>(upto(1)));
      if (r[1] == kNetMacAddrSet) {
        for (int i = 0; i < 6; ++i) r.push_back(byte());
      } else {
        for (int table = 0; table < 2; ++table) {
          const uint16_t n = upto(5);
          put32(n);
          for (int i = 0; i < 6 * n; ++i) r.push_back(byte());
        }
      }
      break;
    case NetClass::kVlan:
      r.push_back(static_cast<uint8_t>(upto(1)));
      put16(upto(20));
      break;
    case NetClass::kAnnounce:
      r.push_back(0);
      break;
    case NetClass::kMq:
      r.push_back(static_cast<uint8_t>(upto(2)));
      if (limits.Has(kNetFSteering)) {
        r[1] = 0;
        put16(upto(2));
        put16(upto(limits.max_pairs));
      } else if (r[1] == kNetMqPairsSet) {
        put16(upto(limits.max_pairs + 1));
      } else if (r[1] == kNetMqRssConfig) {
        rss();
      } else {
        put32(upto(kHashAllTypes));
        put32(0);
        put32(0);
        const uint8_t key = static_cast<uint8_t>(upto(41));
        r.push_back(key);
        for (int i = 0; i < key; ++i) r.push_back(byte());
      }
      break;
    case NetClass::kGuestOffloads:
      r.push_back(0);
      put32(upto(0x1ff) & (upto(1) ? 0x182 : 0xffff));
      put32(0);
      break;
    case NetClass::kNotfCoal:
      r.push_back(static_cast<uint8_t>(upto(3)));
      if (r[1] >= kNetCoalVqSet) {
        put16(upto(2 * limits.max_pairs));
        put16(0);
      }
      put32(upto(3));
      put32(upto(3));
      break;
    case NetClass::kHashTunnel:
      r.push_back(0);
      put32(upto(0x1ff));
      break;
    case NetClass::kStats:
      r.push_back(0);
      break;
    case NetClass::kRssContext:
      r.push_back(static_cast<uint8_t>(upto(3)));
      put16(upto(limits.rss_contexts + 1));
      if (r[1] != kNetRssCtxDel) rss();
      break;
  }
  return r;
}

// Commands applied by all properties of this file.
uint64_t steps = 0;

// RapidCheck chooses the seed (and prints it with a failure) and the length, so that short histories come
// first.
NetState RandomState(const NetLimits& limits) {
  std::mt19937_64 random(*rc::gen::arbitrary<uint64_t>());
  const int count = 80 * *rc::gen::inRange(0, 100);
  NetState state = NetState::Default(limits);
  const NetControl control(limits);
  for (int i = 0; i < count; ++i) {
    const NetState before = state;
    NetReply reply = control.Apply(RandomRequest(limits, random), limits.max_pairs, &state);
    if (reply.ack != kNetAckOk) RC_ASSERT(state == before);
    if (i % 16 == 0) {
      absl::Status valid = state.Validate(limits);
      if (!valid.ok()) RC_FAIL(Message(valid));
    }
    ++steps;
  }
  return state;
}

void ArrivesUnchanged(const NetLimits& limits, const NetState& state) {
  NetSnapshot snapshot{state, 77, {uint64_t{5} << 16 | 1}};
  if (limits.max_pairs < 2) snapshot.flows.clear();
  auto parsed = ParseNetState(SerializeNetState(snapshot, limits.features), limits);
  if (!parsed.ok()) RC_FAIL(Message(parsed.status()));
  RC_ASSERT(parsed->state == state);
  RC_ASSERT(parsed->flows == snapshot.flows);
  NetState replayed = NetState::Default(limits);
  const NetControl control(limits);
  for (const NetCommand& command : ReplayOf(parsed->state, limits)) {
    NetReply reply = control.Apply(command.Encode(), limits.max_pairs, &replayed);
    if (reply.ack != kNetAckOk) RC_FAIL(reply.error);
    ++steps;
  }
  std::vector<std::string> differences = Differences(replayed, state);
  if (!differences.empty()) RC_FAIL(fmt::format("{}", fmt::join(differences, "; ")));
  RC_ASSERT(replayed == state);
}

RC_GTEST_PROP(NetStateProperty, AnyHistory_CapturedSerialisedAndReplayed_IsTheSame, ()) {
  const NetLimits limits = FullLimits();
  ArrivesUnchanged(limits, RandomState(limits));
}

RC_GTEST_PROP(NetStateProperty, AnyFeatureSet_CapturedSerialisedAndReplayed_IsTheSame, ()) {
  NetLimits limits = FullLimits();
  limits.features &= *rc::gen::arbitrary<uint64_t>() | kNetFCtrlVq;
  if (*rc::gen::inRange(0, 4) == 0)
    limits.features = (limits.features & ~(kNetFMq | kNetFRss)) | kNetFSteering;
  limits.max_pairs = static_cast<uint16_t>(*rc::gen::inRange(1, 9));
  if (*rc::gen::inRange(0, 2)) limits.rss_contexts = 0;
  RC_ASSERT(limits.Check().ok());
  ArrivesUnchanged(limits, RandomState(limits));
}

// Runs after the two above, in the order of this file.
TEST(NetStateProperty, Zz_HaveAppliedManyCommands) {
  if (steps == 0) {  // alone, by a filter
    NetState state = NetState::Default(FullLimits());
    std::mt19937_64 random(1);
    for (; steps < 200000; ++steps)
      NetControl(FullLimits()).Apply(RandomRequest(FullLimits(), random), 8, &state);
  }
  std::printf("net state: %llu commands applied\n", static_cast<unsigned long long>(steps));
  // A run with parameters of its own is as long as they say.
  if (!std::getenv("RC_PARAMS")) {
    EXPECT_GE(steps, 200000u);
  }
}

TEST(NetReplay, Order_IsThatOfQemusRestore) {
  const NetLimits limits = FullLimits();
  NetState state = NetState::Default(limits);
  state.unicast.addresses = {{2, 0, 0, 0, 0, 1}};
  state.rule = RxRule::kRss;
  state.pairs = 2;
  state.rss = {kHashIpv4, 0, {0, 1}, 2, {1, 2, 3}};
  state.guest_offloads = 0;
  state.rx = {false, true, false, false, false, true};
  state.vlans = {1, 2};
  state.tx_coalescing = {1, 2};
  state.queue_coalescing[1] = {3, 4};
  state.hash_tunnel = 1;
  state.rss_contexts[1] = state.rss;
  ASSERT_TRUE(state.Validate(limits).ok()) << state.Validate(limits);
  std::vector<std::pair<int, int>> order;
  for (const NetCommand& c : ReplayOf(state, limits))
    order.emplace_back(static_cast<int>(c.net_class), c.command);
  using P = std::pair<int, int>;
  EXPECT_THAT(order, ElementsAre(P(1, 1), P(1, 0), P(4, 0), P(4, 1), P(5, 0), P(0, 0), P(0, 1), P(0, 5),
                                 P(2, 0), P(2, 0), P(6, 0), P(6, 2), P(7, 0), P(9, 1)));
}

TEST(NetReplay, HashWithoutMq_IsReplayed) {
  NetLimits limits;
  limits.features = kNetFCtrlVq | kNetFHashReport;
  limits.hash_types = kHashIpv4;
  NetState state = NetState::Default(limits);
  state.hash = {kHashIpv4, {1}};
  auto commands = ReplayOf(state, limits);
  ASSERT_EQ(commands.size(), 1u);
  EXPECT_EQ(commands[0].command, kNetMqHashConfig);
}

TEST(NetReplay, OverflowedTable_OverflowsAgainWhereMoreFits) {
  NetLimits source = FullLimits(), destination = FullLimits();
  destination.mac_table_entries = 100;
  NetState state = NetState::Default(source);
  state.multicast.overflow = true;
  NetState replayed = NetState::Default(destination);
  for (const NetCommand& c : ReplayOf(state, destination)) {
    ASSERT_EQ(NetControl(destination).Apply(c.Encode(), 8, &replayed).ack, kNetAckOk);
  }
  EXPECT_EQ(replayed, state);
}

TEST(NetStateBlob, FromADeviceWithOtherFeatures_IsRefusedInWords) {
  const NetLimits limits = FullLimits();
  NetLimits other = limits;
  other.features &= ~kNetFMq;
  auto parsed = ParseNetState(SerializeNetState({NetState::Default(limits), 0, {}}, limits.features), other);
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Message(parsed.status()), HasSubstr("MQ"));
}

TEST(NetStateBlob, BeyondTheDevice_IsRefused) {
  const NetLimits limits = FullLimits();
  const std::string sound = SerializeNetState({NetState::Default(limits), 0, {}}, limits.features);
  ASSERT_TRUE(ParseNetState(sound, limits).ok());
  auto broken = [&](auto&& change) {
    v1::NetDeviceState message;
    EXPECT_TRUE(message.ParseFromString(sound));
    change(message);
    return ParseNetState(message.SerializeAsString(), limits).status();
  };
  EXPECT_FALSE(broken([](auto& m) { m.set_version(2); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.set_version(0); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.set_mac("12345"); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.set_pairs(9); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.set_pairs(0); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.set_pairs(65537); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.add_vlans(4095); }).ok());
  EXPECT_FALSE(broken([](auto& m) {
                 for (int i = 0; i < 17; ++i) m.add_vlans(i);
               }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.mutable_unicast()->set_addresses("12345"); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.mutable_unicast()->set_addresses(std::string(42, 2)); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.set_rx_rule(v1::NET_RX_RSS); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.set_rx_rule(static_cast<v1::NetRxRule>(9)); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.mutable_rss()->add_table(0); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.set_guest_offloads(~0ull); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.add_queue_coalescing()->set_queue(16); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.set_hash_tunnel(0x100); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.add_rss_contexts()->set_id(4); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.add_flows(8); }).ok());
  EXPECT_FALSE(broken([](auto& m) { m.mutable_hash()->set_key(std::string(41, 'k')); }).ok());
  EXPECT_FALSE(ParseNetState(std::string(kMaxNetState + 1, 0), limits).ok());
  EXPECT_FALSE(ParseNetState("rubbish", limits).ok());
  EXPECT_FALSE(ParseNetState("", limits).ok());
}

TEST(NetStateDifferences, AreSaidInWords) {
  const NetLimits limits = FullLimits();
  NetState a = NetState::Default(limits), b = a;
  EXPECT_THAT(Differences(a, b), IsEmpty());
  b.pairs = 2;
  b.vlans = {7};
  b.rx.promiscuous = false;
  b.rss_contexts[1] = {};
  auto differences = Differences(a, b);
  EXPECT_THAT(differences, Contains("queue pairs 1, not 2"));
  EXPECT_THAT(differences, Contains("promiscuous on, not off"));
  EXPECT_THAT(differences, Contains(HasSubstr("VLANs")));
  EXPECT_THAT(differences, Contains(HasSubstr("RSS contexts")));
}

}  // namespace
}  // namespace baton::virtio
