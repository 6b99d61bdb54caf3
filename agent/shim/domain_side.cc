#include "agent/shim/domain_side.h"

#include <libvirt/libvirt.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <utility>

#include "agent/vmm/libvirt/job.h"
#include "common/durable_file.h"

namespace baton::shim {

using Kind = migration::JournalRecord::Kind;
using State = migration::Ownership::State;

vmm::SideView LookAtDomain(vmm::LibvirtConnection& connection, const std::string& uuid,
                           vmm::MigrationRole role, Deadline deadline, int* reason_out) {
  using Look = std::pair<vmm::SideView, int>;
  auto view = vmm::CallFor<Look>(
      connection, "looking at the domain",
      [uuid, role](virConnectPtr c) -> absl::StatusOr<Look> {
        vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
        if (!domain) return vmm::LibvirtError("domain");
        vmm::SideView out;
        // First: what a job did before it ended must not be missed in the state of a domain without one.
        out.job = vmm::AskMigrationJob(domain.get()) != vmm::MigrationJob::kNone;
        int state = 0, reason = 0;
        if (virDomainGetState(domain.get(), &state, &reason, 0) != 0) return vmm::LibvirtError("state");
        out.condition = vmm::ConditionOf(state, reason, role);
        return Look(out, reason);
      },
      deadline);
  if (reason_out) *reason_out = view.ok() ? view->second : 0;
  if (view.ok()) return view->first;
  vmm::SideView out;
  if (absl::IsNotFound(view.status())) out.condition = vmm::DomainCondition::kAbsent;
  return out;
}

absl::Status MakeTunnelDirectory(const std::string& path, const v1::DomainHost& host) {
  RETURN_IF_ERROR(RemoveTree(path));
  const std::string parent = path.substr(0, path.find_last_of('/'));
  // QEMU's user has to pass, and need not see what else is there.
  RETURN_IF_ERROR(MakeDirectories(parent, 0711));
  if (::mkdir(path.c_str(), 0700) != 0) return ErrnoError(errno, path);
  if (::geteuid() == 0 && ::chown(path.c_str(), host.qemu_uid(), host.qemu_gid()) != 0)
    return ErrnoError(errno, path);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const stream::TlsContext>> LoadPeerTls(const v1::ShimConfig& config,
                                                                      bool wanted) {
  if (!wanted) return std::shared_ptr<const stream::TlsContext>();
  if (config.tls_ca().empty() || config.tls_cert().empty() || config.tls_key().empty())
    return absl::FailedPreconditionError(
        "the migration wants TLS, but this host's agent has no peer certificates configured");
  return stream::TlsContext::Load(config.tls_ca(), config.tls_cert(), config.tls_key());
}

// --- DomainJournal ---

absl::StatusOr<std::unique_ptr<DomainJournal>> DomainJournal::Open(const std::string& path) {
  // A shim that was killed may hold the lock until the last of its threads has ended.
  ASSIGN_OR_RETURN(auto journal, migration::Journal::Open(path, Deadline::After(std::chrono::seconds(10))));
  return std::unique_ptr<DomainJournal>(new DomainJournal(std::move(journal)));
}

absl::StatusOr<migration::Ownership> DomainJournal::Now() const {
  return migration::ReplayOwnership(journal_->Records());
}

v1::HandoverState DomainJournal::VerdictOf(const std::string& migration) const {
  return migration::VerdictOf(journal_->Records(), migration).verdict;
}

absl::Status DomainJournal::Append(Kind kind, uint64_t epoch, const std::string& migration) {
  if (absl::Status repaired = journal_->Repair(); !repaired.ok()) return repaired;
  migration::JournalRecord record;
  record.kind = kind;
  record.epoch = epoch;
  record.migration = migration;
  return journal_->Append(record);
}

absl::Status DomainJournal::CheckSettled() const {
  ASSIGN_OR_RETURN(migration::Ownership now, Now());
  if (now.state == State::kYielded)
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "the outcome of migration {} is not known yet", now.migration);
  return absl::OkStatus();
}

absl::Status DomainJournal::Own(uint64_t epoch) {
  ASSIGN_OR_RETURN(migration::Ownership now, Now());
  if (now.state == State::kOwner && now.epoch == epoch) return absl::OkStatus();
  RETURN_IF_ERROR(CheckSettled());
  return Append(Kind::kOwner, epoch, "");
}

absl::Status DomainJournal::Yield(const std::string& migration, uint64_t epoch) {
  ASSIGN_OR_RETURN(migration::Ownership now, Now());
  if (now.state == State::kYielded && now.migration == migration) return absl::OkStatus();
  return Append(Kind::kYielded, epoch, migration);
}

absl::Status DomainJournal::Release(const std::string& migration, uint64_t epoch) {
  ASSIGN_OR_RETURN(migration::Ownership now, Now());
  if (now.state == State::kReleased && now.migration == migration) return absl::OkStatus();
  if (now.state != State::kYielded) RETURN_IF_ERROR(Append(Kind::kYielded, epoch, migration));
  return Append(Kind::kReleased, epoch, migration);
}

absl::Status DomainJournal::Keep(const std::string& migration, uint64_t epoch) {
  ASSIGN_OR_RETURN(migration::Ownership now, Now());
  if (now.state != State::kYielded || now.migration != migration) return absl::OkStatus();
  return Append(Kind::kRefused, epoch, migration);
}

absl::Status DomainJournal::Fence(const std::string& migration, uint64_t epoch) {
  ASSIGN_OR_RETURN(migration::Ownership now, Now());
  if (now.state == State::kOwner && now.epoch == epoch + 2) return absl::OkStatus();
  if (now.state != State::kYielded) RETURN_IF_ERROR(Append(Kind::kYielded, epoch, migration));
  return Append(Kind::kFenced, epoch + 2, migration);
}

absl::Status DomainJournal::Expect(const std::string& migration, uint64_t epoch) {
  ASSIGN_OR_RETURN(migration::Ownership now, Now());
  if (now.migration == migration && now.state != State::kNothing) return absl::OkStatus();
  return Append(Kind::kIncoming, epoch, migration);
}

absl::Status DomainJournal::TakeOver(const std::string& migration, uint64_t epoch) {
  if (VerdictOf(migration) == v1::OWNER) return absl::OkStatus();
  return Append(Kind::kOwner, epoch + 1, migration);
}

absl::Status DomainJournal::Refuse(const std::string& migration, uint64_t epoch) {
  if (VerdictOf(migration) == v1::REFUSED) return absl::OkStatus();
  return Append(Kind::kRefused, epoch, migration);
}

// --- DomainMailbox ---

void DomainMailbox::Post(const vmm::DomainEvent& event) {
  std::lock_guard lock(mutex_);
  mail_.events.push_back(event);
  changed_.notify_all();
}

void DomainMailbox::EndCall(absl::Status status) {
  std::lock_guard lock(mutex_);
  mail_.call = std::move(status);
  changed_.notify_all();
}

void DomainMailbox::Wake() {
  std::lock_guard lock(mutex_);
  woken_ = true;
  changed_.notify_all();
}

void DomainMailbox::Stop() {
  std::lock_guard lock(mutex_);
  mail_.stop = true;
  changed_.notify_all();
}

DomainMailbox::Mail DomainMailbox::Wait(Deadline deadline) {
  std::unique_lock lock(mutex_);
  changed_.wait_until(lock, deadline.when(),
                      [this] { return woken_ || mail_.stop || mail_.call || !mail_.events.empty(); });
  woken_ = false;
  Mail out = std::exchange(mail_, Mail());
  mail_.stop = out.stop;
  return out;
}

bool DomainMailbox::stopped() const {
  std::lock_guard lock(mutex_);
  return mail_.stop;
}

}  // namespace baton::shim
