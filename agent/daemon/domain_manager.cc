#include "agent/daemon/domain_manager.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "agent/daemon/domain_host.h"
#include "common/durable_file.h"
#include "common/log.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;

constexpr Duration kDomainAck = seconds(2);
// Until a final report is acknowledged again; the pauses double up to the latter.
constexpr Duration kAckPause = std::chrono::milliseconds(250);
constexpr Duration kMaxAckPause = seconds(30);
constexpr Duration kShimRetires = seconds(10);
constexpr Duration kShimStarts = seconds(20);
constexpr int kMaxRestartDelay = 30;
// For another operation on the domain to end, before a shim ahead of its command is given up; and for that
// command to come: a destination that takes longer to prepare is no reason to have a shim sooner.
constexpr Duration kReadyIn = seconds(2);
constexpr Duration kCommandComes = seconds(5);

}  // namespace

DomainManager::DomainManager(DomainManagerParts parts, VmEvents events)
    : parts_(parts), config_(parts.config), events_(std::move(events)), store_(parts.config) {}

DomainManager::~DomainManager() { Close(); }

void DomainManager::Close() {
  std::map<std::string, EntryPtr> entries;
  {
    std::lock_guard lock(mutex_);
    entries.swap(entries_);
  }
  // Their clients call back into us.
  for (auto& [uuid, entry] : entries) entry->Disconnect();
  inventory_ = nullptr;
}

absl::Status DomainManager::FindAgain(Deadline deadline) {
  ASSIGN_OR_RETURN(std::vector<std::string> uuids, store_.List());
  for (const std::string& uuid : uuids) {
    auto conf = store_.Read(uuid);
    if (!conf.ok()) {
      LOG_ERROR("the shim of domain {} cannot be found again: {}", uuid, Message(conf.status()));
      continue;
    }
    auto entry = std::make_shared<VmEntry>(uuid, DomainPathsOf(config_, uuid));
    entry->set_conf(*conf);
    {
      std::lock_guard lock(mutex_);
      entries_[uuid] = entry;
    }
    std::vector<ProcessId> shims = FindByCommandLine(entry->paths().state_dir + '\0');
    if (!shims.empty()) {
      entry->set_shim(shims.front());
      absl::Status connected = entry->Connect(CallbacksFor(entry), deadline);
      if (connected.ok()) {
        LOG_INFO("shim of domain {} found again (pid {})", uuid, shims.front().pid);
        // Nobody knows any more what it waits for, if it has nothing to do: its agent may also have ended
        // when it had taken the acknowledgement, which was all that was left.
        parts_.tasks.Post([this, entry] { RetireIdle(entry, "its agent is another one"); });
        continue;
      }
      LOG_WARN("shim of domain {} does not answer: {}", uuid, Message(connected));
    }
    parts_.tasks.Post([this, entry] { OnShimGone(entry, 0); });
  }
  return absl::OkStatus();
}

// --- what is known of a domain ---

absl::StatusOr<v1::Vm> DomainManager::Find(const std::string& vm) const {
  vmm::LibvirtInventory* inventory = inventory_;
  if (!inventory)
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "host {} has no libvirt", config_.name);
  return inventory->Find(vm);
}

bool DomainManager::Has(const std::string& vm) const { return Find(vm).ok() || FindEntry(vm) != nullptr; }

DomainManager::EntryPtr DomainManager::FindEntry(const std::string& vm) const {
  std::lock_guard lock(mutex_);
  if (auto found = entries_.find(vm); found != entries_.end()) return found->second;
  for (const auto& [uuid, entry] : entries_) {
    const v1::ShimConfig conf = entry->conf();
    if (conf.domain_host().vm() == vm || conf.domain_host().name() == vm) return entry;
  }
  return nullptr;
}

absl::StatusOr<vmm::LibvirtConnection*> DomainManager::Connection() const {
  vmm::LibvirtInventory* inventory = inventory_;
  if (!inventory)
    return Error(absl::StatusCode::kFailedPrecondition,
                 "host {} has no libvirt (`libvirt` in its agent's configuration)", config_.name);
  return &inventory->connection();
}

