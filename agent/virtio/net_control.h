// The control queue of a virtio-net device: requests as a driver writes them, applied to a NetState.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "agent/virtio/net_state.h"
#include "common/status.h"

namespace baton::virtio {

// One control command, without the acknowledgement that follows it.
struct NetCommand {
  NetClass net_class = NetClass::kRx;
  uint8_t command = 0;
  std::vector<uint8_t> data;
  // Class, command and data as they are in the queue.
  std::vector<uint8_t> Encode() const;
  bool operator==(const NetCommand&) const = default;
};

// The longest request: a MAC table of everything a device may be given (QEMU: 64 entries; more overflow) is
// far below. What is longer is refused unread.
inline constexpr size_t kMaxNetRequest = size_t{64} << 10;

struct NetReply {
  // kNetAckOk or kNetAckErr.
  uint8_t ack = kNetAckErr;
  // For the device-writable part before the acknowledgement (VQ_GET, CAP_GET).
  std::vector<uint8_t> data;
  // What was wrong, for a log; empty with kNetAckOk.
  std::string error;
  // The receive rule or its parameters were set: see QueueSwitch.
  bool steering_changed = false;
};

// Applies requests. Security model: a request is whatever a guest wrote, of any length; it was copied from
// guest memory once. A request that is refused changes nothing.
class NetControl {
 public:
  explicit NetControl(const NetLimits& limits) : limits_(limits) {}
  const NetLimits& limits() const { return limits_; }

  // `request`: class, command and data. `ready_pairs`: how many pairs the driver has set up, counted from the
  // first; a rule that would use more is refused ("the driver must have configured all of them beforehand").
  NetReply Apply(std::span<const uint8_t> request, uint16_t ready_pairs, NetState* state) const;

 private:
  NetLimits limits_;
};

}  // namespace baton::virtio
