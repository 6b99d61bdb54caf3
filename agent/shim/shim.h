// baton-shim: the process. Ties the control socket, the VM and its migrations together.
//
// Threads: the main thread runs the event loop (control connections, signals, end of the VMM) and never
// blocks. Whatever waits (starting, inspecting, stopping) runs on a task thread, one at a time for the VM.
// Each mediator and QEMU's monitor have a thread that sleeps. A migration has its own.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "agent/shim/control_server.h"
#include "agent/shim/event_loop.h"
#include "agent/shim/migration_host.h"
#include "agent/shim/virtual_machine.h"
#include "baton/v1/shim.pb.h"
#include "common/status.h"

namespace baton::shim {

class Shim {
 public:
  // Reads `dir`/shim.conf, takes the journal's lock and listens at run_dir/shim.sock.
  static absl::StatusOr<std::unique_ptr<Shim>> Create(const std::string& dir);
  ~Shim();
  Shim(const Shim&) = delete;
  Shim& operator=(const Shim&) = delete;

  // Brings the VM up and serves it until the shim is retired, the VM was stopped, or SIGTERM. Returns the
  // exit code.
  int Run();

 private:
  using Respond = ControlServer::Respond;

  explicit Shim(ConfigStore config);
  absl::Status Init();

  // --- loop thread ---
  void OnRequest(v1::ShimRequest request, UniqueFd fd, Respond respond);
  void OnSignal(int signal);
  void OnVmmExit();
  void BringUp();
  void Inspect(const v1::InspectVmCommand& command, Respond respond);
  void Stop(const v1::StopVmCommand& command, Respond respond);
  void Retire(Respond respond);
  void SwapDevice(const v1::SwapDeviceCommand& command, Respond respond);
  void AbortIncoming(const v1::AbortIncomingCommand& command, Respond respond);
  void OnMigrationEnd(const std::string& migration_id);
  // After the VMM of an earlier shim was taken over: what the journal says is to be done now.
  absl::Status SettleAdopted();
  // Publishes the status to subscribers; many changes in a row become one event.
  void PublishStatus();
  void WatchVmm();
  v1::ShimStatus Status() const;
  std::vector<v1::ShimReply> Snapshot() const;

  // Runs `work` on the task thread, then `done` on the loop's. Refused (FailedPrecondition) while another
  // task runs.
  absl::Status StartTask(const std::string& what, std::function<void()> work, std::function<void()> done);
  // Ends the process's work; what Run returns. The VMM runs on, or has been ended before.
  void Exit(int code);

  ConfigStore config_;
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<VirtualMachine> vm_;
  std::shared_ptr<ControlServer> control_;
  std::unique_ptr<MigrationHost> migrations_;
  Respond abort_;    // waits for the incoming migration to be refused
  UniqueFd cancel_;  // eventfd: tells a task to hurry
  std::thread task_;
  std::string task_name_;  // empty: none
  // A stop that came while a task ran.
  std::function<void()> stop_after_task_;
  bool watching_vmm_ = false;
  bool vmm_ended_ = false;  // while a task ran; dealt with after it
  v1::Reason reason_ = v1::REASON_UNSPECIFIED;
  bool incoming_ready_ = false;
  bool exiting_ = false;
  int exit_code_ = 0;
  std::shared_ptr<std::atomic<bool>> publish_pending_;
};

}  // namespace baton::shim
