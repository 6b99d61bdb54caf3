#include "agent/daemon/vm_manager.h"

#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <utility>

#include "agent/vhost/probe.h"
#include "common/log.h"
#include "common/unix_socket.h"
#include "common/vm_spec.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;

// A back-end that is up answers within milliseconds.
constexpr Duration kProbeTimeout = seconds(3);
// What is left to end a VM whose start failed, whatever the command's own deadline.
constexpr Duration kAckTimeout = seconds(2);

// Equal as far as a person's spec goes: a VM that moved here has other back-ends than the spec names.
bool SameVm(v1::VmSpec a, v1::VmSpec b) {
  for (v1::VmSpec* spec : {&a, &b}) {
    for (v1::DeviceSpec& device : *spec->mutable_devices()) device.clear_backend();
  }
  return google::protobuf::util::MessageDifferencer::Equals(a, b);
}

}  // namespace

VmManager::VmManager(VmManagerParts parts, VmEvents events)
    : parts_(parts), config_(parts.config), events_(std::move(events)) {}

VmManager::~VmManager() {
  std::map<std::string, EntryPtr> entries;
  {
    std::lock_guard lock(mutex_);
    entries.swap(entries_);
  }
  // Their clients call back into us.
  for (auto& [name, entry] : entries) entry->Disconnect();
}

std::shared_ptr<VmEntry> VmManager::Find(const std::string& vm) const {
  std::lock_guard lock(mutex_);
  auto found = entries_.find(vm);
  return found == entries_.end() ? nullptr : found->second;
}

std::vector<v1::Vm> VmManager::Inventory() const {
  std::vector<EntryPtr> entries;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [name, entry] : entries_) entries.push_back(entry);
  }
  std::vector<v1::Vm> vms;
  for (const EntryPtr& entry : entries) {
    if (entry->listed()) vms.push_back(entry->Describe(config_.name));
  }
  return vms;
}

absl::StatusOr<VmManager::Locked> VmManager::Lock(const std::string& vm, bool create, Deadline deadline) {
  while (true) {
    EntryPtr entry;
    {
      std::lock_guard lock(mutex_);
      auto found = entries_.find(vm);
      if (found != entries_.end()) {
        entry = found->second;
      } else if (!create) {
        return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "no VM {} on host {}", vm, config_.name);
      } else {
        entry = std::make_shared<VmEntry>(vm, PathsOf(config_, vm));
        entries_[vm] = entry;
      }
    }
    std::unique_lock operation(entry->operation(), deadline.when());
    if (!operation.owns_lock())
      return Error(absl::StatusCode::kDeadlineExceeded, "another operation on VM {} has not ended in time",
                   vm);
    // Removed while we waited: the name is free again.
    if (entry->removed()) continue;
    return Locked{std::move(entry), std::move(operation)};
  }
}

VmEntry::Callbacks VmManager::CallbacksFor(const EntryPtr& entry) {
  // The entry owns the client that runs these, hence weak.
  std::weak_ptr<VmEntry> weak = entry;
  VmEntry::Callbacks callbacks;
  callbacks.on_event = [this, weak](const v1::ShimReply& event) {
    if (EntryPtr alive = weak.lock()) OnShimEvent(alive, event);
  };
  callbacks.on_close = [this, weak] {
    parts_.tasks.Post([this, weak] {
      if (EntryPtr alive = weak.lock()) OnShimGone(alive);
    });
  };
  return callbacks;
}

void VmManager::OnShimEvent(const EntryPtr& entry, const v1::ShimReply& event) {
  if (event.has_event_status()) {
    entry->set_status(event.event_status());
    Tell(entry);
    if (event.event_status().has_report()) OnReport(entry, event.event_status().report());
  }
  if (event.has_event_report()) OnReport(entry, event.event_report());
}

