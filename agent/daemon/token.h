// The right to speak for a migration at this host's peer port.
#pragma once

#include <string>

#include "common/status.h"

namespace baton::daemon {

// A new one-time token: stream::kTokenSize bytes that nobody can guess.
absl::StatusOr<std::string> NewToken();

}  // namespace baton::daemon
