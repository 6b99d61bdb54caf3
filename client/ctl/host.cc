// batonctl cordon, uncordon.
#include <CLI/CLI.hpp>

#include "client/ctl/context.h"
#include "client/lib/names.h"

namespace baton::client {
namespace {

void AddCordon(CLI::App* app, Context* context, bool cordon) {
  struct Options {
    std::string name, format;
  };
  auto o = std::make_shared<Options>();
  std::string word = cordon ? "cordon" : "uncordon";
  CLI::App* command = app->add_subcommand(
      word, cordon ? "Accept no more migrations to a host" : "Accept migrations to a host again");
  command->add_option("HOST", o->name, "The host")->required();
  AddFormatOption(command, &o->format);
  command->footer("VMs on the host and migrations under way are not touched.\n\nExample:\n  batonctl " +
                  word + " a");
  command->callback([=] {
    context->action = [o, cordon](Context& c) -> absl::StatusOr<int> {
      ASSIGN_OR_RETURN(std::string name, FullName(Collection::kHosts, o->name));
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      ASSIGN_OR_RETURN(v1::Host host, client->SetHostCordon(name, cordon));
      RETURN_IF_ERROR(PrintResource(ParseFormat(o->format), host, host.name(), [&] {
        return host.name() + (host.cordoned() ? " cordoned\n" : " uncordoned\n");
      }));
      return 0;
    };
  });
}

}  // namespace

void AddHostCommands(CLI::App* app, Context* context) {
  AddCordon(app, context, true);
  AddCordon(app, context, false);
}

}  // namespace baton::client
