// The shim's control socket: any number of connections, each may ask and may subscribe. Losing one changes
// nothing.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/shim/event_loop.h"
#include "baton/v1/shim.pb.h"
#include "common/message_socket.h"
#include "common/unix_socket.h"

namespace baton::shim {

// Everything happens on the loop's thread, except Respond functions and Publish, which any thread may call.
class ControlServer : public std::enable_shared_from_this<ControlServer> {
 public:
  // Answers one request; to be called once. Answers to a connection that is gone are dropped. Must not be
  // called after the loop was destroyed.
  using Respond = std::function<void(absl::StatusOr<v1::ShimReply>)>;
  struct Handlers {
    // A request with the descriptors that came with it (at most one). Must not block.
    std::function<void(v1::ShimRequest, UniqueFd, Respond)> on_request;
    // Events that a new subscriber gets first.
    std::function<std::vector<v1::ShimReply>()> snapshot;
  };

  // Listens at `path`. AlreadyExists if another shim does.
  static absl::StatusOr<std::shared_ptr<ControlServer>> Start(EventLoop& loop, const std::string& path,
                                                              Handlers handlers);
  ~ControlServer();
  // Sends an event (its id is set to 0) to every subscriber. Any thread.
  void Publish(v1::ShimReply event);
  // Stops listening and closes every connection, after giving each what its socket still takes.
  void Close();

 private:
  struct Connection {
    MessageSocket socket;
    bool subscribed = false;
  };
  ControlServer(EventLoop& loop, UnixListener listener, Handlers handlers)
      : loop_(loop), listener_(std::move(listener)), handlers_(std::move(handlers)) {}
  void Accept();
  void OnReady(uint64_t id, uint32_t events);
  void Receive(uint64_t id);
  void Send(uint64_t id, const v1::ShimReply& reply);
  void Drop(uint64_t id, const absl::Status& why);

  EventLoop& loop_;
  UnixListener listener_;
  const Handlers handlers_;
  std::map<uint64_t, Connection> connections_;
  uint64_t next_id_ = 1;
};

}  // namespace baton::shim
