// What batonctl's exit status tells scripts. The contract is docs/exit-codes.md; numbers never change
// meaning.
#pragma once

#include <absl/status/status.h>

#include <string>

#include "baton/v1/migrations.pb.h"

namespace baton::client {

enum ExitCode : int {
  kExitOk = 0,
  // Anything that has no number of its own; a defect of Baton among them.
  kExitFailure = 1,
  // The command line, the configuration, a spec file or a value in the request is wrong.
  kExitUsage = 2,
  kExitNotFound = 3,
  // It exists already, or somebody else changed it meanwhile.
  kExitConflict = 4,
  // The present state does not allow it (VM in a migration, migration ended, …).
  kExitPrecondition = 5,
  // Not allowed, or not known to the server.
  kExitPermission = 6,
  // No connection to batond, or batond has none to the host it needs.
  kExitUnreachable = 7,
  // The time given was over. What was asked for may still be under way.
  kExitTimeout = 8,
  // This batond does not offer the call.
  kExitUnimplemented = 9,
  // Checks found a blocker; nothing was started.
  kExitBlocked = 10,
  // The migration failed; the guest runs at the source.
  kExitMigrationFailed = 20,
  // The migration was cancelled; the guest runs at the source.
  kExitMigrationCancelled = 21,
  // The migration failed; the guest is paused and waits for someone.
  kExitGuestPaused = 22,
  // The migration failed; where the guest is cannot be told now.
  kExitGuestUnknown = 23,
  // The guest ended during the migration and runs nowhere.
  kExitGuestLost = 24,
  // The migration failed after the handover; the guest runs at the destination.
  kExitFailedAtDestination = 25,
  // Ended by SIGINT; 128 + 15 and 128 + 1 for SIGTERM and SIGHUP likewise.
  kExitInterrupted = 130,
};

ExitCode ExitCodeFor(const absl::Status& status);

// Of a migration that has ended; kExitFailure for one that has not.
ExitCode ExitCodeFor(const v1::Migration& migration);

// SUCCEEDED, FAILED or CANCELLED.
bool HasEnded(const v1::Migration& migration);

// The table for --help.
std::string ExitCodeHelp();

}  // namespace baton::client
