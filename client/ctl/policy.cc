// batonctl policy get, set, delete.
#include <CLI/CLI.hpp>

#include "client/ctl/context.h"
#include "client/ctl/params.h"
#include "client/ctl/show.h"
#include "client/lib/units.h"
#include "common/status.h"

namespace baton::client {
namespace {

struct SetOptions {
  std::string name, engine, format;
  std::shared_ptr<ParamOptions> params;
  std::optional<bool> observe_only;
  std::string on_device_error, backoff;
  std::vector<std::string> vms, hosts;
};

absl::StatusOr<v1::Policy> SetPolicy(Client* client, const SetOptions& o) {
  v1::UpdatePolicyRequest request;
  v1::Policy& policy = *request.mutable_policy();
  ASSIGN_OR_RETURN(*policy.mutable_name(), FullName(Collection::kPolicies, o.name));
  std::vector<std::string> given;
  ASSIGN_OR_RETURN(*policy.mutable_params(), BuildParams(*o.params, &given));
  for (const auto& path : given) request.mutable_update_mask()->add_paths("params." + path);
  if (!o.engine.empty()) {
    policy.set_engine(o.engine == "agent" ? v1::ENGINE_AGENT
                      : o.engine == "vmm" ? v1::ENGINE_VMM
                                          : v1::ENGINE_AUTO);
    request.mutable_update_mask()->add_paths("engine");
  }
  if (o.observe_only) {
    policy.set_observe_only(*o.observe_only);
    request.mutable_update_mask()->add_paths("observe_only");
  }
  if (!o.on_device_error.empty()) {
    v1::OnDeviceError& answer = *policy.mutable_on_device_error();
    answer.set_migrate(o.on_device_error == "migrate");
    for (const std::string& vm : o.vms) answer.add_vms(ShortName(vm));
    for (const std::string& host : o.hosts) {
      ASSIGN_OR_RETURN(*answer.add_hosts(), FullName(Collection::kHosts, host));
    }
    if (!o.backoff.empty()) {
      ASSIGN_OR_RETURN(Duration backoff, DurationOption("--event-backoff", o.backoff));
      *answer.mutable_backoff() = FromDuration(backoff);
    }
    request.mutable_update_mask()->add_paths("on_device_error");
  }
  auto existing = client->GetPolicy(policy.name());
  if (existing.status().code() == absl::StatusCode::kNotFound) {
    v1::CreatePolicyRequest create;
    create.set_policy_id(ShortName(policy.name()));
    *create.mutable_policy() = policy;
    return client->CreatePolicy(create);
  }
  RETURN_IF_ERROR(existing.status());
  if (request.update_mask().paths().empty()) {
    return Error(absl::StatusCode::kInvalidArgument, "nothing to change in {}: give parameters, see --help",
                 policy.name());
  }
  // What was read is what is changed: somebody else's change in between must not be mixed with this one.
  policy.set_etag(existing->etag());
  return client->UpdatePolicy(request);
}

void AddGet(CLI::App* group, Context* context) {
  struct Options {
    std::string name, format;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = group->add_subcommand("get", "Show a policy, or list all");
  command->add_option("NAME", o->name, "The policy");
  AddFormatOption(command, &o->format);
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      if (o->name.empty()) return ListPolicies(c, o->format);
      ASSIGN_OR_RETURN(std::string name, FullName(Collection::kPolicies, o->name));
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      ASSIGN_OR_RETURN(v1::Policy policy, client->GetPolicy(name));
      RETURN_IF_ERROR(PrintResource(ParseFormat(o->format), policy, policy.name(),
                                    [&] { return DescribePolicy(policy); }));
      return 0;
    };
  });
}

void AddSet(CLI::App* group, Context* context) {
  auto o = std::make_shared<SetOptions>();
  CLI::App* command = group->add_subcommand("set", "Change a policy, or create it");
  command->add_option("NAME", o->name, "The policy")->required();
  o->params = AddParamOptions(command);
  command->add_option("--engine", o->engine, "Who moves memory: auto, agent or vmm")
      ->check(CLI::IsMember({"auto", "agent", "vmm"}))
      ->option_text("ENGINE");
  command->add_option("--observe-only", o->observe_only, "Log decisions without acting: true or false")
      ->option_text("BOOL");
  const std::string group_name = "When a back-end tells of an error";
  CLI::Option* answer =
      command->add_option("--on-device-error", o->on_device_error, "Move the VM away: migrate or nothing")
          ->check(CLI::IsMember({"migrate", "nothing"}))
          ->option_text("ANSWER")
          ->group(group_name);
  command->add_option("--event-vm", o->vms, "VMs that it covers, also 'web*' (all); may be repeated")
      ->needs(answer)
      ->option_text("VM")
      ->group(group_name);
  command->add_option("--event-host", o->hosts, "Where to, in order of preference; may be repeated")
      ->needs(answer)
      ->option_text("HOST")
      ->group(group_name);
  command->add_option("--event-backoff", o->backoff, "Shortest time between two attempts for a VM (1m)")
      ->needs(answer)
      ->option_text("DURATION")
      ->group(group_name);
  AddFormatOption(command, &o->format);
  command->footer(
      "What is not given stays as it is. Migrations under way keep the parameters they started with.\n\n"
      "Examples:\n"
      "  batonctl policy set default --max-downtime 100ms\n"
      "  batonctl policy set night --bandwidth 2Gbit --on-stall raise-downtime\n"
      "  batonctl policy set evacuate --on-device-error migrate --event-vm 'web*' --event-host b");
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      ASSIGN_OR_RETURN(v1::Policy policy, SetPolicy(client, *o));
      RETURN_IF_ERROR(PrintResource(ParseFormat(o->format), policy, policy.name(),
                                    [&] { return policy.name() + " set\n"; }));
      return 0;
    };
  });
}

void AddDelete(CLI::App* group, Context* context) {
  auto name = std::make_shared<std::string>();
  CLI::App* command = group->add_subcommand("delete", "Delete a policy");
  command->add_option("NAME", *name, "The policy")->required();
  command->callback([=] {
    context->action = [name](Context& c) -> absl::StatusOr<int> {
      ASSIGN_OR_RETURN(std::string full, FullName(Collection::kPolicies, *name));
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      RETURN_IF_ERROR(client->DeletePolicy(full));
      RETURN_IF_ERROR(Print(full + " deleted\n"));
      return 0;
    };
  });
}

}  // namespace

void AddPolicyCommands(CLI::App* app, Context* context) {
  CLI::App* group = app->add_subcommand("policy", "Show and change policies");
  group->require_subcommand(1);
  AddGet(group, context);
  AddSet(group, context);
  AddDelete(group, context);
}

}  // namespace baton::client
