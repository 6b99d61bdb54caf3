// VmManager: the destination side before the peer connects.
#include "agent/daemon/host_info.h"
#include "agent/daemon/token.h"
#include "agent/daemon/vm_manager.h"
#include "agent/vhost/probe.h"
#include "common/finding.h"
#include "common/log.h"
#include "common/vm_spec.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;

constexpr Duration kArrivalProbe = seconds(3);

// The device as the source's mediator sees it; a default one if the source does not list it.
v1::Device SourceDevice(const v1::Inspection& source, const v1::DeviceSpec& spec) {
  for (const v1::Device& device : source.vm().devices()) {
    if (device.name() == spec.name()) return device;
  }
  v1::Device none;
  none.set_name(spec.name());
  none.set_class_(spec.class_());
  return none;
}

v1::Finding BackendFinding(const v1::DeviceSpec& device, const absl::Status& why) {
  std::string remedy = absl::IsDeadlineExceeded(why)
                           ? "see whether the back-end hangs or serves another front-end"
                           : "start the back-end, or correct `backends` in this host's configuration";
  return MakeFinding(v1::BLOCKER, absl::IsDeadlineExceeded(why) ? "BACKEND_SILENT" : "BACKEND_UNREACHABLE",
                     "device " + device.name(), Message(why), remedy);
}

void Append(std::vector<v1::Finding>& to, std::vector<v1::Finding> more) {
  for (v1::Finding& finding : more) to.push_back(std::move(finding));
}

// Of the checks' result: what the caller, who sees only a status, must know.
std::string FirstBlocker(const v1::ShimStatus& status) {
  for (const v1::Finding& finding : status.findings()) {
    if (finding.severity() == v1::BLOCKER) return fmt::format("{}: {}", finding.subject(), finding.message());
  }
  return "";
}

}  // namespace

absl::StatusOr<v1::Prepared> VmManager::PrepareIncoming(const v1::PrepareIncomingCommand& command,
                                                        Deadline deadline) {
  const v1::VmSpec& spec = command.source().vm().spec();
  if (absl::Status valid = ValidateVmSpec(spec); !valid.ok()) return Annotate(valid, "the source's spec");
  if (command.migration_id().empty() || command.migration_id().size() > stream::kMaxMigrationId)
    return Error(absl::StatusCode::kInvalidArgument, "'{}' is no migration id", command.migration_id());
  if (!command.validate_only()) {
    // What has been refused stays refused, also when batond repeats itself.
    if (auto ended = parts_.store.FindEnded(command.migration_id()))
      return Error(v1::DESTINATION_REFUSED, absl::StatusCode::kFailedPrecondition,
                   "migration {} has ended at host {} ({})", command.migration_id(), config_.name,
                   ended->verdict() == v1::OWNER ? "this host owns the guest" : "refused");
  }
  ASSIGN_OR_RETURN(Locked locked, Lock(spec.name(), true, deadline));
  const EntryPtr entry = locked.entry;
  if (entry->conf().has_spec() && !entry->listed()) {
    // What is left of a VM that moved away, or of a refused attempt.
    RETURN_IF_ERROR(Remove(entry, "made room for its return"));
    locked.lock.unlock();
    return PrepareIncoming(command, deadline);
  }
  auto prepared = PrepareLocked(entry, command, deadline);
  // A name that was only looked at must not stay taken.
  bool keep = entry->conf().has_spec() && !entry->removed();
  if (!keep && !entry->removed()) {
    entry->set_removed();
    std::lock_guard lock(mutex_);
    entries_.erase(entry->name());
  }
  return prepared;
}

