#include "client/ctl/completion.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <optional>

#include "client/ctl/context.h"

namespace baton::client {
namespace {

constexpr char kBashScript[] = R"(# bash completion of batonctl. Load it with
#   source <(batonctl completion bash)
# or put it into /etc/bash_completion.d/batonctl.
_batonctl() {
  local IFS=$'\n'
  COMPREPLY=($(batonctl __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
# Where batonctl knows nothing better, files are offered.
complete -o default -F _batonctl batonctl
)";

// What the values of options are.
const std::map<std::string, Collection>& OptionCollections() {
  static const auto* map = new std::map<std::string, Collection>{
      {"--host", Collection::kHosts},       {"--to", Collection::kHosts},
      {"--vm", Collection::kVms},           {"--event-vm", Collection::kVms},
      {"--event-host", Collection::kHosts}, {"--policy", Collection::kPolicies}};
  return *map;
}

const std::map<std::string, std::vector<std::string>>& OptionWords() {
  static const auto* map = new std::map<std::string, std::vector<std::string>>{
      {"--output", {"table", "wide", "json", "yaml", "name"}},
      {"--phase",
       {"QUEUED", "PREPARING", "PRECOPY", "SWITCHOVER", "POSTCOPY", "FINISHING", "SUCCEEDED", "FAILED",
        "CANCELLED"}},
      {"--on-stall", {"abort", "raise-downtime", "switchover", "postcopy"}},
      {"--engine", {"auto", "agent", "vmm"}},
      {"--compression", {"none", "xbzrle", "zlib", "zstd"}},
      {"--inflight", {"drain", "handoff"}},
      {"--kind", {"qemu-storage-daemon", "dpdk", "spdk", "libvhost-user", "lab"}},
      {"--on-device-error", {"migrate", "nothing"}},
      {"--observe-only", {"true", "false"}}};
  return *map;
}

// What the words of a command are, by its path.
std::vector<Collection> PositionalCollections(const std::string& path) {
  static const auto* map = new std::map<std::string, std::vector<Collection>>{
      {"get hosts", {Collection::kHosts}},
      {"get vms", {Collection::kVms}},
      {"get migrations", {Collection::kMigrations}},
      {"get policies", {Collection::kPolicies}},
      {"describe host", {Collection::kHosts}},
      {"describe vm", {Collection::kVms}},
      {"describe migration", {Collection::kMigrations}},
      {"describe policy", {Collection::kPolicies}},
      {"vm stop", {Collection::kVms}},
      {"vm console", {Collection::kVms}},
      {"device list", {Collection::kVms}},
      {"device swap", {Collection::kVms}},
      {"migrate", {Collection::kVms}},
      {"watch", {Collection::kMigrations, Collection::kVms}},
      {"cancel", {Collection::kMigrations, Collection::kVms}},
      {"retune", {Collection::kMigrations, Collection::kVms}},
      {"migration resolve", {Collection::kMigrations}},
      {"report", {Collection::kMigrations}},
      {"cordon", {Collection::kHosts}},
      {"uncordon", {Collection::kHosts}},
      {"policy get", {Collection::kPolicies}},
      {"policy set", {Collection::kPolicies}},
      {"policy delete", {Collection::kPolicies}}};
  auto found = map->find(path);
  return found == map->end() ? std::vector<Collection>{} : found->second;
}

CLI::App* FindSubcommand(CLI::App* command, const std::string& word) {
  for (CLI::App* sub : command->get_subcommands([](CLI::App*) { return true; })) {
    if (sub->check_name(word)) return sub;
  }
  return nullptr;
}

// The option of `command` or of one above it that a word names.
CLI::Option* FindOption(CLI::App* command, const std::string& word) {
  for (CLI::App* at = command; at != nullptr; at = at->get_parent()) {
    for (CLI::Option* option : at->get_options([](CLI::Option*) { return true; })) {
      if (option->nonpositional() && option->check_name(word)) return option;
    }
  }
  return nullptr;
}

bool TakesValue(const CLI::Option* option) { return option->get_items_expected_max() > 0; }

// An option's long name: the key of the tables above.
std::string LongName(const CLI::Option* option) {
  return option->get_lnames().empty() ? "" : "--" + option->get_lnames().front();
}

std::vector<std::string> OptionNames(CLI::App* command) {
  std::vector<std::string> out;
  for (CLI::App* at = command; at != nullptr; at = at->get_parent()) {
    for (CLI::Option* option : at->get_options([](CLI::Option* o) { return o->nonpositional(); })) {
      for (const auto& name : option->get_lnames()) out.push_back("--" + name);
    }
  }
  return out;
}

}  // namespace

std::vector<std::string> Complete(CLI::App& app, const std::vector<std::string>& words,
                                  const NameSource& names) {
  if (words.empty()) return {};
  CLI::App* command = &app;
  std::string path;
  CLI::Option* waiting = nullptr;  // an option whose value is the next word
  for (size_t i = 0; i + 1 < words.size(); ++i) {
    const std::string& word = words[i];
    if (waiting != nullptr) {
      waiting = nullptr;
    } else if (word.size() > 1 && word[0] == '-') {
      CLI::Option* option = FindOption(command, word.substr(0, word.find('=')));
      if (option != nullptr && TakesValue(option) && word.find('=') == std::string::npos) waiting = option;
    } else if (CLI::App* sub = FindSubcommand(command, word)) {
      command = sub;
      path += (path.empty() ? "" : " ") + sub->get_name();
    }
  }
  const std::string& prefix = words.back();
  std::vector<std::string> candidates;
  if (waiting != nullptr) {
    std::string name = LongName(waiting);
    if (OptionCollections().count(name) > 0) {
      candidates = names(OptionCollections().at(name));
    } else if (name == "--output" && path == "report") {
      // A file.
    } else if (OptionWords().count(name) > 0) {
      candidates = OptionWords().at(name);
    }
  } else if (!prefix.empty() && prefix[0] == '-') {
    candidates = OptionNames(command);
  } else {
    for (CLI::App* sub : command->get_subcommands([](CLI::App*) { return true; })) {
      if (!sub->get_group().empty()) candidates.push_back(sub->get_name());
    }
    if (path == "completion") candidates.push_back("bash");
    for (Collection collection : PositionalCollections(path)) {
      for (auto& name : names(collection)) candidates.push_back(std::move(name));
    }
  }
  std::vector<std::string> out;
  for (auto& candidate : candidates) {
    if (candidate.rfind(prefix, 0) == 0) out.push_back(std::move(candidate));
  }
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

int RunComplete(CLI::App& app, Context* context, const std::vector<std::string>& words) {
  // The connection's options may stand on the line that is being written.
  const std::map<std::string, std::string*> options = {
      {"--server", &context->server},     {"-s", &context->server}, {"--ca", &context->ca},
      {"--cert", &context->cert},         {"--key", &context->key}, {"--tls-name", &context->tls_name},
      {"--config", &context->config_path}};
  for (size_t i = 0; i + 1 < words.size(); ++i) {
    auto option = options.find(words[i].substr(0, words[i].find('=')));
    if (option == options.end()) continue;
    size_t equals = words[i].find('=');
    *option->second = equals != std::string::npos ? words[i].substr(equals + 1) : words[i + 1];
  }
  for (const auto& [name, field] : {std::pair{"BATON_SERVER", &context->server},
                                    {"BATON_CA", &context->ca},
                                    {"BATON_CERT", &context->cert},
                                    {"BATON_KEY", &context->key},
                                    {"BATON_TLS_NAME", &context->tls_name},
                                    {"BATON_CONFIG", &context->config_path}}) {
    const char* value = std::getenv(name);
    if (value != nullptr && field->empty()) *field = value;
  }
  // Nobody waits long for a tab.
  context->connect_timeout = "1s";
  context->request_timeout = "5s";
  NameSource names = [context](Collection collection) {
    std::vector<std::string> out;
    auto client = context->Connect();
    if (!client.ok()) return out;
    auto add = [&out](const auto& items) {
      if (!items.ok()) return;
      for (const auto& item : *items) out.push_back(ShortName(item.name()));
    };
    switch (collection) {
      case Collection::kHosts:
        add((*client)->ListHosts());
        break;
      case Collection::kVms:
        add((*client)->ListVms());
        break;
      case Collection::kPolicies:
        add((*client)->ListPolicies());
        break;
      case Collection::kMigrations: {
        auto list = (*client)->ListMigrations("", 100);
        if (!list.ok()) break;
        for (const auto& migration : list->migrations) out.push_back(ShortName(migration.name()));
        break;
      }
    }
    return out;
  };
  std::string out;
  for (const auto& candidate : Complete(app, words, names)) out += candidate + "\n";
  Print(out).IgnoreError();
  return 0;
}

void AddCompletionCommand(CLI::App* app, Context* context) {
  auto shell = std::make_shared<std::string>();
  CLI::App* command = app->add_subcommand("completion", "Print the completion script of a shell");
  command->add_option("SHELL", *shell, "bash")->required()->check(CLI::IsMember({"bash"}));
  command->footer("Example:\n  source <(batonctl completion bash)");
  command->callback([=] {
    // Holds what the option writes to.
    context->action = [shell](Context&) -> absl::StatusOr<int> {
      RETURN_IF_ERROR(Print(kBashScript));
      return 0;
    };
  });
}

}  // namespace baton::client
