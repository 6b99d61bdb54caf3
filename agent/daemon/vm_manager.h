// The VMs of this host: starts, finds again, recovers and removes them, and passes commands on to their
// shims.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "agent/daemon/agent_config.h"
#include "agent/daemon/agent_metrics.h"
#include "agent/daemon/backend_resolver.h"
#include "agent/daemon/qemu_info.h"
#include "agent/daemon/recovery.h"
#include "agent/daemon/report_store.h"
#include "agent/daemon/shim_launcher.h"
#include "agent/daemon/task_queue.h"
#include "agent/daemon/vm_entry.h"
#include "agent/daemon/vm_store.h"
#include "agent/migration/handover.h"
#include "agent/stream/preamble.h"
#include "baton/v1/agent_session.pb.h"

namespace baton::daemon {

// Where news of VMs and migrations go. Called from any thread, must not block.
struct VmEvents {
  std::function<void(const v1::Vm&)> on_vm;
  std::function<void(const std::string& vm, const std::string& message)> on_gone;
  std::function<void(const v1::SideReport&)> on_report;
};

// What a VmManager works with; all of it outlives the manager.
struct VmManagerParts {
  const AgentConfig& config;
  VmStore& store;
  ReportStore& reports;
  BackendResolver& backends;
  QemuInfo& qemu;
  ShimLauncher& launcher;
  AgentMetrics& metrics;
  TaskQueue& tasks;
};

// Thread-safe. Every call that may wait takes a deadline; operations on one VM exclude each other, and one
// that cannot begin by its deadline fails with DeadlineExceeded. `tasks` must be stopped before the manager
// is destroyed.
class VmManager {
 public:
  VmManager(VmManagerParts parts, VmEvents events);
  ~VmManager();

  // At the start of the agent: connects to the shims that run, recovers what has lost its shim. A VM that
  // cannot be recovered is listed with the reason and does not keep the others from being found.
  absl::Status FindAgain(Deadline deadline);

  // --- commands of batond; see agent_session.proto ---
  absl::StatusOr<v1::Vm> StartVm(const v1::StartVmCommand& command, Deadline deadline);
  absl::Status StopVm(const v1::StopVmCommand& command, Deadline deadline);
  absl::StatusOr<v1::Inspection> Inspect(const v1::InspectVmCommand& command, Deadline deadline);
  absl::StatusOr<v1::Prepared> PrepareIncoming(const v1::PrepareIncomingCommand& command, Deadline deadline);
  absl::Status AbortIncoming(const v1::AbortIncomingCommand& command, Deadline deadline);
  absl::Status StartOutgoing(const v1::StartOutgoingCommand& command, Deadline deadline);
  // Passed on to the shim; what a hook made for the back-end before is taken away, and the configuration as
  // the shim wrote it is taken over.
  absl::StatusOr<v1::DeviceSwapped> SwapDevice(const v1::SwapDeviceCommand& command, Deadline deadline);
  // Cancel, retune and resolve: passed on to the shim of `vm`.
  absl::Status Forward(const std::string& vm, const v1::ShimRequest& request, Deadline deadline);

  // --- peer port ---
  // As EntryOfIncoming(), of this host's VMs.
  absl::StatusOr<std::shared_ptr<VmEntry>> FindIncoming(const std::string& migration_id,
                                                        const stream::Token& token);
  // Gives a connection to the VM's shim. The descriptor stays the caller's.
  absl::Status HandOver(VmEntry& entry, const stream::PreambleBytes& preamble, const std::string& remote,
                        int fd, Deadline deadline);
  // The verdict of a migration whose shim cannot answer any more: from the journal, or from what is
  // remembered of VMs that are gone. If nothing was decided and the shim is dead, decides: REFUSED, durable
  // before this returns. Then FailedPrecondition means: its shim lives (again), hand the connection over.
  absl::StatusOr<v1::EndedIncoming> Settle(const std::string& migration_id, const stream::Token& token,
                                           Deadline deadline);

  // Everything that Hello lists.
  std::vector<v1::Vm> Inventory() const;
  std::shared_ptr<VmEntry> Find(const std::string& vm) const;

 private:
  using EntryPtr = std::shared_ptr<VmEntry>;
  // An entry with its operation lock held.
  struct Locked {
    EntryPtr entry;
    std::unique_lock<std::timed_mutex> lock;
  };

  // The entry of `vm`, locked; NotFound unless it exists or is to be created.
  absl::StatusOr<Locked> Lock(const std::string& vm, bool create, Deadline deadline);
  VmEntry::Callbacks CallbacksFor(const EntryPtr& entry);
  void OnShimEvent(const EntryPtr& entry, const v1::ShimReply& event);
  void OnReport(const EntryPtr& entry, const v1::SideReport& report);
  void Tell(const EntryPtr& entry);

  // All below: with the entry's operation lock held.
  absl::StatusOr<v1::ShimConfig> MakeConfig(const v1::VmSpec& spec, bool kvm) const;
  absl::StatusOr<bool> ResolveKvm(v1::Accelerator accelerator) const;
  absl::Status LaunchAndConnect(const EntryPtr& entry, Deadline deadline);
  // Starts a VM or a waiting destination of which everything is written down; removes it again if it fails.
  absl::Status BringUp(const EntryPtr& entry, const std::function<bool(const v1::ShimStatus&)>& ready,
                       Deadline deadline);
  void FindAgainOne(const std::string& vm, Deadline deadline);
  // The shim's connection ended: connect again, or recover.
  void OnShimGone(const EntryPtr& entry);
  void ReconnectOrRecover(const EntryPtr& entry, Deadline deadline);
  void Recover(const EntryPtr& entry);
  // What the VM's journal says.
  absl::StatusOr<migration::Ownership> OwnershipOf(const std::string& vm) const;
  void Adopt(const EntryPtr& entry, const migration::Ownership& ownership, int attempt);
  // Gives every migration of the VM that will not report any more its final report; `heard` is the one that
  // the new shim goes on with.
  void FinishOpenReports(const EntryPtr& entry, ShimDeathAction action, const migration::Ownership& ownership,
                         const v1::SideReport& heard, bool adopted_running);
  absl::Status WriteRefused(const VmEntry& entry, const v1::ShimConfig& conf);
  // The migration under way has ended for this host: the shim is told to go, everything is removed.
  void Retire(const EntryPtr& entry, const std::string& message);
  void RemoveLater(const EntryPtr& entry, const std::string& message, const absl::Status& why);
  // Ends shim and VMM, gives back-ends back, removes all files and the entry.
  absl::Status Remove(const EntryPtr& entry, const std::string& message);
  void EndProcesses(const EntryPtr& entry);
  void UpdateGauges();

  // incoming.cc
  absl::StatusOr<v1::Prepared> PrepareLocked(const EntryPtr& entry, const v1::PrepareIncomingCommand& command,
                                             Deadline deadline);
  std::vector<v1::ResolvedDevice> ResolveDevices(const v1::PrepareIncomingCommand& command,
                                                 std::vector<v1::Finding>* findings, Deadline deadline);

  const VmManagerParts parts_;
  const AgentConfig& config_;
  const VmEvents events_;
  mutable std::mutex mutex_;
  std::map<std::string, EntryPtr> entries_;  // guarded by mutex_
};

}  // namespace baton::daemon
