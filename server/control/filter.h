// Filters and page tokens of list calls. Pure.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "baton/v1/migrations.pb.h"
#include "common/status.h"

namespace baton::server {

// A conjunction of `field=value` joined by " AND ". InvalidArgument for unknown or repeated fields.
absl::StatusOr<std::map<std::string, std::string>> ParseFilter(const std::string& text,
                                                               const std::vector<std::string>& fields);

struct MigrationFilter {
  std::string vm, source, destination;  // full names, or empty
  std::optional<v1::Phase> phase;
  std::optional<bool> active;
  bool Matches(const v1::Migration& migration) const;
};
absl::StatusOr<MigrationFilter> ParseMigrationFilter(const std::string& text);

// Where a list goes on. A token belongs to the list call and filter it came from: with others it is
// InvalidArgument.
std::string MakePageToken(const std::string& call, const std::string& filter, const std::string& last);
absl::StatusOr<std::string> ParsePageToken(const std::string& token, const std::string& call,
                                           const std::string& filter);
// The size to use: default 50, at most 1000; InvalidArgument if negative.
absl::StatusOr<size_t> PageSize(int32_t wanted);

}  // namespace baton::server
