#include "agent/virtio/packet.h"

#include <cstring>

namespace baton::virtio {
namespace {

constexpr uint16_t kTypeIpv4 = 0x0800, kTypeIpv6 = 0x86dd, kTypeVlan = 0x8100, kTypeQinQ = 0x88a8;
constexpr uint8_t kTcp = 6, kUdp = 17;
// More extension headers or tags than this are nobody's packet.
constexpr int kMaxHeaders = 8;

uint16_t Big16(const uint8_t* p) { return static_cast<uint16_t>(p[0] << 8 | p[1]); }

void ParsePorts(std::span<const uint8_t> l4, uint8_t protocol, PacketInfo* out) {
  if ((protocol != kTcp && protocol != kUdp) || l4.size() < 4) return;
  out->l4 = protocol == kTcp ? PacketInfo::L4::kTcp : PacketInfo::L4::kUdp;
  std::memcpy(&out->source_port, l4.data(), 2);
  std::memcpy(&out->destination_port, l4.data() + 2, 2);
}

void ParseIpv4(std::span<const uint8_t> ip, PacketInfo* out) {
  if (ip.size() < 20 || ip[0] >> 4 != 4) return;
  const size_t header = size_t{ip[0] & 0xfu} * 4;
  if (header < 20 || header > ip.size()) return;
  out->l3 = PacketInfo::L3::kIpv4;
  std::memcpy(out->source_address.data(), ip.data() + 12, 4);
  std::memcpy(out->destination_address.data(), ip.data() + 16, 4);
  // Every fragment, the first too: the others have no ports, and all of them belong to one queue.
  if (Big16(&ip[6]) & 0x3fff) return;
  ParsePorts(ip.subspan(header), ip[9], out);
}

// A home address option (type 0xc9, 16 bytes) among the destination options.
void FindHomeAddress(std::span<const uint8_t> options, PacketInfo* out) {
  for (size_t at = 0; at < options.size();) {
    if (options[at] == 0) {  // Pad1
      ++at;
      continue;
    }
    if (at + 2 > options.size()) return;
    const size_t length = options[at + 1];
    if (at + 2 + length > options.size()) return;
    if (options[at] == 0xc9 && length == 16) {
      std::memcpy(out->home_address.data(), &options[at + 2], 16);
      return;
    }
    at += 2 + length;
  }
}

void ParseIpv6(std::span<const uint8_t> ip, PacketInfo* out) {
  if (ip.size() < 40 || ip[0] >> 4 != 6) return;
  out->l3 = PacketInfo::L3::kIpv6;
  std::memcpy(out->source_address.data(), ip.data() + 8, 16);
  std::memcpy(out->destination_address.data(), ip.data() + 24, 16);
  out->home_address = out->source_address;
  out->final_destination = out->destination_address;
  uint8_t next = ip[6];
  auto rest = ip.subspan(40);
  for (int i = 0; i < kMaxHeaders; ++i) {
    if (next == kTcp || next == kUdp) return ParsePorts(rest, next, out);
    if (next == 44) {  // fragment
      out->extended = true;
      return;
    }
    if (next != 0 && next != 43 && next != 60) return;
    if (rest.size() < 8) return;
    const size_t length = (size_t{rest[1]} + 1) * 8;
    if (length > rest.size()) return;
    out->extended = true;
    if (next == 43 && rest[2] == 2 && length >= 24) {
      std::memcpy(out->final_destination.data(), &rest[8], 16);
    }
    if (next == 60) FindHomeAddress(rest.subspan(2, length - 2), out);
    next = rest[0];
    rest = rest.subspan(length);
  }
}

}  // namespace

std::optional<PacketInfo> ParsePacket(std::span<const uint8_t> frame) {
  if (frame.size() < 14) return std::nullopt;
  PacketInfo out;
  std::memcpy(out.destination.data(), frame.data(), 6);
  std::memcpy(out.source.data(), frame.data() + 6, 6);
  out.ethertype = Big16(&frame[12]);
  auto rest = frame.subspan(14);
  for (int i = 0; i < 2 && (out.ethertype == kTypeVlan || out.ethertype == kTypeQinQ); ++i) {
    if (rest.size() < 4) return out;
    if (out.vlan < 0) out.vlan = Big16(&rest[0]) & 0xfff;
    out.ethertype = Big16(&rest[2]);
    rest = rest.subspan(4);
  }
  if (out.ethertype == kTypeIpv4) ParseIpv4(rest, &out);
  if (out.ethertype == kTypeIpv6) ParseIpv6(rest, &out);
  return out;
}

}  // namespace baton::virtio
