// Starting baton-shim so that it lives on without its agent.
#pragma once

#include <memory>
#include <string>

#include "agent/daemon/agent_config.h"
#include "agent/daemon/task_queue.h"
#include "common/process.h"

namespace baton::daemon {

// Starts shims. An interface so that tests can count and fail starts.
class ShimLauncher {
 public:
  virtual ~ShimLauncher() = default;
  // Starts the shim of `vm`, whose shim.conf has been written to paths.state_dir. Returns once the program
  // runs; its control socket comes a little later. Any thread.
  virtual absl::StatusOr<ProcessId> Start(const std::string& vm, const VmPaths& paths) = 0;
  // Starts a spare shim for the next Start(), if there is none. Any thread.
  virtual void KeepSpare() {}
};

// Runs `baton-shim --dir STATE_DIR` with its output appended to shim.log, detached from us. Under
// systemd through `systemd-run --scope`, so that it is outside our control group and stopping our unit does
// not reach it.
//
// KeepSpare() starts `baton-shim --spare`, which ends with this launcher, and which the next Start() turns
// into the VM's; a new one is started on `tasks` a little later, when the VM's migration or start is past the
// moments that count. A spare that is gone costs nothing but time: the VM's shim is started as without it.
// Without `tasks` there are no spares. Both arguments must outlive the launcher, and no task may run when it
// goes.
std::unique_ptr<ShimLauncher> MakeShimLauncher(const AgentConfig& config, TaskQueue* tasks = nullptr);

// The last lines of a VM's shim.log, for error messages; empty if there are none.
std::string TailOfShimLog(const VmPaths& paths, size_t bytes = 1024);

}  // namespace baton::daemon
