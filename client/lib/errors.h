// What a failed call means to the person who made it. Pure functions, any thread.
#pragma once

#include <absl/status/status.h>

#include <string>
#include <utility>
#include <vector>

#include "baton/v1/migrations.pb.h"
#include "common/status.h"

namespace baton::client {

// An error taken apart. Strings are for people and may be empty, `reason` and `code` are for programs.
struct Explanation {
  absl::StatusCode code = absl::StatusCode::kOk;
  v1::Reason reason = v1::REASON_UNSPECIFIED;
  std::string what;   // what happened
  std::string where;  // where the guest is, if the error tells
  std::string next;   // what to do
  // Wrong fields or failed preconditions, each "subject: description".
  std::vector<std::string> details;
};

Explanation Explain(const absl::Status& status);

// Several lines, the first starting with "error: ", then "  guest: …", "  next: …". Ends with a line break.
std::string RenderError(const absl::Status& status);

// {"error": {"code": "NOT_FOUND", "reason": …, "message": …, …}} on one line; part of the JSON contract.
std::string RenderErrorJson(const absl::Status& status);

// What to do about a migration that ended for `reason`; empty if there is nothing to add.
std::string AdviceFor(v1::Reason reason);

// "runs at the source, host a": the guest's location in words, with the hosts of the migration.
std::string DescribeLocation(v1::GuestLocation location, const std::string& source,
                             const std::string& destination);

// "NOT_FOUND": the canonical code's name.
std::string CodeName(absl::StatusCode code);

}  // namespace baton::client
