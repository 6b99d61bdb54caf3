// The mediators of a libvirt domain: one for each vhost-user device whose path in the domain's XML leads to
// Baton (`batonctl vm mediate`).
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "agent/shim/config_store.h"
#include "agent/vhost/mediator.h"
#include "baton/v1/fleet.pb.h"
#include "common/status.h"

namespace baton::shim {

class DomainDevices {
 public:
  // Starts a mediator for each device of the configuration, in the directory that it names, for QEMU's user.
  // A back-end that is away is waited for. `returning`: a shim before this one served them, and QEMU may run.
  // `on_change` comes from any thread.
  static absl::StatusOr<std::unique_ptr<DomainDevices>> Start(const v1::ShimConfig& config, bool returning,
                                                              std::function<void()> on_change);

  std::vector<v1::Device> Describe() const;
  vhost::Mediator* Find(const std::string& device) const;
  std::vector<vhost::Mediator*> All() const;

  // Hears of the end of each armed stop before QEMU does (MediatorCallbacks::on_stopped), on the mediator's
  // thread. Null: nobody. After the return the handler before is not being called any more.
  using StopHandler =
      std::function<void(const std::string& device, const absl::StatusOr<v1::DeviceState>& state)>;
  void SetStopHandler(StopHandler handler);

 private:
  DomainDevices() = default;
  // Shared with mediators: one calls until it is gone.
  struct Stops {
    std::mutex mutex;
    StopHandler handler;  // guarded by mutex, also while it runs
  };
  const std::shared_ptr<Stops> stops_ = std::make_shared<Stops>();
  std::vector<std::unique_ptr<vhost::Mediator>> mediators_;  // constant after Start
};

}  // namespace baton::shim
