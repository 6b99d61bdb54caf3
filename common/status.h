// Errors: absl::Status from one end to the other, with a baton.v1.Reason attached where it is known.
//
// Codes are chosen by what the caller can do: Unavailable = try again, FailedPrecondition = change something
// first, InvalidArgument = the input is wrong, DeadlineExceeded = a peer was too slow, DataLoss = bytes were
// wrong, Aborted = the operation was given up and the guest goes on, ResourceExhausted = a limit, Internal =
// a defect of ours.
#pragma once

#include <absl/status/status.h>
#include <absl/status/statusor.h>
#include <fmt/format.h>

#include <string>
#include <utility>

#include "baton/v1/types.pb.h"

namespace baton {

// status.message() as a std::string (Debian's absl::string_view is not std::string_view).
inline std::string Message(const absl::Status& status) { return std::string(status.message()); }

// A status of `code` with a formatted message: Error(absl::StatusCode::kUnavailable, "{}: {}", path, why).
template <typename... Args>
absl::Status Error(absl::StatusCode code, fmt::format_string<Args...> format, Args&&... args) {
  return absl::Status(code, fmt::format(format, std::forward<Args>(args)...));
}

// The same, carrying the reason that API, metrics and audit will show.
absl::Status WithReason(absl::Status status, v1::Reason reason);
template <typename... Args>
absl::Status Error(v1::Reason reason, absl::StatusCode code, fmt::format_string<Args...> format,
                   Args&&... args) {
  return WithReason(absl::Status(code, fmt::format(format, std::forward<Args>(args)...)), reason);
}

// The reason attached by WithReason, or `fallback`.
v1::Reason ReasonOf(const absl::Status& status, v1::Reason fallback = v1::INTERNAL);

// "what: strerror(error)" with a code that fits the errno value (ENOENT → NotFound, EACCES/EPERM →
// PermissionDenied, ENOSPC/EDQUOT/ENOMEM/EMFILE → ResourceExhausted, ECONNREFUSED/ECONNRESET/EPIPE →
// Unavailable, ETIMEDOUT → DeadlineExceeded, EADDRINUSE → AlreadyExists, else Internal).
absl::Status ErrnoError(int error, const std::string& what);

// `status` with `prefix: ` before its message; code and reason stay. OK stays OK.
absl::Status Annotate(const absl::Status& status, const std::string& prefix);

}  // namespace baton

#define BATON_CONCAT_INNER(a, b) a##b
#define BATON_CONCAT(a, b) BATON_CONCAT_INNER(a, b)

// Returns from the function if `expr` (an absl::Status) is not OK.
#define RETURN_IF_ERROR(expr)                                                           \
  do {                                                                                  \
    if (absl::Status baton_status_ = (expr); !baton_status_.ok()) return baton_status_; \
  } while (0)

// ASSIGN_OR_RETURN(auto x, MakeX()): x from an absl::StatusOr, or returns its status.
#define ASSIGN_OR_RETURN(lhs, expr) ASSIGN_OR_RETURN_INNER(BATON_CONCAT(baton_or_, __LINE__), lhs, expr)
#define ASSIGN_OR_RETURN_INNER(tmp, lhs, expr) \
  auto tmp = (expr);                           \
  if (!tmp.ok()) return tmp.status();          \
  lhs = std::move(tmp).value()
