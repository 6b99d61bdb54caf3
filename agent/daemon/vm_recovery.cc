// VmManager: finding shims again, and what happens when one ended unasked.
#include <algorithm>
#include <atomic>
#include <thread>

#include "agent/daemon/vm_manager.h"
#include "agent/migration/journal.h"
#include "common/log.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;

// A shim that was just started by an agent that died, until it listens.
constexpr Duration kAttachTimeout = seconds(10);
// From a shim's death until the last of its threads has closed its files.
constexpr Duration kShimEnds = seconds(5);
// A new shim reconnects QMP and waits for the VMM to come back to the device sockets (QEMU: every second).
constexpr Duration kAdoptTimeout = seconds(30);
constexpr int kMaxAdoptDelaySeconds = 30;
constexpr size_t kFindAgainThreads = 16;

}  // namespace

absl::Status VmManager::FindAgain(Deadline deadline) {
  ASSIGN_OR_RETURN(std::vector<std::string> names, parts_.store.List());
  // Side by side: taking over VMs whose shims ended takes a while each, and others wait for their
  // connections.
  std::atomic<size_t> next{0};
  std::vector<std::thread> workers;
  for (size_t i = 0; i < std::min<size_t>(names.size(), kFindAgainThreads); ++i) {
    workers.emplace_back([&] {
      for (size_t at = next++; at < names.size(); at = next++) FindAgainOne(names[at], deadline);
    });
  }
  for (std::thread& worker : workers) worker.join();
  if (!names.empty()) LOG_INFO("{} VM(s) found again", names.size());
  UpdateGauges();
  return absl::OkStatus();
}

void VmManager::FindAgainOne(const std::string& vm, Deadline deadline) {
  auto entry = std::make_shared<VmEntry>(vm, PathsOf(config_, vm));
  std::lock_guard operation(entry->operation());
  {
    std::lock_guard lock(mutex_);
    entries_[vm] = entry;
  }
  auto conf = parts_.store.Read(vm);
  if (!conf.ok()) {
    // Its processes may well run: nothing is touched.
    LOG_ERROR("VM {} cannot be taken over: {}", vm, Message(conf.status()));
    v1::ShimConfig unknown;
    unknown.mutable_spec()->set_name(vm);
    entry->set_conf(unknown);
    entry->set_shown(v1::Vm::PAUSED, "its configuration is unreadable: " + Message(conf.status()));
    return;
  }
  entry->set_conf(*conf);
  std::vector<ProcessId> shims = FindByCommandLine(entry->paths().state_dir + '\0');
  if (shims.empty()) {
    LOG_WARN("the shim of VM {} ended while no agent ran", vm);
    Recover(entry);
    return;
  }
  entry->set_shim(shims.front());
  absl::Status connected = entry->Connect(CallbacksFor(entry), deadline.Min(Deadline::After(kAttachTimeout)));
  if (connected.ok()) {
    LOG_INFO("shim of VM {} found again (pid {})", vm, shims.front().pid);
    // The agent before this one may have ended between the shim's last report and the removal.
    auto ownership = OwnershipOf(vm);
    if (ownership.ok() && (ownership->state == migration::Ownership::State::kReleased ||
                           ownership->state == migration::Ownership::State::kRefused)) {
      entry->set_retiring();
      parts_.tasks.Post([this, entry] { Retire(entry, "its migration ended"); });
    }
    return;
  }
  if (!ProcessAlive(entry->shim())) {
    Recover(entry);
    return;
  }
  LOG_ERROR("the shim of VM {} (pid {}) does not answer: {}", vm, shims.front().pid, Message(connected));
  entry->set_shown(v1::Vm::PAUSED, "its shim does not answer: " + Message(connected));
  parts_.tasks.PostAfter(seconds(5), [this, entry] { OnShimGone(entry); });
}

void VmManager::OnShimGone(const EntryPtr& entry) {
  std::lock_guard operation(entry->operation());
  // Stopped or retired on purpose; or a new connection was made while this waited.
  if (entry->removed() || entry->ending() || entry->connected()) return;
  ReconnectOrRecover(entry, Deadline::After(kAttachTimeout));
}

