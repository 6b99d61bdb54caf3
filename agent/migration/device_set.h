// The devices of a VM as a migration sees them. Implemented over the mediators in mediator_devices.h, and by
// fakes in tests.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "agent/memory/dirty_source.h"
#include "agent/memory/guest_ram.h"
#include "agent/memory/hint_source.h"
#include "baton/v1/peer.pb.h"
#include "baton/v1/types.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::migration {

struct StopOrders {
  // For queues that finish what is in flight.
  Duration drain_bound{0};
  // Its answers to requests in flight, by device.
  v1::MigrationParams params;
  // Devices that may hand them over, as far as the destination is concerned.
  std::set<std::string> takes_inflight;
  // Those of them at which requests in flight may overlap.
  std::set<std::string> orders_inflight;
};

// One caller at a time: the thread of the migration.
class DeviceSet {
 public:
  virtual ~DeviceSet() = default;

  // The balloon that can tell which pages are free; null if the VM has none. Lives as long as this.
  virtual memory::HintSource* hints() { return nullptr; }

  // --- source ---
  // A dirty source for each device that writes guest memory by itself.
  virtual std::vector<std::unique_ptr<memory::DirtySource>> MakeDirtySources() = 0;
  // The next stop of the VMM is that of a migration.
  virtual absl::Status ArmStop(const StopOrders& orders) = 0;
  // The states of all stopped devices and the guest physical layout of `ram`. Errors carry the reason
  // (DRAIN_TIMEOUT, STATE_MISMATCH, SOURCE_BACKEND_FAILED …).
  virtual absl::StatusOr<v1::DeviceStates> CollectStates(const memory::GuestRam& ram, Deadline deadline) = 0;
  // Time from the first to the last queue stopped, of the slowest device.
  virtual Duration stop_duration() const = 0;
  // When the first queue of any device began to stop, CLOCK_MONOTONIC; 0 if that is not known.
  virtual int64_t stop_began_ns() const { return 0; }
  // How each device stopped, for the report.
  virtual std::vector<v1::DeviceStop> stops() const = 0;
  // The migration was given up: stops are ordinary again. Idempotent.
  virtual absl::Status DisarmStop() = 0;

  // --- destination ---
  // Devices whose back-ends can be given requests in flight.
  virtual std::vector<std::string> TakesInflight() const = 0;
  // And that keep those in order that overlap.
  virtual std::vector<std::string> OrdersInflight() const = 0;
  // Every device of this host has its state in `states` and the other way round, and the VMM will be held to
  // it. Before the VMM starts them.
  virtual absl::Status ExpectStates(const v1::DeviceStates& states) = 0;
  // Compares what was shipped with what arrived in memory. `ram` has its layout.
  virtual absl::Status VerifyAgainstMemory(const v1::DeviceStates& states, const memory::GuestRam& ram) = 0;
  // After the VMM started the guest: OK if it started each device as expected.
  virtual absl::Status CheckStarted() const = 0;
  // After the guest runs: what the devices themselves can do so that the network finds it here.
  virtual absl::Status Announce(Deadline /*deadline*/) { return absl::OkStatus(); }
};

}  // namespace baton::migration
