#include "common/reason.h"

#include <algorithm>
#include <cctype>

namespace baton {
namespace {

struct Row {
  v1::Reason reason;
  absl::StatusCode code;
};

// Codes by what the caller can do next; see common/status.h.
constexpr Row kTable[] = {
    {v1::REASON_UNSPECIFIED, absl::StatusCode::kOk},
    {v1::NONE, absl::StatusCode::kOk},
    {v1::CANCELLED_BY_REQUEST, absl::StatusCode::kCancelled},
    {v1::VALIDATION_FAILED, absl::StatusCode::kFailedPrecondition},
    {v1::NOT_FOUND, absl::StatusCode::kNotFound},
    {v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition},
    {v1::AGENT_UNREACHABLE, absl::StatusCode::kUnavailable},
    {v1::DESTINATION_START_FAILED, absl::StatusCode::kAborted},
    {v1::DESTINATION_BACKEND_FAILED, absl::StatusCode::kFailedPrecondition},
    {v1::SOURCE_BACKEND_FAILED, absl::StatusCode::kFailedPrecondition},
    {v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded},
    {v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition},
    {v1::PEER_CONNECTION_FAILED, absl::StatusCode::kUnavailable},
    {v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss},
    {v1::NOT_CONVERGING, absl::StatusCode::kAborted},
    {v1::PHASE_TIMEOUT, absl::StatusCode::kDeadlineExceeded},
    {v1::SOURCE_VMM_FAILED, absl::StatusCode::kAborted},
    {v1::DESTINATION_VMM_FAILED, absl::StatusCode::kAborted},
    {v1::SOURCE_SHIM_FAILED, absl::StatusCode::kAborted},
    {v1::DESTINATION_SHIM_FAILED, absl::StatusCode::kAborted},
    {v1::DIRTY_TRACKING_UNAVAILABLE, absl::StatusCode::kFailedPrecondition},
    {v1::STATE_WRITE_FAILED, absl::StatusCode::kResourceExhausted},
    {v1::DESTINATION_REFUSED, absl::StatusCode::kAborted},
    {v1::STATE_MISMATCH, absl::StatusCode::kDataLoss},
    {v1::RESOLVED_BY_OPERATOR, absl::StatusCode::kAborted},
    {v1::PERMISSION_DENIED_REASON, absl::StatusCode::kPermissionDenied},
    {v1::RESOURCE_EXHAUSTED_REASON, absl::StatusCode::kResourceExhausted},
    {v1::INTERNAL, absl::StatusCode::kInternal},
};

static_assert(std::size(kTable) == v1::Reason_ARRAYSIZE, "every reason has exactly one row");
static_assert(
    [] {
      for (int i = 0; i < v1::Reason_ARRAYSIZE; ++i) {
        if (kTable[i].reason != i) return false;
      }
      return true;
    }(),
    "rows stand in the order of the enum");

std::string Lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

}  // namespace

absl::StatusCode CodeOf(v1::Reason reason) {
  if (reason < 0 || reason >= v1::Reason_ARRAYSIZE) return absl::StatusCode::kInternal;
  return kTable[reason].code;
}

std::string LabelOf(v1::Reason reason) {
  if (!v1::Reason_IsValid(reason)) return "unknown";
  if (reason == v1::REASON_UNSPECIFIED) return "unspecified";
  return Lower(v1::Reason_Name(reason));
}

std::string LabelOf(v1::Phase phase) {
  if (!v1::Phase_IsValid(phase)) return "unknown";
  if (phase == v1::PHASE_UNSPECIFIED) return "unspecified";
  return Lower(v1::Phase_Name(phase));
}

absl::Status ErrorOf(v1::Reason reason, const std::string& message) {
  absl::StatusCode code = CodeOf(reason);
  if (code == absl::StatusCode::kOk) code = absl::StatusCode::kInternal;
  return WithReason(absl::Status(code, message), reason);
}

}  // namespace baton