void VmManager::OnReport(const EntryPtr& entry, const v1::SideReport& report) {
  if (report.migration_id().empty()) return;
  std::optional<v1::SideReport> fresh = parts_.reports.Update(report);
  if (fresh) {
    events_.on_report(*fresh);
    if (fresh->done()) parts_.metrics.CountMigration(*fresh);
  }
  if (!report.done()) return;
  entry->set_finished(report.migration_id());
  bool given_away = report.role() == v1::ROLE_SOURCE && report.handover() == v1::RELEASED;
  bool refused = report.role() == v1::ROLE_DESTINATION && report.handover() == v1::REFUSED;
  if (given_away || refused) entry->set_retiring();
  // The shim may forget it now, and may have to go altogether. Not from here: this is the client's own
  // thread.
  parts_.tasks.Post([this, entry, report, given_away, refused] {
    v1::ShimRequest request;
    request.mutable_report_ack()->set_migration_id(report.migration_id());
    request.mutable_report_ack()->set_role(report.role());
    request.mutable_report_ack()->set_sequence(report.sequence());
    auto acknowledged = entry->Call(request, Deadline::After(kAckTimeout));
    if (!acknowledged.ok()) LOG_DEBUG("report not acknowledged: {}", Message(acknowledged.status()));
    if (given_away) Retire(entry, "moved to another host");
    if (refused) Retire(entry, "the migration to this host ended: " + report.message());
  });
}

void VmManager::Tell(const EntryPtr& entry) {
  if (entry->listed()) events_.on_vm(entry->Describe(config_.name));
  UpdateGauges();
}

void VmManager::UpdateGauges() {
  double running = 0, incoming = 0, other = 0;
  for (const v1::Vm& vm : Inventory()) {
    if (vm.state() == v1::Vm::RUNNING) {
      ++running;
    } else if (vm.state() == v1::Vm::INCOMING) {
      ++incoming;
    } else {
      ++other;
    }
  }
  parts_.metrics.SetVms(running, incoming, other);
}

absl::StatusOr<bool> VmManager::ResolveKvm(v1::Accelerator accelerator) const {
  if (accelerator == v1::ACCELERATOR_TCG) return false;
  if (accelerator == v1::ACCELERATOR_KVM && !config_.kvm)
    return Error(absl::StatusCode::kFailedPrecondition,
                 "the VM needs KVM, which host {} has not (`kvm: off`)", config_.name);
  return config_.kvm;
}

absl::StatusOr<v1::ShimConfig> VmManager::MakeConfig(const v1::VmSpec& spec, bool kvm) const {
  std::string name = spec.qemu().empty() ? "default" : spec.qemu();
  auto qemu = config_.qemu.find(name);
  if (qemu == config_.qemu.end())
    return Error(absl::StatusCode::kFailedPrecondition, "host {} has no QEMU named '{}'", config_.name, name);
  VmPaths paths = PathsOf(config_, spec.name());
  RETURN_IF_ERROR(CheckUnixPath(paths.console));
  for (const v1::DeviceSpec& device : spec.devices())
    RETURN_IF_ERROR(CheckUnixPath(fmt::format("{}/dev-{}.sock", paths.run_dir, device.name())));
  v1::ShimConfig conf;
  *conf.mutable_spec() = spec;
  conf.set_run_dir(paths.run_dir);
  conf.set_state_dir(paths.state_dir);
  conf.set_memory_path(paths.memory);
  conf.set_qemu_path(qemu->second.path);
  conf.mutable_qemu_args()->Add(qemu->second.args.begin(), qemu->second.args.end());
  conf.mutable_qemu_env()->insert(qemu->second.env.begin(), qemu->second.env.end());
  conf.set_kvm(kvm);
  conf.set_tls_ca(config_.peer.tls.ca);
  conf.set_tls_cert(config_.peer.tls.cert);
  conf.set_tls_key(config_.peer.tls.key);
  conf.set_console_log(paths.console_log);
  conf.set_dirty_tracking(config_.dirty_tracking);
  return conf;
}

