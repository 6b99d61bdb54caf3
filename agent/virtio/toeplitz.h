// The Toeplitz hash of receive-side scaling (VIRTIO 1.4, 5.1.6.4.3), over what of a packet the driver chose.
#pragma once

#include <cstdint>
#include <span>

#include "agent/virtio/packet.h"

namespace baton::virtio {

// `key` shorter than the input needs is continued with zeros.
uint32_t Toeplitz(std::span<const uint8_t> key, std::span<const uint8_t> input);

struct PacketHash {
  uint32_t value = 0;
  HashReport report = HashReport::kNone;  // kNone: the driver chose no type that fits
};
// The most specific of `hash_types` that the packet has.
PacketHash HashPacket(const PacketInfo& packet, uint32_t hash_types, std::span<const uint8_t> key);

}  // namespace baton::virtio
