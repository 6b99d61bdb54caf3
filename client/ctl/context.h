// What every command has: the options that are common to all, and the connection.
#pragma once

#include <absl/status/statusor.h>

#include <functional>
#include <memory>
#include <string>

#include "client/ctl/output.h"
#include "client/lib/client.h"
#include "client/lib/names.h"

namespace CLI {
class App;
}

namespace baton::client {

// Lives for one run of batonctl. One thread.
class Context {
 public:
  // As given on the command line or in the environment; empty: not given. Durations as text.
  std::string config_path;
  std::string server, ca, cert, key, tls_name;
  std::string connect_timeout, request_timeout;
  bool json_errors = false;

  // What the chosen command does; set while the command line is read. Answers the exit code.
  std::function<absl::StatusOr<int>(Context&)> action;

  // Connection options from command line, environment and configuration file, in this order.
  absl::StatusOr<ConnectionOptions> Connection();
  // The client, made at the first call.
  absl::StatusOr<Client*> Connect();

 private:
  std::unique_ptr<Client> client_;
};

// $XDG_CONFIG_HOME/baton/config.yaml or ~/.config/baton/config.yaml; empty without a home.
std::string DefaultConfigPath();
// Fields of the file that `out` leaves open are taken from it. A missing file is an error only if `required`.
absl::Status ReadConfigFile(const std::string& path, bool required, Context* out);

// To standard output. An error if it was closed.
absl::Status Print(const std::string& text);
// To standard error.
void PrintError(const std::string& text);

// What is wrong with a local file is wrong input (exit 2), whatever the system call said: "not found" and "no
// permission" are about the server's resources.
absl::Status AsWrongInput(const absl::Status& status);

// The value that `option` was given. InvalidArgument names the option.
absl::StatusOr<Duration> DurationOption(const std::string& option, const std::string& text);
absl::StatusOr<uint64_t> RateOption(const std::string& option, const std::string& text);

int64_t NowSeconds();
int64_t NowNs();

// Width for tables on standard output: the terminal's, 0 in a pipe.
size_t OutputWidth();

// Prints one resource: JSON, YAML, its name, or `text`.
absl::Status PrintResource(Format format, const google::protobuf::Message& message, const std::string& name,
                           const std::function<std::string()>& text);

// -o for a command, with the formats that make sense for resources.
void AddFormatOption(CLI::App* command, std::string* format);

// A migration by its id, by an unambiguous beginning of it, or by the VM that is in it ("web1", "vms/web1").
// NotFound says what was tried.
absl::StatusOr<v1::Migration> FindMigration(Client* client, const std::string& name);

// `get vms`, which `vm list` is too. `host` empty: all.
absl::StatusOr<int> ListVms(Context& context, const std::string& host, const std::string& format);

// `get policies`, which `policy get` without a name is too.
absl::StatusOr<int> ListPolicies(Context& context, const std::string& format);

// Each registers its commands.
void AddGetCommands(CLI::App* app, Context* context);
void AddDescribeCommands(CLI::App* app, Context* context);
void AddVmCommands(CLI::App* app, Context* context);
void AddDeviceCommands(CLI::App* app, Context* context);
void AddMigrateCommands(CLI::App* app, Context* context);
void AddHostCommands(CLI::App* app, Context* context);
void AddPolicyCommands(CLI::App* app, Context* context);
void AddTopCommand(CLI::App* app, Context* context);
void AddReportCommand(CLI::App* app, Context* context);
void AddCompletionCommand(CLI::App* app, Context* context);

}  // namespace baton::client