std::vector<v1::ResolvedDevice> VmManager::ResolveDevices(const v1::PrepareIncomingCommand& command,
                                                          std::vector<v1::Finding>* findings,
                                                          Deadline deadline) {
  const v1::VmSpec& spec = command.source().vm().spec();
  std::vector<v1::ResolvedDevice> devices;
  for (const v1::DeviceSpec& device : spec.devices()) {
    auto resolved = parts_.backends.Resolve(spec.name(), device, command.migration_id(), deadline);
    if (!resolved.ok()) {
      findings->push_back(
          MakeFinding(v1::BLOCKER, "BACKEND_UNKNOWN", "device " + device.name(), Message(resolved.status()),
                      "add the device to `backends` in this host's configuration, or a backend_hook"));
      continue;
    }
    devices.push_back(*resolved);
    auto probed =
        vhost::ProbeBackend(device, resolved->backend(), deadline.Min(Deadline::After(kArrivalProbe)));
    if (!probed.ok()) {
      findings->push_back(BackendFinding(device, probed.status()));
      continue;
    }
    Append(*findings,
           vhost::CompareForMigration(SourceDevice(command.source(), device), *probed, command.params()));
  }
  return devices;
}

absl::StatusOr<v1::Prepared> VmManager::PrepareLocked(const EntryPtr& entry,
                                                      const v1::PrepareIncomingCommand& command,
                                                      Deadline deadline) {
  const v1::VmSpec& spec = command.source().vm().spec();
  v1::ShimConfig conf = entry->conf();
  v1::Prepared prepared;
  prepared.set_peer_address(config_.peer.advertise);
  // Repeated by a batond that restarted.
  if (!command.validate_only() && conf.migration_id() == command.migration_id() &&
      conf.mode() == v1::ShimConfig::INCOMING_VM) {
    RETURN_IF_ERROR(
        entry->AwaitStatus([](const v1::ShimStatus& status) { return status.incoming_ready(); }, deadline));
    prepared.set_token(conf.token());
    return prepared;
  }
  DestinationFacts facts = GatherDestinationFacts(config_, parts_.qemu, spec, deadline);
  if (conf.has_spec()) {
    v1::Vm here = entry->Describe(config_.name);
    facts.vm_in_use = v1::Vm::State_Name(here.state());
    if (!here.message().empty()) facts.vm_in_use += ", " + here.message();
  }
  std::vector<v1::Finding> findings = CheckDestination(command.source(), command.params(), facts);
  // A VM of that name has its back-ends here already; a hook must not be asked for them, let alone take them
  // away.
  std::vector<v1::ResolvedDevice> devices;
  if (!conf.has_spec()) devices = ResolveDevices(command, &findings, deadline);
  prepared.mutable_findings()->Add(findings.begin(), findings.end());
  auto release = [&] {
    for (const v1::ResolvedDevice& device : devices)
      parts_.backends.Release(spec.name(), device, command.migration_id());
  };
  if (command.validate_only() || HasBlocker(findings)) {
    release();
    return prepared;
  }
  auto start = [&]() -> absl::Status {
    // The guest goes on under what it runs under; AUTO from a source that does not say is decided here.
    v1::Accelerator accelerator = command.source().accelerator();
    ASSIGN_OR_RETURN(bool kvm,
                     ResolveKvm(accelerator == v1::ACCELERATOR_AUTO ? spec.accelerator() : accelerator));
    ASSIGN_OR_RETURN(v1::ShimConfig fresh, MakeConfig(spec, kvm));
    fresh.set_mode(v1::ShimConfig::INCOMING_VM);
    fresh.set_epoch(command.source().epoch());
    fresh.mutable_devices()->Add(devices.begin(), devices.end());
    fresh.set_migration_id(command.migration_id());
    *fresh.mutable_source() = command.source();
    *fresh.mutable_params() = command.params();
    ASSIGN_OR_RETURN(*fresh.mutable_token(), NewToken());
    entry->set_conf(fresh);
    RETURN_IF_ERROR(parts_.store.Write(spec.name(), fresh));
    return BringUp(
        entry,
        [](const v1::ShimStatus& status) { return status.incoming_ready() || !FirstBlocker(status).empty(); },
        deadline);
  };
  absl::Status started = start();
  v1::ShimStatus status = entry->status();
  if (started.ok() && status.incoming_ready() && FirstBlocker(status).empty()) {
    prepared.mutable_findings()->MergeFrom(status.findings());
    prepared.set_token(entry->conf().token());
    LOG_INFO("VM {} is awaited, migration {}", spec.name(), command.migration_id());
    return prepared;
  }
  if (started.ok()) started = absl::FailedPreconditionError(FirstBlocker(status));
  if (!entry->conf().has_spec()) {
    release();  // nothing else knows of them yet
  } else if (absl::Status removed = Remove(entry, Message(started)); !removed.ok()) {
    LOG_WARN("VM {} is not removed: {}", spec.name(), Message(removed));
  }
  return WithReason(
      Annotate(started, fmt::format("VM {} cannot be awaited on host {}", spec.name(), config_.name)),
      ReasonOf(started, v1::DESTINATION_START_FAILED));
}

