// Fleet: the VMs, who owns them, and claims that contradict the record.
#include <algorithm>
#include <chrono>

#include "common/grpc_status.h"
#include "common/log.h"
#include "common/vm_spec.h"
#include "server/fleet/fleet.h"
#include "server/names.h"

namespace baton::server {

absl::Status Fleet::Save(const std::string& id, VmEntry& entry, VmRecord record) {
  if (entry.record.SerializeAsString() == record.SerializeAsString()) return absl::OkStatus();
  Batch batch;
  batch.Put("vms/" + id, record.SerializeAsString());
  RETURN_IF_ERROR(store_.Commit(batch).status());
  entry.record = std::move(record);
  return absl::OkStatus();
}

std::string Fleet::IdFor(const v1::Vm& reported) const {
  std::string id = IdOf(reported.name());
  if (!reported.has_domain() || reported.domain().uuid().empty()) return id;
  auto found = vms_.find(id);
  const bool other =
      found != vms_.end() && found->second.record.vm().domain().uuid() != reported.domain().uuid();
  return other || vms_.count(reported.domain().uuid()) ? reported.domain().uuid() : id;
}

void Fleet::TakeVm(HostEntry& host, const v1::Vm& reported) {
  std::string id = IdFor(reported);
  if (!IsValidName(id)) {
    LOG_WARN("{}: a VM with the impossible name \"{}\" was ignored", host.record.host().name(), id);
    return;
  }
  const std::string host_name = host.record.host().name();
  v1::Vm vm = reported;
  vm.set_name("vms/" + id);
  vm.set_host(host_name);
  host.vms[id] = vm;
  // The destination side of a migration owns nothing yet.
  if (vm.state() == v1::Vm::INCOMING) return;
  auto found = vms_.find(id);
  if (found == vms_.end()) found = vms_.emplace(id, VmEntry()).first;
  VmEntry& entry = found->second;
  VmRecord record = entry.record;
  bool is_void = std::any_of(
      record.void_claims().begin(), record.void_claims().end(),
      [&](const auto& claim) { return claim.host() == host_name && claim.epoch() == vm.epoch(); });
  bool newer = record.owner().empty() || vm.epoch() > record.epoch();
  bool same = vm.epoch() == record.epoch() && record.owner() == host_name;
  // libvirt's own protocol moves domains, and nobody counts epochs then: one that runs here and stands still
  // there is here.
  newer |= vm.has_domain() && vm.state() == v1::Vm::RUNNING && vm.epoch() == record.epoch() &&
           record.vm().state() == v1::Vm::STOPPED;
  if (is_void || (!newer && !same)) {
    // A source that has yielded keeps its stopped VM for a moment; one that runs is a second owner.
    bool in_migration = observer_ && !observer_->MigrationOf(id).empty();
    if (vm.state() != v1::Vm::RUNNING) {
      ClearStale(id, host_name);
    } else if (!in_migration) {
      SetStale(id, entry, vm, is_void);
    }
    return;
  }
  ClearStale(id, host_name);
  if (newer && !record.owner().empty() && record.owner() != host_name) {
    LOG_INFO("vms/{}: {} owns it at epoch {} (before: {} at {})", id, host_name, vm.epoch(), record.owner(),
             record.epoch());
  }
  *record.mutable_vm() = vm;
  record.mutable_vm()->clear_migration();
  record.set_owner(host_name);
  record.set_epoch(vm.epoch());
  if (absl::Status status = Save(id, entry, record); !status.ok()) {
    // The claim stays in the host's inventory and is taken again with its next word.
    LOG_ERROR("vms/{}: {}", id, Message(status));
    if (entry.record.owner().empty()) vms_.erase(id);
  }
  CountHosts();
  if (observer_) observer_->OnVm(id);
  if (observer_ && vm.state() == v1::Vm::STOPPED) observer_->OnVmEnded(IdOf(host_name), id, vm.message());
  // The word of the host to which libvirt moved it may have come before this one's.
  if (vm.has_domain() && vm.state() == v1::Vm::STOPPED) Adopt(id);
}

void Fleet::SetStale(const std::string& id, VmEntry& entry, const v1::Vm& claim, bool is_void) {
  metrics_.stale_owners->Increment();
  LOG_ERROR(
      "vms/{}: {} claims to run it at epoch {}{}, but {} owns it at epoch {}: two copies may be running; "
      "end the one at {} (QEMU has pid {} there)",
      id, claim.host(), claim.epoch(), is_void ? " (fenced)" : "", entry.record.owner(), entry.record.epoch(),
      claim.host(), claim.vmm_pid());
  if (entry.stale.insert_or_assign(claim.host(), claim).second) metrics_.stale_copies->Increment();
}

void Fleet::ClearStale(const std::string& id, const std::string& host) {
  auto found = vms_.find(id);
  if (found == vms_.end() || found->second.stale.erase(host) == 0) return;
  metrics_.stale_copies->Decrement();
  LOG_INFO("vms/{}: {} does not run a second copy any more", id, host);
}

absl::Status Fleet::CheckNoStaleCopy(const std::string& id) const {
  auto found = vms_.find(id);
  if (found == vms_.end() || found->second.stale.empty()) return absl::OkStatus();
  const v1::Vm& claim = found->second.stale.begin()->second;
  const VmRecord& record = found->second.record;
  std::string why = fmt::format(
      "runs at {} as well, at epoch {}, but {} owns it at epoch {}: end the copy at {} first (its QEMU has "
      "pid {} there)",
      claim.host(), claim.epoch(), record.owner(), record.epoch(), claim.host(), claim.vmm_pid());
  absl::Status status =
      Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, "vms/{} {}", id, why);
  return WithPrecondition(WithResource(std::move(status), "vms", "vms/" + id), "STALE_OWNER", claim.host(),
                          why);
}

