// What a device does, apart from how it is reached: the interface between the lab device's vhost-user side
// (rings, in-flight region, dirty log, stop and start) and its models (blk, net).
//
// Threads: everything here is called on the thread that runs LabDevice::Run, in both directions. A model
// never blocks; what takes time ends in a call of the host from Tick or from a watched descriptor.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/status.h"

namespace baton::lab {

// A piece of guest memory, checked and mapped. `data` stays valid until the request is completed or
// abandoned, also across a change of the memory table.
struct IoSegment {
  uint8_t* data = nullptr;
  uint32_t len = 0;
  uint64_t gpa = 0;
};

// A descriptor chain in the hands of the model, from Pop (or Replay) to Complete (or Abandon). Owned by the
// host, which uses it again for a later chain.
struct IoRequest {
  uint32_t queue = 0;
  // Below the ring's size, and no other request of this queue has it: for arrays beside the host's.
  uint32_t slot = 0;
  // Head (split) or buffer id (packed).
  uint16_t id = 0;
  // Order of fetching within the queue; what the in-flight region holds.
  uint64_t counter = 0;
  // Comes from the in-flight region: a device before this one had fetched it.
  bool replayed = false;
  // The device may read the first, and write the second.
  std::vector<IoSegment> readable;
  std::vector<IoSegment> writable;
  uint64_t readable_bytes = 0;
  uint64_t writable_bytes = 0;
};

// How a queue is to be stopped.
enum class StopMode {
  // Every request is to be completed.
  kDrain,
  // No request needs to be completed. One that is not is abandoned, but only once nothing of it can touch
  // guest memory or storage any more (a confirmed cancel); one that must not be executed twice and has
  // already begun is completed all the same.
  kSuspend,
};

// What the host does for a model.
class DeviceHost {
 public:
  virtual ~DeviceHost() = default;
  // The next available chain, noted as in flight; null when there is none or the queue is not running.
  virtual IoRequest* Pop(uint32_t queue) = 0;
  // Everything of `request` is done and `written` bytes of its writable part have been written: logs these,
  // publishes the chain (now or, with IN_ORDER, in its turn) and calls the driver. `request` is gone.
  virtual void Complete(IoRequest* request, uint32_t written) = 0;
  // Only after Stop or Reset: the request stays in the in-flight region, as it is. `request` is gone.
  virtual void Abandon(IoRequest* request) = 0;
  // True between the start of a queue and its stop, while it is enabled.
  virtual bool Running(uint32_t queue) const = 0;
  // Feature bits that the driver has accepted.
  virtual uint64_t features() const = 0;
  // Calls DeviceModel::Tick at `when`, unless an earlier time is already set. Clock::time_point::max():
  // never.
  virtual void TickAt(Clock::time_point when) = 0;
  // Calls `ready` whenever `fd` is readable, until Unwatch. The descriptor stays the caller's.
  virtual void Watch(int fd, std::function<void()> ready) = 0;
  virtual void Unwatch(int fd) = 0;
  // Tells the front-end that the config space changed (back-end channel, if there is one).
  virtual void ConfigChanged() = 0;
  // Tells the front-end that this queue needs attention: its error eventfd, and VRING_ERR on the back-end
  // channel.
  virtual void QueueError(uint32_t queue) = 0;
  // A place where a fault may end the process (see LabFaults::crash_at). Does not return then.
  virtual void CrashPoint(const char* name) = 0;
  // A counter that `stats` shows and `wait` can wait for. The reference stays valid.
  virtual int64_t& Counter(const std::string& name) = 0;
};

class DeviceModel {
 public:
  virtual ~DeviceModel() = default;
  // Called once, before anything else. `host` outlives the model.
  virtual void Attach(DeviceHost* host) = 0;
  // Feature bits of the device type that are offered (ring features are the host's).
  virtual uint64_t Features() const = 0;
  // Protocol features that the model wants offered beside the host's own (RARP, NET_MTU, DEVICE_STATE ...).
  virtual uint64_t ProtocolFeatures() const { return 0; }
  // Virtqueues, the control queue included.
  virtual uint32_t Queues() const = 0;
  // What GET_QUEUE_NUM answers: queue *pairs* for net, queues for everything else.
  virtual uint32_t QueueNum() const { return Queues(); }
  // The config space. A read beyond it is refused by the host.
  virtual std::span<const uint8_t> Config() const = 0;
  // `migration`: fields that are read-only for a driver may be written. InvalidArgument refuses.
  virtual absl::Status WriteConfig(uint32_t offset, std::span<const uint8_t> data, bool migration) = 0;
  virtual void FeaturesAccepted(uint64_t /*features*/) {}
  // The queue runs from now on; Available follows at once.
  virtual void Started(uint32_t /*queue*/) {}
  // A request that was in flight when a device before this one ended, oldest first, before the queue's first
  // Available. Overlapping requests take effect in this order.
  virtual void Replay(IoRequest* request) = 0;
  // There may be chains to Pop. What is left in the ring (network receive buffers) is not offered again
  // before the driver's next kick.
  virtual void Available(uint32_t queue) = 0;
  // The driver can see that this request is complete.
  virtual void Published(uint32_t /*queue*/, uint64_t /*counter*/) {}
  // Brings it about, now or later, that each request of the queue is completed or abandoned. Pop gives
  // nothing any more.
  virtual void Stop(uint32_t queue, StopMode mode) = 0;
  // The device was reset, or the front-end went away, with every queue stopped.
  virtual void Reset() {}
  virtual void Tick(Clock::time_point /*now*/) {}
  virtual absl::Status SendRarp(std::span<const uint8_t, 6> /*mac*/) {
    return absl::UnimplementedError("this device announces nothing");
  }
  virtual absl::Status SetMtu(uint64_t /*mtu*/) { return absl::UnimplementedError("not a network device"); }
  // State for DEVICE_STATE, with every queue stopped.
  virtual absl::StatusOr<std::string> SaveState() { return absl::UnimplementedError("no state to save"); }
  virtual absl::Status LoadState(const std::string& /*state*/) {
    return absl::UnimplementedError("no state to load");
  }
  // Shown by the control socket's `stats`, under "model".
  virtual nlohmann::json Describe() const { return nlohmann::json::object(); }
  // Keys of the control socket's `set` that the host does not know; `command` holds only these. The error
  // names the key.
  virtual absl::Status Set(const nlohmann::json& command) {
    if (command.empty()) return absl::OkStatus();
    return Error(absl::StatusCode::kInvalidArgument, "no setting {}", command.begin().key());
  }
};

}  // namespace baton::lab
