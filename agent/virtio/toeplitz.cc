#include "agent/virtio/toeplitz.h"

#include <cstring>

namespace baton::virtio {

uint32_t Toeplitz(std::span<const uint8_t> key, std::span<const uint8_t> input) {
  auto key_byte = [&](size_t i) -> uint64_t { return i < key.size() ? key[i] : 0; };
  // The upper half of `window` is the 32 bits of the key at the current bit; each input byte uses up 8 bits.
  uint64_t window = 0;
  for (size_t i = 0; i < 8; ++i) window = window << 8 | key_byte(i);
  uint32_t hash = 0;
  for (size_t i = 0; i < input.size(); ++i) {
    for (int bit = 7; bit >= 0; --bit) {
      if (input[i] >> bit & 1) hash ^= static_cast<uint32_t>(window >> 32);
      window <<= 1;
    }
    window |= key_byte(i + 8);
  }
  return hash;
}

PacketHash HashPacket(const PacketInfo& packet, uint32_t hash_types, std::span<const uint8_t> key) {
  std::array<uint8_t, 36> input;
  size_t size = 0;
  auto put = [&](const void* from, size_t n) {
    std::memcpy(input.data() + size, from, n);
    size += n;
  };
  auto ports = [&] {
    put(&packet.source_port, 2);
    put(&packet.destination_port, 2);
  };
  const bool tcp = packet.l4 == PacketInfo::L4::kTcp, udp = packet.l4 == PacketInfo::L4::kUdp;
  HashReport report = HashReport::kNone;
  if (packet.l3 == PacketInfo::L3::kIpv4) {
    const bool with_ports = (tcp && (hash_types & kHashTcpv4)) || (udp && (hash_types & kHashUdpv4));
    if (!with_ports && !(hash_types & kHashIpv4)) return {};
    put(packet.source_address.data(), 4);
    put(packet.destination_address.data(), 4);
    if (with_ports) ports();
    report = !with_ports ? HashReport::kIpv4 : tcp ? HashReport::kTcpv4 : HashReport::kUdpv4;
  } else if (packet.l3 == PacketInfo::L3::kIpv6) {
    // Without extension headers the _EX types are the same as the plain ones (VIRTIO 1.4, 5.1.6.4.3.4).
    struct Kind {
      bool fits;
      uint32_t ex, plain;
      HashReport ex_report, plain_report;
      bool ports;
    };
    const Kind kinds[] = {
        {tcp, kHashTcpEx, kHashTcpv6, HashReport::kTcpv6Ex, HashReport::kTcpv6, true},
        {udp, kHashUdpEx, kHashUdpv6, HashReport::kUdpv6Ex, HashReport::kUdpv6, true},
        {true, kHashIpEx, kHashIpv6, HashReport::kIpv6Ex, HashReport::kIpv6, false},
    };
    for (const Kind& kind : kinds) {
      if (!kind.fits) continue;
      const bool ex = (hash_types & kind.ex) != 0;
      if (!ex && !(hash_types & kind.plain)) continue;
      put(ex ? packet.home_address.data() : packet.source_address.data(), 16);
      put(ex ? packet.final_destination.data() : packet.destination_address.data(), 16);
      if (kind.ports) ports();
      report = ex ? kind.ex_report : kind.plain_report;
      break;
    }
  }
  if (report == HashReport::kNone) return {};
  return {Toeplitz(key, std::span(input).first(size)), report};
}

}  // namespace baton::virtio