void VmManager::ReconnectOrRecover(const EntryPtr& entry, Deadline deadline) {
  // The socket may close a moment before the process is gone.
  if (auto pidfd = OpenPidfd(entry->shim()); pidfd.ok()) {
    if (!WaitPidfd(pidfd->get(), deadline.Min(Deadline::After(seconds(1)))).ok()) {
      absl::Status connected = entry->Connect(CallbacksFor(entry), deadline);
      if (connected.ok()) return;
      if (ProcessAlive(entry->shim())) {
        LOG_ERROR("the shim of VM {} does not answer: {}", entry->name(), Message(connected));
        parts_.tasks.PostAfter(seconds(5), [this, entry] { OnShimGone(entry); });
        return;
      }
    }
  }
  LOG_WARN("the shim of VM {} ended unexpectedly", entry->name());
  Recover(entry);
}

absl::StatusOr<migration::Ownership> VmManager::OwnershipOf(const std::string& vm) const {
  ASSIGN_OR_RETURN(std::vector<migration::JournalRecord> records, parts_.store.ReadJournal(vm));
  return migration::ReplayOwnership(records);
}

void VmManager::Recover(const EntryPtr& entry) {
  entry->Disconnect();
  // The shim wrote down its VMM's pid.
  auto conf = parts_.store.Read(entry->name());
  auto ownership = OwnershipOf(entry->name());
  if (!conf.ok() || !ownership.ok()) {
    // Who owns the guest cannot be told, so nothing may be started and nothing removed.
    std::string why = Message(conf.ok() ? ownership.status() : conf.status());
    LOG_ERROR("VM {} is left alone, its state is unreadable: {}", entry->name(), why);
    entry->set_shown(v1::Vm::PAUSED, "its shim ended and its state is unreadable: " + why);
    parts_.metrics.CountShimDeath("unreadable");
    Tell(entry);
    return;
  }
  entry->set_conf(*conf);
  bool incoming = conf->mode() == v1::ShimConfig::INCOMING_VM;
  bool vmm_alive =
      conf->vmm_pid() > 0 && ProcessAlive({static_cast<pid_t>(conf->vmm_pid()), conf->vmm_start_time()});
  ShimDeathAction action = DecideAfterShimDeath(*ownership, incoming, vmm_alive);
  parts_.metrics.CountShimDeath(NameOf(action));
  LOG_WARN("VM {}: shim gone, VMM {}: {}", entry->name(), vmm_alive ? "alive" : "gone", NameOf(action));
  switch (action) {
    case ShimDeathAction::kAdopt:
      Adopt(entry, *ownership, 0);
      return;
    case ShimDeathAction::kGuestLost:
    case ShimDeathAction::kYieldedLost:
      entry->set_shown(v1::Vm::STOPPED, "its shim and its VMM ended");
      FinishOpenReports(entry, action, *ownership, {}, false);
      // Listed until somebody stops or starts it: an operator must see it.
      Tell(entry);
      return;
    case ShimDeathAction::kRefuse: {
      absl::Status refused = WriteRefused(*entry, *conf);
      if (!refused.ok()) {
        LOG_ERROR("VM {}: the refusal cannot be written, trying again: {}", entry->name(), Message(refused));
        entry->set_shown(v1::Vm::PAUSED,
                         "its shim ended and the refusal cannot be written: " + Message(refused));
        Tell(entry);
        parts_.tasks.PostAfter(seconds(1), [this, entry] { OnShimGone(entry); });
        return;
      }
      break;
    }
    case ShimDeathAction::kCleanUp:
    case ShimDeathAction::kNeverStarted:
      break;
  }
  // The VMM ends before the report says that this side is done.
  EndProcesses(entry);
  FinishOpenReports(entry, action, *ownership, {}, false);
  const std::string message = "its shim ended (" + NameOf(action) + ")";
  if (absl::Status removed = Remove(entry, message); !removed.ok()) RemoveLater(entry, message, removed);
}

