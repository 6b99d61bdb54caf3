// The libvirt domains of this host as far as Baton moves them: checks before the start, a shim for each
// domain that is moving (or whose devices are mediated), and what is to be told of them beside what libvirt
// tells.
//
// A shim that died is started again with what it was told; it finds out by itself what became of the domain.
// The agent ends no domain and starts none.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "agent/daemon/agent_config.h"
#include "agent/daemon/agent_metrics.h"
#include "agent/daemon/backend_resolver.h"
#include "agent/daemon/domain_store.h"
#include "agent/daemon/report_store.h"
#include "agent/daemon/shim_launcher.h"
#include "agent/daemon/task_queue.h"
#include "agent/daemon/vm_entry.h"
#include "agent/daemon/vm_manager.h"
#include "agent/daemon/vm_store.h"
#include "agent/stream/preamble.h"
#include "agent/vmm/libvirt/inventory.h"
#include "baton/v1/agent_session.pb.h"

namespace baton::daemon {

// What a DomainManager works with; all of it outlives the manager.
struct DomainManagerParts {
  const AgentConfig& config;
  // Of verdicts about migrations that have ended.
  VmStore& ended;
  ReportStore& reports;
  BackendResolver& backends;
  ShimLauncher& launcher;
  AgentMetrics& metrics;
  TaskQueue& tasks;
};

// Thread-safe. Calls that may wait take a deadline; operations on one domain exclude each other. `tasks` must
// be stopped before the manager is destroyed, and the inventory as well.
class DomainManager {
 public:
  // `events.on_gone` is not used: a domain is gone when libvirt says so.
  DomainManager(DomainManagerParts parts, VmEvents events);
  ~DomainManager();
  // Leaves the shims; nothing is told any more. Before the inventory goes.
  void Close();
  DomainManager(const DomainManager&) = delete;
  DomainManager& operator=(const DomainManager&) = delete;

  // The domains of this host; to be called once it exists, before everything below.
  void Use(vmm::LibvirtInventory* inventory) { inventory_ = inventory; }
  // At the start of the agent: connects to the shims that run, starts those that ended.
  absl::Status FindAgain(Deadline deadline);

  // Adds to a domain as libvirt shows it what is known here: epoch, migration, shim; and that one which is
  // just coming or has just left is not this host's. Never waits.
  void Complete(v1::Vm* vm);
  // Tells batond of the domain as it is now. What is told of domains is told here, one at a time: whoever saw
  // an older state must not speak after one who saw a newer.
  void Tell(const std::string& uuid);
  // libvirt does not have the domain any more; `tell` says so.
  void OnGone(const std::string& uuid, const std::function<void()>& tell);

  // The domain is in the inventory, under this id, name or UUID.
  bool Has(const std::string& vm) const;
  // --- commands of batond; see agent_session.proto ---
  absl::StatusOr<v1::Inspection> Inspect(const v1::InspectVmCommand& command, Deadline deadline);
  absl::StatusOr<v1::Prepared> PrepareIncoming(const v1::PrepareIncomingCommand& command, Deadline deadline);
  bool Expects(const std::string& migration_id) const;
  absl::Status AbortIncoming(const v1::AbortIncomingCommand& command, Deadline deadline);
  absl::Status StartOutgoing(const v1::StartOutgoingCommand& command, Deadline deadline);
  // Cancel, retune and resolve: passed on to the domain's shim.
  absl::Status Forward(const std::string& vm, const v1::ShimRequest& request, Deadline deadline);

  // Puts Baton between the domain of that XML and its vhost-user back-ends: a shim serves them from now on,
  // and the XML that comes back leads to it.
  absl::StatusOr<v1::MediateDomainResponse> Mediate(const v1::MediateDomainCommand& command,
                                                    Deadline deadline);

  // --- peer port ---
  // As EntryOfIncoming(), of this host's domains.
  absl::StatusOr<std::shared_ptr<VmEntry>> FindIncoming(const std::string& migration_id,
                                                        const stream::Token& token) const;

