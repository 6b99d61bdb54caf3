#include "client/ctl/exit_codes.h"

#include "common/status.h"

namespace baton::client {

ExitCode ExitCodeFor(const absl::Status& status) {
  // Some reasons say more than the code under which they travel.
  switch (ReasonOf(status, v1::REASON_UNSPECIFIED)) {
    case v1::VALIDATION_FAILED:
      return kExitBlocked;
    case v1::AGENT_UNREACHABLE:
      return kExitUnreachable;
    case v1::PERMISSION_DENIED_REASON:
      return kExitPermission;
    default:
      break;
  }
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
      return kExitUsage;
    case absl::StatusCode::kNotFound:
      return kExitNotFound;
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kAborted:
      return kExitConflict;
    case absl::StatusCode::kFailedPrecondition:
      return kExitPrecondition;
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated:
      return kExitPermission;
    case absl::StatusCode::kUnavailable:
      return kExitUnreachable;
    case absl::StatusCode::kDeadlineExceeded:
      return kExitTimeout;
    case absl::StatusCode::kUnimplemented:
      return kExitUnimplemented;
    default:
      return kExitFailure;
  }
}

bool HasEnded(const v1::Migration& migration) {
  return migration.phase() == v1::SUCCEEDED || migration.phase() == v1::FAILED ||
         migration.phase() == v1::CANCELLED;
}

ExitCode ExitCodeFor(const v1::Migration& migration) {
  if (migration.phase() == v1::SUCCEEDED) return kExitOk;
  if (!HasEnded(migration)) return kExitFailure;
  // Where the guest is comes first: it decides what has to be done next.
  switch (migration.guest_location()) {
    case v1::PAUSED_SOURCE:
    case v1::PAUSED_DESTINATION:
      return kExitGuestPaused;
    case v1::UNKNOWN:
      return kExitGuestUnknown;
    case v1::LOST:
      return kExitGuestLost;
    case v1::DESTINATION:
      return kExitFailedAtDestination;
    default:
      break;
  }
  if (migration.phase() == v1::CANCELLED) return kExitMigrationCancelled;
  return migration.reason() == v1::VALIDATION_FAILED ? kExitBlocked : kExitMigrationFailed;
}

std::string ExitCodeHelp() {
  return "Exit status:\n"
         "  0  done                                  10  checks found a blocker, nothing started\n"
         "  1  other failure                         20  migration failed, guest runs at the source\n"
         "  2  wrong usage or input                  21  migration cancelled, guest runs at the source\n"
         "  3  not found                             22  migration failed, guest is paused\n"
         "  4  exists already, or changed meanwhile  23  migration failed, guest's place unknown\n"
         "  5  state does not allow it               24  guest ended during the migration\n"
         "  6  not permitted                         25  failed after the handover, guest runs at the "
         "destination\n"
         "  7  server or host not reachable         130  interrupted (Ctrl-C); the server goes on\n"
         "  8  time was over; may be under way\n"
         "  9  not offered by this server";
}

}  // namespace baton::client
