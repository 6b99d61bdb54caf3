// batonctl: what people and scripts drive Baton with.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <exception>

#include "client/ctl/context.h"
#include "client/ctl/exit_codes.h"
#include "client/lib/errors.h"
#include "common/version.h"

namespace baton::client {
namespace {

void AddGlobalOptions(CLI::App* app, Context* context) {
  const std::string group = "Connection";
  app->add_option("--server,-s", context->server,
                  "batond: HOST[:PORT] or unix:/PATH (default 127.0.0.1:7400)")
      ->envname("BATON_SERVER")
      ->option_text("ADDRESS")
      ->group(group);
  app->add_option("--ca", context->ca, "Certificates that sign the server's")
      ->envname("BATON_CA")
      ->option_text("FILE")
      ->group(group);
  app->add_option("--cert", context->cert, "Own certificate")
      ->envname("BATON_CERT")
      ->option_text("FILE")
      ->group(group);
  app->add_option("--key", context->key, "Own private key")
      ->envname("BATON_KEY")
      ->option_text("FILE")
      ->group(group);
  app->add_option("--tls-name", context->tls_name, "Name that the server's certificate must carry")
      ->envname("BATON_TLS_NAME")
      ->option_text("NAME")
      ->group(group);
  app->add_option("--connect-timeout", context->connect_timeout,
                  "How long to wait for a server that is not there (2s)")
      ->option_text("DURATION")
      ->group(group);
  app->add_option("--request-timeout", context->request_timeout, "Bound of one call (30s)")
      ->option_text("DURATION")
      ->group(group);
  app->add_option("--config", context->config_path,
                  "Configuration file (default ~/.config/baton/config.yaml)")
      ->envname("BATON_CONFIG")
      ->option_text("FILE")
      ->group(group);
  app->add_flag("--json-errors", context->json_errors, "Errors as one JSON object a line on standard error")
      ->group(group);
}

void AddVersion(CLI::App* app, Context* context) {
  CLI::App* command = app->add_subcommand("version", "Print the version");
  command->callback([context] {
    context->action = [](Context&) -> absl::StatusOr<int> {
      RETURN_IF_ERROR(Print(std::string("batonctl ") + kVersion + "\n"));
      return 0;
    };
  });
}

int Fail(const Context& context, const absl::Status& status) {
  PrintError(context.json_errors ? RenderErrorJson(status) : RenderError(status));
  return ExitCodeFor(status);
}

// What CLI11 found wrong, as our own kind of error: its exit codes are its own, and its text lacks where to
// look next.
int FailUsage(const CLI::App& app, const Context& context, const CLI::ParseError& error) {
  const CLI::App* command = &app;
  std::string path = "batonctl";
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    path += " " + command->get_name();
  }
  absl::Status status = absl::InvalidArgumentError(error.what());
  if (context.json_errors) return Fail(context, status);
  PrintError(std::string("error: ") + error.what() + "\n  next:  " + path + " --help\n");
  return kExitUsage;
}

int Main(int argc, char** argv) {
  Context context;
  CLI::App app("Baton moves running virtual machines between hosts, with their devices.", "batonctl");
  app.require_subcommand(1);
  app.fallthrough();
  app.get_formatter()->column_width(34);
  app.set_version_flag("--version", std::string("batonctl ") + kVersion, "Print the version");
  AddGlobalOptions(&app, &context);
  AddGetCommands(&app, &context);
  AddDescribeCommands(&app, &context);
  AddVmCommands(&app, &context);
  AddMigrateCommands(&app, &context);
  AddHostCommands(&app, &context);
  AddVersion(&app, &context);
  app.footer(ExitCodeHelp() +
             "\n\nExamples:\n"
             "  batonctl get hosts\n"
             "  batonctl vm start web1.yaml --host a\n"
             "  batonctl migrate web1 --to b --dry-run\n"
             "  batonctl migrate web1 --to b\n"
             "  batonctl watch web1\n");
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {
    // --help and --version.
    return app.exit(success);
  } catch (const CLI::ParseError& error) {
    return FailUsage(app, context, error);
  }
  if (!context.action) return Fail(context, absl::InternalError("no command"));
  absl::StatusOr<int> code = context.action(context);
  return code.ok() ? *code : Fail(context, code.status());
}

}  // namespace
}  // namespace baton::client

int main(int argc, char** argv) {
  try {
    return baton::client::Main(argc, argv);
  } catch (const std::exception& error) {
    // Libraries throw when memory is exhausted, and where they have defects.
    baton::client::PrintError(std::string("error: ") + error.what() + "\n");
    return baton::client::kExitFailure;
  }
}