absl::StatusOr<v1::Vm> VmManager::StartVm(const v1::StartVmCommand& command, Deadline deadline) {
  v1::VmSpec spec = command.spec();
  FillVmSpecDefaults(&spec);
  RETURN_IF_ERROR(ValidateVmSpec(spec));
  ASSIGN_OR_RETURN(Locked locked, Lock(spec.name(), true, deadline));
  const EntryPtr& entry = locked.entry;
  uint64_t epoch = 1;
  if (entry->conf().has_spec()) {
    v1::Vm vm = entry->Describe(config_.name);
    auto ownership = OwnershipOf(spec.name());
    // A guest that was given away may run elsewhere; starting it here could make two of it.
    if (ownership.ok() && ownership->state == migration::Ownership::State::kYielded)
      return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                   "VM {} was given away by host {} in migration {} and may run at its destination; settle "
                   "that migration first (`batonctl migration resolve {}`)",
                   spec.name(), config_.name, ownership->migration, ownership->migration);
    if (vm.state() != v1::Vm::STOPPED && entry->listed()) {
      if (!SameVm(entry->conf().spec(), spec))
        return Error(absl::StatusCode::kAlreadyExists, "VM {} exists on host {} with another spec",
                     spec.name(), config_.name);
      return vm;
    }
    RETURN_IF_ERROR(ownership.status());
    // Whoever knows of the guest that ended knows its epoch: this one is another.
    epoch = ownership->epoch + 1;
    RETURN_IF_ERROR(Remove(entry, "started anew"));
    locked.lock.unlock();
    ASSIGN_OR_RETURN(locked, Lock(spec.name(), true, deadline));
    if (entry->conf().has_spec())
      return Error(absl::StatusCode::kAborted, "VM {} is being started by another command", spec.name());
  }
  auto start = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(bool kvm, ResolveKvm(spec.accelerator()));
    ASSIGN_OR_RETURN(v1::ShimConfig conf, MakeConfig(spec, kvm));
    conf.set_mode(v1::ShimConfig::FRESH);
    conf.set_epoch(epoch);
    for (const v1::DeviceSpec& device : spec.devices()) {
      const std::string subject = "device " + device.name();
      auto resolved = parts_.backends.Resolve(spec.name(), device, "", deadline);
      if (!resolved.ok()) return Annotate(resolved.status(), subject);
      *conf.add_devices() = *resolved;
      entry->set_conf(conf);  // so that a failure gives back what a hook made
      auto probed =
          vhost::ProbeBackend(device, resolved->backend(), deadline.Min(Deadline::After(kProbeTimeout)));
      if (!probed.ok()) return WithReason(Annotate(probed.status(), subject), v1::SOURCE_BACKEND_FAILED);
    }
    entry->set_conf(conf);
    RETURN_IF_ERROR(parts_.store.Write(spec.name(), conf));
    return BringUp(
        entry, [](const v1::ShimStatus& status) { return status.vm().state() == v1::Vm::RUNNING; }, deadline);
  };
  if (absl::Status started = start(); !started.ok()) {
    absl::Status removed = Remove(entry, Message(started));
    if (!removed.ok()) LOG_WARN("VM {} was not removed: {}", spec.name(), Message(removed));
    return Annotate(started, "VM " + spec.name() + " was not started");
  }
  LOG_INFO("VM {} started", spec.name());
  return entry->Describe(config_.name);
}

absl::Status VmManager::LaunchAndConnect(const EntryPtr& entry, Deadline deadline) {
  entry->Disconnect();
  entry->set_ending(false);
  auto process = parts_.launcher.Start(entry->name(), entry->paths());
  if (!process.ok()) return process.status();
  entry->set_shim(*process);
  parts_.metrics.CountShimStart(entry->conf().mode() == v1::ShimConfig::ADOPT         ? "adopt"
                                : entry->conf().mode() == v1::ShimConfig::INCOMING_VM ? "incoming"
                                                                                      : "fresh");
  return entry->Connect(CallbacksFor(entry), deadline);
}

absl::Status VmManager::BringUp(const EntryPtr& entry,
                                const std::function<bool(const v1::ShimStatus&)>& ready, Deadline deadline) {
  // A shim that fails says so in its status and ends, or only ends.
  auto failed = [](const v1::ShimStatus& status) { return status.vm().state() == v1::Vm::STOPPED; };
  absl::Status up = LaunchAndConnect(entry, deadline);
  if (up.ok()) {
    up = entry->AwaitStatus([&](const v1::ShimStatus& status) { return ready(status) || failed(status); },
                            deadline);
  }
  v1::ShimStatus status = entry->status();
  if (up.ok() && ready(status)) return up;
  std::string why = status.vm().message();
  if (why.empty()) why = TailOfShimLog(entry->paths());
  if (absl::IsDeadlineExceeded(up) && why.empty()) return Annotate(up, "the VM does not come up");
  absl::StatusCode code = up.ok() ? absl::StatusCode::kFailedPrecondition : up.code();
  absl::Status failure = Error(code, "{}", why.empty() ? Message(up) : why);
  return status.reason() == v1::REASON_UNSPECIFIED ? failure : WithReason(failure, status.reason());
}

