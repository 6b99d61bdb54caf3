// The source's side of moving a libvirt domain: opens the tunnel, asks libvirt to move the domain, follows
// and steers that, and after its end looks at both libvirts until the guest is in exactly one place.
//
//   Prepare ─→ Move ─→ Settle ─→ end        after a restart of the shim: Settle at once
//
// One thread of its own does all of it; libvirt's calls run on threads of their connection and are bounded.
// The tunnel and the connection to the destination's libvirt stay until the outcome is known.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "agent/migration/convergence.h"
#include "agent/migration/reporter.h"
#include "agent/shim/config_store.h"
#include "agent/shim/domain_device_link.h"
#include "agent/shim/domain_side.h"
#include "agent/stream/tunnel.h"
#include "agent/vmm/libvirt/mover.h"
#include "agent/vmm/libvirt/settlement.h"
#include "baton/v1/agent_session.pb.h"
#include "baton/v1/peer.pb.h"

namespace baton::shim {

// All of it outlives the migration.
struct DomainOutgoingParts {
  ConfigStore& config;
  DomainJournal& journal;
  vmm::LibvirtConnection& local;
  // For the call that lasts, which has a connection to itself (LibvirtConnection::Begin).
  vmm::LibvirtConnection& caller;
  DomainDevices* devices;  // null: none is mediated
  migration::ReportCallback on_report;
  // The migration has ended, its last report was given. On the migration's thread.
  std::function<void()> on_end;
};

// Thread-safe.
class DomainOutgoing {
 public:
  // `resume`: a shim before this one had begun it; nothing is started, only settled.
  DomainOutgoing(DomainOutgoingParts parts, const v1::StartOutgoingCommand& command, bool resume);
  // Leaves everything as it is; libvirt goes on. A later shim settles.
  ~DomainOutgoing();
  DomainOutgoing(const DomainOutgoing&) = delete;
  DomainOutgoing& operator=(const DomainOutgoing&) = delete;

  const std::string& id() const { return command_.migration_id(); }
  bool ended() const;
  // FailedPrecondition once the guest may run at the destination.
  absl::Status Cancel();
  absl::Status Retune(const v1::RetuneCommand& command);
  // What batond heard from the destination's agent, or an operator's confirmation.
  absl::Status Resolve(const v1::ResolveCommand& command);
  // News of the domain from this host's libvirt, or of the connection to it. Must not wait.
  void OnEvent(const vmm::DomainEvent& event) { mail_->Post(event); }
  void OnLibvirt(bool up) {
    if (!up) missed_events_ = true;
    mail_->Wake();
  }
  // News of the caller's connection. Must not wait.
  void OnCaller() { mail_->Wake(); }

 private:
  // Why the migration is ended from this side.
  struct Wish {
    v1::Reason reason = v1::REASON_UNSPECIFIED;
    std::string message;
  };

  void Run();
  absl::Status Prepare();
  absl::StatusOr<bool> ReadSource(Deadline deadline);
  bool ReadForgets();
  // What QEMU is told once libvirt has begun.
  void SetLimits();
  absl::Status BeginCall(bool recover);
  // Tells QEMU the blackout that it may aim at.
  void LimitDowntime(Duration limit);
  // Writes down which limit QEMU had before, for this shim or a later one.
  void NoteLimit();
  // Gives QEMU that limit back if the domain stays here.
  void RestoreLimit(bool stays);
  // Until the call has returned, or the end of the object.
  void Follow();
  void OnDomainEvent(const vmm::DomainEvent& event);
  void OnIteration(uint64_t iteration);
  void Judge(const vmm::JobFigures& job, uint64_t iteration);
  void Carry(const migration::ConvergenceDecision& decision);
  void StartPostCopy(const std::string& why);
  // For the record of the migration.
  void Decided(const std::string& action, const std::string& why);
  void Tick();
  void ApplyWishes();
  void EndEarly(const v1::Reason reason, const std::string& message);

  // --- domain_connections.cc ---
  absl::Status OpenTunnel();
  void CloseTunnel();
  void SetEntrance(std::shared_ptr<stream::TunnelEntrance> entrance);
  // From any thread: the call cannot succeed any more, for this reason.
  void CutVmm(v1::Reason reason, const std::string& message);
  void ArmDevices(Deadline deadline);
  void ReleaseDevices();
  // Until `connection`, one of this host's libvirt, is there. What asks for the end of the migration ends it,
  // as long as the guest was not given away: after that there is no way back, and post-copy that lost its
  // connection has to go on.
  absl::Status AwaitConnection(const vmm::LibvirtConnection& connection, Deadline deadline);
  // Begins to connect to the destination's libvirt.
  void OpenRemote();
  // Does so once libvirt's call has come so far that nothing of it has to wait for that, and notes then
  // whether the guest is still here.
  void WatchRemote();
  // It could be seen all the time since before the handover.
  bool WatchedRemote() const { return watched_since_ && *watched_since_ == losses_->load(); }

