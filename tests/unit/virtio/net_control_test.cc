// Control-queue commands: what each changes, what is refused, and that a refused one changes nothing.
#include "agent/virtio/net_control.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace baton::virtio {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint64_t kEverything = kNetFCtrlVq | kNetFCtrlRx | kNetFCtrlRxExtra | kNetFCtrlVlan |
                                 kNetFCtrlMacAddr | kNetFGuestAnnounce | kNetFMq | kNetFRss |
                                 kNetFHashReport | kNetFCtrlGuestOffloads | kNetFGuestCsum | kNetFGuestTso4 |
                                 kNetFNotfCoal | kNetFVqNotfCoal | kNetFHashTunnel | kFVersion1;

NetLimits Everything() {
  NetLimits limits;
  limits.features = kEverything;
  limits.max_pairs = 4;
  limits.mac_table_entries = 4;
  limits.rss_table = 8;
  limits.hash_types = kHashAllTypes;
  limits.tunnel_types = 0xf;
  limits.rss_contexts = 2;
  limits.mac = {0x52, 0x54, 0, 1, 2, 3};
  return limits;
}

class NetControlTest : public testing::Test {
 protected:
  NetReply Send(std::vector<uint8_t> request) {
    NetState before = state_;
    NetReply reply = NetControl(limits_).Apply(request, ready_pairs_, &state_);
    if (reply.ack != kNetAckOk) {
      EXPECT_EQ(state_, before) << "a refused request changed something";
      EXPECT_FALSE(reply.error.empty());
    } else {
      EXPECT_TRUE(reply.error.empty());
    }
    EXPECT_TRUE(state_.Validate(limits_).ok()) << state_.Validate(limits_);
    return reply;
  }
  bool Accepted(std::vector<uint8_t> request) { return Send(std::move(request)).ack == kNetAckOk; }
  void Without(uint64_t features) {
    limits_.features &= ~features;
    state_ = NetState::Default(limits_);
  }
  NetLimits limits_ = Everything();
  NetState state_ = NetState::Default(limits_);
  uint16_t ready_pairs_ = 4;
};

TEST_F(NetControlTest, Defaults_AreThoseOfAReset) {
  EXPECT_EQ(state_.pairs, 1);
  EXPECT_EQ(state_.rule, RxRule::kAutomatic);
  EXPECT_TRUE(state_.rx.promiscuous);
  EXPECT_EQ(state_.guest_offloads, kNetFGuestCsum | kNetFGuestTso4);
  EXPECT_EQ(state_.mac, limits_.mac);
  EXPECT_TRUE(state_.vlans.empty());
}

TEST_F(NetControlTest, RequestsCutShort_AreRefusedAtEveryLength) {
  const std::vector<std::vector<uint8_t>> whole = {
      {0, 0, 1},
      {1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6},
      {1, 1, 1, 2, 3, 4, 5, 6},
      {2, 0, 5, 0},
      {4, 0, 2, 0},
      {4, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 2, 0, 1, 0xaa},
      {4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xaa},
      {5, 0, 2, 0, 0, 0, 0, 0, 0, 0},
      {6, 0, 1, 0, 0, 0, 2, 0, 0, 0},
      {6, 2, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0},
      {7, 0, 1, 0, 0, 0},
      {9, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0xaa},
  };
  for (const auto& request : whole) {
    for (size_t length = 0; length < request.size(); ++length) {
      state_ = NetState::Default(limits_);
      EXPECT_FALSE(Accepted({request.begin(), request.begin() + static_cast<ptrdiff_t>(length)}))
          << "class " << int{request[0]} << " command " << int{request[1]} << " at length " << length;
    }
    state_ = NetState::Default(limits_);
    EXPECT_TRUE(Accepted(request)) << "class " << int{request[0]} << " command " << int{request[1]};
  }
}

TEST_F(NetControlTest, ReceiveModes_SwitchOneByOne) {
  for (uint8_t mode = 0; mode < 6; ++mode) EXPECT_TRUE(Accepted({0, mode, static_cast<uint8_t>(mode != 0)}));
  EXPECT_EQ(state_.rx, (NetRxModes{false, true, true, true, true, true}));
  EXPECT_FALSE(Accepted({0, 6, 1}));
}

