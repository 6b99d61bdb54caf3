// batond's configuration: a YAML file, with command-line flags on top.
#pragma once

#include <optional>
#include <string>

#include "common/clock.h"
#include "common/grpc_credentials.h"
#include "common/status.h"
#include "common/units.h"
#include "server/control/machine.h"
#include "server/schedule/limits.h"

namespace baton::server {

// docs/batond.md explains each field.
struct ServerConfig {
  Address listen{"127.0.0.1", 7400, ""};
  std::optional<Address> metrics = Address{"127.0.0.1", 7401, ""};
  std::string data_dir = "/var/lib/batond";
  TlsFiles tls;
  std::string log_level = "info";
  bool log_json = false;
  ScheduleLimits limits;
  Duration heartbeat_interval = std::chrono::seconds(5);
  Duration heartbeat_timeout = std::chrono::seconds(15);
  MachineTimes times;
  uint64_t history = 10'000;
  int64_t watch_log = 20'000;
  Duration dirty_sample = std::chrono::seconds(1);
  std::string version;
};

// Reads a file over `config`. Errors are "file:line: field: problem", one a line.
absl::Status ReadConfigFile(const std::string& path, ServerConfig* config);

// What the command line asked for.
struct CommandLine {
  ServerConfig config;
  // Set: print it and leave with `exit_code`.
  std::optional<std::string> print;
  int exit_code = 0;
};
// Flags win over the file. InvalidArgument for what cannot be understood.
absl::StatusOr<CommandLine> ParseCommandLine(int argc, const char* const* argv);

}  // namespace baton::server
