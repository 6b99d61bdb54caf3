// What both sides of a libvirt domain's migration need: a look at the domain, its journal, the directory of
// the tunnel's sockets, and a mailbox for the thread that decides.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "agent/migration/handover.h"
#include "agent/migration/journal.h"
#include "agent/stream/tls.h"
#include "agent/vmm/libvirt/connection.h"
#include "agent/vmm/libvirt/settlement.h"
#include "baton/v1/shim.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::shim {

// The domain as `connection` has it now; kUnreachable if it does not answer by the deadline. `reason` (may be
// null) gets libvirt's reason for the state.
vmm::SideView LookAtDomain(vmm::LibvirtConnection& connection, const std::string& uuid,
                           vmm::MigrationRole role, Deadline deadline, int* reason = nullptr);

// Makes the directory for a migration's sockets, for QEMU's user alone; its parent must let that user pass.
// What an earlier attempt left in it is removed.
absl::Status MakeTunnelDirectory(const std::string& path, const v1::DomainHost& host);

// Null without TLS. FailedPrecondition if this host has no certificates.
absl::StatusOr<std::shared_ptr<const stream::TlsContext>> LoadPeerTls(const v1::ShimConfig& config,
                                                                      bool wanted);

// The journal of a domain's ownership. libvirt decides who runs the guest; the journal keeps what Baton has
// seen and said of it, so that a later shim says nothing else. Every call may be repeated. Thread-safe.
class DomainJournal {
 public:
  static absl::StatusOr<std::unique_ptr<DomainJournal>> Open(const std::string& path);

  absl::StatusOr<migration::Ownership> Now() const;
  v1::HandoverState VerdictOf(const std::string& migration) const;

  // --- source ---
  // FailedPrecondition while the outcome of a migration is not known.
  absl::Status CheckSettled() const;
  // The domain runs here at `epoch`, as libvirt says. FailedPrecondition while the outcome of a migration is
  // not known.
  absl::Status Own(uint64_t epoch);
  absl::Status Yield(const std::string& migration, uint64_t epoch);
  // The destination has it. After a Yield() that could not be written, writes that first.
  absl::Status Release(const std::string& migration, uint64_t epoch);
  // It goes on here. Writes nothing if it was not yielded.
  absl::Status Keep(const std::string& migration, uint64_t epoch);
  // It goes on here because the destination was confirmed to be fenced: owned at epoch + 2.
  absl::Status Fence(const std::string& migration, uint64_t epoch);

  // --- destination ---
  absl::Status Expect(const std::string& migration, uint64_t epoch);
  // Owned at epoch + 1.
  absl::Status TakeOver(const std::string& migration, uint64_t epoch);
  absl::Status Refuse(const std::string& migration, uint64_t epoch);

 private:
  explicit DomainJournal(std::unique_ptr<migration::Journal> journal) : journal_(std::move(journal)) {}
  absl::Status Append(migration::JournalRecord::Kind kind, uint64_t epoch, const std::string& migration);
  std::unique_ptr<migration::Journal> journal_;
};

// What the deciding thread waits for. Thread-safe; shared with calls that may outlive it.
class DomainMailbox {
 public:
  struct Mail {
    std::vector<vmm::DomainEvent> events;
    // How the call of virDomainMigrateToURI3 ended.
    std::optional<absl::Status> call;
    bool stop = false;
  };
  void Post(const vmm::DomainEvent& event);
  void EndCall(absl::Status status);
  // Ends a Wait() without mail.
  void Wake();
  // For good: every Wait() returns with `stop`.
  void Stop();
  Mail Wait(Deadline deadline);
  bool stopped() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Mail mail_;           // guarded by mutex_
  bool woken_ = false;  // guarded by mutex_
};

}  // namespace baton::shim
