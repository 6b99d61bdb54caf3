// How a unary call is answered: checked on gRPC's thread, decided on the event loop, counted and audited on
// the way out.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "common/grpc_status.h"
#include "common/log.h"
#include "server/api/auth.h"
#include "server/event_loop.h"
#include "server/metrics.h"

namespace baton::server {

struct ApiContext {
  EventLoop& loop;
  ServerMetrics& metrics;
};

using Done = std::function<void(absl::Status)>;

// Answers later with what the returned function is told. Calls of operators and admins leave an audit line;
// `subject` is the resource it names.
inline Done Answer(ApiContext api, grpc::ServerUnaryReactor* reactor, const std::string& method,
                   const Caller& caller, Role needed, const std::string& subject) {
  return [api, reactor, method, caller, needed, subject](absl::Status status) {
    api.metrics.ApiCall(method, static_cast<int>(status.code()));
    if (needed >= Role::kOperator) {
      LOG_INFO("audit caller={} method={} subject={} code={}{}{}", caller.ToString(), method, subject,
               static_cast<int>(status.code()),
               status.ok() ? "" : " message=", status.ok() ? "" : Message(status));
    }
    reactor->Finish(ToGrpc(status));
  };
}

// Runs `act(done)` on the loop if the caller has the role.
template <typename Act>
grpc::ServerUnaryReactor* Unary(ApiContext api, grpc::CallbackServerContext* context, const char* method,
                                Role needed, const std::string& subject, Act act) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  Caller caller = CallerOf(*context);
  Done done = Answer(api, reactor, method, caller, needed, subject);
  if (absl::Status status = Require(caller, needed); !status.ok()) {
    done(status);
    return reactor;
  }
  api.loop.Post([act = std::move(act), done = std::move(done)]() mutable { act(std::move(done)); });
  return reactor;
}

// For results that are at hand: stores the value or passes the error on.
template <typename T>
absl::Status Store1(absl::StatusOr<T> result, T* out) {
  if (!result.ok()) return result.status();
  *out = *std::move(result);
  return absl::OkStatus();
}

}  // namespace baton::server
