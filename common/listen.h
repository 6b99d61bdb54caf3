// Saying why an address cannot be listened on, where libraries do not tell.
#pragma once

#include "common/status.h"
#include "common/units.h"

namespace baton {

// Whether a server could listen on `address` now. AlreadyExists if it is in use (a unix socket with a
// listener; one without is a leftover and is no obstacle), PermissionDenied, NotFound (no such local address
// or directory). Names other than "localhost" and port 0 are not probed. The answer may change before the
// real bind: it serves the error message, not correctness.
absl::Status ProbeListen(const Address& address);

}  // namespace baton