uint64_t DomainManager::EpochOf(const migration::Ownership& ownership, bool served, bool here) const {
  // One that was given away and is back has been moved by other hands, from whoever had it at the epoch
  // after.
  if (ownership.state == migration::Ownership::State::kReleased && here && !served)
    return ownership.epoch + 2;
  return ownership.epoch;
}

void DomainManager::Complete(v1::Vm* vm) {
  const std::string uuid = vm->domain().uuid();
  auto ownership = store_.OwnershipOf(uuid);
  if (!ownership.ok()) {
    LOG_WARN("domain {}: {}", uuid, Message(ownership.status()));
    return;
  }
  EntryPtr entry;
  bool departed = false;
  {
    std::lock_guard lock(mutex_);
    // One that does nothing is not there. What it says of itself may be newer than its configuration here.
    if (auto found = entries_.find(uuid);
        found != entries_.end() &&
        !(IsIdle(found->second->conf()) && found->second->status().vm().migration().empty()))
      entry = found->second;
    if (vm->state() == v1::Vm::STOPPED) departed_.erase(uuid);
    departed = departed_.count(uuid) > 0;
  }
  using State = migration::Ownership::State;
  const bool here = vm->state() == v1::Vm::RUNNING || vm->state() == v1::Vm::PAUSED;
  vm->set_epoch(EpochOf(*ownership, entry != nullptr || departed, here));
  if (departed || (entry && ownership->state == State::kReleased)) {
    // libvirt's news of it is older than ours.
    vm->set_state(v1::Vm::STOPPED);
    vm->set_message("moved to another host");
  }
  if (!entry) return;
  const v1::ShimConfig conf = entry->conf();
  const v1::ShimStatus status = entry->status();
  vm->set_shim_pid(static_cast<uint64_t>(entry->shim().pid));
  *vm->mutable_devices() = status.vm().devices();
  if (!status.vm().migration().empty()) vm->set_migration(status.vm().migration());
  // Until this side is owner it is the source's guest, whatever libvirt has of it here.
  if (!conf.migration_id().empty() && here && ownership->state != State::kOwner &&
      ownership->state != State::kYielded && ownership->state != State::kReleased)
    vm->set_state(v1::Vm::INCOMING);
}

void DomainManager::OnGone(const std::string& uuid, const std::function<void()>& tell) {
  {
    std::lock_guard lock(telling_);
    tell();
  }
  EntryPtr served;
  {
    std::lock_guard lock(mutex_);
    departed_.erase(uuid);
    if (auto found = entries_.find(uuid); found != entries_.end()) served = found->second;
  }
  // A domain that ended here for good has no epoch any more; of one that left, the next to come must know it.
  auto forget = [this, uuid] {
    auto ownership = store_.OwnershipOf(uuid);
    if (ownership.ok() && ownership->state == migration::Ownership::State::kOwner) (void)store_.Forget(uuid);
  };
  const std::string why = "libvirt does not have the domain any more";
  if (!served) {
    forget();
  } else if (served->conf().domain_host().resident()) {
    // Its devices were served as long as it was defined here.
    parts_.tasks.Post([this, served, why] { Retire(served, why); });
  } else if (IsIdle(served->conf())) {
    parts_.tasks.Post([this, served, why, forget] {
      RetireIdle(served, why);
      if (served->removed()) forget();
    });
  }
}

void DomainManager::Tell(const std::string& uuid) {
  std::lock_guard lock(telling_);
  if (auto vm = Find(uuid); vm.ok()) events_.on_vm(*vm);
}

// --- shims ---