TEST_F(NetControlTest, ReceiveModesOfRxExtra_NeedIt) {
  Without(kNetFCtrlRxExtra);
  EXPECT_TRUE(Accepted({0, kNetRxAllMulti, 1}));
  EXPECT_THAT(Send({0, kNetRxNoBcast, 1}).error, HasSubstr("CTRL_RX_EXTRA"));
}

TEST_F(NetControlTest, EachClass_NeedsItsFeature) {
  const std::pair<uint64_t, std::vector<uint8_t>> cases[] = {
      {kNetFCtrlRx | kNetFCtrlRxExtra, {0, 0, 0}},
      {kNetFCtrlRx | kNetFCtrlRxExtra, {1, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
      {kNetFCtrlMacAddr, {1, 1, 1, 2, 3, 4, 5, 6}},
      {kNetFCtrlVlan, {2, 0, 1, 0}},
      {kNetFGuestAnnounce, {3, 0}},
      {kNetFMq, {4, 0, 1, 0}},
      {kNetFRss, {4, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0xaa}},
      {kNetFHashReport, {4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xaa}},
      {kNetFCtrlGuestOffloads, {5, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
      {kNetFNotfCoal, {6, 0, 1, 0, 0, 0, 2, 0, 0, 0}},
      {kNetFVqNotfCoal, {6, 3, 0, 0, 0, 0}},
      {kNetFHashTunnel, {7, 0, 1, 0, 0, 0}},
      {0, {8, 0}},
      {0, {10, 0}},
  };
  for (const auto& [feature, request] : cases) {
    limits_ = Everything();
    Without(feature);
    EXPECT_FALSE(Accepted(request)) << "class " << int{request[0]} << " command " << int{request[1]};
  }
  limits_ = Everything();
  limits_.rss_contexts = 0;
  EXPECT_THAT(Send({9, 0}).error, HasSubstr("RSS_CONTEXT"));
}

TEST_F(NetControlTest, MacTable_ReplacesTheOneBefore) {
  EXPECT_TRUE(Accepted({1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1}));
  EXPECT_THAT(state_.unicast.addresses, ElementsAre(MacAddress{2, 0, 0, 0, 0, 1}));
  EXPECT_THAT(state_.multicast.addresses, ElementsAre(MacAddress{1, 0, 0x5e, 0, 0, 1}));
  EXPECT_TRUE(Accepted({1, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(state_.unicast, MacTable());
}

TEST_F(NetControlTest, MacTableThatDoesNotFit_OverflowsAndKeepsNothingOfItsKind) {
  // Three unicast addresses fit into four places, three multicast ones beside them do not.
  std::vector<uint8_t> request{1, 0, 3, 0, 0, 0};
  for (uint8_t i = 0; i < 3; ++i) request.insert(request.end(), {2, 0, 0, 0, 0, i});
  request.insert(request.end(), {3, 0, 0, 0});
  for (uint8_t i = 0; i < 3; ++i) request.insert(request.end(), {1, 0, 0x5e, 0, 0, i});
  EXPECT_TRUE(Accepted(request));
  EXPECT_EQ(state_.unicast.addresses.size(), 3u);
  EXPECT_TRUE(state_.multicast.overflow);
  EXPECT_TRUE(state_.multicast.addresses.empty());
  EXPECT_TRUE(Accepted({0, 0, 0}));
  EXPECT_TRUE(PassesFilter(state_, limits_, {1, 0, 0x5e, 9, 9, 9}, -1))
      << "an overflowed table lets all through";
  EXPECT_FALSE(PassesFilter(state_, limits_, {2, 9, 9, 9, 9, 9}, -1));
}

TEST_F(NetControlTest, MacTableWithACountBeyondItsBytes_IsRefused) {
  EXPECT_FALSE(Accepted({1, 0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4, 5, 6}));
  EXPECT_FALSE(Accepted({1, 0, 0, 0, 0, 0, 0xab, 0xaa, 0xaa, 0x2a, 1, 2, 3, 4, 5, 6}));
}

TEST_F(NetControlTest, OverlongRequest_IsRefused) {
  std::vector<uint8_t> request(kMaxNetRequest + 1, 0);
  EXPECT_FALSE(Accepted(request));
}

TEST_F(NetControlTest, Vlans_AreAddedDeletedAndChecked) {
  EXPECT_TRUE(Accepted({2, 0, 5, 0}));
  EXPECT_TRUE(Accepted({2, 0, 0xfe, 0x0f}));
  EXPECT_FALSE(Accepted({2, 0, 0xff, 0x0f})) << "4095 is reserved";
  EXPECT_FALSE(Accepted({2, 0, 0, 0x10}));
  EXPECT_TRUE(Accepted({2, 1, 5, 0}));
  EXPECT_THAT(state_.vlans, ElementsAre(4094));
  EXPECT_TRUE(Accepted({0, 0, 0}));
  EXPECT_FALSE(PassesFilter(state_, limits_, limits_.mac, 5));
  EXPECT_TRUE(PassesFilter(state_, limits_, limits_.mac, 4094));
  EXPECT_TRUE(PassesFilter(state_, limits_, limits_.mac, -1)) << "untagged passes";
  limits_.vlans = 1;
  EXPECT_FALSE(Accepted({2, 0, 7, 0})) << "the device's filter is full";
}

TEST_F(NetControlTest, AnnounceAck_NeedsNoDataAndClearsThePending) {
  state_.announce_pending = true;
  EXPECT_TRUE(Accepted({3, 0}));
  EXPECT_FALSE(state_.announce_pending);
  EXPECT_FALSE(Accepted({3, 1}));
}

TEST_F(NetControlTest, Pairs_AreLimitedByTheDeviceAndByWhatTheDriverSetUp) {
  EXPECT_TRUE(Send({4, 0, 4, 0}).steering_changed);
  EXPECT_EQ(state_.pairs, 4);
  EXPECT_FALSE(Accepted({4, 0, 0, 0}));
  EXPECT_FALSE(Accepted({4, 0, 5, 0}));
  EXPECT_FALSE(Accepted({4, 0, 0xff, 0xff}));
  ready_pairs_ = 2;
  EXPECT_FALSE(Accepted({4, 0, 3, 0})) << "only two pairs are set up";
}

TEST_F(NetControlTest, LastMultiqueueCommand_Wins) {
  const std::vector<uint8_t> rss{4, 1, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 3, 0, 2, 0xaa, 0xbb};
  EXPECT_TRUE(Accepted(rss));
  EXPECT_EQ(state_.rule, RxRule::kRss);
  EXPECT_EQ(state_.pairs, 3);
  EXPECT_THAT(state_.rss.table, ElementsAre(0, 1));
  EXPECT_TRUE(Accepted({4, 0, 2, 0}));
  EXPECT_EQ(state_.rule, RxRule::kAutomatic) << "VQ_PAIRS_SET leaves RSS";
  EXPECT_EQ(state_.rss, RssConfig());
  EXPECT_TRUE(Accepted(rss));
  EXPECT_TRUE(Accepted({4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xaa}));
  EXPECT_EQ(state_.rule, RxRule::kAutomatic);
  EXPECT_EQ(state_.pairs, 3) << "HASH_CONFIG keeps the number of pairs";
  EXPECT_EQ(state_.hash.hash_types, kHashIpv4);
}

TEST_F(NetControlTest, RssConfig_IsCheckedFieldByField) {
  auto rss = [](uint32_t types, uint16_t mask, uint16_t unclassified, std::vector<uint16_t> table,
                uint16_t tx, uint8_t key) {
    std::vector<uint8_t> r{4, 1, static_cast<uint8_t>(types), static_cast<uint8_t>(types >> 8), 0, 0};
    auto put = [&](uint16_t v) {
      r.insert(r.end(), {static_cast<uint8_t>(v), static_cast<uint8_t>(v >> 8)});
    };
    put(mask);
    put(unclassified);
    for (uint16_t t : table) put(t);
    put(tx);
    r.push_back(key);
    r.resize(r.size() + key, 0x5a);
    return r;
  };
  EXPECT_TRUE(Accepted(rss(1, 1, 0, {0, 3}, 4, 40)));
  EXPECT_TRUE(Accepted(rss(0, 0, 0, {2}, 1, 0))) << "no hash: everything is unclassified";
  EXPECT_FALSE(Accepted(rss(1 << 9, 1, 0, {0, 1}, 1, 40))) << "a hash type that does not exist";
  EXPECT_FALSE(Accepted(rss(1, 2, 0, {0, 1, 2}, 1, 40))) << "no power of two";
  EXPECT_FALSE(Accepted(rss(1, 15, 0, std::vector<uint16_t>(16), 1, 40)))
      << "a longer table than the device's";
  EXPECT_FALSE(Accepted(rss(1, 0xffff, 0, {0}, 1, 40))) << "the mask that makes 65536 entries";
  EXPECT_FALSE(Accepted(rss(1, 1, 4, {0, 1}, 1, 40))) << "the queue for the unclassified";
  EXPECT_FALSE(Accepted(rss(1, 1, 0, {0, 4}, 1, 40))) << "a queue in the table";
  EXPECT_FALSE(Accepted(rss(1, 1, 0, {0, 1}, 0, 40))) << "no transmit queue";
  EXPECT_FALSE(Accepted(rss(1, 1, 0, {0, 1}, 5, 40))) << "too many transmit queues";
  EXPECT_FALSE(Accepted(rss(1, 1, 0, {0, 1}, 1, 41))) << "a longer key than the device's";
  EXPECT_FALSE(Accepted(rss(1, 1, 0, {0, 1}, 1, 0))) << "a hash without a key";
  ready_pairs_ = 1;
  EXPECT_FALSE(Accepted(rss(1, 1, 0, {0, 1}, 1, 40))) << "a queue that is not set up";
}

TEST_F(NetControlTest, Offloads_AreASubsetOfTheNegotiated) {
  EXPECT_TRUE(Accepted({5, 0, 2, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(state_.guest_offloads, kNetFGuestCsum);
  EXPECT_FALSE(Accepted({5, 0, 0, 1, 0, 0, 0, 0, 0, 0})) << "TSO6 was not negotiated";
  EXPECT_FALSE(Accepted({5, 0, 0, 0, 0, 0, 0, 0, 0, 0x80}));
}

TEST_F(NetControlTest, Coalescing_OfADirectionReplacesThatOfItsQueues) {
  EXPECT_TRUE(Accepted({6, 1, 8, 0, 0, 0, 9, 0, 0, 0}));
  EXPECT_TRUE(Accepted({6, 2, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0}));
  EXPECT_TRUE(Accepted({6, 2, 2, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0}));
  EXPECT_THAT(Send({6, 3, 3, 0, 0, 0}).data, ElementsAre(1, 0, 0, 0, 2, 0, 0, 0));
  EXPECT_THAT(Send({6, 3, 0, 0, 0, 0}).data, ElementsAre(8, 0, 0, 0, 9, 0, 0, 0)) << "the direction's";
  EXPECT_TRUE(Accepted({6, 0, 7, 0, 0, 0, 7, 0, 0, 0}));
  EXPECT_EQ(state_.queue_coalescing.size(), 1u) << "only the receive queue is still apart";
  EXPECT_TRUE(Accepted({6, 2, 2, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0}));
  EXPECT_TRUE(state_.queue_coalescing.empty()) << "the same as its direction";
  EXPECT_FALSE(Accepted({6, 2, 8, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0})) << "the control queue has none";
  EXPECT_FALSE(Accepted({6, 4, 0, 0, 0, 0}));
}

TEST_F(NetControlTest, HashTunnelAndRssContexts_KeepToTheDevice) {
  EXPECT_TRUE(Accepted({7, 0, 5, 0, 0, 0}));
  EXPECT_FALSE(Accepted({7, 0, 0x10, 0, 0, 0}));
  EXPECT_THAT(Send({9, 0}).data, ElementsAre(2, 0));
  const std::vector<uint8_t> rss{1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0xaa};
  auto context = [&](uint8_t command, uint8_t id) {
    std::vector<uint8_t> r{9, command, id, 0};
    r.insert(r.end(), rss.begin(), rss.end());
    return r;
  };
  EXPECT_FALSE(Accepted(context(kNetRssCtxAdd, 0))) << "0 is the device's own";
  EXPECT_FALSE(Accepted(context(kNetRssCtxMod, 1))) << "does not exist";
  EXPECT_TRUE(Accepted(context(kNetRssCtxAdd, 1)));
  EXPECT_FALSE(Accepted(context(kNetRssCtxAdd, 1))) << "exists";
  EXPECT_TRUE(Accepted(context(kNetRssCtxMod, 1)));
  EXPECT_TRUE(Accepted(context(kNetRssCtxAdd, 2)));
  EXPECT_FALSE(Accepted(context(kNetRssCtxAdd, 3)));
  EXPECT_TRUE(Accepted({9, kNetRssCtxDel, 1, 0}));
  EXPECT_FALSE(Accepted({9, kNetRssCtxDel, 1, 0}));
  EXPECT_EQ(state_.rss_contexts.size(), 1u);
}

// The command of the 2012 proposal: {rule, reserved, param}, param + 1 pairs.
TEST_F(NetControlTest, SteeringProposal_RulesAreProbedByTheirAcknowledgement) {
  limits_.features = kNetFCtrlVq | kNetFSteering | kFVersion1;
  limits_.rss_contexts = 0;
  state_ = NetState::Default(limits_);
  EXPECT_EQ(state_.rule, RxRule::kSingle) << "the default";
  EXPECT_EQ(limits_.RxQueue(state_.rule, 0), 0u);
  EXPECT_EQ(limits_.ControlQueue(), 2u);
  EXPECT_EQ(limits_.QueueCount(), 12u);
  EXPECT_TRUE(Send({4, 0, 2, 0, 3, 0}).steering_changed);
  EXPECT_EQ(state_.rule, RxRule::kFollowsTx);
  EXPECT_EQ(state_.pairs, 4);
  EXPECT_EQ(limits_.RxQueue(state_.rule, 1), 6u) << "the default queues are unused, 3 is reserved";
  EXPECT_EQ(limits_.TxQueue(state_.rule, 1), 7u);
  EXPECT_TRUE(Accepted({4, 0, 1, 0, 0, 0}));
  EXPECT_EQ(state_.rule, RxRule::kHost);
  EXPECT_FALSE(Accepted({4, 0, 3, 0, 0, 0})) << "an unknown rule";
  EXPECT_FALSE(Accepted({4, 0, 1, 0, 4, 0})) << "more pairs than there are";
  EXPECT_FALSE(Accepted({4, 0, 1, 0, 0xff, 0xff}));
  ready_pairs_ = 1;
  EXPECT_FALSE(Accepted({4, 0, 1, 0, 1, 0})) << "they must have been set up beforehand";
  EXPECT_TRUE(Accepted({4, 0, 0, 0, 9, 9})) << "param is unused with the single queue";
  EXPECT_EQ(state_, NetState::Default(limits_));
}

TEST_F(NetControlTest, SteeringProposal_ExcludesWhatClaimsItsCommandsAndFields) {
  for (uint64_t other : {kNetFMq, kNetFRss, kNetFMtu}) {
    NetLimits limits;
    limits.features = kNetFCtrlVq | kNetFSteering | other;
    EXPECT_FALSE(limits.Check().ok());
  }
}

TEST_F(NetControlTest, Filter_FollowsTheModes) {
  const MacAddress broadcast{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, other{2, 2, 2, 2, 2, 2},
      group{1, 0, 0, 0, 0, 1};
  EXPECT_TRUE(PassesFilter(state_, limits_, other, 9)) << "promiscuous";
  EXPECT_TRUE(Accepted({0, kNetRxPromisc, 0}));
  EXPECT_TRUE(PassesFilter(state_, limits_, broadcast, -1));
  EXPECT_TRUE(PassesFilter(state_, limits_, limits_.mac, -1));
  EXPECT_FALSE(PassesFilter(state_, limits_, other, -1));
  EXPECT_FALSE(PassesFilter(state_, limits_, group, -1));
  EXPECT_TRUE(Accepted({0, kNetRxAllMulti, 1}));
  EXPECT_TRUE(PassesFilter(state_, limits_, group, -1));
  EXPECT_TRUE(Accepted({0, kNetRxAllUni, 1}));
  EXPECT_TRUE(PassesFilter(state_, limits_, other, -1));
  EXPECT_TRUE(Accepted({0, kNetRxNoMulti, 1}));
  EXPECT_FALSE(PassesFilter(state_, limits_, group, -1));
  EXPECT_TRUE(Accepted({0, kNetRxNoUni, 1}));
  EXPECT_FALSE(PassesFilter(state_, limits_, limits_.mac, -1));
  EXPECT_TRUE(Accepted({0, kNetRxNoBcast, 1}));
  EXPECT_FALSE(PassesFilter(state_, limits_, broadcast, -1));
}

}  // namespace
}  // namespace baton::virtio
