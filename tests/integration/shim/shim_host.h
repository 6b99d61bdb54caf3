// One host with one shim, for tests that play the agent.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "agent/shim/control_client.h"
#include "tests/integration/shim/real_peers.h"

namespace baton::test {

class ShimHost {
 public:
  // Directories DIR/NAME/{run,state} and SHM/NAME.ram; the storage daemon, if any, listens at
  // DIR/NAME/disk0.sock.
  ShimHost(const TempDirs& dirs, const std::string& name);
  // Ends shim and QEMU, however they are.
  ~ShimHost();

  const std::string& run_dir() const { return run_dir_; }
  const std::string& state_dir() const { return state_dir_; }
  const std::string& memory_path() const { return memory_path_; }
  std::string disk_socket() const { return dir_ + "/disk0.sock"; }

  // Starts the storage daemon (again).
  absl::Status StartDisk(const std::string& image, int queues = 1);
  StorageDaemon& disk() { return *disk_; }

  // A configuration for `spec` with this host's paths; to be changed and given to StartShim.
  v1::ShimConfig MakeConfig(const v1::VmSpec& spec, v1::ShimConfig::Mode mode) const;
  // Writes shim.conf, starts baton-shim, connects and subscribes. `pause_at`: see common/pause_point.h.
  absl::Status StartShim(const v1::ShimConfig& config, const std::string& pause_at = "");
  // Waits until the shim stands at a pause point, or lets it go on.
  absl::Status WaitPause(const std::string& point, Deadline deadline);
  void Continue(const std::string& point);
  // What the shim has made of shim.conf.
  absl::StatusOr<v1::ShimConfig> ReadConfig() const;
  // Starts another shim with shim.conf as it is, except for the mode.
  absl::Status StartShimAgain(v1::ShimConfig::Mode mode);

  // Waits until the newest status event satisfies `wanted`.
  absl::StatusOr<v1::ShimStatus> WaitStatus(const std::function<bool(const v1::ShimStatus&)>& wanted,
                                            Deadline deadline);
  absl::StatusOr<v1::ShimStatus> WaitState(v1::Vm::State state, Deadline deadline);
  // The same for reports of migrations.
  absl::StatusOr<v1::SideReport> WaitReport(const std::function<bool(const v1::SideReport&)>& wanted,
                                            Deadline deadline);
  using ControlClient = shim::ControlClient;
  ControlClient& control() { return *control_; }
  absl::StatusOr<v1::ShimReply> Call(v1::ShimRequest request, Duration timeout = std::chrono::seconds(30),
                                     int fd = -1);

  pid_t shim_pid() const { return shim_->pid(); }
  void KillShim();
  // Waits for the shim to end by itself.
  absl::StatusOr<ExitStatus> WaitShimExit(Deadline deadline);
  std::string ShimLog() const;
  Console console;

 private:
  void ForgetEvents();

  std::string dir_, run_dir_, state_dir_, memory_path_;
  std::optional<StorageDaemon> disk_;
  std::optional<Process> shim_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<v1::ShimStatus> status_;    // guarded by mutex_
  std::optional<v1::SideReport> report_;    // guarded by mutex_
  bool closed_ = false;                     // guarded by mutex_
  std::unique_ptr<ControlClient> control_;  // its handlers use what is above
};

}  // namespace baton::test