void Fleet::DropVm(HostEntry& host, const std::string& id, const std::string& message) {
  auto found = vms_.find(id);
  if (found == vms_.end() || found->second.record.owner() != host.record.host().name()) return;
  VmEntry& entry = found->second;
  if (observer_ && !observer_->MigrationOf(id).empty()) {
    // The new owner's word, or the migration's end, decides what becomes of it.
    VmRecord record = entry.record;
    record.mutable_vm()->set_state(v1::Vm::STOPPED);
    record.mutable_vm()->set_message(message);
    if (absl::Status status = Save(id, entry, record); !status.ok())
      LOG_ERROR("vms/{}: {}", id, Message(status));
    observer_->OnVmEnded(IdOf(host.record.host().name()), id, message);
    return;
  }
  Batch batch;
  batch.Delete("vms/" + id);
  if (absl::Status status = store_.Commit(batch).status(); !status.ok()) {
    LOG_ERROR("vms/{}: {}", id, Message(status));
    return;
  }
  LOG_INFO("vms/{}: gone from {}: {}", id, host.record.host().name(), message);
  Forget(id);
  Adopt(id);
}

void Fleet::Adopt(const std::string& id) {
  for (auto& [name, host] : hosts_) {
    auto claim = host.vms.find(id);
    if (claim == host.vms.end() || !claim->second.has_domain() || claim->second.state() != v1::Vm::RUNNING)
      continue;
    const v1::Vm vm = claim->second;
    return TakeVm(host, vm);
  }
}

void Fleet::Forget(const std::string& id) {
  auto found = vms_.find(id);
  if (found == vms_.end()) return;
  metrics_.stale_copies->Decrement(static_cast<double>(found->second.stale.size()));
  vms_.erase(found);
  CountHosts();
}

v1::Vm Fleet::View(const std::string& id, const VmEntry& entry) const {
  v1::Vm view = entry.record.vm();
  view.set_name("vms/" + id);
  view.set_host(entry.record.owner());
  view.set_epoch(entry.record.epoch());
  std::string host_id = IdOf(entry.record.owner());
  if (!Connected(host_id)) {
    view.set_state(v1::Vm::HOST_UNREACHABLE);
    view.set_message(
        fmt::format("the agent of {} has no session; the VM itself does not need one", entry.record.owner()));
  }
  if (absl::Status stale = CheckNoStaleCopy(id); !stale.ok()) view.set_message(Message(stale));
  if (observer_) view.set_migration(observer_->MigrationOf(id));
  return view;
}

absl::StatusOr<v1::Vm> Fleet::GetVm(const std::string& id) const {
  auto found = vms_.find(id);
  if (found == vms_.end()) return NoSuch("vms", id);
  return View(id, found->second);
}

std::vector<v1::Vm> Fleet::ListVms(const std::string& host, const std::string& after, size_t limit) const {
  std::vector<v1::Vm> vms;
  for (auto it = vms_.upper_bound(after); it != vms_.end() && vms.size() < limit; ++it) {
    if (!host.empty() && it->second.record.owner() != "hosts/" + host) continue;
    vms.push_back(View(it->first, it->second));
  }
  return vms;
}

const VmRecord* Fleet::FindVm(const std::string& id) const {
  auto found = vms_.find(id);
  return found == vms_.end() ? nullptr : &found->second.record;
}

