// QEMU that Baton starts itself and drives over QMP.
//
// What the migration relies on (QEMU docs/devel/migration, qapi/migration.json):
//  - `x-ignore-shared`: RAM in a shared named file is not in the stream; it is ours to move.
//  - `pause-before-switchover`: after `migrate` QEMU stops the guest and its vhost-user devices and waits in
//  state
//    pre-switchover. What it wrote until then is stage SETUP; after `migrate-continue` comes stage FINAL.
//  - `migrate_cancel` in any state before the end, and `cont` after it, bring the guest back at the source.
//  - QEMU at the destination is created with -S, so that loading never starts the guest; `cont` does.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "agent/vmm/driver.h"
#include "agent/vmm/qmp/qemu_command.h"
#include "agent/vmm/qmp/qmp_client.h"
#include "common/process.h"

namespace baton::vmm {

struct QemuLaunch {
  QemuCommand command;  // qmp_fd and reconnect_ms are set by Launch
  std::map<std::string, std::string> env;
  // QEMU's own stdout and stderr are appended here.
  std::string log_path;
};

// Thread rules as in VmmDriver. The VMM outlives this object: destroying the driver disconnects, and leaves
// QEMU as it is.
class QmpDriver final : public VmmDriver {
 public:
  // Starts QEMU in a session of its own, with the guest created but stopped (and waiting for a migration if
  // command.incoming). The device sockets must be listened at already. Errors name the file that is missing,
  // or quote what QEMU printed before it exited.
  static absl::StatusOr<std::unique_ptr<QmpDriver>> Launch(QemuLaunch launch, Deadline deadline);
  // Takes over a QEMU that an earlier process started with the same run_dir. NotFound if that process is
  // gone.
  static absl::StatusOr<std::unique_ptr<QmpDriver>> Adopt(const ProcessId& process,
                                                          const std::string& run_dir,
                                                          const std::string& log_path, Deadline deadline);
  ~QmpDriver() override;

  pid_t pid() const override { return id_.pid; }
  const ProcessId& process() const { return id_; }
  int exit_fd() const override { return pidfd_.get(); }
  std::string version() const override;
  absl::StatusOr<bool> IsRunning(Deadline deadline) override;
  absl::StatusOr<std::vector<Obstacle>> Obstacles(Deadline deadline) override;
  absl::StatusOr<UniqueFd> Freeze(Deadline deadline) override;
  int64_t frozen_at_ns() const override { return frozen_at_ns_; }
  absl::Status ContinueState(Deadline deadline) override;
  absl::Status ConfirmState(Deadline deadline) override;
  absl::Status Resume(Deadline deadline) override;
  absl::StatusOr<UniqueFd> BeginLoad(Deadline deadline) override;
  absl::Status FinishLoad(Deadline deadline) override;
  absl::Status Start(Deadline deadline) override;
  absl::Status Announce(Deadline deadline) override;
  absl::Status PowerDown(Deadline deadline) override;
  void Kill() override;

  // QEMU's state of the outgoing or incoming migration ("none", "pre-switchover", "completed" …).
  absl::StatusOr<std::string> MigrationState(Deadline deadline);
  // QEMU's run state ("running", "paused", "postmigrate", "inmigrate" …).
  absl::StatusOr<std::string> RunState(Deadline deadline);
  // How it ended, in words: the guest's wish, exit code or signal, and what QEMU printed last. Waits briefly
  // for an end that is under way; says so if it still runs. Any thread.
  std::string DescribeExit();
  // Kill() was called: its end is no news. Any thread.
  bool killed() const { return killed_; }
  // The end was wished for: the guest powered itself off, or PowerDown was asked. Any thread, after the end.
  bool GuestShutDown() const;

 private:
  QmpDriver(ProcessId id, UniqueFd pidfd, std::string log_path, uint64_t log_start);
  absl::Status Attach(const std::string& run_dir, Deadline deadline);
  absl::StatusOr<nlohmann::json> Execute(const std::string& command, const nlohmann::json& arguments,
                                         Deadline deadline, int fd = -1);
  // `status`, or what became of QEMU if it is gone.
  absl::Status Explain(const absl::Status& status);
  // Passes one end of a new socket pair to QEMU under `name`; returns the other.
  absl::StatusOr<UniqueFd> PassSocket(const std::string& name, bool qemu_writes, Deadline deadline);
  // Waits for one of QEMU's MIGRATION events; returns the state it names.
  absl::StatusOr<std::string> AwaitMigration(uint64_t after, std::initializer_list<const char*> wanted,
                                             Deadline deadline);
  // Waits until QEMU has put away what belonged to its last outgoing migration.
  absl::Status AwaitPutAway(Deadline deadline);
  std::string LogTail() const;
  std::string MigrationError(Deadline deadline);

  const ProcessId id_;
  const UniqueFd pidfd_;
  const std::string log_path_;
  const uint64_t log_start_;  // where this QEMU's output begins in the file
  std::unique_ptr<QmpClient> qmp_;
  uint64_t load_events_ = 0;
  uint64_t freeze_events_ = 0;  // those after it are of the last Freeze()
  int64_t frozen_at_ns_ = 0;
  std::atomic<bool> killed_ = false;
  std::mutex exit_mutex_;
  std::optional<Process> child_;          // guarded by exit_mutex_; absent if adopted
  std::optional<std::string> exit_text_;  // guarded by exit_mutex_
};

}  // namespace baton::vmm