absl::StatusOr<DomainManager::Locked> DomainManager::Lock(const std::string& uuid, Deadline deadline) {
  for (;;) {
    EntryPtr entry;
    {
      std::lock_guard lock(mutex_);
      EntryPtr& place = entries_[uuid];
      if (!place) place = std::make_shared<VmEntry>(uuid, DomainPathsOf(config_, uuid));
      entry = place;
    }
    std::unique_lock operation(entry->operation(), deadline.when());
    if (!operation.owns_lock())
      return Error(absl::StatusCode::kDeadlineExceeded,
                   "another operation on domain {} has not ended in time", uuid);
    if (entry->removed()) continue;
    return Locked{std::move(entry), std::move(operation)};
  }
}

VmEntry::Callbacks DomainManager::CallbacksFor(const EntryPtr& entry) {
  std::weak_ptr<VmEntry> weak = entry;
  VmEntry::Callbacks callbacks;
  callbacks.on_event = [this, weak](const v1::ShimReply& event) {
    if (EntryPtr alive = weak.lock()) OnEvent(alive, event);
  };
  callbacks.on_close = [this, weak] {
    parts_.tasks.Post([this, weak] {
      if (EntryPtr alive = weak.lock()) OnShimGone(alive, 0);
    });
  };
  return callbacks;
}

void DomainManager::OnEvent(const EntryPtr& entry, const v1::ShimReply& event) {
  if (event.has_event_status()) {
    entry->set_status(event.event_status());
    Tell(entry->name());
    if (event.event_status().has_report()) OnReport(entry, event.event_status().report());
  }
  if (event.has_event_report()) OnReport(entry, event.event_report());
}

void DomainManager::OnReport(const EntryPtr& entry, const v1::SideReport& report) {
  if (report.migration_id().empty()) return;
  const auto before = parts_.reports.Find(report.migration_id(), report.role());
  std::optional<v1::SideReport> fresh = parts_.reports.Take(report);
  const bool turned = fresh && (!before || before->handover() != fresh->handover());
  if (report.role() == v1::ROLE_SOURCE && report.handover() == v1::RELEASED &&
      !entry->finished(report.migration_id())) {
    auto vm = Find(entry->name());
    std::lock_guard lock(mutex_);
    if (vm.ok() && vm->state() != v1::Vm::STOPPED) departed_.insert(entry->name());
  }
  if (fresh) {
    // The owner first: whoever hears of the end finds the domain where it is.
    if (turned) Tell(entry->name());
    events_.on_report(*fresh);
    parts_.reports.Keep(report.migration_id(), report.role());
    if (fresh->done()) {
      parts_.metrics.CountMigration(*fresh);
      LOG_INFO("migration {}: {} of vms/{} here has ended: {} {} {}", fresh->migration_id(),
               fresh->role() == v1::ROLE_SOURCE ? "the source's side" : "the destination's side", fresh->vm(),
               v1::Phase_Name(fresh->phase()), v1::Reason_Name(fresh->reason()), fresh->message());
    }
  }
  if (!report.done() || entry->finished(report.migration_id())) return;
  entry->set_finished(report.migration_id());
  // Not from here: this is the client's own thread.
  parts_.tasks.Post([this, entry, report] {
    if (report.role() == v1::ROLE_DESTINATION) {
      v1::EndedIncoming ended;
      const v1::ShimConfig conf = entry->conf();
      ended.set_migration_id(report.migration_id());
      ended.set_vm(report.vm());
      ended.set_token(conf.token());
      ended.set_tls(conf.params().tls());
      ended.set_verdict(report.handover());
      ended.set_epoch(report.epoch());
      absl::Status kept = parts_.ended.RememberEnded(ended);
      if (!kept.ok()) LOG_WARN("domain {}: {}", entry->name(), Message(kept));
      if (report.handover() == v1::OWNER) {
        store_.KeepImages(entry->name());
      } else {
        store_.DropImages(entry->name());
      }
    }
    Acknowledge(entry, report, 0);
  });
}

