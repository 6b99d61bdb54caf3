// Resource names: "hosts/a", "vms/web1", "migrations/…", "policies/default". People may leave the collection
// out where the command says which one is meant. Pure functions, any thread.
#pragma once

#include <absl/status/statusor.h>

#include <string>

namespace baton::client {

enum class Collection { kHosts, kVms, kMigrations, kPolicies };

// "hosts", "vms", "migrations", "policies".
std::string CollectionName(Collection collection);

// One item of a collection, for sentences: "host", "VM", "migration", "policy".
std::string ItemName(Collection collection);

// "web1" and "vms/web1" both give "vms/web1". InvalidArgument for an empty name, for another collection's
// name
// ("hosts/a" where a VM is meant) and for characters that no resource name has.
absl::StatusOr<std::string> FullName(Collection collection, const std::string& name);

// "vms/web1" gives "web1"; a name without a collection stays as it is.
std::string ShortName(const std::string& name);

}  // namespace baton::client
