// Following migrations until they end: live on a terminal, lines in a pipe.
#pragma once

#include <absl/status/statusor.h>

#include <functional>
#include <optional>
#include <string>

#include "client/ctl/context.h"
#include "client/ctl/terminal.h"
#include "client/lib/client.h"

namespace baton::client {

struct FollowOptions {
  Format format = Format::kTable;
  // Give up following after this long; the migration goes on. 0: never.
  Duration timeout{0};
  // Said on Ctrl-C, so that nobody thinks that the migration stopped.
  std::string interrupt_hint;
  // Called with the exit code once the end has been printed, before anything is closed. Need not return.
  std::function<void(int)> leave;
};

// The signals that following handles.
std::vector<int> FollowSignals();

// Follows one migration from its present state on. Answers the exit code: that of the migration's end,
// kExitInterrupted after Ctrl-C (and 128 + n for other signals), kExitTimeout at the timeout. Machine formats
// get nothing but the final state (JSON, YAML), progress then goes to standard error if that is a terminal.
absl::StatusOr<int> FollowMigration(Client* client, Signals* signals, const v1::Migration& start,
                                    const FollowOptions& options);

// Lines (or JSON lines) for every change of every migration, until a signal or the timeout.
absl::StatusOr<int> FollowAll(Client* client, Signals* signals, const FollowOptions& options);

}  // namespace baton::client
