// In-flight sets as they travel between hosts (peer.proto, VringState).
#pragma once

#include "agent/virtio/inflight.h"
#include "baton/v1/peer.pb.h"
#include "common/status.h"

namespace baton::vhost {

// Fills `inflight`, `last_avail` and `used_idx` of `out`, and of a packed ring `chain_lengths` and
// `descriptors`; the rest is the caller's. The set's descriptors may lie in `out` already (RoomIn).
void ToProto(const virtio::InflightView& set, v1::VringState* out);

// Makes `out` a state of which ToProto of `n` requests and descriptors takes no more memory, and touches
// that.
void MakeRoom(bool packed, uint32_t n, v1::VringState* out);
// Where a packed ring's descriptors may be put, after MakeRoom; else nowhere.
std::span<virtio::InflightDesc> RoomIn(v1::VringState* out);

// The set of a ring as the source shipped it, in good form by itself (CheckInflightSet). STATE_MISMATCH names
// the value that cannot be.
absl::StatusOr<virtio::InflightSet> FromProto(const v1::VringState& vring);

}  // namespace baton::vhost
