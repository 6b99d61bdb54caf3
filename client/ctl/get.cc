// batonctl get, describe.
#include <CLI/CLI.hpp>
#include <algorithm>

#include "client/ctl/context.h"
#include "client/ctl/show.h"
#include "client/lib/names.h"

namespace baton::client {
namespace {

struct GetOptions {
  std::vector<std::string> names;
  std::string format;
  std::string vm, host, phase;
  bool active = false;
  size_t limit = 0;
};

// Prints what was fetched: one resource asked for by name as itself, everything else as a list.
template <typename Message>
absl::Status PrintItems(const GetOptions& options, const std::string& key, const std::vector<Message>& items,
                        const std::function<std::string()>& table) {
  std::vector<const google::protobuf::Message*> messages;
  for (const auto& item : items) messages.push_back(&item);
  bool single = options.names.size() == 1 && items.size() == 1;
  switch (ParseFormat(options.format)) {
    case Format::kJson:
      return Print(single ? ToJson(items[0]) : ListToJson(key, messages));
    case Format::kYaml:
      return Print(single ? ToYaml(items[0]) : ListToYaml(key, messages));
    case Format::kName: {
      std::string out;
      for (const auto& item : items) out += item.name() + "\n";
      return Print(out);
    }
    default:
      if (items.empty()) PrintError("no " + key + " found\n");
      return items.empty() ? absl::OkStatus() : Print(table());
  }
}

// Fetches the named ones, each by its own call, or all.
template <typename Message, typename One, typename All>
absl::StatusOr<std::vector<Message>> Fetch(const GetOptions& options, Collection collection, One one,
                                           All all) {
  if (options.names.empty()) return all();
  std::vector<Message> out;
  for (const auto& name : options.names) {
    ASSIGN_OR_RETURN(std::string full, FullName(collection, name));
    ASSIGN_OR_RETURN(Message item, one(full));
    out.push_back(std::move(item));
  }
  return out;
}

absl::StatusOr<int> GetHosts(Context& context, const GetOptions& options) {
  ASSIGN_OR_RETURN(Client * client, context.Connect());
  ASSIGN_OR_RETURN(auto hosts,
                   Fetch<v1::Host>(
                       options, Collection::kHosts, [&](const std::string& n) { return client->GetHost(n); },
                       [&] { return client->ListHosts(); }));
  RETURN_IF_ERROR(PrintItems(options, "hosts", hosts, [&] {
    return HostTable(hosts, ParseFormat(options.format) == Format::kWide, NowSeconds()).Render(OutputWidth());
  }));
  return 0;
}

absl::StatusOr<int> GetVms(Context& context, const GetOptions& options) {
  ASSIGN_OR_RETURN(Client * client, context.Connect());
  std::string filter;
  if (!options.host.empty()) {
    ASSIGN_OR_RETURN(std::string host, FullName(Collection::kHosts, options.host));
    filter = "host=" + host;
  }
  ASSIGN_OR_RETURN(auto vms,
                   Fetch<v1::Vm>(
                       options, Collection::kVms, [&](const std::string& n) { return client->GetVm(n); },
                       [&] { return client->ListVms(filter); }));
  RETURN_IF_ERROR(PrintItems(options, "vms", vms, [&] {
    return VmTable(vms, ParseFormat(options.format) == Format::kWide, NowSeconds()).Render(OutputWidth());
  }));
  return 0;
}

absl::StatusOr<int> GetMigrations(Context& context, const GetOptions& options) {
  ASSIGN_OR_RETURN(Client * client, context.Connect());
  std::vector<std::string> filters;
  if (!options.vm.empty()) {
    ASSIGN_OR_RETURN(std::string vm, FullName(Collection::kVms, options.vm));
    filters.push_back("vm=" + vm);
  }
  if (!options.phase.empty()) filters.push_back("phase=" + options.phase);
  if (options.active) filters.push_back("active=true");
  std::string filter;
  for (const auto& f : filters) filter += (filter.empty() ? "" : " AND ") + f;
  std::vector<v1::Migration> migrations;
  if (options.names.empty()) {
    ASSIGN_OR_RETURN(auto list, client->ListMigrations(filter, options.limit));
    migrations = std::move(list.migrations);
  } else {
    for (const auto& name : options.names) {
      ASSIGN_OR_RETURN(auto migration, FindMigration(client, name));
      migrations.push_back(std::move(migration));
    }
  }
  RETURN_IF_ERROR(PrintItems(options, "migrations", migrations, [&] {
    return MigrationTable(migrations, ParseFormat(options.format) == Format::kWide, NowSeconds())
        .Render(OutputWidth());
  }));
  return 0;
}

absl::StatusOr<int> GetPolicies(Context& context, const GetOptions& options) {
  ASSIGN_OR_RETURN(Client * client, context.Connect());
  ASSIGN_OR_RETURN(auto policies, Fetch<v1::Policy>(
                                      options, Collection::kPolicies,
                                      [&](const std::string& n) { return client->GetPolicy(n); },
                                      [&] { return client->ListPolicies(); }));
  RETURN_IF_ERROR(PrintItems(options, "policies", policies, [&] {
    return PolicyTable(policies, ParseFormat(options.format) == Format::kWide).Render(OutputWidth());
  }));
  return 0;
}

using Run = absl::StatusOr<int> (*)(Context&, const GetOptions&);

CLI::App* AddGet(CLI::App* get, Context* context, const std::string& name, const std::string& alias,
                 const std::string& help, const std::shared_ptr<GetOptions>& options, Run run) {
  CLI::App* command = get->add_subcommand(name, help)->alias(alias);
  command->add_option("NAME", options->names, "Only these");
  AddFormatOption(command, &options->format);
  command->callback(
      [context, options, run] { context->action = [options, run](Context& c) { return run(c, *options); }; });
  return command;
}

}  // namespace

absl::StatusOr<int> ListVms(Context& context, const std::string& host, const std::string& format) {
  GetOptions options;
  options.host = host;
  options.format = format;
  return GetVms(context, options);
}

absl::StatusOr<int> ListPolicies(Context& context, const std::string& format) {
  GetOptions options;
  options.format = format;
  return GetPolicies(context, options);
}

void AddGetCommands(CLI::App* app, Context* context) {
  CLI::App* get = app->add_subcommand("get", "List resources, or show some by name");
  get->require_subcommand(1);
  get->footer(
      "Examples:\n"
      "  batonctl get hosts\n"
      "  batonctl get vms --host a -o wide\n"
      "  batonctl get migrations --active\n"
      "  batonctl get vm web1 -o json | jq -r .host");
  auto hosts = std::make_shared<GetOptions>();
  AddGet(get, context, "hosts", "host", "Hosts and what they have", hosts, GetHosts);
  auto vms = std::make_shared<GetOptions>();
  CLI::App* get_vms = AddGet(get, context, "vms", "vm", "VMs and where they run", vms, GetVms);
  get_vms->add_option("--host", vms->host, "Only VMs on this host")->option_text("HOST");
  auto migrations = std::make_shared<GetOptions>();
  migrations->limit = 50;
  CLI::App* get_migrations =
      AddGet(get, context, "migrations", "migration",
             "Migrations, newest first; NAME may also be a VM that is in one", migrations, GetMigrations);
  get_migrations->add_option("--vm", migrations->vm, "Only of this VM")->option_text("VM");
  get_migrations->add_option("--phase", migrations->phase, "Only in this phase (PRECOPY, FAILED, …)")
      ->transform(CLI::IsMember({"QUEUED", "PREPARING", "PRECOPY", "SWITCHOVER", "POSTCOPY", "FINISHING",
                                 "SUCCEEDED", "FAILED", "CANCELLED"},
                                CLI::ignore_case))
      ->option_text("PHASE");
  get_migrations->add_flag("--active", migrations->active, "Only those that have not ended");
  get_migrations->add_option("--limit", migrations->limit, "At most so many; 0: all (default 50)")
      ->option_text("N");
  auto policies = std::make_shared<GetOptions>();
  AddGet(get, context, "policies", "policy", "Policies", policies, GetPolicies);
}

void AddDescribeCommands(CLI::App* app, Context* context) {
  CLI::App* describe = app->add_subcommand("describe", "Show everything about one resource");
  describe->require_subcommand(1);
  describe->footer(
      "Examples:\n"
      "  batonctl describe host a\n"
      "  batonctl describe vm web1\n"
      "  batonctl describe migration 3f2a91c0");
  struct Options {
    std::string name, format;
  };
  auto add = [&](const std::string& name, const std::string& alias, const std::string& help,
                 std::function<absl::StatusOr<int>(Client*, const Options&)> run) {
    auto options = std::make_shared<Options>();
    CLI::App* command = describe->add_subcommand(name, help)->alias(alias);
    command->add_option("NAME", options->name, "Its name")->required();
    AddFormatOption(command, &options->format);
    command->callback([context, options, run] {
      context->action = [options, run](Context& c) -> absl::StatusOr<int> {
        ASSIGN_OR_RETURN(Client * client, c.Connect());
        return run(client, *options);
      };
    });
  };
  add("host", "hosts", "A host and its VMs", [](Client* client, const Options& o) -> absl::StatusOr<int> {
    ASSIGN_OR_RETURN(std::string name, FullName(Collection::kHosts, o.name));
    ASSIGN_OR_RETURN(v1::Host host, client->GetHost(name));
    std::vector<v1::Vm> vms;
    if (!IsMachineFormat(ParseFormat(o.format))) {
      ASSIGN_OR_RETURN(vms, client->ListVms("host=" + name));
    }
    RETURN_IF_ERROR(PrintResource(ParseFormat(o.format), host, host.name(),
                                  [&] { return DescribeHost(host, vms, NowSeconds()); }));
    return 0;
  });
  add("vm", "vms", "A VM, its devices and their back-ends",
      [](Client* client, const Options& o) -> absl::StatusOr<int> {
        ASSIGN_OR_RETURN(std::string name, FullName(Collection::kVms, o.name));
        ASSIGN_OR_RETURN(v1::Vm vm, client->GetVm(name));
        RETURN_IF_ERROR(PrintResource(ParseFormat(o.format), vm, vm.name(),
                                      [&] { return DescribeVm(vm, NowSeconds()); }));
        return 0;
      });
  add("migration", "migrations", "A migration: phases, rounds, decisions, downtimes",
      [](Client* client, const Options& o) -> absl::StatusOr<int> {
        ASSIGN_OR_RETURN(v1::Migration migration, FindMigration(client, o.name));
        RETURN_IF_ERROR(PrintResource(ParseFormat(o.format), migration, migration.name(),
                                      [&] { return DescribeMigration(migration); }));
        return 0;
      });
  add("policy", "policies", "A policy", [](Client* client, const Options& o) -> absl::StatusOr<int> {
    ASSIGN_OR_RETURN(std::string name, FullName(Collection::kPolicies, o.name));
    ASSIGN_OR_RETURN(v1::Policy policy, client->GetPolicy(name));
    RETURN_IF_ERROR(
        PrintResource(ParseFormat(o.format), policy, policy.name(), [&] { return DescribePolicy(policy); }));
    return 0;
  });
}

}  // namespace baton::client
