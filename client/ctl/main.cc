// batonctl: what people and scripts drive Baton with.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <exception>

#include "client/ctl/completion.h"
#include "client/ctl/context.h"
#include "client/ctl/exit_codes.h"
#include "client/lib/errors.h"
#include "common/units.h"
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

// The option of a command or of those above it (CLI::App::fallthrough) that a word names, with or without a
// value behind it: --name, --name=value, -n, -nvalue.
CLI::Option* OptionOf(CLI::App* command, const std::string& word) {
  const std::string name = word.rfind("--", 0) == 0 ? word.substr(0, word.find('=')) : word.substr(0, 2);
  for (CLI::App* at = command; at != nullptr; at = at->get_parent()) {
    if (CLI::Option* option = at->get_option_no_throw(name)) return option;
  }
  return nullptr;
}

// Where a command was expected: the first word that is none, and no option either, or empty.
std::string UnknownWord(CLI::App* app, const std::vector<std::string>& words, CLI::App** where) {
  CLI::App* command = app;
  for (size_t i = 0; i < words.size(); ++i) {
    *where = command;
    if (command->get_require_subcommand_min() == 0) return "";
    if (words[i].empty() || words[i][0] == '-') {
      CLI::Option* option = OptionOf(command, words[i]);
      if (option == nullptr) return words[i];
      // Its value is no command.
      const bool attached =
          words[i].find('=') != std::string::npos || (words[i].size() > 2 && words[i][1] != '-');
      if (option->get_items_expected_max() > 0 && !attached) ++i;
      continue;
    }
    CLI::App* next = nullptr;
    for (CLI::App* sub : command->get_subcommands([](CLI::App*) { return true; })) {
      if (sub->check_name(words[i])) next = sub;
    }
    if (next == nullptr) return words[i];
    command = next;
  }
  *where = command;
  return "";
}

// What is wrong with a word that is neither command nor option.
std::string UnknownText(const CLI::App* command, const std::string& word,
                        const std::vector<std::string>& commands) {
  const bool option = word[0] == '-';
  std::vector<std::string> known = commands;
  if (option) {
    known.clear();
    for (const CLI::App* at = command; at != nullptr; at = at->get_parent()) {
      for (const CLI::Option* one : at->get_options()) {
        for (const std::string& name : one->get_lnames()) known.push_back("--" + name);
      }
    }
  }
  std::string text = fmt::format("unknown {} '{}'", option ? "option" : "command", word);
  if (auto near = Nearest(word.substr(0, word.find('=')), known))
    text += fmt::format("; did you mean '{}'?", *near);
  return text;
}

// What CLI11 found wrong, as our own kind of error: its exit codes are its own, and its text lacks where to
// look next.
int FailUsage(CLI::App* app, const Context& context, const CLI::ParseError& error,
              const std::vector<std::string>& words) {
  CLI::App* command = app;
  std::string what = error.what();
  std::string unknown = UnknownWord(app, words, &command);
  std::vector<std::string> commands;
  for (CLI::App* sub : command->get_subcommands([](CLI::App*) { return true; }))
    commands.push_back(sub->get_name());
  if (!unknown.empty()) {
    what = UnknownText(command, unknown, commands);
  } else if (dynamic_cast<const CLI::RequiredError*>(&error) != nullptr && !commands.empty()) {
    what = "a command is missing: ";
    for (size_t i = 0; i < commands.size(); ++i) what += (i == 0 ? "" : ", ") + commands[i];
  }
  std::string path = command->get_name();
  for (CLI::App* at = command->get_parent(); at != nullptr; at = at->get_parent())
    path = at->get_name() + " " + path;
  if (context.json_errors) return Fail(context, absl::InvalidArgumentError(what));
  PrintError("error: " + what + "\n  next:  " + path + " --help\n");
  return kExitUsage;
}

int Main(int argc, char** argv) {
  Context context;
  CLI::App app("Baton moves running virtual machines between hosts, with their devices.", "batonctl");
  app.require_subcommand(1);
  app.fallthrough();
  app.get_formatter()->column_width(34);
  // Placeholders stand in capitals already; types would only repeat "TEXT".
  app.get_formatter()->label("TEXT", "");
  app.get_formatter()->label("REQUIRED", "(required)");
  app.set_version_flag("--version", std::string("batonctl ") + kVersion, "Print the version");
  AddGlobalOptions(&app, &context);
  AddGetCommands(&app, &context);
  AddDescribeCommands(&app, &context);
  AddVmCommands(&app, &context);
  AddDeviceCommands(&app, &context);
  AddMigrateCommands(&app, &context);
  AddHostCommands(&app, &context);
  AddPolicyCommands(&app, &context);
  AddTopCommand(&app, &context);
  AddReportCommand(&app, &context);
  AddCompletionCommand(&app, &context);
  AddVersion(&app, &context);
  app.footer(ExitCodeHelp() +
             "\n\nExamples:\n"
             "  batonctl get hosts\n"
             "  batonctl vm start web1.yaml --host a\n"
             "  batonctl migrate web1 --to b --dry-run\n"
             "  batonctl migrate web1 --to b\n"
             "  batonctl watch web1\n");
  // Asked by the completion script; the words are no command line of ours.
  if (argc >= 2 && std::string(argv[1]) == "__complete")
    return RunComplete(app, &context, {argv + 2, argv + argc});
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {
    // --help and --version.
    return app.exit(success);
  } catch (const CLI::ParseError& error) {
    return FailUsage(&app, context, error, {argv + 1, argv + argc});
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
