// Migration parameters as options of a command; `migrate` and `policy set` share them.
#pragma once

#include <absl/status/statusor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "baton/v1/types.pb.h"

namespace CLI {
class App;
}

namespace baton::client {

// As given on the command line; empty: not given.
struct ParamOptions {
  std::string max_downtime, max_duration, bandwidth, drain_timeout, on_stall;
  std::vector<std::string> inflight;
  std::optional<uint32_t> channels;
  std::optional<uint32_t> max_stalled_rounds;
  bool tls = false;
  bool tls_given = false;
  std::optional<bool> free_page_hints;
  // Of the VMM engine.
  std::optional<std::string> compression;
  std::optional<bool> auto_converge, post_copy, zero_copy, copy_storage;
};

// Adds the options to `command`, which must not outlive them.
std::shared_ptr<ParamOptions> AddParamOptions(CLI::App* command);

// Only what was given is set. InvalidArgument names the option and the value. `paths` (may be null) gets the
// name of each field that was given, for update masks.
absl::StatusOr<v1::MigrationParams> BuildParams(const ParamOptions& options, std::vector<std::string>* paths);

}  // namespace baton::client
