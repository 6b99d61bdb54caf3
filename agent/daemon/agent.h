// baton-agent as an object: everything that main() starts, wired together.
#pragma once

#include <atomic>
#include <memory>

#include "agent/daemon/agent_config.h"
#include "agent/daemon/agent_metrics.h"
#include "agent/daemon/backend_resolver.h"
#include "agent/daemon/console_relay.h"
#include "agent/daemon/domain_manager.h"
#include "agent/daemon/peer_port.h"
#include "agent/daemon/qemu_info.h"
#include "agent/daemon/report_store.h"
#include "agent/daemon/session.h"
#include "agent/daemon/shim_launcher.h"
#include "agent/daemon/task_queue.h"
#include "agent/daemon/vm_manager.h"
#include "agent/daemon/vm_store.h"
#include "agent/vmm/libvirt/inventory.h"
#include "common/fd.h"
#include "common/metrics.h"

namespace baton::daemon {

// Start() finds the shims again, opens the peer port and begins to dial batond; destruction ends all that and
// leaves every shim running.
class Agent {
 public:
  // `launcher` null: the real one. Errors have a message of their own for each cause: unwritable directory,
  // missing program, another agent on the same state_dir, port in use, unusable certificates.
  static absl::StatusOr<std::unique_ptr<Agent>> Start(AgentConfig config,
                                                      std::unique_ptr<ShimLauncher> launcher = nullptr);
  ~Agent();
  VmManager& vms() { return *vms_; }
  uint16_t peer_port() const { return peer_port_->port(); }
  uint16_t metrics_port() const { return metrics_endpoint_ ? metrics_endpoint_->port() : 0; }

 private:
  explicit Agent(AgentConfig config);
  absl::Status LockStateDir();
  absl::Status StartServices();
  v1::Hello MakeHello();
  void OnCommand(const v1::Command& command, uint64_t session);
  v1::CommandResult Execute(const v1::Command& command, Deadline deadline);
  absl::Status Run(const v1::Command& command, Deadline deadline, v1::CommandResult* result);
  void StartLibvirt();
  // A domain as this host tells of it.
  v1::Vm Localize(v1::Vm vm) const;
  // The VM is a domain of this host's libvirt, and none of Baton's own.
  bool IsDomain(const std::string& vm) const;
  // Of a command about a VM that only libvirt has: why it is not done. OK for all others.
  absl::Status CheckOurs(const std::string& vm) const;
  absl::Status Forward(const std::string& vm, const v1::ShimRequest& request, Deadline deadline);

  const AgentConfig config_;
  UniqueFd lock_;  // flock on state_dir/agent.lock
  v1::Host host_;
  uint64_t start_counter_ = 0;
  AgentMetrics metrics_;
  QemuInfo qemu_;
  VmStore store_;
  ReportStore reports_;
  BackendResolver backends_;
  std::unique_ptr<ShimLauncher> launcher_;
  // Own threads for each: recovering a VM or a slow command must not keep a peer's connection waiting.
  TaskQueue vm_tasks_{8};
  TaskQueue commands_{16};
  TaskQueue peer_tasks_{8};
  std::unique_ptr<VmManager> vms_;
  std::unique_ptr<DomainManager> domains_;          // null: no libvirt
  std::unique_ptr<vmm::LibvirtInventory> libvirt_;  // null: not asked for
  std::atomic<bool> libvirt_unread_ = false;        // the last Hello said that libvirt had not been read
  std::unique_ptr<ConsoleRelay> consoles_;
  std::unique_ptr<MetricsEndpoint> metrics_endpoint_;
  std::unique_ptr<PeerPort> peer_port_;
  // Events arise before the session exists, and while it is being destroyed.
  std::mutex session_mutex_;
  std::shared_ptr<Session> session_;  // guarded by session_mutex_
  std::shared_ptr<Session> session();
};

}  // namespace baton::daemon
