// The QEMU Machine Protocol over a unix socket: one JSON object a line, commands with ids, events in between.
// What QEMU says is input like any other: line lengths, shapes and types are checked, an answer that makes no
// sense is an error, never an assumption.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>

#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::vmm {

// A string of an object; empty if it is no object, has no such key, or something else is there.
std::string StringAt(const nlohmann::json& object, const char* key);

struct QmpEvent {
  uint64_t sequence = 0;  // counts events of this connection, from 1
  std::string name;       // "MIGRATION", "STOP", "SHUTDOWN", …
  nlohmann::json data;    // an object, empty if the event has none
  // CLOCK_MONOTONIC when it happened, by QEMU's time stamp; when it arrived if that makes no sense.
  int64_t at_ns = 0;
};

// Thread-safe; commands of several threads overlap. One reader thread, which sleeps while QEMU is silent.
class QmpClient {
 public:
  // Longest line accepted from QEMU; its largest answers (query-qmp-schema) are far below.
  static constexpr size_t kMaxLine = 4u << 20;
  // Events kept for WaitEvent; older ones are dropped.
  static constexpr size_t kMaxEvents = 256;

  // Connects, reads the greeting, negotiates capabilities. NotFound or Unavailable if nobody listens;
  // Unavailable if QEMU closes the connection (it exits), FailedPrecondition if what listens there is no
  // QEMU.
  static absl::StatusOr<std::unique_ptr<QmpClient>> Connect(const std::string& path, Deadline deadline);
  ~QmpClient();
  QmpClient(const QmpClient&) = delete;
  QmpClient& operator=(const QmpClient&) = delete;

  // Runs one command and returns its "return" value. QEMU's own refusals become FailedPrecondition with the
  // command and QEMU's words; Unavailable if the connection ended. `fd` (not consumed) is attached for getfd.
  absl::StatusOr<nlohmann::json> Execute(const std::string& command, const nlohmann::json& arguments,
                                         Deadline deadline, int fd = -1);

  // Sequence number of the newest event so far: events after it are those still to come.
  uint64_t LastEvent() const;
  // The first event with sequence > `after` that `wanted` accepts; waits for it. Unavailable if the
  // connection ended.
  absl::StatusOr<QmpEvent> WaitEvent(uint64_t after, const std::function<bool(const QmpEvent&)>& wanted,
                                     Deadline deadline);
  // The newest event of that name, if it is still kept. Also after the connection ended.
  std::optional<QmpEvent> Newest(const std::string& name) const;
  // {7, 2, 22} of the greeting.
  struct Version {
    int major = 0;
    int minor = 0;
    int micro = 0;
  };
  Version version() const { return version_; }
  // The connection has ended. Waits for it, at most until the deadline.
  bool WaitClosed(Deadline deadline);

 private:
  explicit QmpClient(UniqueFd fd);
  absl::Status Negotiate(Deadline deadline);
  void Read();
  void HandleLine(const std::string& line);
  absl::Status SendLine(const std::string& line, Deadline deadline, int fd);

  struct Pending {
    std::optional<nlohmann::json> answer;
  };

  UniqueFd fd_;
  UniqueFd stop_;
  Version version_;
  std::mutex send_mutex_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t next_id_ = 1;                  // guarded by mutex_
  std::map<uint64_t, Pending*> calls_;    // guarded by mutex_
  std::deque<QmpEvent> events_;           // guarded by mutex_
  uint64_t event_count_ = 0;              // guarded by mutex_
  std::optional<absl::Status> greeting_;  // guarded by mutex_
  absl::Status broken_;                   // guarded by mutex_; not OK once the connection ended
  std::thread reader_;
};

}  // namespace baton::vmm
