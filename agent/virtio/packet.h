// What steering needs to know of an Ethernet frame.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "agent/virtio/net_protocol.h"

namespace baton::virtio {

// Addresses and ports, in network byte order, as they stand in the frame.
struct PacketInfo {
  MacAddress destination{};
  MacAddress source{};
  int vlan = -1;           // id of the (outer) 802.1Q tag
  uint16_t ethertype = 0;  // of what follows the tags
  enum class L3 : uint8_t { kOther, kIpv4, kIpv6 } l3 = L3::kOther;
  enum class L4 : uint8_t { kNone, kTcp, kUdp } l4 = L4::kNone;  // kNone in fragments
  std::array<uint8_t, 16> source_address{};                      // IPv4: the first four bytes
  std::array<uint8_t, 16> destination_address{};
  uint16_t source_port = 0;  // network byte order
  uint16_t destination_port = 0;
  // IPv6 extension headers were there; the two below are what the *_EX hash types use.
  bool extended = false;
  std::array<uint8_t, 16> home_address{};       // of a home address option, else the source address
  std::array<uint8_t, 16> final_destination{};  // of a routing header of type 2, else the destination address
};

// nullopt: shorter than an Ethernet header. Everything else has an answer; what is truncated or malformed
// above Ethernet counts as L3::kOther or L4::kNone. `frame` is hostile.
std::optional<PacketInfo> ParsePacket(std::span<const uint8_t> frame);

}  // namespace baton::virtio
