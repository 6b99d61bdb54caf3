// baton-shim in the DOMAIN mode: the process that serves a libvirt domain. It carries the domain's migration,
// out of this host or to it, and may stand before its vhost-user back-ends. The VMM is libvirt's: nothing
// here starts or ends it, and it needs this process for its mediated devices only.
//
// The main thread runs the event loop and never blocks; each migration has a thread, and libvirt's calls run
// on threads of their connection.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "agent/shim/config_store.h"
#include "agent/shim/control_server.h"
#include "agent/shim/domain_devices.h"
#include "agent/shim/domain_incoming.h"
#include "agent/shim/domain_outgoing.h"
#include "agent/shim/domain_side.h"
#include "agent/shim/event_loop.h"
#include "baton/v1/shim.pb.h"
#include "common/status.h"

namespace baton::shim {

class DomainShim {
 public:
  // What can be done before there is a domain: libvirt's client library gets ready. Starts no thread.
  static void GetReady();
  // Reads `dir`/shim.conf, takes the journal's lock and listens at run_dir/shim.sock.
  static absl::StatusOr<std::unique_ptr<DomainShim>> Create(const std::string& dir);
  ~DomainShim();
  DomainShim(const DomainShim&) = delete;
  DomainShim& operator=(const DomainShim&) = delete;

  // Goes on with what a shim before this one had begun, and serves until it is retired or SIGTERM. Returns
  // the exit code.
  int Run();

 private:
  using Respond = ControlServer::Respond;

  explicit DomainShim(ConfigStore config) : config_(std::move(config)) {}
  absl::Status Init();

  // --- loop thread ---
  void Begin();
  void Connect(const v1::ShimConfig& config);
  // The connection of the call that lasts, if there is none yet.
  void OpenCaller(const std::string& uri);
  void OnRequest(v1::ShimRequest request, UniqueFd fd, Respond respond);
  void OnSignal(int signal);
  absl::Status StartOutgoing(const v1::StartOutgoingCommand& command);
  void AbortIncoming(const v1::AbortIncomingCommand& command, Respond respond);
  absl::Status Retire();
  void Acknowledge(const v1::ReportAck& ack);
  void StartDevices(const v1::ShimConfig& config);
  void PublishStatus();
  v1::ShimStatus Status() const;
  std::vector<v1::ShimReply> Snapshot() const;
  // The migration under way, or empty.
  std::string Active() const;
  void Exit(int code);

  // Any thread.
  void TakeReport(const v1::SideReport& report);
  std::vector<v1::SideReport> Reports() const;
  DomainOutgoingParts OutgoingParts();

  ConfigStore config_;
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<DomainJournal> journal_;
  std::shared_ptr<ControlServer> control_;
  bool exiting_ = false;
  int exit_code_ = 0;

  mutable std::mutex mutex_;
  // By migration and role; the newest of each, until a final one is acknowledged.
  std::map<std::pair<std::string, v1::Role>, v1::SideReport> reports_;  // guarded by mutex_

  std::unique_ptr<DomainDevices> devices_;  // null: none
  absl::Status devices_failed_;
  std::unique_ptr<vmm::LibvirtConnection> local_;
  std::unique_ptr<vmm::LibvirtConnection> caller_;  // null: nothing is to be moved from here
  std::unique_ptr<DomainOutgoing> outgoing_;
  std::unique_ptr<DomainIncoming> incoming_;
};

}  // namespace baton::shim
