// The internal state of a back-end (protocol feature DEVICE_STATE), out of one and into another, from the
// front-end's view (vhost-user.rst, "Migrating back-end state"). The state is opaque, bound to the back-end's
// version, and does not hold the rings' positions.
#pragma once

#include <string>

#include "agent/vhost/frontend.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::vhost {

// Of one device. All devices of a VM travel in one peer message of at most 16 MiB.
inline constexpr size_t kMaxBackendState = size_t{4} << 20;

// Security model: the back-end may write for ever, slowly, or not at all, and may answer with a descriptor of
// its own choice: bytes and time are bounded, and only a pipe or a socket is read or written.
//
// Both need every ring stopped. Codes: FailedPrecondition (the back-end refused or says that the transfer
// failed), ResourceExhausted (more than kMaxBackendState), DeadlineExceeded, Unavailable (it hung up). After
// DeadlineExceeded with frontend.overdue() an answer is still to come, as after any request.
absl::StatusOr<std::string> SaveBackendState(Frontend& frontend, Deadline deadline);

// After an error what the back-end holds is undefined: it must be reset or reconnected before it is used.
absl::Status LoadBackendState(Frontend& frontend, const std::string& state, Deadline deadline);

}  // namespace baton::vhost
