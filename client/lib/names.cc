#include "client/lib/names.h"

#include "common/status.h"

namespace baton::client {

std::string CollectionName(Collection collection) {
  switch (collection) {
    case Collection::kHosts:
      return "hosts";
    case Collection::kVms:
      return "vms";
    case Collection::kMigrations:
      return "migrations";
    case Collection::kPolicies:
      return "policies";
  }
  return "";
}

std::string ItemName(Collection collection) {
  switch (collection) {
    case Collection::kHosts:
      return "host";
    case Collection::kVms:
      return "VM";
    case Collection::kMigrations:
      return "migration";
    case Collection::kPolicies:
      return "policy";
  }
  return "";
}

absl::StatusOr<std::string> FullName(Collection collection, const std::string& name) {
  std::string id = name;
  std::string prefix = CollectionName(collection) + "/";
  if (id.compare(0, prefix.size(), prefix) == 0) {
    id = id.substr(prefix.size());
  } else if (id.find('/') != std::string::npos) {
    return Error(absl::StatusCode::kInvalidArgument, "'{}' does not name a {}: expected NAME or {}NAME", name,
                 ItemName(collection), prefix);
  }
  if (id.empty()) return Error(absl::StatusCode::kInvalidArgument, "empty {} name", ItemName(collection));
  for (char c : id) {
    bool allowed = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
                   c == '_' || c == '.';
    if (!allowed) {
      return Error(absl::StatusCode::kInvalidArgument,
                   "'{}' is not a {} name: letters, digits, '-', '_' and '.' only", name,
                   ItemName(collection));
    }
  }
  return prefix + id;
}

std::string ShortName(const std::string& name) {
  size_t slash = name.find('/');
  return slash == std::string::npos ? name : name.substr(slash + 1);
}

}  // namespace baton::client