absl::Status VmManager::WriteRefused(const VmEntry& entry, const v1::ShimConfig& conf) {
  // The journal's lock keeps a shim out that somebody may have started meanwhile.
  ASSIGN_OR_RETURN(std::unique_ptr<migration::Journal> journal,
                   migration::Journal::Open(entry.paths().journal, Deadline::After(kShimEnds)));
  migration::JournalRecord record;
  record.kind = migration::JournalRecord::Kind::kRefused;
  record.epoch = conf.source().epoch();
  record.migration = conf.migration_id();
  std::vector<migration::JournalRecord> records = journal->Records();
  if (migration::VerdictOf(records, conf.migration_id()).verdict == v1::REFUSED) return absl::OkStatus();
  bool announced = std::any_of(records.begin(), records.end(), [&](const migration::JournalRecord& r) {
    return r.kind == migration::JournalRecord::Kind::kIncoming && r.migration == record.migration;
  });
  if (!announced) {
    migration::JournalRecord first = record;
    first.kind = migration::JournalRecord::Kind::kIncoming;
    RETURN_IF_ERROR(journal->Append(first));
  }
  return journal->Append(record);
}

void VmManager::Adopt(const EntryPtr& entry, const migration::Ownership& ownership, int attempt) {
  v1::ShimConfig conf = entry->conf();
  conf.set_mode(v1::ShimConfig::ADOPT);
  absl::Status adopted = parts_.store.Write(entry->name(), conf);
  if (adopted.ok()) {
    entry->set_conf(conf);
    entry->set_shown(v1::Vm::RUNNING, "its shim ended; a new one takes over");
    Deadline deadline = Deadline::After(kAdoptTimeout);
    adopted = LaunchAndConnect(entry, deadline);
    if (adopted.ok()) {
      adopted = entry->AwaitStatus(
          [](const v1::ShimStatus& status) {
            return status.vm().state() == v1::Vm::RUNNING || status.vm().state() == v1::Vm::PAUSED ||
                   status.vm().state() == v1::Vm::STOPPED;
          },
          deadline);
    }
  }
  // A shim that could not take the VM over says STOPPED although the VMM lives.
  if (adopted.ok() && entry->status().vm().state() == v1::Vm::STOPPED &&
      ProcessAlive({static_cast<pid_t>(conf.vmm_pid()), conf.vmm_start_time()}))
    adopted = absl::UnavailableError(entry->status().vm().message());
  if (adopted.ok()) {
    v1::ShimStatus status = entry->status();
    LOG_INFO("VM {}: a new shim took over (pid {})", entry->name(), status.pid());
    FinishOpenReports(entry, ShimDeathAction::kAdopt, ownership, status.report(),
                      status.vm().state() == v1::Vm::RUNNING);
    return;
  }
  int delay = std::min(kMaxAdoptDelaySeconds, 1 << std::min(attempt, 5));
  std::string log = TailOfShimLog(entry->paths());
  LOG_ERROR("VM {}: no new shim, next try in {} s: {}{}{}", entry->name(), delay, Message(adopted),
            log.empty() ? "" : ": ", log);
  // A shim that hangs would keep the next one from the journal.
  entry->set_ending(true);
  entry->Disconnect();
  if (entry->shim().pid > 0) {
    absl::Status killed = KillProcess(entry->shim(), Deadline::After(seconds(5)));
    if (!killed.ok()) LOG_WARN("VM {}: {}", entry->name(), Message(killed));
  }
  entry->set_ending(false);
  entry->set_shown(v1::Vm::RUNNING, "its shim ended and no new one can be started: " + Message(adopted));
  Tell(entry);
  // Not Recover(): it decides afresh, the VMM may have ended meanwhile.
  parts_.tasks.PostAfter(seconds(delay), [this, entry, attempt] {
    std::lock_guard operation(entry->operation());
    if (entry->removed() || entry->ending() || entry->connected()) return;
    auto now = OwnershipOf(entry->name());
    auto conf = parts_.store.Read(entry->name());
    bool alive = conf.ok() && ProcessAlive({static_cast<pid_t>(conf->vmm_pid()), conf->vmm_start_time()});
    if (now.ok() && alive && DecideAfterShimDeath(*now, false, true) == ShimDeathAction::kAdopt) {
      Adopt(entry, *now, attempt + 1);
    } else {
      Recover(entry);
    }
  });
}

