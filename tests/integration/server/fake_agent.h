// A scripted agent over real gRPC: keeps one session with batond (dialling again for ever), answers commands
// from a small model of a host, and sends the reports that a test tells it to. No VM, no shim.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "baton/v1/agent_session.grpc.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::test {

// Thread-safe. The host's VMs, reports and verdicts survive its sessions, as they survive an agent's restart.
class FakeAgent {
 public:
  // Dials `target` in the background.
  FakeAgent(std::string name, std::shared_ptr<grpc::Channel> channel);
  ~FakeAgent();

  // A VM that runs here; told to batond if there is a session.
  void AddVm(const std::string& id, uint64_t epoch, v1::Vm::State state = v1::Vm::RUNNING);
  // The same for a libvirt domain of that name.
  void AddDomain(const std::string& name, const std::string& uuid, v1::Vm::State state = v1::Vm::RUNNING);
  void RemoveVm(const std::string& id);
  bool HasVm(const std::string& id) const;

  // Commands of this kind are received but not answered until Release.
  void Hold(v1::Command::BodyCase kind);
  void Release(v1::Command::BodyCase kind);
  // The next command of this kind is answered with this result.
  void AnswerNext(v1::Command::BodyCase kind, v1::CommandResult result);
  // Blocker, warnings …: what PrepareIncoming finds.
  void SetFindings(std::vector<v1::Finding> findings);
  // The agent goes away (its host's model stays) and comes back.
  void Pause();
  void Resume();
  // The agent hangs: its stream stays open, nothing is said or dialled any more.
  void Hang();
  void Wake();

  // Sends a report and keeps it for the next Hello until it is acknowledged (if done). Sets the sequence.
  void Report(v1::SideReport report);
  // Waits until a command of this kind has come `count` times in all. False after 60 s.
  bool AwaitCommand(v1::Command::BodyCase kind, int count = 1);
  v1::Command LastCommand(v1::Command::BodyCase kind) const;
  int CommandCount(v1::Command::BodyCase kind) const;
  bool AwaitSession(int count = 1);
  bool AwaitAck(const std::string& migration);
  // Status with which the last session ended.
  grpc::Status last_status() const;
  // What the console was sent.
  std::string console_input() const;
  void ConsoleOutput(const std::string& data, bool close = false);

 private:
  using Stream = grpc::ClientReaderWriter<v1::AgentMessage, v1::ServerMessage>;
  void Run();
  void RunSession();
  void Heartbeats(Duration interval, const Stream* stream);
  void OnCommand(const v1::Command& command);
  v1::CommandResult Carry(const v1::Command& command);  // with mutex_
  void Send(const v1::AgentMessage& message);           // with mutex_
  v1::Hello MakeHello() const;                          // with mutex_
  v1::Vm MakeVm(const std::string& id) const;           // with mutex_
  bool Await(const std::function<bool()>& condition);

  const std::string name_;
  const std::shared_ptr<grpc::Channel> channel_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, v1::Vm> vms_;
  std::map<std::pair<std::string, v1::Role>, v1::SideReport> reports_;
  std::map<std::string, v1::HandoverState> incoming_;  // migration → IDLE, REFUSED, OWNER
  std::set<std::string> outgoing_;
  std::vector<v1::Finding> findings_;
  std::map<v1::Command::BodyCase, std::vector<v1::Command>> commands_;
  std::map<v1::Command::BodyCase, std::vector<v1::Command>> held_;
  std::set<v1::Command::BodyCase> holding_;
  std::map<v1::Command::BodyCase, v1::CommandResult> scripted_;
  std::set<std::string> acked_;
  uint64_t console_stream_ = 0;
  std::string console_input_;
  uint64_t sequence_ = 0;
  uint64_t start_counter_ = 1;
  int sessions_ = 0;
  grpc::Status last_status_;
  bool paused_ = false, hanging_ = false, stopping_ = false;
  grpc::ClientContext* context_ = nullptr;
  Stream* stream_ = nullptr;
  std::thread thread_;
};

}  // namespace baton::test
