// Who calls, and what they may do.
//
// With TLS the identity is in the client's certificate: a URI among its subject alternative names,
//   baton://ROLE/NAME        (baton://agent/host-a, baton://operator/jane)
// or else its common name,
//   ROLE:NAME                (agent:host-a)
// ROLE is viewer (reads), operator (also migrates, starts, stops, cordons, opens consoles), admin (also
// changes policies and settles migrations as fenced) or agent (holds the session of host NAME, and nothing
// else). Without TLS, that is on loopback addresses and unix sockets only, every caller is an admin and may
// hold any agent's session.
#pragma once

#include <grpcpp/security/auth_context.h>

#include <string>
#include <vector>

#include "common/status.h"

namespace grpc {
class ServerContextBase;
}

namespace baton::server {

enum class Role { kNone, kAgent, kViewer, kOperator, kAdmin };

struct Caller {
  Role role = Role::kNone;
  std::string name;
  // For logs: "operator:jane", "local".
  std::string ToString() const;
};

// Pure part: from the URIs and the common name of a verified certificate.
Caller CallerFromNames(const std::vector<std::string>& uris, const std::string& common_name);
// Of a call. Thread-safe.
Caller CallerOf(const grpc::ServerContextBase& context);

// PermissionDenied unless the caller's role covers `needed` (viewer < operator < admin; agents cover none of
// them).
absl::Status Require(const Caller& caller, Role needed);
// PermissionDenied unless the caller may hold the session of host `id`.
absl::Status RequireAgent(const Caller& caller, const std::string& id);

}  // namespace baton::server
