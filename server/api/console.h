// The relay between a caller's Console stream and the agent of the VM's host.
#pragma once

#include "baton/v1/fleet.pb.h"
#include "server/api/unary.h"
#include "server/fleet/fleet.h"

namespace baton::server {

// Deletes itself when the call is over.
grpc::ServerBidiReactor<v1::ConsoleRequest, v1::ConsoleResponse>* StartConsole(ApiContext api,
                                                                               const Caller& caller,
                                                                               Fleet& fleet);

}  // namespace baton::server
