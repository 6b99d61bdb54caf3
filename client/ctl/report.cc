// batonctl report.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>

#include "client/ctl/context.h"
#include "client/ctl/report_html.h"
#include "client/ctl/terminal.h"
#include "common/fd.h"

namespace baton::client {
namespace {

// A report appears whole or not at all.
absl::Status WriteFile(const std::string& path, const std::string& text) {
  std::string temporary = path + ".tmp";
  UniqueFd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!fd) return ErrnoError(errno, "writing " + path);
  absl::Status status = Annotate(WriteAll(fd.get(), text), path);
  if (status.ok() && ::rename(temporary.c_str(), path.c_str()) != 0)
    status = ErrnoError(errno, "writing " + path);
  if (!status.ok()) ::unlink(temporary.c_str());
  return status;
}

}  // namespace

void AddReportCommand(CLI::App* app, Context* context) {
  struct Options {
    std::string name, file;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app->add_subcommand("report", "Draw a migration's life as one HTML page");
  command->add_option("NAME", o->name, "Migration, or VM that is in one")->required();
  command->add_option("-o,--output", o->file, "File to write; '-' or none: standard output")
      ->option_text("FILE");
  command->footer(
      "The page loads nothing and runs no script.\n\nExample:\n  batonctl report 3f2a91c0 -o report.html");
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      ASSIGN_OR_RETURN(v1::Migration migration, FindMigration(client, o->name));
      std::string page = RenderReport(migration);
      if (o->file.empty() || o->file == "-") {
        RETURN_IF_ERROR(Print(page));
      } else {
        RETURN_IF_ERROR(AsWrongInput(WriteFile(o->file, page)));
        PrintError("wrote " + o->file + "\n");
      }
      return 0;
    };
  });
}

}  // namespace baton::client
