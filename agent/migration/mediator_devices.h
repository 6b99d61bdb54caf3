// The devices of a migration over the mediators of a shim.
#pragma once

#include <memory>
#include <vector>

#include "agent/migration/device_set.h"
#include "agent/vhost/mediator.h"

namespace baton::migration {

// `mediators` must outlive the result.
std::unique_ptr<DeviceSet> MakeMediatorDevices(std::vector<vhost::Mediator*> mediators);

}  // namespace baton::migration