void DomainManager::Acknowledge(const EntryPtr& entry, const v1::SideReport& report, int attempt) {
  if (entry->removed()) return;
  v1::ShimRequest request;
  request.mutable_report_ack()->set_migration_id(report.migration_id());
  request.mutable_report_ack()->set_role(report.role());
  request.mutable_report_ack()->set_sequence(report.sequence());
  absl::Status told = entry->Call(request, Deadline::After(kDomainAck)).status();
  {
    std::lock_guard operation(entry->operation());
    if (entry->removed()) return;
    auto conf = store_.Read(entry->name());
    if (conf.ok()) entry->set_conf(*conf);
    // The answer may be lost, and one that was started anew first has to see the end again: only what a later
    // shim would read says that it was taken.
    const std::string named = !conf.ok()                         ? (told.ok() ? "" : report.migration_id())
                              : report.role() == v1::ROLE_SOURCE ? conf->outgoing().migration_id()
                                                                 : conf->migration_id();
    if (named == report.migration_id()) {
      LOG_DEBUG("migration {}: the shim of domain {} has not taken the end yet: {}", report.migration_id(),
                entry->name(), Message(told));
      parts_.tasks.PostAfter(std::min(kMaxAckPause, kAckPause * (1 << std::min(attempt, 10))),
                             [this, entry, report, attempt] { Acknowledge(entry, report, attempt + 1); });
      return;
    }
  }
  // One whose domain did not come has nothing to serve either.
  const bool refused = report.role() == v1::ROLE_DESTINATION && report.handover() == v1::REFUSED;
  if (!entry->conf().domain_host().resident() || report.handover() == v1::RELEASED || refused)
    Retire(entry, report.handover() == v1::RELEASED ? "moved to another host" : "its migration has ended");
}

absl::StatusOr<v1::ShimConfig> DomainManager::MakeConfig(const std::string& uuid,
                                                         const std::string& vm) const {
  ASSIGN_OR_RETURN(v1::DomainHost host, DescribeDomainHost(config_.libvirt));
  const VmPaths paths = DomainPathsOf(config_, uuid);
  v1::ShimConfig conf;
  conf.set_mode(v1::ShimConfig::DOMAIN);
  conf.set_run_dir(paths.run_dir);
  conf.set_state_dir(paths.state_dir);
  conf.set_libvirt_uri(config_.libvirt.uri);
  conf.set_domain_uuid(uuid);
  conf.set_tls_ca(config_.peer.tls.ca);
  conf.set_tls_cert(config_.peer.tls.cert);
  conf.set_tls_key(config_.peer.tls.key);
  *conf.mutable_domain_host() = host;
  conf.mutable_domain_host()->set_vm(vm);
  if (auto known = Find(uuid); known.ok()) conf.mutable_domain_host()->set_name(known->domain().name());
  return conf;
}

absl::Status DomainManager::LaunchWith(const EntryPtr& entry, const v1::ShimConfig& conf, Deadline deadline) {
  entry->set_conf(conf);
  RETURN_IF_ERROR(store_.WriteSoon(entry->name(), conf));
  return Launch(entry, deadline, /*fresh=*/true);
}

absl::Status DomainManager::Launch(const EntryPtr& entry, Deadline deadline, bool fresh) {
  entry->Disconnect();
  entry->set_ending(false);
  auto process = parts_.launcher.Start(entry->name(), entry->paths());
  if (!process.ok()) return process.status();
  entry->set_shim(*process);
  parts_.metrics.CountShimStart("domain");
  // Durable before anybody is told of the shim, while it starts.
  if (fresh) RETURN_IF_ERROR(store_.Sync(entry->name()));
  absl::Status connected = entry->Connect(CallbacksFor(entry), deadline);
  if (connected.ok()) return connected;
  const std::string log = TailOfShimLog(entry->paths());
  return log.empty() ? connected : Annotate(connected, log);
}