 private:
  using EntryPtr = std::shared_ptr<VmEntry>;
  struct Locked {
    EntryPtr entry;
    std::unique_lock<std::timed_mutex> lock;
  };

  absl::StatusOr<v1::Vm> Find(const std::string& vm) const;
  EntryPtr FindEntry(const std::string& vm) const;
  absl::StatusOr<Locked> Lock(const std::string& uuid, Deadline deadline);
  VmEntry::Callbacks CallbacksFor(const EntryPtr& entry);
  void OnEvent(const EntryPtr& entry, const v1::ShimReply& event);
  void OnReport(const EntryPtr& entry, const v1::SideReport& report);
  // Tells the shim that its final report was heard, again and again until its configuration does not name the
  // migration any more, and then lets go of the shim if it has nothing else to do.
  void Acknowledge(const EntryPtr& entry, const v1::SideReport& report, int attempt);
  absl::StatusOr<vmm::LibvirtConnection*> Connection() const;
  // A shim for a domain that is about to be moved away is started while the destination prepares, so that it
  // waits for the command. One that gets none is retired after a while.
  void GetReady(const std::string& uuid, const std::string& vm);
  // The epoch at which this host has the domain, if it has it.
  uint64_t EpochOf(const migration::Ownership& ownership, bool served, bool here) const;

  // Its shim does nothing for its domain: its command has not come yet, or will not.
  static bool IsIdle(const v1::ShimConfig& conf);

  // --- with the entry's operation lock held ---
  absl::StatusOr<v1::ShimConfig> MakeConfig(const std::string& uuid, const std::string& vm) const;
  // A shim of its own configuration, durable when it returns.
  absl::Status LaunchWith(const EntryPtr& entry, const v1::ShimConfig& conf, Deadline deadline);
  // `fresh`: the configuration was written and is not durable yet.
  absl::Status Launch(const EntryPtr& entry, Deadline deadline, bool fresh = false);
  void OnShimGone(const EntryPtr& entry, int attempt);
  void Retire(const EntryPtr& entry, const std::string& why);
  // The same for one that has nothing to do, and only then.
  void RetireIdle(const EntryPtr& entry, const std::string& why);
  void Remove(const EntryPtr& entry);
  void Drop(const EntryPtr& entry);

  // --- domain_mediate.cc ---
  // Devices that mediators serve here.
  struct Mediated {
    std::vector<v1::DeviceSpec> specs;
    std::vector<v1::ResolvedDevice> devices;  // of the same order
  };
  std::string DeviceDir(const std::string& uuid) const;
  void ResolveMediated(const vmm::DomainDescription& domain, const std::string& vm,
                       const v1::PrepareIncomingCommand& command, Mediated* out,
                       std::vector<v1::Finding>* findings, Deadline deadline) const;
  void AddMediated(const Mediated& mediated, v1::ShimConfig* conf) const;
  absl::Status Serve(const std::string& uuid, const std::string& vm, const std::string& name,
                     const Mediated& wanted, Deadline deadline);

  // --- domain_incoming.cc ---
  struct Plan;
  absl::StatusOr<Plan> MakePlan(const v1::PrepareIncomingCommand& command, Deadline deadline) const;
  absl::StatusOr<v1::Prepared> PrepareLocked(Locked locked, const Plan& plan,
                                             const v1::PrepareIncomingCommand& command, Deadline deadline);
  absl::Status MakeImages(const Plan& plan, const v1::DomainHost& host, Deadline deadline) const;

  const DomainManagerParts parts_;
  const AgentConfig& config_;
  const VmEvents events_;
  const DomainStore store_;
  std::atomic<vmm::LibvirtInventory*> inventory_ = nullptr;
  std::mutex telling_;
  mutable std::mutex mutex_;
  std::map<std::string, EntryPtr> entries_;  // by UUID; guarded by mutex_, as all below
  // Moved away, and libvirt has not yet shown that they are not here.
  std::set<std::string> departed_;
};

}  // namespace baton::daemon
