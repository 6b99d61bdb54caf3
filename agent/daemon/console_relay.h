// Serial consoles: QEMU's console sockets on one side, streams of batond's clients on the other.
#pragma once

#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "agent/daemon/agent_config.h"
#include "baton/v1/agent_session.pb.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::daemon {

// Thread-safe; one thread of its own. QEMU serves one client a socket, so all streams of a VM share one
// connection. A stream that is not read fast enough loses output (and is told how much) rather than stopping
// the guest.
class ConsoleRelay {
 public:
  // Takes data for batond; false if it cannot now. Called with the relay's lock held: must not call back.
  using Sink = std::function<bool(const v1::ConsoleData&)>;
  explicit ConsoleRelay(Sink sink);
  ~ConsoleRelay();

  // Opens a stream; its output begins with the tail of what the console said before. NotFound or Unavailable
  // if the VM has no console now.
  absl::Status Open(uint64_t stream, const std::string& vm, const VmPaths& paths);
  // Input for a stream, or its end. Input may overtake the command that opens its stream (commands are
  // carried out by another thread than data) and is kept for it.
  void OnData(const v1::ConsoleData& data);
  // The session with batond is gone, and all streams with it.
  void CloseAll();

 private:
  struct Line {
    UniqueFd fd;
    std::set<uint64_t> streams;
    std::string input;  // not yet taken by QEMU
  };
  struct Stream {
    std::string vm;
    uint64_t dropped = 0;  // bytes since the last that got through
  };
  void Run();
  void Wake();
  // All with mutex_ held.
  void ReadLine(const std::string& vm);
  void WriteLine(Line& line);
  void Deliver(uint64_t id, Stream& stream, const std::string& data);
  void CloseStream(uint64_t id, const std::string& error);
  void CloseLine(const std::string& vm, const std::string& error);

  const Sink sink_;
  std::mutex mutex_;
  std::map<std::string, Line> lines_;      // guarded by mutex_; by VM
  std::map<uint64_t, Stream> streams_;     // guarded by mutex_
  std::map<uint64_t, std::string> early_;  // guarded by mutex_; input of streams not open yet
  bool stopping_ = false;                  // guarded by mutex_
  UniqueFd wake_;                          // eventfd
  std::thread thread_;
};

}  // namespace baton::daemon
