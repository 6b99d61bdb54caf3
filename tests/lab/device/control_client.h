// A client of the lab device's control socket, for tests in other processes.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "common/clock.h"
#include "common/status.h"

namespace baton::lab {

// Sends one command and returns the answer. FailedPrecondition with its "error" if the answer's "ok" is
// false; the socket's errors otherwise. `wait` commands bound themselves; `deadline` should lie behind.
absl::StatusOr<nlohmann::json> CallLabDevice(const std::string& control, const nlohmann::json& command,
                                             Deadline deadline);

}  // namespace baton::lab
