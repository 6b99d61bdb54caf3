// Resource names: "collection/id".
#pragma once

#include <string>

#include "common/status.h"

namespace baton::server {

// "web1" from "vms/web1"; a bare id passes too. For texts that were checked before or come from agents.
std::string IdOf(const std::string& name);
// From a request: `field` names it in the error. InvalidArgument unless it is "collection/id" with a valid
// id.
absl::StatusOr<std::string> ParseName(const std::string& name, const std::string& collection,
                                      const std::string& field);
// NOT_FOUND for "collection/id".
absl::Status NoSuch(const std::string& collection, const std::string& id);

// A new migration id: ids sort by the time they were made.
std::string NewMigrationId(int64_t unix_ms);
// `bytes` random bytes in hex.
std::string RandomHex(int bytes);

}  // namespace baton::server
