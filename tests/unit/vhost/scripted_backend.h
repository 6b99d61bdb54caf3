// A vhost-user back-end of a few lines for tests of what is said to it and in which order: it answers every
// request, remembers it, and transfers device state well or badly. It moves no data.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "agent/vhost/socket.h"
#include "common/unix_socket.h"

namespace baton::vhost {

struct ScriptedBackendOptions {
  std::string socket;
  uint64_t features = 0;
  uint64_t protocol_features = 0;
  uint64_t queues = 1;
  std::string config;                 // of GET_CONFIG
  std::string state;                  // given in a save
  uint64_t check = 0;                 // the answer to CHECK_DEVICE_STATE
  uint64_t transfer = kTransferNoFd;  // the answer to SET_DEVICE_STATE_FD, without a descriptor of its own
  bool own_channel = false;           // gives a descriptor of its own instead
  bool regular_file = false;          // ... of a kind that nobody should take
  bool silent_save = false;           // keeps the pipe open and writes nothing
  bool hangs_up = false;              // when a transfer begins
  uint32_t speaks_at_kick = 0;        // says something unasked when it gets its n-th SET_VRING_KICK
  uint32_t leaves_at_kick = 0;        // hangs up then
  bool truncates_region = false;      // the in-flight region, when it is to stop without completing
};

class ScriptedBackend {
 public:
  // The request, and the ring it is about (or the first byte of its payload).
  using Heard = std::pair<Request, uint32_t>;

  explicit ScriptedBackend(ScriptedBackendOptions options);
  ~ScriptedBackend();
  // Everything heard on all connections.
  std::vector<Heard> heard() const;
  // Of `request` alone, in order.
  std::vector<uint32_t> Of(Request request) const;
  bool WaitFor(Request request, size_t count) const;
  int connections() const { return connections_; }
  // Each SET_VRING_BASE: the ring, and where it is to start.
  std::vector<std::pair<uint32_t, uint32_t>> bases() const;
  // What the last load brought.
  std::string loaded() const;
  // From the next connection on.
  void set_check(uint64_t check) { check_ = check; }

 private:
  void Loop();
  void Serve(Connection connection);
  absl::Status Answer(Connection& connection, WireMessage& m);
  absl::Status Transfer(Connection& connection, WireMessage& m);

  const ScriptedBackendOptions options_;
  UnixListener listen_;
  std::atomic<bool> quit_{false};
  std::atomic<int> connections_{0};
  std::atomic<uint64_t> check_;
  mutable std::mutex mutex_;
  std::vector<Heard> heard_;                          // guarded by mutex_
  std::vector<std::pair<uint32_t, uint32_t>> bases_;  // guarded by mutex_
  std::string loaded_;                                // guarded by mutex_
  std::vector<UniqueFd> kept_;                        // the thread's
  uint32_t kicks_ = 0;                                // the thread's: SET_VRING_KICK heard
  UniqueFd region_;                                   // the thread's: of SET_INFLIGHT_FD
  UniqueFd load_fd_;  // the thread's: read to its end when the front-end checks
  Connection channel_;
  std::thread thread_;
};

}  // namespace baton::vhost
