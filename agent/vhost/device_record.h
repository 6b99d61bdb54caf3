// What the VMM asked of a device: everything that is needed to build the device again at a back-end.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "agent/vhost/device_memo.h"
#include "agent/vhost/memory_table.h"
#include "agent/vhost/socket.h"
#include "agent/vhost/wire.h"
#include "agent/virtio/packed_ring.h"
#include "agent/virtio/split_ring.h"
#include "common/fd.h"

namespace baton::vhost {

// A notification descriptor that the VMM handed over, or its explicit absence (bit 8).
struct Notifier {
  bool set = false;
  UniqueFd fd;
};

struct VringRecord {
  uint32_t num = 0;  // 0: not set
  std::optional<uint32_t> base;
  std::optional<VringAddr> addr;  // user addresses, flags without F_LOG
  Notifier kick, call, err;
  std::optional<bool> enabled;
  // Between SET_VRING_KICK and GET_VRING_BASE.
  bool started = false;
  // The answer to the last GET_VRING_BASE. A later SET_VRING_BASE with this value means "go on where you
  // were".
  std::optional<uint32_t> told;
  // The back-end that served it is gone and took an unknown number of requests with it. Cleared when the ring
  // was recovered, or when the guest set it up anew.
  bool lost = false;
  // What the memo had of this ring has been taken over.
  bool recalled = false;
};

struct ConfigWrite {
  uint32_t offset;
  uint32_t flags;
  std::vector<uint8_t> data;
};

// One session of the VMM, from its connection to its disconnection. Not thread-safe.
struct DeviceRecord {
  std::optional<uint64_t> features;  // without VHOST_F_LOG_ALL
  uint64_t protocol_features = 0;
  MemoryTable memory;
  std::map<uint32_t, VringRecord> vrings;
  std::optional<uint64_t> status;
  std::optional<uint64_t> mtu;
  std::vector<ConfigWrite> config_writes;
  InflightRegion inflight;  // always our own, never the VMM's
  Connection channel;       // the VMM's end for requests of the back-end

  bool packed() const;
  bool any_started() const;
  // Ring addresses in guest physical terms. InvalidArgument if the ring is not wholly in guest memory, or
  // misaligned.
  absl::StatusOr<virtio::SplitRing> Split(uint32_t index) const;
  absl::StatusOr<virtio::PackedRing> Packed(uint32_t index) const;
};

}  // namespace baton::vhost
