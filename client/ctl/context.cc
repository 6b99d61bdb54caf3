#include "client/ctl/context.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdlib>

#include "client/ctl/terminal.h"
#include "client/ctl/text.h"
#include "client/lib/units.h"
#include "common/config.h"

namespace baton::client {

std::string DefaultConfigPath() {
  const char* xdg = std::getenv("XDG_CONFIG_HOME");
  if (xdg != nullptr && *xdg == '/') return std::string(xdg) + "/baton/config.yaml";
  const char* home = std::getenv("HOME");
  if (home != nullptr && *home == '/') return std::string(home) + "/.config/baton/config.yaml";
  return "";
}

absl::Status ReadConfigFile(const std::string& path, bool required, Context* out) {
  auto document = ConfigDocument::FromFile(path);
  if (!document.ok()) {
    if (!required && document.status().code() == absl::StatusCode::kNotFound) return absl::OkStatus();
    return document.status();
  }
  ConfigReader root = document->Root();
  for (auto [name, field] : {std::pair{"server", &out->server},
                             {"ca", &out->ca},
                             {"cert", &out->cert},
                             {"key", &out->key},
                             {"tls_name", &out->tls_name},
                             {"connect_timeout", &out->connect_timeout},
                             {"request_timeout", &out->request_timeout}}) {
    std::string value;
    if (root.Text(name, &value) && field->empty()) *field = value;
  }
  return document->Finish(root);
}

absl::StatusOr<ConnectionOptions> Context::Connection() {
  std::string path = config_path.empty() ? DefaultConfigPath() : config_path;
  if (!path.empty()) RETURN_IF_ERROR(AsWrongInput(ReadConfigFile(path, !config_path.empty(), this)));
  ConnectionOptions options;
  if (!server.empty()) options.server = server;
  options.ca = ca;
  options.cert = cert;
  options.key = key;
  options.tls_name = tls_name;
  if (!connect_timeout.empty()) {
    ASSIGN_OR_RETURN(options.connect_timeout, DurationOption("connect timeout", connect_timeout));
  }
  if (!request_timeout.empty()) {
    ASSIGN_OR_RETURN(options.request_timeout, DurationOption("request timeout", request_timeout));
  }
  return options;
}

absl::StatusOr<Client*> Context::Connect() {
  if (!client_) {
    ASSIGN_OR_RETURN(ConnectionOptions options, Connection());
    auto client = Client::Make(options);
    if (!client.ok()) return AsWrongInput(client.status());
    client_ = *std::move(client);
  }
  return client_.get();
}

absl::Status Print(const std::string& text) { return WriteAll(STDOUT_FILENO, text); }
void PrintError(const std::string& text) { WriteAll(STDERR_FILENO, Harmless(text)).IgnoreError(); }

absl::Status AsWrongInput(const absl::Status& status) {
  return status.ok() ? status : absl::InvalidArgumentError(Message(status));
}

absl::StatusOr<Duration> DurationOption(const std::string& option, const std::string& text) {
  auto duration = ParseDuration(text);
  return duration.ok() ? duration : Annotate(duration.status(), option);
}

absl::StatusOr<uint64_t> RateOption(const std::string& option, const std::string& text) {
  auto rate = ParseRate(text);
  return rate.ok() ? rate : Annotate(rate.status(), option);
}

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}
int64_t NowSeconds() { return NowNs() / 1000000000; }

size_t OutputWidth() {
  return IsTerminal(STDOUT_FILENO) ? static_cast<size_t>(SizeOf(STDOUT_FILENO).columns) : 0;
}

absl::Status PrintResource(Format format, const google::protobuf::Message& message, const std::string& name,
                           const std::function<std::string()>& text) {
  switch (format) {
    case Format::kJson:
      return Print(ToJson(message));
    case Format::kYaml:
      return Print(ToYaml(message));
    case Format::kName:
      return Print(name + "\n");
    default:
      return Print(text());
  }
}

void AddFormatOption(CLI::App* command, std::string* format) {
  *format = "table";
  command->add_option("-o,--output", *format, "Output: table, wide, json, yaml or name")
      ->check(CLI::IsMember({"table", "wide", "json", "yaml", "name"}))
      ->option_text("FORMAT");
}

absl::StatusOr<v1::Migration> FindMigration(Client* client, const std::string& name) {
  std::string id = name;
  absl::Status first;
  if (name.rfind("vms/", 0) != 0) {
    ASSIGN_OR_RETURN(std::string full, FullName(Collection::kMigrations, name));
    auto migration = client->GetMigration(full);
    if (migration.ok() || migration.status().code() != absl::StatusCode::kNotFound) return migration;
    first = migration.status();
    id = ShortName(full);
    if (name != id) return first;
    // Ids are long; the first letters that a list shows are enough where they are unambiguous.
    if (id.size() >= 4) {
      ASSIGN_OR_RETURN(auto list, client->ListMigrations("", 1000));
      const v1::Migration* found = nullptr;
      for (const auto& candidate : list.migrations) {
        if (ShortName(candidate.name()).rfind(id, 0) != 0) continue;
        if (found != nullptr) {
          return Error(absl::StatusCode::kInvalidArgument, "'{}' could mean {} or {}: write more of it", name,
                       found->name(), candidate.name());
        }
        found = &candidate;
      }
      if (found != nullptr) return *found;
    }
  }
  ASSIGN_OR_RETURN(std::string vm_name, FullName(Collection::kVms, id));
  auto vm = client->GetVm(vm_name);
  if (!vm.ok()) {
    if (vm.status().code() != absl::StatusCode::kNotFound || first.ok()) return vm.status();
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "there is no migration '{0}' and no VM '{0}'",
                 id);
  }
  if (vm->migration().empty()) {
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound,
                 "{} is in no migration now; 'batonctl get migrations --vm {}' lists those that ended",
                 vm_name, id);
  }
  return client->GetMigration(vm->migration());
}

}  // namespace baton::client
