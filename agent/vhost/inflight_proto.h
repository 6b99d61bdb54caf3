// In-flight sets as they travel between hosts (peer.proto, VringState).
#pragma once

#include "agent/virtio/inflight.h"
#include "baton/v1/peer.pb.h"
#include "common/status.h"

namespace baton::vhost {

// Fills `inflight`, `last_avail` and `used_idx` of `out`; the rest is the caller's.
void ToProto(const virtio::InflightSet& set, v1::VringState* out);

// The set of a ring as the source shipped it, in good form by itself (CheckInflightSet). STATE_MISMATCH names
// the value that cannot be.
absl::StatusOr<virtio::InflightSet> FromProto(const v1::VringState& vring);

}  // namespace baton::vhost
