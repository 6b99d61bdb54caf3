// The host's one port for connections of other hosts' shims: reads the preamble and hands the socket to the
// shim that it is meant for.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "agent/daemon/agent_config.h"
#include "agent/daemon/agent_metrics.h"
#include "agent/daemon/domain_manager.h"
#include "agent/daemon/task_queue.h"
#include "agent/daemon/vm_manager.h"
#include "agent/stream/tls.h"
#include "common/fd.h"
#include "common/unix_socket.h"

namespace baton::daemon {

// Security model: anybody who reaches the port may connect, send anything, or nothing. Until a preamble with
// a valid token was read, a connection costs one descriptor and 128 bytes, at most kMaxUnknown of them at a
// time and each for at most kPreambleTimeout. What is wrong is closed with one log line (at most a few a
// second) and counted.
class PeerPort {
 public:
  static constexpr size_t kMaxUnknown = 64;
  static constexpr Duration kPreambleTimeout = std::chrono::seconds(5);

  // Listens and starts to serve. AlreadyExists if the port is in use; the message names the field to change.
  static absl::StatusOr<std::unique_ptr<PeerPort>> Start(const AgentConfig& config, VmManager& vms,
                                                         DomainManager* domains, AgentMetrics& metrics,
                                                         TaskQueue& tasks);
  // Stops accepting; connections that were handed over are not touched. `tasks` must be stopped before.
  ~PeerPort();
  // The port really listened on; 0 for unix sockets.
  uint16_t port() const { return port_; }

 private:
  struct Unknown;  // a connection whose preamble has not been read whole
  PeerPort(const AgentConfig& config, VmManager& vms, DomainManager* domains, AgentMetrics& metrics,
           TaskQueue& tasks)
      : config_(config), vms_(vms), domains_(domains), metrics_(metrics), tasks_(tasks) {}
  absl::Status Listen();
  void Run();
  void Accept(std::vector<Unknown>& unknown);
  // True while more has to come.
  bool Read(Unknown& connection);
  // On a task thread: the preamble is complete.
  void Dispatch(UniqueFd socket, stream::PreambleBytes bytes, const std::string& remote);
  void AnswerVerdict(UniqueFd socket, const v1::EndedIncoming& ended, const std::string& remote);
  void Refuse(const std::string& remote, const std::string& outcome, const std::string& why);

  const AgentConfig& config_;
  VmManager& vms_;
  DomainManager* const domains_;  // null: no libvirt
  AgentMetrics& metrics_;
  TaskQueue& tasks_;
  UniqueFd listener_;
  UnixListener unix_listener_;
  uint16_t port_ = 0;
  UniqueFd stop_;  // eventfd
  std::atomic<int64_t> log_window_{0};
  std::atomic<int> logged_{0};
  std::thread thread_;
};

}  // namespace baton::daemon
