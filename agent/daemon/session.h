// The agent's end of the session with batond: one bidirectional stream, dialled again and again with growing
// pauses.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "agent/daemon/agent_config.h"
#include "baton/v1/agent_session.grpc.pb.h"

namespace baton::daemon {

// Thread-safe. What is sent while no session is up is dropped: the next Hello says all of it. Console data is
// dropped, too, when batond does not take it fast enough.
class Session {
 public:
  // Called on the session's thread; must not wait for anything.
  struct Handlers {
    // The inventory, made anew for each session.
    std::function<v1::Hello()> hello;
    // `session` must be given back with the result.
    std::function<void(const v1::Command&, uint64_t session)> on_command;
    std::function<void(const v1::ReportAck&)> on_report_ack;
    std::function<void(const v1::ConsoleData&)> on_console;
    // The session is up (Welcome was heard), or is lost.
    std::function<void(bool up)> on_state;
  };
  // Never gives up; reconnects after 0.2 s at first, later after up to `max_backoff`, ± a quarter.
  Session(std::shared_ptr<grpc::Channel> channel, Handlers handlers,
          Duration max_backoff = std::chrono::seconds(5));
  // Ends the session and waits for a handler that runs.
  ~Session();

  void Send(const v1::Vm& vm);
  void SendGone(const std::string& vm, const std::string& message);
  void Send(const v1::SideReport& report);
  // Dropped unless the session in which the command came is still up: batond repeats what it needs in the
  // next one.
  void Send(const v1::CommandResult& result, uint64_t session);
  // Ends the session that is up, if any, and begins a new one with a Hello.
  void Renew();
  // False if it was dropped.
  bool Send(const v1::ConsoleData& data);

 private:
  void Run();
  // Until the channel is connected, for a few seconds at most.
  void AwaitConnection();
  // One session from dialling to its end.
  void RunOnce();
  void Write(grpc::ClientReaderWriter<v1::AgentMessage, v1::ServerMessage>& stream);
  void OnMessage(const v1::ServerMessage& message, uint64_t session);
  void Push(v1::AgentMessage message);

  const std::shared_ptr<grpc::Channel> channel_;
  const Handlers handlers_;
  const Duration max_backoff_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<v1::AgentMessage> outbox_;  // guarded by mutex_, as all below
  size_t console_bytes_ = 0;             // of console data in outbox_
  uint64_t session_ = 0;                 // number of the session that is up or being set up
  bool open_ = false;                    // outbox_ takes messages
  bool welcomed_ = false;
  bool stopping_ = false;
  Duration heartbeat_ = std::chrono::seconds(5);
  grpc::ClientContext* context_ = nullptr;  // of the running call
  std::string last_error_;                  // session thread only
  std::thread thread_;
};

}  // namespace baton::daemon
