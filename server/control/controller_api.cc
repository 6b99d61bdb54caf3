// Controller: what callers of the API ask for.
#include <algorithm>
#include <chrono>

#include "common/grpc_status.h"
#include "common/log.h"
#include "common/reason.h"
#include "server/control/controller.h"
#include "server/control/dry_run.h"
#include "server/names.h"

namespace baton::server {

// --- the API ---

absl::StatusOr<v1::Migration> Controller::Plan(const v1::Migration& wanted) {
  ASSIGN_OR_RETURN(std::string vm, ParseName(wanted.vm(), "vms", "migration.vm"));
  ASSIGN_OR_RETURN(std::string destination,
                   ParseName(wanted.destination(), "hosts", "migration.destination"));
  std::string policy_name = wanted.policy().empty() ? "policies/default" : wanted.policy();
  ASSIGN_OR_RETURN(std::string policy_id, ParseName(policy_name, "policies", "migration.policy"));
  RETURN_IF_ERROR(ValidateParams(wanted.params(), "migration.params."));
  if (wanted.labels_size() > 32) return InvalidField("migration.labels", "at most 32");
  for (const auto& [key, value] : wanted.labels()) {
    if (key.size() > 63 || value.size() > 255) {
      return InvalidField("migration.labels", "keys have at most 63 bytes, values at most 255");
    }
  }
  ASSIGN_OR_RETURN(v1::Policy policy, policies_.Get(policy_id));
  if (!policy.schedule().empty()) {
    return Error(absl::StatusCode::kUnimplemented,
                 "policies/{}: schedules are kept but not carried out by this version; use on_stall",
                 policy_id);
  }
  ASSIGN_OR_RETURN(v1::Vm known, fleet_.GetVm(vm));
  // libvirt's QEMUs move their memory themselves, Baton's own never do.
  const v1::Engine other = known.has_domain() ? v1::ENGINE_AGENT : v1::ENGINE_VMM;
  if (policy.engine() == other) {
    return Error(
        v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
        "policies/{} wants the {} engine, {} is {} and moves by the other one: choose a policy with the "
        "engine auto",
        policy_id, known.has_domain() ? "agent" : "VMM", known.name(),
        known.has_domain() ? "a libvirt domain" : "a VM of Baton's own");
  }
  ASSIGN_OR_RETURN(v1::Host host, fleet_.GetHost(destination));
  if (known.host() == wanted.destination()) {
    return InvalidField("migration.destination", fmt::format("{} runs there already", wanted.vm()));
  }
  auto refuse = [&](v1::Reason reason, absl::StatusCode code, const std::string& name,
                    const std::string& why) {
    std::string collection = name.substr(0, name.find('/'));
    absl::Status status = WithReason(absl::Status(code, fmt::format("{} {}", name, why)), reason);
    return WithPrecondition(WithResource(std::move(status), collection, name), v1::Reason_Name(reason), name,
                            why);
  };
  if (host.cordoned()) {
    return refuse(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, host.name(),
                  "is cordoned; uncordon it or choose another destination");
  }
  RETURN_IF_ERROR(fleet_.CheckNoStaleCopy(vm));
  RETURN_IF_ERROR(fleet_.CheckNotSwapping(vm));
  if (!known.migration().empty()) {
    return refuse(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, known.name(),
                  fmt::format("is in {} already", known.migration()));
  }
  const std::string no_session = "has no agent session; check baton-agent there";
  if (known.state() == v1::Vm::HOST_UNREACHABLE) {
    return WithRetry(refuse(v1::AGENT_UNREACHABLE, absl::StatusCode::kUnavailable, known.host(), no_session),
                     std::chrono::seconds(2));
  }
  if (!host.connected()) {
    return WithRetry(refuse(v1::AGENT_UNREACHABLE, absl::StatusCode::kUnavailable, host.name(), no_session),
                     std::chrono::seconds(2));
  }
  if (known.state() != v1::Vm::RUNNING) {
    return refuse(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, known.name(),
                  fmt::format("is {}, only running VMs migrate", v1::Vm::State_Name(known.state())));
  }
  v1::Migration migration;
  migration.set_vm(known.name());
  migration.set_source(known.host());
  migration.set_destination(host.name());
  migration.set_policy(policy_name);
  *migration.mutable_params() = MergeParams(policy.params(), wanted.params());
  *migration.mutable_labels() = wanted.labels();
  migration.set_epoch(known.epoch());
  return migration;
}

void Controller::Create(const v1::CreateMigrationRequest& request, Callback callback) {
  v1::CreateMigrationRequest body = request;
  body.clear_request_id();
  std::string request_key = "requests/migrations." + request.request_id();
  bool keyed = !request.request_id().empty() && !request.validate_only();
  if (request.request_id().size() > 128)
    return callback(InvalidField("request_id", "has more than 128 bytes"));
  if (keyed) {
    auto before = store_.Get(request_key);
    if (before.ok()) {
      RequestRecord record;
      record.ParseFromString(before->value);
      if (record.body() == Canonical(body)) return callback(Get(IdOf(record.name())));
      return callback(WithResource(
          Error(absl::StatusCode::kAlreadyExists, "request_id {} was used for {} with another body",
                request.request_id(), record.name()),
          "migrations", record.name()));
    }
    if (before.status().code() != absl::StatusCode::kNotFound) return callback(before.status());
  }
  auto planned = Plan(request.migration());
  if (!planned.ok()) return callback(planned.status());
  if (request.validate_only()) return RunDry(*std::move(planned), std::move(callback));

  v1::Migration migration = *std::move(planned);
  Now now = Time();
  // Ids of one batond rise even if its clock does not.
  last_id_ms_ = std::max(last_id_ms_ + 1, now.wall_ns / 1'000'000);
  std::string id = NewMigrationId(last_id_ms_);
  migration.set_name("migrations/" + id);
  migration.mutable_create_time()->set_seconds(now.wall_ns / 1'000'000'000);
  migration.mutable_create_time()->set_nanos(static_cast<int32_t>(now.wall_ns % 1'000'000'000));
  Machine machine(migration, MigrationControl(), options_.times);
  machine.Handle(Tick{}, now);
  Batch more;
  if (keyed) {
    RequestRecord record;
    record.set_name(migration.name());
    record.set_body(Canonical(body));
    more.Put(request_key, record.SerializeAsString());
  }
  Entry& entry = Add(id, std::move(machine));
  if (absl::Status status = Save(entry, entry.machine, true, true, &more); !status.ok()) {
    busy_.erase(entry.vm);
    entries_.erase(id);
    return callback(status);
  }
  Connect(entry);
  Schedule();
  callback(Get(id));
}

void Controller::RunDry(v1::Migration migration, Callback callback) {
  StartDryRun(fleet_, std::move(migration), options_.dirty_sample, last_rate_, std::move(callback));
}

absl::StatusOr<v1::Migration> Controller::Get(const std::string& id) {
  auto item = store_.Get("migrations/" + id);
  if (item.status().code() == absl::StatusCode::kNotFound) return NoSuch("migrations", id);
  RETURN_IF_ERROR(item.status());
  return FromValue(item->value, item->revision);
}

absl::StatusOr<Controller::Page> Controller::List(const MigrationFilter& filter, const std::string& after,
                                                  size_t limit) {
  Page page;
  page.revision = store_.Revision();
  std::string key = after.empty() ? "" : "migrations/" + after;
  while (true) {
    ASSIGN_OR_RETURN(auto items, store_.Scan("migrations/", key, 200, true));
    for (const Item& item : items) {
      ASSIGN_OR_RETURN(v1::Migration migration, FromValue(item.value, item.revision));
      if (!filter.Matches(migration)) continue;
      if (page.migrations.size() == limit) {
        page.last = IdOf(page.migrations.back().name());
        return page;
      }
      page.migrations.push_back(std::move(migration));
    }
    if (items.size() < 200) return page;
    key = items.back().key;
  }
}

absl::StatusOr<v1::Migration> Controller::Cancel(const std::string& id) {
  ASSIGN_OR_RETURN(Entry * entry, FindActive(id));
  RETURN_IF_ERROR(TryApply(*entry, CancelAsked{}));
  return Get(id);
}

absl::StatusOr<v1::Migration> Controller::Retune(const std::string& id, const v1::RetuneCommand& retune) {
  ASSIGN_OR_RETURN(Entry * entry, FindActive(id));
  v1::MigrationParams params;
  if (retune.has_bandwidth()) params.set_bandwidth(retune.bandwidth());
  if (retune.has_max_downtime()) *params.mutable_max_downtime() = retune.max_downtime();
  if (!retune.has_bandwidth() && !retune.has_max_downtime()) {
    return absl::InvalidArgumentError("nothing to change: set bandwidth or max_downtime");
  }
  RETURN_IF_ERROR(ValidateParams(params, ""));
  RETURN_IF_ERROR(TryApply(*entry, RetuneAsked{retune}));
  return Get(id);
}

absl::StatusOr<v1::Migration> Controller::Resolve(const std::string& id, bool fenced) {
  Entry* entry = Find(id);
  if (!entry) {
    ASSIGN_OR_RETURN(v1::Migration migration, Get(id));
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "migrations/{}: there is nothing to resolve; it has ended ({})", id,
                 LabelOf(migration.phase()));
  }
  RETURN_IF_ERROR(entry->machine.CanResolve());
  if (!fenced) {
    return InvalidField(
        "fenced", "must be true: confirm that the host which does not answer cannot run the guest any more");
  }
  bool source_gone = entry->machine.control().destination().handover() == v1::OWNER;
  const std::string& gone = source_gone ? entry->source : entry->destination;
  if (!source_gone) {
    // Should the destination come back as owner, its claim must not win by its higher epoch.
    RETURN_IF_ERROR(fleet_.VoidClaim(entry->vm, gone, entry->machine.migration().epoch() + 1));
  }
  LOG_WARN("migrations/{}: hosts/{} was confirmed as fenced", id, gone);
  RETURN_IF_ERROR(TryApply(*entry, FencedAsked{}));
  return Get(id);
}

absl::StatusOr<std::vector<v1::WatchMigrationsResponse>> Controller::Changes(const std::string& id,
                                                                             int64_t after, int limit) {
  ASSIGN_OR_RETURN(auto changes, store_.Changes("migrations/" + id, after, limit));
  std::vector<v1::WatchMigrationsResponse> out;
  for (const Change& change : changes) {
    v1::WatchMigrationsResponse response;
    response.set_revision(change.revision);
    if (change.value) {
      ASSIGN_OR_RETURN(*response.mutable_migration(), FromValue(*change.value, change.revision));
    } else {
      // Forgotten for its age: only the name is left.
      response.mutable_migration()->set_name(change.key);
      response.mutable_migration()->set_revision(change.revision);
    }
    out.push_back(std::move(response));
  }
  return out;
}

void Controller::OnVm(const std::string& vm) {
  if (vm_listener_) vm_listener_(vm);
}

uint64_t Controller::Subscribe(std::function<void()> wake) {
  subscribers_[next_subscriber_] = std::move(wake);
  metrics_.watches->Set(static_cast<double>(subscribers_.size()));
  return next_subscriber_++;
}

void Controller::Unsubscribe(uint64_t number) {
  subscribers_.erase(number);
  metrics_.watches->Set(static_cast<double>(subscribers_.size()));
}

}  // namespace baton::server