void DomainManager::OnShimGone(const EntryPtr& entry, int attempt) {
  std::lock_guard operation(entry->operation());
  if (entry->removed() || entry->ending() || entry->connected()) return;
  if (auto pidfd = OpenPidfd(entry->shim()); pidfd.ok()) {
    // The socket may close a moment before the process is gone; one that hangs would keep its successor out.
    if (!WaitPidfd(pidfd->get(), Deadline::After(seconds(1))).ok()) {
      if (entry->Connect(CallbacksFor(entry), Deadline::After(seconds(5))).ok()) return;
      (void)KillProcess(entry->shim(), Deadline::After(seconds(5)));
    }
  }
  auto conf = store_.Read(entry->name());
  if (!conf.ok()) {
    LOG_ERROR("domain {}: {}", entry->name(), Message(conf.status()));
    return;
  }
  entry->set_conf(*conf);
  parts_.metrics.CountShimDeath("domain");
  if (IsIdle(*conf)) {
    LOG_WARN("the shim of domain {} ended before anything was asked of it", entry->name());
    return Remove(entry);
  }
  LOG_WARN("the shim of domain {} ended unexpectedly and is started again", entry->name());
  absl::Status started = Launch(entry, Deadline::After(kShimStarts));
  if (started.ok()) return;
  const int delay = std::min(kMaxRestartDelay, 1 << std::min(attempt, 5));
  LOG_ERROR("domain {}: no new shim, next try in {} s: {}", entry->name(), delay, Message(started));
  parts_.tasks.PostAfter(seconds(delay), [this, entry, attempt] { OnShimGone(entry, attempt + 1); });
}

void DomainManager::Retire(const EntryPtr& entry, const std::string& why) {
  std::lock_guard operation(entry->operation());
  if (entry->removed()) return;
  // Another migration may have been begun since.
  if (auto conf = store_.Read(entry->name());
      conf.ok() && (!conf->migration_id().empty() || !conf->outgoing().migration_id().empty()))
    return;
  LOG_INFO("the shim of domain {} is done: {}", entry->name(), why);
  Remove(entry);
}

void DomainManager::RetireIdle(const EntryPtr& entry, const std::string& why) {
  std::lock_guard operation(entry->operation());
  if (entry->removed()) return;
  if (auto conf = store_.Read(entry->name()); !conf.ok() || !IsIdle(*conf)) return;
  LOG_INFO("the shim of domain {} is not needed: {}", entry->name(), why);
  Remove(entry);
}

bool DomainManager::IsIdle(const v1::ShimConfig& conf) {
  return !conf.domain_host().resident() && conf.migration_id().empty() &&
         conf.outgoing().migration_id().empty();
}

// Ends the shim and removes what it leaves, except the journal.
void DomainManager::Remove(const EntryPtr& entry) {
  entry->set_ending(true);
  auto pidfd = OpenPidfd(entry->shim());
  if (pidfd.ok()) {
    v1::ShimRequest request;
    request.mutable_retire();
    absl::Status retired = entry->Call(request, Deadline::After(kShimRetires)).status();
    if (retired.ok() || absl::IsUnavailable(retired))
      retired = WaitPidfd(pidfd->get(), Deadline::After(kShimRetires));
    if (absl::IsFailedPrecondition(retired)) {
      LOG_WARN("the shim of domain {} stays: {}", entry->name(), Message(retired));
      entry->set_ending(false);
      return;
    }
    if (!retired.ok()) {
      LOG_WARN("the shim of domain {} does not retire and is ended: {}", entry->name(), Message(retired));
      (void)KillProcess(entry->shim(), Deadline::After(kShimRetires));
    }
  }
  entry->Disconnect();
  if (absl::Status removed = store_.Retire(entry->name()); !removed.ok())
    LOG_WARN("domain {}: {}", entry->name(), Message(removed));
  if (absl::Status removed = RemoveTree(DeviceDir(entry->name())); !removed.ok())
    LOG_WARN("domain {}: {}", entry->name(), Message(removed));
  Drop(entry);
  Tell(entry->name());
}

