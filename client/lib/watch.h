// Watching migrations across breaks of the connection and restarts of batond.
#pragma once

#include <absl/status/status.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "baton/v1/migrations.pb.h"
#include "client/lib/client.h"
#include "client/lib/event_queue.h"

namespace baton::client {

// One thing that a watch has to tell.
struct WatchEvent {
  enum class Kind {
    kChange,        // `migration` and `revision`
    kDisconnected,  // the stream broke (`status` says how); it is being resumed
    kResumed,       // the stream is up again; nothing was missed and nothing comes twice
    kRestarted,     // the server no longer has the changes since the last revision: present states follow
    kEnded,         // the watch is over for good: `status` is the server's refusal
  };
  Kind kind = Kind::kChange;
  v1::Migration migration;
  int64_t revision = 0;
  absl::Status status;
};

// A resumable WatchMigrations call on a thread of its own. Delivers every change with a revision above the
// start exactly once and in order; reconnects for as long as it lives, with a backoff up to 2 s.
//
//   MigrationWatch watch(&client, "migrations/1", 0);
//   poll(watch.fd()) … while (auto event = watch.Next()) …
//
// Next() and fd() from one thread. The client must outlive the watch.
class MigrationWatch {
 public:
  // `name` empty: all migrations. `start_revision` 0: the present states first.
  MigrationWatch(Client* client, std::string name, int64_t start_revision);
  // Cancels the call and joins the thread.
  ~MigrationWatch();
  MigrationWatch(const MigrationWatch&) = delete;
  MigrationWatch& operator=(const MigrationWatch&) = delete;

  // Readable while events wait.
  int fd() const { return events_.fd(); }
  std::optional<WatchEvent> Next() { return events_.Pop(); }

 private:
  struct Call;
  void Run();
  // One stream from start to break. `connected`: as the user of the watch last heard it.
  absl::Status RunStream(bool* connected);
  // False once the watch is being destroyed.
  bool Pause(Duration duration);

  Client* const client_;
  const std::string name_;
  EventQueue<WatchEvent> events_;
  int64_t revision_;  // of the last change delivered; thread_ only

  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;       // guarded by mutex_
  std::unique_ptr<Call> call_;  // guarded by mutex_; the stream under way, if any
  std::thread thread_;
};

}  // namespace baton::client
