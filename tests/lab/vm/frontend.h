// The VMM's side of one vhost-user device, as QEMU has it: connects, negotiates, starts and stops rings, and
// comes back after its peer was away.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agent/vhost/frontend.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"
#include "tests/lab/vm/options.h"
#include "tests/lab/vm/ram.h"

namespace baton::lab {

// Where a ring is and where it goes on; guest physical addresses.
struct RingPlace {
  uint16_t size = 0;
  uint64_t desc = 0, driver = 0, device = 0;
  // As SET_VRING_BASE takes it.
  uint32_t base = 0;
};

// Not thread-safe. Calls that wait do so at most until `deadline`; any error but those named means that the
// connection is gone (connected() is false then).
class DeviceFrontend {
 public:
  // `rings`: vrings of the device (blk: queues; net: two a pair, and the control queue).
  DeviceFrontend(const DeviceOptions& options, const Ram& ram, uint32_t rings, bool ask_inflight);

  // Connects and agrees on everything up to SET_OWNER and the configuration space. The features that the
  // first connection offered must be offered again (FailedPrecondition). What a device was given stays with
  // it over a new connection: the in-flight region above all.
  absl::Status Connect(Deadline deadline);
  bool connected() const { return frontend_.has_value(); }
  // Readable when the peer says something unasked, i.e. has gone away.
  int fd() const { return frontend_ ? frontend_->fd() : -1; }
  int channel_fd() const { return frontend_ ? frontend_->channel_fd() : -1; }
  // To be called when fd() or channel_fd() is readable. False: the connection is gone.
  bool Attend();
  void Disconnect();

  // What the device offers, and its configuration space.
  uint64_t offered() const { return offered_; }
  const std::vector<uint8_t>& config() const { return config_; }
  // The peer said since the last call that its configuration space changed. ReadConfig reads it again.
  bool TakeConfigChange() { return std::exchange(config_changed_, false); }
  absl::Status ReadConfig(Deadline deadline);

  // Hands over memory and starts the rings, in QEMU's order. Every ring is kicked once.
  absl::Status Start(uint64_t features, const std::vector<RingPlace>& rings, Deadline deadline);
  bool started() const { return started_; }
  // Stops them. One base for each ring; nullopt where the peer did not tell any more.
  std::vector<std::optional<uint32_t>> Stop(Deadline deadline);

  // Kick and call descriptors of each ring; they live as long as this object.
  int kick_fd(uint32_t ring) const { return notifiers_[ring].kick.get(); }
  int call_fd(uint32_t ring) const { return notifiers_[ring].call.get(); }
  void Kick(uint32_t ring) const;
  // Connections made so far.
  uint32_t connections() const { return connections_; }
  const DeviceOptions& options() const { return options_; }

 private:
  absl::Status StartRings(uint64_t features, const std::vector<RingPlace>& rings, Deadline deadline);
  absl::Status Hello(Deadline deadline);
  absl::Status HandOverInflight(uint16_t size, Deadline deadline);

  struct Notifiers {
    UniqueFd kick, call;
  };
  const DeviceOptions options_;
  const Ram& ram_;
  const bool ask_inflight_;
  std::vector<Notifiers> notifiers_;
  std::optional<vhost::Frontend> frontend_;
  uint64_t offered_ = 0;
  std::vector<uint8_t> config_;
  bool config_changed_ = false;
  struct Inflight {
    vhost::InflightDescription description{};
    UniqueFd fd;
  };
  std::optional<Inflight> inflight_;
  bool started_ = false;
  bool memory_given_ = false;  // on this connection
  uint32_t connections_ = 0;
};

}  // namespace baton::lab