void Fleet::StartVm(const std::string& host, const v1::VmSpec& spec, VmCallback callback) {
  const std::string id = spec.name();
  if (!hosts_.count(host)) return callback(NoSuch("hosts", host));
  if (!Connected(host)) {
    return callback(WithRetry(Error(v1::AGENT_UNREACHABLE, absl::StatusCode::kUnavailable,
                                    "the agent of hosts/{} has no session; check baton-agent there", host),
                              std::chrono::seconds(2)));
  }
  auto found = vms_.find(id);
  if (found != vms_.end()) {
    const VmRecord& record = found->second.record;
    bool same = record.vm().spec().SerializeAsString() == spec.SerializeAsString();
    auto taken = [&](const std::string& why) {
      return WithResource(Error(absl::StatusCode::kAlreadyExists, "vms/{} {}", id, why), "vms", "vms/" + id);
    };
    if (absl::Status stale = CheckNoStaleCopy(id); !stale.ok()) return callback(stale);
    if (!same) return callback(taken(fmt::format("exists at {} with another spec", record.owner())));
    if (record.owner() != "hosts/" + host)
      return callback(taken(fmt::format("exists at {}", record.owner())));
    v1::Vm view = View(id, found->second);
    if (view.state() == v1::Vm::RUNNING || view.state() == v1::Vm::PAUSED) return callback(view);
    if (!view.migration().empty()) return callback(taken(fmt::format("is in {}", view.migration())));
  }
  VmEntry& entry = vms_[id];
  VmRecord record = entry.record;
  *record.mutable_vm()->mutable_spec() = spec;
  record.mutable_vm()->set_name("vms/" + id);
  record.mutable_vm()->set_host("hosts/" + host);
  record.mutable_vm()->set_state(v1::Vm::STARTING);
  record.mutable_vm()->clear_message();
  record.set_owner("hosts/" + host);
  if (absl::Status status = Save(id, entry, record); !status.ok()) {
    if (entry.record.owner().empty()) vms_.erase(id);
    return callback(status);
  }
  entry.starting = true;
  CountHosts();
  v1::Command command;
  *command.mutable_start_vm()->mutable_spec() = spec;
  command.mutable_timeout()->set_seconds(60);
  Send(host, std::move(command), [this, id, host, callback = std::move(callback)](CommandReply reply) {
    auto found = vms_.find(id);
    const absl::Status failed =
        Annotate(reply.status, fmt::format("hosts/{} could not start vms/{}", host, id));
    if (found == vms_.end()) {
      // An agent says that a VM which did not start is gone before it says why.
      return callback(failed.ok() ? absl::AbortedError("the VM was stopped meanwhile") : failed);
    }
    found->second.starting = false;
    if (reply.status.ok()) {
      v1::Vm vm = reply.result.vm();
      vm.set_name("vms/" + id);
      TakeVm(hosts_[host], vm);
      return callback(GetVm(id));
    }
    if (reply.answered && !hosts_[host].vms.count(id)) {
      // The agent says that it did not start: the name is free again.
      Batch batch;
      batch.Delete("vms/" + id);
      if (store_.Commit(batch).ok()) Forget(id);
    }
    callback(failed);
  });
}

void Fleet::StopVm(const std::string& id, bool force, std::function<void(absl::Status)> callback) {
  auto found = vms_.find(id);
  if (found == vms_.end()) return callback(NoSuch("vms", id));
  v1::Vm view = View(id, found->second);
  if (!view.migration().empty()) {
    return callback(
        WithResource(Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                           "vms/{} is in {}; cancel that first, or wait for its end", id, view.migration()),
                     "migrations", view.migration()));
  }
  std::string host = IdOf(found->second.record.owner());
  v1::Command command;
  command.mutable_stop_vm()->set_vm(id);
  command.mutable_stop_vm()->set_force(force);
  command.mutable_timeout()->set_seconds(30);
  Send(host, std::move(command), [this, id, host, callback = std::move(callback)](CommandReply reply) {
    // An agent that has no such VM has nothing to stop.
    if (!reply.status.ok() && !(reply.answered && reply.status.code() == absl::StatusCode::kNotFound)) {
      return callback(Annotate(reply.status, fmt::format("vms/{}", id)));
    }
    hosts_[host].vms.erase(id);
    if (vms_.count(id)) {
      Batch batch;
      batch.Delete("vms/" + id);
      if (absl::Status status = store_.Commit(batch).status(); !status.ok()) return callback(status);
      Forget(id);
    }
    callback(absl::OkStatus());
  });
}

absl::Status Fleet::SetOwner(const std::string& id, const std::string& host, uint64_t epoch) {
  auto found = vms_.find(id);
  if (found == vms_.end() || epoch <= found->second.record.epoch()) return absl::OkStatus();
  VmRecord record = found->second.record;
  record.set_owner("hosts/" + host);
  record.set_epoch(epoch);
  record.mutable_vm()->set_host("hosts/" + host);
  ClearStale(id, "hosts/" + host);
  if (auto at = hosts_.find(host); at != hosts_.end() && at->second.vms.count(id)) {
    *record.mutable_vm() = at->second.vms[id];
  }
  return Save(id, found->second, std::move(record));
}

absl::Status Fleet::VoidClaim(const std::string& id, const std::string& host, uint64_t epoch) {
  auto found = vms_.find(id);
  if (found == vms_.end()) return absl::OkStatus();
  VmRecord record = found->second.record;
  for (const auto& claim : record.void_claims()) {
    if (claim.host() == "hosts/" + host && claim.epoch() == epoch) return absl::OkStatus();
  }
  auto* claim = record.add_void_claims();
  claim->set_host("hosts/" + host);
  claim->set_epoch(epoch);
  return Save(id, found->second, std::move(record));
}

}  // namespace baton::server
