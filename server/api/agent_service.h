// The AgentSession service: one stream an agent.
#pragma once

#include "baton/v1/agent_session.grpc.pb.h"
#include "server/api/unary.h"
#include "server/fleet/fleet.h"

namespace baton::server {

// Thread-safe. The fleet outlives every call.
class AgentService : public v1::AgentSession::CallbackService {
 public:
  AgentService(ApiContext api, Fleet& fleet) : api_(api), fleet_(fleet) {}
  grpc::ServerBidiReactor<v1::AgentMessage, v1::ServerMessage>* Session(
      grpc::CallbackServerContext* context) override;

 private:
  ApiContext api_;
  Fleet& fleet_;
};

}  // namespace baton::server