  // --- domain_settle.cc ---
  void Settle();
  vmm::SettlementInput Look();
  absl::StatusOr<v1::Verdict> AskDestination();
  // Does what the settlement says; true once the migration has ended.
  bool Act(const vmm::SettlementInput& seen, const vmm::Settlement& settlement);
  void Yielded();
  // We suspended the source's copy, and wrote that down before.
  bool SuspendedHere() const;
  bool EndHere(bool running, const std::string& why);
  bool EndAway(const std::string& why);
  void LoseGuest(const std::string& why);
  void NotStarted(const absl::Status& why);
  absl::Status OnDomain(vmm::LibvirtConnection& connection, const std::string& what,
                        std::function<int(virDomainPtr)> call);
  void UndefineLeftover();
  Wish Cause() const;
  void AddDowntime();

  // --- domain_recover.cc ---
  std::string AskSourceQemu();
  void LookAtBreak(vmm::SettlementInput* in);
  void Recover(const std::string& why);
  void RecoveryEnded(const absl::Status& status);
  void NotRecovered(const absl::Status& why);

  DomainOutgoingParts p_;
  const v1::StartOutgoingCommand command_;
  const bool resume_;
  const std::shared_ptr<DomainMailbox> mail_ = std::make_shared<DomainMailbox>();
  migration::Reporter reporter_;

  // Of the thread alone.
  std::string uuid_;
  stream::DialOptions dial_;
  std::shared_ptr<stream::TunnelEntrance> entrance_;  // replaced under mutex_
  std::unique_ptr<DomainDeviceSender> device_link_;   // while the call is under way
  std::unique_ptr<vmm::LibvirtConnection> remote_;
  // How often the destination's libvirt was lost; and had been when the guest was last seen here with it.
  const std::shared_ptr<std::atomic<int>> losses_ = std::make_shared<std::atomic<int>>(0);
  std::optional<int> watched_since_;
  std::optional<vmm::JobFigures> completed_;  // what libvirt told of its job at the end of it
  // The connection to this host's libvirt was lost once: that the domain was stopped may not have been heard.
  std::atomic<bool> missed_events_ = false;
  vmm::DomainMover mover_;
  vmm::MoveSource source_;
  migration::Convergence convergence_;
  vmm::JobFigures before_;  // at the last iteration
  uint64_t iteration_ = 0;  // judged last
  // Told of by libvirt and to be looked at when due; 0: none.
  uint64_t iteration_begun_ = 0;
  Clock::time_point iteration_due_{};
  Duration limit_told_{};  // of the blackout, to QEMU
  bool call_active_ = false;
  bool suspended_ = false;   // by the migration: its state may have left
  bool was_paused_ = false;  // by its user, before libvirt's job began
  bool postcopy_ = false;
  bool postcopy_asked_ = false;
  bool destination_ran_ = false;
  bool recovering_ = false;  // the call under way is to recover post-copy
  Clock::time_point call_began_{};
  // Since when the source says that post-copy lost its connection, and the destination does not.
  std::optional<Clock::time_point> unnoticed_since_;
  int not_recovered_ = 0;  // attempts since post-copy was seen connected
  Clock::time_point recover_again_{};
  Duration recover_pause_{};
  absl::Status call_status_;
  Clock::time_point deadline_{};
  std::optional<Clock::time_point> abort_since_;
  std::string said_;  // last settlement, for the log

  mutable std::mutex mutex_;
  std::atomic<bool> cut_ = false;
  std::optional<Wish> end_;  // guarded by mutex_, as all below
  std::optional<uint64_t> bandwidth_;
  std::optional<Duration> max_downtime_;
  v1::HandoverState verdict_ = v1::HANDOVER_STATE_UNSPECIFIED;
  bool fenced_ = false;
  bool yielded_ = false;
  bool ended_ = false;
  // What broke in the tunnel last.
  std::string broken_;
  std::thread thread_;
};

}  // namespace baton::shim
