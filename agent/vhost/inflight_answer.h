// What a migration does with the requests that a device has in flight, as far as it can be said before the
// device stops. Pure.
#pragma once

#include <string>

#include "baton/v1/fleet.pb.h"
#include "baton/v1/types.pb.h"
#include "baton/v1/vm_spec.pb.h"

namespace baton::vhost {

// What `params` say of the device: the rule that names it, else the one that names its class, else the
// default; DRAIN if nothing does.
v1::InflightAnswer AnswerFor(const v1::MigrationParams& params, const std::string& device,
                             v1::DeviceClass device_class);

// Why not, in words that end a sentence "it drains instead: …"; empty: it can.
struct HandoffObstacles {
  // Its requests in flight cannot be handed to another host at all.
  std::string handoff;
  // Not those that write.
  std::string writes;
  // Its back-end cannot be given requests of another host.
  std::string takeover;
};

// By class, kind and protocol features of the device's back-end. `fenced`: a fence command is configured.
HandoffObstacles ObstaclesOf(v1::DeviceClass device_class, v1::BackendKind kind, uint64_t offered_protocol,
                             bool fenced);

}  // namespace baton::vhost