absl::Status VmManager::AbortIncoming(const v1::AbortIncomingCommand& command, Deadline deadline) {
  auto refuse_late = [&](const v1::EndedIncoming& ended) -> absl::Status {
    if (ended.verdict() != v1::OWNER) return absl::OkStatus();
    return Error(absl::StatusCode::kFailedPrecondition, "host {} owned VM {} since migration {}",
                 config_.name, ended.vm(), command.migration_id());
  };
  if (auto ended = parts_.store.FindEnded(command.migration_id())) return refuse_late(*ended);
  auto locked = Lock(command.vm(), false, deadline);
  if (!locked.ok() && !absl::IsNotFound(locked.status())) return locked.status();
  if (!locked.ok() || locked->entry->conf().migration_id() != command.migration_id()) {
    // Never prepared here. A preparation that comes late must find that it is over.
    if (auto ended = parts_.store.FindEnded(command.migration_id())) return refuse_late(*ended);
    v1::EndedIncoming never;
    never.set_migration_id(command.migration_id());
    never.set_vm(command.vm());
    never.set_verdict(v1::REFUSED);
    return parts_.store.RememberEnded(never);
  }
  const EntryPtr& entry = locked->entry;
  auto pidfd = OpenPidfd(entry->shim());
  if (entry->connected() && pidfd.ok()) {
    v1::ShimRequest request;
    *request.mutable_abort_incoming() = command;
    // Its exit is expected from here on; what it refuses (it owns the guest) leaves it running.
    entry->set_ending(true);
    absl::Status reply = entry->Call(request, deadline).status();
    // It owns the guest, or is busy: its word. Any other failure is a shim that cannot answer; it is ended
    // below, and the journal decides.
    if (absl::IsFailedPrecondition(reply)) {
      entry->set_ending(false);
      return reply;
    }
    if (!reply.ok()) LOG_WARN("shim of VM {} does not abort: {}", entry->name(), Message(reply));
    absl::Status ended =
        reply.ok() ? WaitPidfd(pidfd->get(), deadline.Min(Deadline::After(seconds(10)))) : absl::OkStatus();
    if (!ended.ok())
      LOG_WARN("shim of VM {} does not end after the abort: {}", entry->name(), Message(ended));
    entry->set_ending(false);
  }
  // Decides by the journal, as for any shim that is gone, and removes what is left.
  // Only the shim is ended here: whether the VMM may be, the journal says.
  entry->Disconnect();
  if (entry->shim().pid > 0) RETURN_IF_ERROR(KillProcess(entry->shim(), Deadline::After(seconds(5))));
  Recover(entry);
  if (entry->removed()) return absl::OkStatus();
  return Error(absl::StatusCode::kFailedPrecondition, "VM {} cannot be taken back: {}", entry->name(),
               entry->Describe(config_.name).message());
}

}  // namespace baton::daemon
