// batonctl migrate, watch, cancel, retune, migration resolve.
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <map>

#include "client/ctl/context.h"
#include "client/ctl/exit_codes.h"
#include "client/ctl/follow.h"
#include "client/ctl/params.h"
#include "client/ctl/show.h"
#include "client/lib/errors.h"
#include "client/lib/units.h"

namespace baton::client {
namespace {

struct MigrateOptions {
  std::string vm, to, policy, request_id, timeout, format;
  std::shared_ptr<ParamOptions> params;
  std::vector<std::string> labels;
  bool dry_run = false;
  bool wait = false;  // the default; there so that scripts can say it
  bool no_wait = false;
};

absl::StatusOr<v1::CreateMigrationRequest> BuildRequest(const MigrateOptions& o) {
  v1::CreateMigrationRequest request;
  v1::Migration& migration = *request.mutable_migration();
  ASSIGN_OR_RETURN(*migration.mutable_vm(), FullName(Collection::kVms, o.vm));
  ASSIGN_OR_RETURN(*migration.mutable_destination(), FullName(Collection::kHosts, o.to));
  if (!o.policy.empty()) {
    ASSIGN_OR_RETURN(*migration.mutable_policy(), FullName(Collection::kPolicies, o.policy));
  }
  std::vector<std::string> given;
  ASSIGN_OR_RETURN(v1::MigrationParams params, BuildParams(*o.params, &given));
  if (!given.empty()) *migration.mutable_params() = params;
  for (const std::string& label : o.labels) {
    size_t equals = label.find('=');
    if (equals == std::string::npos || equals == 0) {
      return Error(absl::StatusCode::kInvalidArgument, "--label '{}': expected KEY=VALUE", label);
    }
    (*migration.mutable_labels())[label.substr(0, equals)] = label.substr(equals + 1);
  }
  request.set_request_id(o.request_id.empty() ? MakeRequestId() : o.request_id);
  request.set_validate_only(o.dry_run);
  return request;
}

std::string DryRunText(const v1::Migration& m) {
  std::string out = DescribeFindings(m);
  const v1::Progress& p = m.progress();
  if (p.has_forecast_remaining() || p.has_forecast_downtime()) {
    out += "forecast:";
    if (p.has_forecast_remaining()) out += " takes " + FormatDuration(p.forecast_remaining());
    if (p.has_forecast_downtime()) {
      out +=
          (p.has_forecast_remaining() ? ", blackout " : " blackout ") + FormatDuration(p.forecast_downtime());
    }
    if (p.dirty_rate() > 0) out += ", guest writes " + FormatRate(p.dirty_rate());
    out += "\n";
  }
  out += HasBlocker(m) ? "not possible: settle the blockers first\n"
                       : "possible; nothing was started (--dry-run)\n";
  return out;
}

absl::StatusOr<int> DryRun(Client* client, v1::CreateMigrationRequest* request, const MigrateOptions& o) {
  // Room for a sample of the dirty rate and for back-ends that answer late.
  Duration timeout = std::chrono::seconds(60);
  if (!o.timeout.empty()) {
    ASSIGN_OR_RETURN(timeout, DurationOption("--timeout", o.timeout));
  }
  ASSIGN_OR_RETURN(v1::Migration migration, client->CreateMigration(request, timeout));
  RETURN_IF_ERROR(PrintResource(ParseFormat(o.format), migration, migration.name(),
                                [&] { return DryRunText(migration); }));
  return HasBlocker(migration) ? kExitBlocked : kExitOk;
}

std::string GoesOnHint(const v1::Migration& migration) {
  std::string id = ShortName(migration.name());
  return fmt::format(
      "{} goes on without this command.\n  follow it: batonctl watch {}\n  cancel it: batonctl cancel {}",
      migration.name(), id, id);
}

absl::StatusOr<int> Follow(Client* client, const v1::Migration& migration, const std::string& format,
                           const std::string& timeout) {
  FollowOptions options;
  options.format = ParseFormat(format);
  options.interrupt_hint = GoesOnHint(migration);
  if (!timeout.empty()) {
    ASSIGN_OR_RETURN(options.timeout, DurationOption("--timeout", timeout));
  }
  // All has been written by then. To end the stream, the channel and gRPC in good order takes a busy host 15
  // ms, for which whoever waits for the command would wait too.
  options.leave = [](int code) { ::_exit(code); };
  Signals signals(FollowSignals());
  return FollowMigration(client, &signals, migration, options);
}

absl::StatusOr<int> Migrate(Context& context, const MigrateOptions& o) {
  ASSIGN_OR_RETURN(auto request, BuildRequest(o));
  ASSIGN_OR_RETURN(Client * client, context.Connect());
  if (o.dry_run) return DryRun(client, &request, o);
  v1::Migration migration;
  {
    InterruptMessage interrupted(fmt::format(
        "\ninterrupted before the server answered: the migration may have been started; look with\n"
        "  batonctl get migrations --vm {}\n"
        "Repeating the command with --request-id {} does not start a second one.\n",
        o.vm, request.request_id()));
    ASSIGN_OR_RETURN(migration, client->CreateMigration(&request, client->options().request_timeout));
  }
  if (!o.no_wait) return Follow(client, migration, o.format, o.timeout);
  RETURN_IF_ERROR(PrintResource(ParseFormat(o.format), migration, migration.name(), [&] {
    return fmt::format("{} created\n  follow it: batonctl watch {}\n", migration.name(),
                       ShortName(migration.name()));
  }));
  return kExitOk;
}

void AddMigrate(CLI::App* app, Context* context) {
  auto o = std::make_shared<MigrateOptions>();
  CLI::App* command = app->add_subcommand("migrate", "Move a running VM to another host");
  command->add_option("VM", o->vm, "The VM")->required();
  command->add_option("--to", o->to, "Destination host (required)")->required()->option_text("HOST");
  command->add_flag("--dry-run", o->dry_run, "Run every check and forecast, start nothing");
  command->add_flag("--no-wait", o->no_wait, "Return once it is recorded instead of following it to its end");
  command->add_flag("--wait", o->wait, "Follow the migration to its end (the default)")
      ->excludes("--no-wait");
  command->add_option("--timeout", o->timeout, "Stop waiting after this long (exit 8); the migration goes on")
      ->option_text("DURATION");
  command->add_option("--policy", o->policy, "Policy (default: default)")->option_text("POLICY");
  o->params = AddParamOptions(command);
  command->add_option("--label", o->labels, "Free text for the record; may be repeated")
      ->option_text("KEY=VALUE");
  command
      ->add_option("--request-id", o->request_id,
                   "Makes repeating the command harmless (default: a new UUID)")
      ->option_text("UUID");
  AddFormatOption(command, &o->format);
  command->footer(
      "Ctrl-C leaves the command (exit 130); the migration goes on. 'batonctl cancel' cancels it.\n\n"
      "Examples:\n"
      "  batonctl migrate web1 --to b\n"
      "  batonctl migrate web1 --to b --dry-run\n"
      "  batonctl migrate web1 --to b --max-downtime 50ms --bandwidth 10Gbit --timeout 10m\n"
      "  batonctl migrate web1 --to b --no-wait -o name");
  command->callback([=] { context->action = [o](Context& c) { return Migrate(c, *o); }; });
}

absl::StatusOr<int> Watch(Context& context, const std::vector<std::string>& words, const std::string& format,
                          const std::string& timeout) {
  std::vector<std::string> names = words;
  if (!names.empty() && (names[0] == "migration" || names[0] == "migrations")) names.erase(names.begin());
  if (names.size() > 1) {
    return Error(absl::StatusCode::kInvalidArgument, "watch follows one migration or all: unexpected '{}'",
                 names[1]);
  }
  ASSIGN_OR_RETURN(Client * client, context.Connect());
  if (!names.empty()) {
    ASSIGN_OR_RETURN(v1::Migration migration, FindMigration(client, names[0]));
    return Follow(client, migration, format, timeout);
  }
  FollowOptions options;
  options.format = ParseFormat(format);
  if (!timeout.empty()) {
    ASSIGN_OR_RETURN(options.timeout, DurationOption("--timeout", timeout));
  }
  Signals signals(FollowSignals());
  return FollowAll(client, &signals, options);
}

void AddWatch(CLI::App* app, Context* context) {
  struct Options {
    std::vector<std::string> words;
    std::string format, timeout;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app->add_subcommand("watch", "Follow a migration to its end, or every change of all");
  command->add_option("NAME", o->words,
                      "Migration, or VM that is in one; none: all migrations. 'migration NAME' works too");
  command->add_option("--timeout", o->timeout, "Stop watching after this long (exit 8)")
      ->option_text("DURATION");
  AddFormatOption(command, &o->format);
  command->footer(
      "Survives restarts of batond: nothing is missed and nothing is shown twice. The exit status is that of "
      "the\n"
      "migration's end. With -o json and no NAME: one JSON object a line for each change.\n\n"
      "Examples:\n"
      "  batonctl watch web1\n"
      "  batonctl watch migration 3f2a91c0\n"
      "  batonctl watch -o json | jq -c '{name, phase}'");
  command->callback(
      [=] { context->action = [o](Context& c) { return Watch(c, o->words, o->format, o->timeout); }; });
}

void AddCancel(CLI::App* app, Context* context) {
  struct Options {
    std::string name, format, timeout;
    bool wait = false;
    bool no_wait = false;  // the default; there so that scripts can say it
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app->add_subcommand("cancel", "Cancel a migration; the guest goes on at the source");
  command->add_option("NAME", o->name, "Migration, or VM that is in one")->required();
  command->add_flag("--wait", o->wait, "Follow it to its end");
  command->add_flag("--no-wait", o->no_wait, "Return once it is taken down (the default)")
      ->excludes("--wait");
  command->add_option("--timeout", o->timeout, "With --wait: stop waiting after this long")
      ->option_text("DURATION");
  AddFormatOption(command, &o->format);
  command->footer(
      "Without --wait the exit status says that the cancellation was taken down. A handover that is already "
      "under way\n"
      "finishes: then the migration ends as SUCCEEDED. With --wait a cancelled migration exits with 21.\n\n"
      "Examples:\n"
      "  batonctl cancel web1\n"
      "  batonctl cancel 3f2a91c0 --wait");
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      ASSIGN_OR_RETURN(v1::Migration migration, FindMigration(client, o->name));
      ASSIGN_OR_RETURN(migration, client->CancelMigration(migration.name()));
      if (o->wait) return Follow(client, migration, o->format, o->timeout);
      RETURN_IF_ERROR(PrintResource(ParseFormat(o->format), migration, migration.name(), [&] {
        return migration.phase() == v1::CANCELLED ? migration.name() + " is cancelled\n"
                                                  : migration.name() + ": cancellation asked for\n";
      }));
      return kExitOk;
    };
  });
}

void AddRetune(CLI::App* app, Context* context) {
  struct Options {
    std::string name, bandwidth, max_downtime, format;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app->add_subcommand("retune", "Change limits of a migration under way");
  command->add_option("NAME", o->name, "Migration, or VM that is in one")->required();
  command->add_option("--bandwidth", o->bandwidth, "New limit a second (500MiB, 10Gbit, unlimited)")
      ->option_text("RATE");
  command->add_option("--max-downtime", o->max_downtime, "New blackout to aim at")->option_text("DURATION");
  AddFormatOption(command, &o->format);
  command->footer(
      "Examples:\n"
      "  batonctl retune web1 --bandwidth unlimited\n"
      "  batonctl retune web1 --max-downtime 500ms");
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      if (o->bandwidth.empty() && o->max_downtime.empty()) {
        return Error(absl::StatusCode::kInvalidArgument,
                     "nothing to change: give --bandwidth or --max-downtime");
      }
      v1::RetuneMigrationRequest request;
      if (!o->bandwidth.empty()) {
        ASSIGN_OR_RETURN(uint64_t bandwidth, RateOption("--bandwidth", o->bandwidth));
        request.set_bandwidth(bandwidth);
      }
      if (!o->max_downtime.empty()) {
        ASSIGN_OR_RETURN(Duration downtime, DurationOption("--max-downtime", o->max_downtime));
        *request.mutable_max_downtime() = FromDuration(downtime);
      }
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      ASSIGN_OR_RETURN(v1::Migration migration, FindMigration(client, o->name));
      request.set_name(migration.name());
      ASSIGN_OR_RETURN(migration, client->RetuneMigration(request));
      RETURN_IF_ERROR(PrintResource(ParseFormat(o->format), migration, migration.name(),
                                    [&] { return migration.name() + ": retuned\n"; }));
      return kExitOk;
    };
  });
}

