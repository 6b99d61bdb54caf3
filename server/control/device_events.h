// What batond makes of the errors that back-ends tell of their devices: counts them, and lets a policy move
// the VM away (v1::OnDeviceError). Belongs to the event loop.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "baton/v1/fleet.pb.h"
#include "common/status.h"
#include "server/control/controller.h"
#include "server/control/policies.h"
#include "server/event_loop.h"
#include "server/fleet/fleet.h"
#include "server/metrics.h"
#include "server/store/records.pb.h"
#include "server/store/store.h"

namespace baton::server {

// One event is answered at a time for a VM, the newest: at most one migration, and after a failure a pause
// that doubles. What was decided is recorded before it is done, so that a restart neither forgets an event
// nor answers it twice. The migration carries its cause in labels ("cause", "device", "event").
class DeviceEvents {
 public:
  // All outlive this. Registers itself as the controller's listener.
  DeviceEvents(EventLoop& loop, Store& store, Fleet& fleet, Policies& policies, Controller& controller,
               ServerMetrics& metrics);
  ~DeviceEvents();
  // Takes up what was under way.
  absl::Status Load();

  // The fleet heard of the VM.
  void OnVm(const std::string& vm);

  // Attempts for one event.
  static constexpr uint32_t kMaxAttempts = 5;

 private:
  struct Entry {
    DeviceEventRecord record;
    std::optional<EventLoop::TimerId> timer;
  };

  // Does what is due for the VM now.
  void Consider(const std::string& vm);
  // The migration that was last tried for it: true if nothing further is to be done now.
  bool Following(const std::string& vm, Entry& entry);
  absl::StatusOr<std::string> ChooseHost(const v1::OnDeviceError& answer, const v1::Vm& vm) const;
  bool Save(const std::string& vm, Entry& entry, DeviceEventRecord record);
  void Settle(const std::string& vm, Entry& entry, const std::string& answer);
  void Arm(const std::string& vm, Entry& entry, int64_t at_ns);
  void Forget(const std::string& vm);

  EventLoop& loop_;
  Store& store_;
  Fleet& fleet_;
  Policies& policies_;
  Controller& controller_;
  ServerMetrics& metrics_;
  std::map<std::string, Entry> entries_;
};

}  // namespace baton::server
