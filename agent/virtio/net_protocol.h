// virtio-net on the wire: feature bits, configuration space, control commands, packet header (VIRTIO 1.4,
// 5.1). Numbers only.
#pragma once

#include <array>
#include <cstdint>

#include "agent/virtio/features.h"

namespace baton::virtio {

using MacAddress = std::array<uint8_t, 6>;

inline constexpr uint64_t kNetFGuestCsum = Bit(1);
inline constexpr uint64_t kNetFCtrlGuestOffloads = Bit(2);
inline constexpr uint64_t kNetFMac = Bit(5);
inline constexpr uint64_t kNetFGuestTso4 = Bit(7);
inline constexpr uint64_t kNetFGuestTso6 = Bit(8);
inline constexpr uint64_t kNetFGuestEcn = Bit(9);
inline constexpr uint64_t kNetFGuestUfo = Bit(10);
inline constexpr uint64_t kNetFMrgRxbuf = Bit(15);
inline constexpr uint64_t kNetFStatus = Bit(16);
inline constexpr uint64_t kNetFCtrlVq = Bit(17);
inline constexpr uint64_t kNetFCtrlRx = Bit(18);
inline constexpr uint64_t kNetFCtrlVlan = Bit(19);
inline constexpr uint64_t kNetFCtrlRxExtra = Bit(20);
inline constexpr uint64_t kNetFGuestAnnounce = Bit(21);
inline constexpr uint64_t kNetFCtrlMacAddr = Bit(23);
inline constexpr uint64_t kNetFHashTunnel = Bit(51);
inline constexpr uint64_t kNetFVqNotfCoal = Bit(52);
inline constexpr uint64_t kNetFNotfCoal = Bit(53);
inline constexpr uint64_t kNetFGuestUso4 = Bit(54);
inline constexpr uint64_t kNetFGuestUso6 = Bit(55);
inline constexpr uint64_t kNetFHashReport = Bit(57);
inline constexpr uint64_t kNetFRss = Bit(60);
// Experimental, of this project; no standard gives this bit a meaning. The steering command of the 2012
// multiqueue proposal (single queue, receive follows transmit, chosen by the host), with that proposal's
// queue numbers and configuration fields. Off unless asked for; excludes kNetFMq and kNetFRss, whose class 4
// commands and configuration fields it overlays.
inline constexpr uint64_t kNetFSteering = Bit(58);

// What a driver may accept only together with CTRL_VQ. A vhost-user back-end may see them without it: QEMU
// keeps the control queue to itself and passes GUEST_ANNOUNCE, MQ and the like on (user_feature_bits in
// net/vhost-user.c).
inline constexpr uint64_t kNetFNeedCtrlVq = kNetFMq | kNetFRss | kNetFCtrlRx | kNetFCtrlVlan |
                                            kNetFCtrlRxExtra | kNetFCtrlMacAddr | kNetFGuestAnnounce |
                                            kNetFNotfCoal | kNetFVqNotfCoal | kNetFHashTunnel |
                                            kNetFCtrlGuestOffloads | kNetFHashReport | kNetFSteering;

// The offloads that a guest can switch at run time, by the bit of their feature.
inline constexpr uint64_t kNetGuestOffloads = kNetFGuestCsum | kNetFGuestTso4 | kNetFGuestTso6 |
                                              kNetFGuestEcn | kNetFGuestUfo | kNetFGuestUso4 | kNetFGuestUso6;

// Bits of the configuration field `status`.
inline constexpr uint16_t kNetStatusLinkUp = 1;
inline constexpr uint16_t kNetStatusAnnounce = 2;

// {u8 class, u8 command} data → {u8 ack}.
enum class NetClass : uint8_t {
  kRx = 0,
  kMac = 1,
  kVlan = 2,
  kAnnounce = 3,
  kMq = 4,
  kGuestOffloads = 5,
  kNotfCoal = 6,
  kHashTunnel = 7,
  kStats = 8,
  kRssContext = 9,
};
inline constexpr uint8_t kNetRxPromisc = 0, kNetRxAllMulti = 1, kNetRxAllUni = 2, kNetRxNoMulti = 3,
                         kNetRxNoUni = 4, kNetRxNoBcast = 5;
inline constexpr uint8_t kNetMacTableSet = 0, kNetMacAddrSet = 1;
inline constexpr uint8_t kNetVlanAdd = 0, kNetVlanDel = 1;
inline constexpr uint8_t kNetAnnounceAck = 0;
inline constexpr uint8_t kNetMqPairsSet = 0, kNetMqRssConfig = 1, kNetMqHashConfig = 2;
inline constexpr uint8_t kNetSteeringSet = 0;  // class kMq, under kNetFSteering
inline constexpr uint8_t kNetOffloadsSet = 0;
inline constexpr uint8_t kNetCoalTxSet = 0, kNetCoalRxSet = 1, kNetCoalVqSet = 2, kNetCoalVqGet = 3;
inline constexpr uint8_t kNetHashTunnelSet = 0;
inline constexpr uint8_t kNetRssCtxCapGet = 0, kNetRssCtxAdd = 1, kNetRssCtxMod = 2, kNetRssCtxDel = 3;
inline constexpr uint8_t kNetAckOk = 0, kNetAckErr = 1;

// Hash types, and the reports that a receive header carries (VIRTIO 1.4, 5.1.6.4.3 and 5.1.6.4.4).
inline constexpr uint32_t kHashIpv4 = 1 << 0, kHashTcpv4 = 1 << 1, kHashUdpv4 = 1 << 2, kHashIpv6 = 1 << 3,
                          kHashTcpv6 = 1 << 4, kHashUdpv6 = 1 << 5, kHashIpEx = 1 << 6, kHashTcpEx = 1 << 7,
                          kHashUdpEx = 1 << 8;
inline constexpr uint32_t kHashAllTypes = (1 << 9) - 1;
enum class HashReport : uint16_t {
  kNone = 0,
  kIpv4 = 1,
  kTcpv4 = 2,
  kUdpv4 = 3,
  kIpv6 = 4,
  kTcpv6 = 5,
  kUdpv6 = 6,
  kIpv6Ex = 7,
  kTcpv6Ex = 8,
  kUdpv6Ex = 9,
};

inline constexpr uint16_t kNetMaxPairs = 0x8000;
inline constexpr size_t kNetMaxKey = 40;       // what Toeplitz can use for the longest input
inline constexpr size_t kNetMaxTable = 512;    // indirection entries; Linux and QEMU use 128
inline constexpr uint16_t kNetMaxVlan = 4095;  // VLAN ids are 0..4094; 4095 is reserved (802.1Q)

// Before each packet, little-endian. `num_buffers` is there with VERSION_1 or MRG_RXBUF, `hash…` with
// HASH_REPORT.
struct NetHeader {
  uint8_t flags = 0;
  uint8_t gso_type = 0;
  uint16_t hdr_len = 0;
  uint16_t gso_size = 0;
  uint16_t csum_start = 0;
  uint16_t csum_offset = 0;
  uint16_t num_buffers = 0;
};
static_assert(sizeof(NetHeader) == 12);

}  // namespace baton::virtio