absl::Status VmManager::StopVm(const v1::StopVmCommand& command, Deadline deadline) {
  ASSIGN_OR_RETURN(Locked locked, Lock(command.vm(), false, deadline));
  const EntryPtr& entry = locked.entry;
  std::vector<v1::SideReport> open = parts_.reports.OpenOf(command.vm());
  if (!open.empty())
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "VM {} is in migration {}; cancel that first", command.vm(), open[0].migration_id());
  auto pidfd = OpenPidfd(entry->shim());
  if (pidfd.ok()) {
    entry->set_ending(true);
    v1::ShimRequest request;
    *request.mutable_stop() = command;
    auto reply = entry->Call(request, deadline);
    // Unavailable: it may have ended before it could answer.
    absl::Status ended = reply.ok() || absl::IsUnavailable(reply.status()) ? WaitPidfd(pidfd->get(), deadline)
                                                                           : reply.status();
    if (!ended.ok() && !command.force()) {
      entry->set_ending(false);
      if (absl::IsDeadlineExceeded(ended))
        return Error(absl::StatusCode::kDeadlineExceeded,
                     "the guest of VM {} has not powered off in time; stop it with force", command.vm());
      return ended;
    }
  }
  return Remove(entry, "stopped on request");
}

absl::StatusOr<v1::Inspection> VmManager::Inspect(const v1::InspectVmCommand& command, Deadline deadline) {
  EntryPtr entry = Find(command.vm());
  if (entry == nullptr || !entry->listed())
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "no VM {} on host {}", command.vm(),
                 config_.name);
  v1::ShimRequest request;
  *request.mutable_inspect() = command;
  ASSIGN_OR_RETURN(v1::ShimReply reply, entry->Call(request, deadline));
  v1::Inspection inspection = reply.inspection();
  v1::Vm vm = entry->Describe(config_.name);
  // What the agent knows better: names and the spec as it is recorded here. The rest is the shim's.
  inspection.mutable_vm()->set_name(vm.name());
  inspection.mutable_vm()->set_host(vm.host());
  *inspection.mutable_vm()->mutable_spec() = vm.spec();
  if (inspection.epoch() == 0) inspection.set_epoch(vm.epoch());
  inspection.set_accelerator(entry->conf().kvm() ? v1::ACCELERATOR_KVM : v1::ACCELERATOR_TCG);
  return inspection;
}

absl::Status VmManager::StartOutgoing(const v1::StartOutgoingCommand& command, Deadline deadline) {
  // Repeated by a batond that restarted: it runs, or has ended and its report is on its way.
  if (parts_.reports.Find(command.migration_id(), v1::ROLE_SOURCE)) return absl::OkStatus();
  if (config_.peer.require_tls && !command.params().tls())
    return Error(absl::StatusCode::kFailedPrecondition, "host {} migrates with TLS only", config_.name);
  v1::ShimRequest request;
  *request.mutable_start_outgoing() = command;
  return Forward(command.vm(), request, deadline);
}

absl::StatusOr<v1::DeviceSwapped> VmManager::SwapDevice(const v1::SwapDeviceCommand& command,
                                                        Deadline deadline) {
  ASSIGN_OR_RETURN(Locked locked, Lock(command.vm(), false, deadline));
  const EntryPtr& entry = locked.entry;
  if (std::vector<v1::SideReport> open = parts_.reports.OpenOf(command.vm()); !open.empty())
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "VM {} is in migration {}; swap its devices after that", command.vm(),
                 open[0].migration_id());
  const v1::ShimConfig before = entry->conf();
  v1::ShimRequest request;
  *request.mutable_swap_device() = command;
  auto reply = entry->Call(request, deadline);
  // Also after an error: the answer may be lost, or the new back-end may have failed after the switch.
  if (auto conf = parts_.store.Read(command.vm()); conf.ok()) {
    entry->set_conf(*conf);
    for (const v1::ResolvedDevice& old : before.devices()) {
      for (const v1::ResolvedDevice& now : conf->devices()) {
        if (old.name() == now.name() && old.backend().socket() != now.backend().socket())
          parts_.backends.Release(command.vm(), old, before.migration_id());
      }
    }
  } else {
    LOG_WARN("VM {}: {}", command.vm(), Message(conf.status()));
  }
  if (!reply.ok()) return reply.status();
  return reply->swapped();
}

