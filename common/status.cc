#include "common/status.h"

#include <absl/strings/cord.h>

#include <cerrno>
#include <cstring>

namespace baton {
namespace {
constexpr char kReasonUrl[] = "baton.dev/reason";
}

absl::Status WithReason(absl::Status status, v1::Reason reason) {
  if (!status.ok()) status.SetPayload(kReasonUrl, absl::Cord(v1::Reason_Name(reason)));
  return status;
}

v1::Reason ReasonOf(const absl::Status& status, v1::Reason fallback) {
  auto payload = status.GetPayload(kReasonUrl);
  v1::Reason reason;
  if (payload && v1::Reason_Parse(std::string(*payload), &reason)) return reason;
  return fallback;
}

absl::Status ErrnoError(int error, const std::string& what) {
  absl::StatusCode code = absl::StatusCode::kInternal;
  switch (error) {
    case ENOENT:
    case ENXIO:
    case ESRCH:
      code = absl::StatusCode::kNotFound;
      break;
    case EACCES:
    case EPERM:
    case EROFS:
      code = absl::StatusCode::kPermissionDenied;
      break;
    case ENOSPC:
    case EDQUOT:
    case ENOMEM:
    case EMFILE:
    case ENFILE:
      code = absl::StatusCode::kResourceExhausted;
      break;
    case ECONNREFUSED:
    case ECONNRESET:
    case EPIPE:
    case EAGAIN:
    case ENOTCONN:
      code = absl::StatusCode::kUnavailable;
      break;
    case ETIMEDOUT:
      code = absl::StatusCode::kDeadlineExceeded;
      break;
    case EADDRINUSE:
    case EEXIST:
      code = absl::StatusCode::kAlreadyExists;
      break;
    case EINVAL:
      code = absl::StatusCode::kInvalidArgument;
      break;
    default:
      break;
  }
  return absl::Status(code, fmt::format("{}: {}", what, std::strerror(error)));
}

absl::Status Annotate(const absl::Status& status, const std::string& prefix) {
  if (status.ok()) return status;
  absl::Status out(status.code(), fmt::format("{}: {}", prefix, Message(status)));
  status.ForEachPayload([&](auto url, const absl::Cord& payload) { out.SetPayload(url, payload); });
  return out;
}

}  // namespace baton
