#include "server/api/auth.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/server_context.h>

#include <utility>

namespace baton::server {
namespace {

constexpr std::pair<const char*, Role> kRoles[] = {{"agent", Role::kAgent},
                                                   {"viewer", Role::kViewer},
                                                   {"operator", Role::kOperator},
                                                   {"admin", Role::kAdmin}};

std::string NameOf(Role role) {
  for (const auto& [name, value] : kRoles) {
    if (value == role) return name;
  }
  return "nobody";
}

bool Parse(const std::string& role, const std::string& name, Caller* out) {
  if (name.empty()) return false;
  for (const auto& [text, value] : kRoles) {
    if (role != text) continue;
    *out = {value, name};
    return true;
  }
  return false;
}

std::string Text(grpc::string_ref ref) { return std::string(ref.data(), ref.size()); }

}  // namespace

std::string Caller::ToString() const { return name == "local" ? name : NameOf(role) + ":" + name; }

Caller CallerFromNames(const std::vector<std::string>& uris, const std::string& common_name) {
  Caller caller;
  const std::string scheme = "baton://";
  for (const std::string& uri : uris) {
    if (uri.rfind(scheme, 0) != 0) continue;
    size_t slash = uri.find('/', scheme.size());
    if (slash == std::string::npos) continue;
    if (Parse(uri.substr(scheme.size(), slash - scheme.size()), uri.substr(slash + 1), &caller))
      return caller;
  }
  size_t colon = common_name.find(':');
  if (colon != std::string::npos &&
      Parse(common_name.substr(0, colon), common_name.substr(colon + 1), &caller)) {
    return caller;
  }
  return {Role::kNone, common_name};
}

Caller CallerOf(const grpc::ServerContextBase& context) {
  auto auth = context.auth_context();
  if (!auth) return {Role::kAdmin, "local"};
  auto type = auth->FindPropertyValues(GRPC_TRANSPORT_SECURITY_TYPE_PROPERTY_NAME);
  // Batond makes insecure ports on local addresses only.
  if (type.empty() || Text(type[0]) != "ssl") return {Role::kAdmin, "local"};
  if (!auth->IsPeerAuthenticated()) return {};
  std::vector<std::string> uris;
  for (const auto& value : auth->FindPropertyValues(GRPC_X509_SAN_PROPERTY_NAME)) uris.push_back(Text(value));
  for (const auto& value : auth->FindPropertyValues("peer_uri")) uris.push_back(Text(value));
  auto common_name = auth->FindPropertyValues(GRPC_X509_CN_PROPERTY_NAME);
  return CallerFromNames(uris, common_name.empty() ? "" : Text(common_name[0]));
}

absl::Status Require(const Caller& caller, Role needed) {
  if (caller.role >= needed && caller.role != Role::kAgent && caller.role != Role::kNone)
    return absl::OkStatus();
  return Error(v1::PERMISSION_DENIED_REASON, absl::StatusCode::kPermissionDenied,
               "the certificate says {}, but this call needs the role {}", caller.ToString(), NameOf(needed));
}

absl::Status RequireAgent(const Caller& caller, const std::string& id) {
  if (caller.name == "local" && caller.role == Role::kAdmin) return absl::OkStatus();
  if (caller.role == Role::kAgent && caller.name == id) return absl::OkStatus();
  return Error(v1::PERMISSION_DENIED_REASON, absl::StatusCode::kPermissionDenied,
               "the certificate says {}, but the session of hosts/{} needs agent:{}", caller.ToString(), id,
               id);
}

}  // namespace baton::server