void AddMigration(CLI::App* app, Context* context) {
  struct Options {
    std::string name, format;
    bool fenced = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* group = app->add_subcommand("migration", "Settle migrations that cannot settle themselves");
  group->require_subcommand(1);
  CLI::App* command =
      group->add_subcommand("resolve", "Let the source resume a guest whose destination is gone for good");
  command->add_option("NAME", o->name, "Migration")->required();
  command->add_flag("--fenced", o->fenced,
                    "You confirm: the destination host cannot run the guest any more (powered off, cut off)");
  AddFormatOption(command, &o->format);
  command->footer(
      "Only for migrations whose guest location is UNKNOWN. With a destination that may still run the guest, "
      "two copies\n"
      "of it would run and destroy its disk: fence the host first.\n\n"
      "Example:\n"
      "  batonctl migration resolve 3f2a91c0 --fenced");
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      if (!o->fenced) {
        return Error(
            absl::StatusCode::kInvalidArgument,
            "resolve needs --fenced: your word that the destination host cannot run the guest any more");
      }
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      ASSIGN_OR_RETURN(v1::Migration migration, FindMigration(client, o->name));
      ASSIGN_OR_RETURN(migration, client->ResolveMigration(migration.name(), true));
      RETURN_IF_ERROR(PrintResource(ParseFormat(o->format), migration, migration.name(), [&] {
        return fmt::format(
            "{}: the source was told to resume; guest: {}\n", migration.name(),
            DescribeLocation(migration.guest_location(), migration.source(), migration.destination()));
      }));
      return kExitOk;
    };
  });
}

}  // namespace

void AddMigrateCommands(CLI::App* app, Context* context) {
  AddMigrate(app, context);
  AddWatch(app, context);
  AddCancel(app, context);
  AddRetune(app, context);
  AddMigration(app, context);
}

}  // namespace baton::client
