// One VM of this host as the agent holds it: its configuration, the connection to its shim, and the shim's
// last word.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "agent/daemon/agent_config.h"
#include "agent/shim/control_client.h"
#include "agent/stream/preamble.h"
#include "baton/v1/shim.pb.h"
#include "common/process.h"

namespace baton::daemon {

// Thread-safe.
class VmEntry {
 public:
  // Called on the shim client's thread: must neither block nor call the shim.
  struct Callbacks {
    std::function<void(const v1::ShimReply&)> on_event;
    std::function<void()> on_close;
  };

  VmEntry(std::string name, VmPaths paths) : name_(std::move(name)), paths_(std::move(paths)) {}

  const std::string& name() const { return name_; }
  const VmPaths& paths() const { return paths_; }

  // Held while the VM is started, stopped, recovered or removed: one of these at a time.
  std::timed_mutex& operation() { return operation_; }

  v1::ShimConfig conf() const;
  void set_conf(v1::ShimConfig conf);
  ProcessId shim() const;
  void set_shim(ProcessId id);

  // Connects to the control socket and subscribes, waiting for the socket to appear as long as the shim's
  // process lives. Unavailable if the process ends first.
  absl::Status Connect(const Callbacks& callbacks, Deadline deadline);
  // Ends the connection, if there is one.
  void Disconnect();
  bool connected() const;
  // A request to the shim; Unavailable if it is not connected.
  absl::StatusOr<v1::ShimReply> Call(const v1::ShimRequest& request, Deadline deadline, int fd = -1) const;

  // The last status; default if none was heard.
  v1::ShimStatus status() const;
  // Takes over a status event.
  void set_status(v1::ShimStatus status);
  // Waits until `done` says true for a status. Unavailable if the connection ends first, DeadlineExceeded.
  absl::Status AwaitStatus(const std::function<bool(const v1::ShimStatus&)>& done, Deadline deadline) const;

  // Without a shim: what to show instead of its status.
  void set_shown(v1::Vm::State state, std::string message);
  // The shim's exit is expected; nothing is to be recovered.
  void set_ending(bool ending);
  bool ending() const;
  // Handed over or refused: not this host's VM any more, only to be removed. Whatever its shim still says, it
  // is not listed.
  void set_retiring();
  // No longer in the inventory (set once, under operation()).
  void set_removed();
  bool removed() const;

  // The final report of this side of a migration was heard from the shim.
  void set_finished(const std::string& migration_id);
  bool finished(const std::string& migration_id) const;

  // As it is told to batond; names are full ("vms/x").
  v1::Vm Describe(const std::string& host) const;
  // Listed in the inventory: it has a configuration, and was not handed over or refused.
  bool listed() const;

 private:
  const std::string name_;
  const VmPaths paths_;
  std::timed_mutex operation_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  v1::ShimConfig conf_;  // guarded by mutex_, as all below
  ProcessId shim_;
  std::shared_ptr<shim::ControlClient> client_;
  bool broken_ = false;  // the connection ended by itself
  std::optional<v1::ShimStatus> status_;
  v1::Vm::State shown_ = v1::Vm::STARTING;
  std::string shown_message_;
  bool ending_ = false;
  bool retiring_ = false;
  bool removed_ = false;
  std::string finished_;
};

// Of `entries` the one that waits (or waited) for that migration, if the token is right. NotFound, or
// PermissionDenied.
absl::StatusOr<std::shared_ptr<VmEntry>> EntryOfIncoming(
    const std::map<std::string, std::shared_ptr<VmEntry>>& entries, const std::string& migration_id,
    const stream::Token& token);

// Pids of processes with `argument` among their command line's arguments, or contained in one of them. For
// finding what nobody wrote down: a shim or QEMU whose starter died at the wrong moment.
std::vector<ProcessId> FindByCommandLine(const std::string& argument);

}  // namespace baton::daemon