void VmManager::FinishOpenReports(const EntryPtr& entry, ShimDeathAction action,
                                  const migration::Ownership& ownership, const v1::SideReport& heard,
                                  bool adopted_running) {
  std::vector<v1::SideReport> open = parts_.reports.OpenOf(entry->name());
  // A destination whose shim never gave its final report is still owed one.
  v1::ShimConfig conf = entry->conf();
  bool refused =
      action == ShimDeathAction::kRefuse ||
      (action == ShimDeathAction::kCleanUp && ownership.state == migration::Ownership::State::kRefused);
  if (refused && !parts_.reports.Find(conf.migration_id(), v1::ROLE_DESTINATION) &&
      !entry->finished(conf.migration_id())) {
    v1::SideReport report;
    report.set_migration_id(conf.migration_id());
    report.set_vm(entry->name());
    report.set_role(v1::ROLE_DESTINATION);
    report.set_epoch(conf.source().epoch());
    open.push_back(report);
  }
  for (const v1::SideReport& report : open) {
    // The new shim goes on with this one itself: a source that asks for the verdict, or a final word of its
    // own.
    if (report.migration_id() == heard.migration_id() && report.role() == heard.role()) continue;
    // Nor is anything final while the outcome is being asked for.
    if (action == ShimDeathAction::kAdopt && ownership.state == migration::Ownership::State::kYielded &&
        report.migration_id() == ownership.migration)
      continue;
    auto fresh = parts_.reports.Update(FinalReportAfterShimDeath(report, action, ownership, adopted_running));
    if (!fresh) continue;
    events_.on_report(*fresh);
    parts_.metrics.CountMigration(*fresh);
  }
}

absl::StatusOr<std::shared_ptr<VmEntry>> VmManager::FindIncoming(const std::string& migration_id,
                                                                 const stream::Token& token) {
  std::lock_guard lock(mutex_);
  return EntryOfIncoming(entries_, migration_id, token);
}

absl::Status VmManager::HandOver(VmEntry& entry, const stream::PreambleBytes& preamble,
                                 const std::string& remote, int fd, Deadline deadline) {
  v1::ShimRequest request;
  request.mutable_accept_channel()->set_preamble(preamble.data(), preamble.size());
  request.mutable_accept_channel()->set_remote(remote);
  return entry.Call(request, deadline, fd).status();
}

absl::StatusOr<v1::EndedIncoming> VmManager::Settle(const std::string& migration_id,
                                                    const stream::Token& token, Deadline deadline) {
  auto entry = FindIncoming(migration_id, token);
  if (!entry.ok() && !absl::IsNotFound(entry.status())) return entry.status();
  if (entry.ok()) {
    std::unique_lock operation((*entry)->operation(), deadline.when());
    if (!operation.owns_lock())
      return Error(absl::StatusCode::kDeadlineExceeded, "another operation on VM {} has not ended",
                   (*entry)->name());
    if (!(*entry)->removed()) {
      if (!(*entry)->connected() && !(*entry)->ending()) ReconnectOrRecover(*entry, deadline);
      if (!(*entry)->removed()) {
        ASSIGN_OR_RETURN(auto records, parts_.store.ReadJournal((*entry)->name()));
        migration::JournalVerdict verdict = migration::VerdictOf(records, migration_id);
        if (verdict.verdict != v1::OWNER && verdict.verdict != v1::REFUSED)
          return Error(absl::StatusCode::kFailedPrecondition, "migration {} is not decided, its shim runs",
                       migration_id);
        v1::EndedIncoming ended;
        ended.set_migration_id(migration_id);
        ended.set_vm((*entry)->name());
        ended.set_verdict(verdict.verdict);
        ended.set_epoch(verdict.epoch);
        ended.set_tls((*entry)->conf().params().tls());
        return ended;
      }
    }
  }
  std::optional<v1::EndedIncoming> ended = parts_.store.FindEnded(migration_id);
  if (!ended) return Error(absl::StatusCode::kNotFound, "migration {} is not known here", migration_id);
  auto expected = stream::MakeToken(ended->token());
  if (!expected.ok() || !stream::TokensEqual(*expected, token))
    return Error(absl::StatusCode::kPermissionDenied, "wrong token for migration {}", migration_id);
  return *ended;
}

}  // namespace baton::daemon
