#include "client/lib/errors.h"

#include <map>
#include <nlohmann/json.hpp>

#include "client/lib/names.h"
#include "common/grpc_status.h"

namespace baton::client {
namespace {

std::string AdviceForCode(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kUnavailable:
      return "check that batond runs and that --server (or BATON_SERVER) names it";
    case absl::StatusCode::kDeadlineExceeded:
      return "what was asked for may still be under way; look with 'batonctl get', or allow more time with "
             "--request-timeout";
    case absl::StatusCode::kUnauthenticated:
      return "batond does not know this certificate; check --ca, --cert and --key";
    case absl::StatusCode::kPermissionDenied:
      return "this needs another role; use a certificate that has it";
    case absl::StatusCode::kUnimplemented:
      return "this batond does not offer that call; compare the versions with 'batonctl version'";
    case absl::StatusCode::kAborted:
      return "someone else changed it meanwhile; read it again and repeat";
    default:
      return "";
  }
}

}  // namespace

std::string CodeName(absl::StatusCode code) { return absl::StatusCodeToString(code); }

std::string AdviceFor(v1::Reason reason) {
  switch (reason) {
    case v1::VALIDATION_FAILED:
      return "settle the blockers, then look again with 'batonctl migrate … --dry-run'";
    case v1::VM_NOT_MIGRATABLE:
      return "'batonctl describe vm', 'get migrations' and 'get hosts' show how things stand";
    case v1::AGENT_UNREACHABLE:
      return "check baton-agent on that host ('batonctl get hosts'), then try again";
    case v1::DESTINATION_START_FAILED:
    case v1::DESTINATION_VMM_FAILED:
      return "read the VMM's log on the destination host, or choose another destination";
    case v1::DESTINATION_BACKEND_FAILED:
      return "check the back-end on the destination host and the agent's configuration for it, then try "
             "again";
    case v1::SOURCE_BACKEND_FAILED:
      return "check the back-end on the source host, then try again";
    case v1::DRAIN_TIMEOUT:
      return "the storage was too slow to finish its requests: try again, or allow more with --drain-timeout";
    case v1::INFLIGHT_UNKNOWN:
      return "the device cannot tell its requests in flight exactly: try again when it is idle";
    case v1::PEER_CONNECTION_FAILED:
      return "check the network and the firewall between the hosts' peer ports, then try again";
    case v1::PEER_PROTOCOL_ERROR:
      return "check that both hosts run the same version of Baton";
    case v1::NOT_CONVERGING:
      return "the guest writes faster than the link carries: raise --max-downtime or --bandwidth, or try at "
             "a quieter "
             "time";
    case v1::PHASE_TIMEOUT:
      return "look at what the phase waited for with 'batonctl describe migration'";
    case v1::DIRTY_TRACKING_UNAVAILABLE:
      return "the agent's host needs userfaultfd and ptrace permission, or soft-dirty; see the agent's log";
    case v1::STATE_WRITE_FAILED:
      return "free space in the state directory, or correct its permissions, then try again";
    case v1::RESOURCE_EXHAUSTED_REASON:
      return "free the resource that the message names, or choose another destination";
    case v1::PERMISSION_DENIED_REASON:
      return "this needs another role; use a certificate that has it";
    case v1::INTERNAL:
      return "this is a defect in Baton; please report it with the logs of both hosts";
    default:
      return "";
  }
}

std::string DescribeLocation(v1::GuestLocation location, const std::string& source,
                             const std::string& destination) {
  std::string from = source.empty() ? "" : ", host " + ShortName(source);
  std::string to = destination.empty() ? "" : ", host " + ShortName(destination);
  switch (location) {
    case v1::SOURCE:
      return "runs at the source" + from;
    case v1::DESTINATION:
      return "runs at the destination" + to;
    case v1::PAUSED_SOURCE:
      return "stands still at the source" + from;
    case v1::PAUSED_DESTINATION:
      return "stands still at the destination" + to;
    case v1::UNKNOWN:
      return "cannot be told: a host that may own it does not answer";
    case v1::LOST:
      return "has ended and runs nowhere";
    default:
      return "";
  }
}

Explanation Explain(const absl::Status& status) {
  Explanation out;
  out.code = status.code();
  out.reason = ReasonOf(status, v1::REASON_UNSPECIFIED);
  out.what = Message(status);
  std::map<std::string, std::string> metadata = MetadataOf(status);
  v1::GuestLocation location;
  if (v1::GuestLocation_Parse(metadata["guest_location"], &location)) {
    out.where = DescribeLocation(location, metadata["source"], metadata["destination"]);
  }
  google::rpc::BadRequest bad_request = BadRequestOf(status);
  for (const auto& violation : bad_request.field_violations()) {
    out.details.push_back(violation.field() + ": " + violation.description());
  }
  google::rpc::PreconditionFailure preconditions = PreconditionFailureOf(status);
  for (const auto& violation : preconditions.violations()) {
    out.details.push_back(violation.subject() + ": " + violation.description());
  }
  // The commonest case, one wrong field, has the same text in the message.
  if (out.details.size() == 1 && out.what.find(out.details[0]) != std::string::npos) out.details.clear();
  out.next = AdviceFor(out.reason);
  if (out.next.empty()) out.next = AdviceForCode(out.code);
  Duration delay = RetryDelayOf(status);
  if (out.next.empty() && delay.count() > 0) {
    out.next = fmt::format("try again in {:.1f} s", static_cast<double>(delay.count()) / 1e9);
  }
  return out;
}

std::string RenderError(const absl::Status& status) {
  Explanation e = Explain(status);
  std::string what = e.what.empty() ? CodeName(e.code) : e.what;
  while (!what.empty() && what.back() == '\n') what.pop_back();
  std::string out = "error: " + what + "\n";
  for (const std::string& detail : e.details) out += "  - " + detail + "\n";
  if (!e.where.empty()) out += "  guest: " + e.where + "\n";
  if (!e.next.empty()) out += "  next:  " + e.next + "\n";
  return out;
}

std::string RenderErrorJson(const absl::Status& status) {
  Explanation e = Explain(status);
  nlohmann::ordered_json error;
  error["code"] = CodeName(e.code);
  error["reason"] = e.reason == v1::REASON_UNSPECIFIED ? "" : v1::Reason_Name(e.reason);
  error["message"] = e.what;
  error["guest"] = e.where;
  error["next"] = e.next;
  error["details"] = e.details;
  nlohmann::ordered_json out;
  out["error"] = error;
  return out.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace baton::client
