// The devices of a migration over the mediators of a shim.
#pragma once

#include <memory>
#include <vector>

#include "agent/migration/device_set.h"
#include "agent/vhost/balloon_backend.h"
#include "agent/vhost/mediator.h"

namespace baton::migration {

// `balloon`: the back-end of the mediator of its name; null if the VM has none. All must outlive the result.
std::unique_ptr<DeviceSet> MakeMediatorDevices(std::vector<vhost::Mediator*> mediators,
                                               vhost::BalloonBackend* balloon = nullptr);

}  // namespace baton::migration