void DomainManager::Drop(const EntryPtr& entry) {
  entry->set_removed();
  std::lock_guard lock(mutex_);
  if (auto found = entries_.find(entry->name()); found != entries_.end() && found->second == entry)
    entries_.erase(found);
}

// --- the source ---

absl::Status DomainManager::StartOutgoing(const v1::StartOutgoingCommand& command, Deadline deadline) {
  // Repeated by a batond that restarted: it runs, or has ended and its report is on its way.
  if (parts_.reports.Find(command.migration_id(), v1::ROLE_SOURCE)) return absl::OkStatus();
  if (config_.peer.require_tls && !command.params().tls())
    return Error(absl::StatusCode::kFailedPrecondition, "host {} migrates with TLS only", config_.name);
  const std::string expected = config_.libvirt.socket_dir + "/" + command.migration_id();
  if (command.domain().tunnel_dir() != expected || command.migration_id().find('/') != std::string::npos)
    return Error(absl::StatusCode::kFailedPrecondition,
                 "the destination wants the migration's sockets in {}, this host would make them in {}: "
                 "`libvirt.socket_dir` must be the same on both",
                 command.domain().tunnel_dir(), expected);
  ASSIGN_OR_RETURN(v1::Vm vm, Find(command.vm()));
  const std::string uuid = vm.domain().uuid();
  ASSIGN_OR_RETURN(Locked locked, Lock(uuid, deadline));
  const EntryPtr& entry = locked.entry;
  auto start = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(migration::Ownership ownership, store_.OwnershipOf(uuid));
    const bool served = entry->connected() && !IsIdle(entry->conf());
    if (const uint64_t epoch = EpochOf(ownership, served, true); epoch != command.epoch())
      return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                   "the migration is for epoch {} of the domain, this host has it at epoch {}",
                   command.epoch(), epoch);
    if (!entry->connected()) {
      ASSIGN_OR_RETURN(v1::ShimConfig conf, MakeConfig(uuid, command.vm()));
      RETURN_IF_ERROR(LaunchWith(entry, conf, deadline));
    }
    v1::ShimRequest request;
    *request.mutable_start_outgoing() = command;
    request.mutable_start_outgoing()->set_disks_shared(
        DisksAreShared(vm.domain(), command.domain(), config_.libvirt.shared));
    return entry->Call(request, deadline).status();
  };
  absl::Status started = start();
  if (auto conf = store_.Read(uuid); conf.ok()) entry->set_conf(*conf);
  // A shim that has not taken the command is of no use, unless it serves something else.
  if (!started.ok() && IsIdle(entry->conf())) Remove(entry);
  return started;
}

void DomainManager::GetReady(const std::string& uuid, const std::string& vm) {
  auto locked = Lock(uuid, Deadline::After(kReadyIn));
  if (!locked.ok()) return;
  const EntryPtr& entry = locked->entry;
  if (entry->connected() || !IsIdle(entry->conf())) return;
  auto conf = MakeConfig(uuid, vm);
  // As long as the command itself would let it start: on a busy host that then waits for this one, and not
  // for its end.
  absl::Status launched = conf.ok() ? LaunchWith(entry, *conf, Deadline::After(kShimStarts)) : conf.status();
  if (!launched.ok()) {
    // The command will find the same, and say so.
    LOG_DEBUG("domain {}: no shim ahead of its command: {}", uuid, Message(launched));
    return Remove(entry);
  }
  parts_.tasks.PostAfter(kCommandComes,
                         [this, entry = entry] { RetireIdle(entry, "no command came for it"); });
}

absl::Status DomainManager::Forward(const std::string& vm, const v1::ShimRequest& request,
                                    Deadline deadline) {
  EntryPtr entry = FindEntry(vm);
  if (!entry) {
    if (auto known = Find(vm); known.ok()) entry = FindEntry(known->domain().uuid());
  }
  if (!entry)
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "vms/{} is in no migration on host {}", vm,
                 config_.name);
  return entry->Call(request, deadline).status();
}

}  // namespace baton::daemon