absl::Status VmManager::Forward(const std::string& vm, const v1::ShimRequest& request, Deadline deadline) {
  EntryPtr entry = Find(vm);
  if (entry == nullptr)
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "no VM {} on host {}", vm, config_.name);
  return entry->Call(request, deadline).status();
}

void VmManager::Retire(const EntryPtr& entry, const std::string& message) {
  std::unique_lock operation(entry->operation());
  if (entry->removed()) return;
  entry->set_ending(true);
  auto pidfd = OpenPidfd(entry->shim());
  if (pidfd.ok()) {
    // Its last report may come before its VMM has ended.
    (void)entry->AwaitStatus(
        [](const v1::ShimStatus& status) { return status.vm().state() == v1::Vm::STOPPED; },
        Deadline::After(seconds(5)));
    v1::ShimRequest request;
    request.mutable_retire();
    absl::Status retired = entry->Call(request, Deadline::After(seconds(5))).status();
    if (retired.ok() || absl::IsUnavailable(retired))
      retired = WaitPidfd(pidfd->get(), Deadline::After(seconds(5)));
    if (!retired.ok())
      LOG_WARN("shim of VM {} does not retire and is ended: {}", entry->name(), Message(retired));
  }
  if (absl::Status removed = Remove(entry, message); !removed.ok()) RemoveLater(entry, message, removed);
}

// The disk may have room again, and nobody else would come back for a VM that has ended.
void VmManager::RemoveLater(const EntryPtr& entry, const std::string& message, const absl::Status& why) {
  LOG_WARN("VM {} is not removed, trying again: {}", entry->name(), Message(why));
  parts_.tasks.PostAfter(seconds(5), [this, entry, message] { Retire(entry, message); });
}

void VmManager::EndProcesses(const EntryPtr& entry) {
  entry->set_ending(true);
  entry->Disconnect();
  Deadline deadline = Deadline::After(seconds(10));
  auto end = [&](const ProcessId& id, const char* what) {
    absl::Status killed = KillProcess(id, deadline);
    if (!killed.ok()) LOG_WARN("{} of VM {} (pid {}): {}", what, entry->name(), id.pid, Message(killed));
  };
  if (entry->shim().pid > 0) end(entry->shim(), "shim");
  // The shim writes down its VMM, but may have died in between; both carry paths that no other process has.
  auto conf = parts_.store.Read(entry->name());
  if (conf.ok() && conf->vmm_pid() > 0)
    end({static_cast<pid_t>(conf->vmm_pid()), conf->vmm_start_time()}, "VMM");
  for (const ProcessId& id : FindByCommandLine(entry->paths().state_dir + '\0')) end(id, "shim");
  for (const ProcessId& id : FindByCommandLine("mem-path=" + entry->paths().memory)) end(id, "VMM");
}

absl::Status VmManager::Remove(const EntryPtr& entry, const std::string& message) {
  EndProcesses(entry);
  v1::ShimConfig conf = entry->conf();
  absl::Status removed = parts_.store.Remove(entry->name());
  for (const v1::ResolvedDevice& device : conf.devices())
    parts_.backends.Release(entry->name(), device, conf.migration_id());
  if (!removed.ok()) {
    entry->set_shown(v1::Vm::STOPPED, "its files cannot be removed: " + Message(removed));
    Tell(entry);
    return removed;
  }
  bool told = conf.has_spec();
  entry->set_removed();
  {
    std::lock_guard lock(mutex_);
    entries_.erase(entry->name());
  }
  if (told) {
    LOG_INFO("VM {} is gone from this host: {}", entry->name(), message);
    events_.on_gone(entry->name(), message);
  }
  UpdateGauges();
  return absl::OkStatus();
}

}  // namespace baton::daemon
