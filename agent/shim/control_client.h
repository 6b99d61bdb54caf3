// The agent's (and the tests') end of a shim's control socket.
//
//   ControlClient::Handlers handlers{.on_event = …, .on_close = …};
//   ASSIGN_OR_RETURN(auto shim, ControlClient::Connect(path, std::move(handlers), Deadline::After(2s)));
//   v1::ShimRequest request;
//   request.mutable_status();
//   ASSIGN_OR_RETURN(v1::ShimReply reply, shim->Call(request, Deadline::After(2s)));
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "baton/v1/shim.pb.h"
#include "common/message_socket.h"

namespace baton::shim {

// Thread-safe: any thread may call; calls overlap (replies are matched by id). One reader thread per client
// runs the handlers; a handler must not call back into the client or destroy it.
class ControlClient {
 public:
  struct Handlers {
    // Events after Subscribe(), in order: event_status or event_report is set.
    std::function<void(const v1::ShimReply&)> on_event;
    // The connection ended (shim exit, protocol error); at most once, not called by Close() and destruction.
    std::function<void(const absl::Status&)> on_close;
  };

  static absl::StatusOr<std::unique_ptr<ControlClient>> Connect(const std::string& path, Handlers handlers,
                                                                Deadline deadline);
  // Closes; waits for a handler that runs.
  ~ControlClient();
  ControlClient(const ControlClient&) = delete;
  ControlClient& operator=(const ControlClient&) = delete;

  // Sends `request` (its id is set here) with `fd` attached, if not -1 (stays the caller's), and waits for
  // the reply. A reply with a code becomes a status with that code, message and reason. Unavailable if the
  // connection broke: the shim may or may not have acted. DeadlineExceeded likewise; a late reply is dropped.
  absl::StatusOr<v1::ShimReply> Call(v1::ShimRequest request, Deadline deadline, int fd = -1);
  // From now on events reach on_event; the current status and report come at once.
  absl::Status Subscribe(Deadline deadline);
  // Ends the connection; pending calls fail with Unavailable. Idempotent.
  void Close();
  bool closed() const;

 private:
  ControlClient(MessageSocket socket, Handlers handlers);
  void Read();

  struct Pending {
    std::optional<v1::ShimReply> reply;
    bool broken = false;
    std::condition_variable done;
  };

  MessageSocket socket_;
  const Handlers handlers_;
  UniqueFd stop_;  // eventfd that ends the reader
  std::mutex send_mutex_;
  mutable std::mutex mutex_;
  uint64_t next_id_ = 1;                // guarded by mutex_
  std::map<uint64_t, Pending*> calls_;  // guarded by mutex_
  absl::Status broken_;                 // guarded by mutex_
  bool stopping_ = false;               // guarded by mutex_
  std::thread reader_;
};

}  // namespace baton::shim
