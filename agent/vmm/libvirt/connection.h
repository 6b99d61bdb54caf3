// A connection to a libvirt daemon that comes back by itself, and whose calls are bounded in time.
//
// A libvirt call may hang for as long as a QEMU monitor or a back-end does (virConnectSetKeepAlive only
// notices a daemon that is silent altogether). Every call therefore runs on a thread of its own pool, and the
// caller leaves at its deadline; a call that was left behind ends when libvirt lets it, and until then counts
// against `max_calls`.
#pragma once

#include <libvirt/libvirt.h>

#include <functional>
#include <memory>
#include <string>

#include "common/clock.h"
#include "common/status.h"

namespace baton::vmm {

// libvirt's last error on this thread, with a code that says what to do: no such domain → NotFound,
// connection gone → Unavailable, refused by its access control → PermissionDenied, operation invalid now →
// FailedPrecondition.
absl::Status LibvirtError(const std::string& what);

// A counted reference to a domain, released at destruction.
struct DomainDeleter {
  void operator()(virDomainPtr domain) const { virDomainFree(domain); }
};
using DomainPtr = std::unique_ptr<virDomain, DomainDeleter>;

// The canonical text of a domain's UUID, or empty.
std::string UuidOf(virDomainPtr domain);

struct LibvirtOptions {
  std::string uri = "qemu:///system";
  // Of one attempt to connect.
  Duration connect_timeout = std::chrono::seconds(10);
  // Between attempts: from the first to the last, doubling. The daemon's socket appearing ends the pause at
  // once.
  Duration backoff = std::chrono::milliseconds(100);
  Duration backoff_max = std::chrono::seconds(5);
  // A daemon that answers no ping for this long is taken for dead.
  Duration keepalive = std::chrono::seconds(15);
  // Which events are told of: each kind of libvirt's is a question more when connecting and when leaving, and
  // messages more at the moment at which a migration switches over. Of kLifecycle kDefinition is a part.
  enum class Events { kAll, kMigration, kLifecycle, kNone };
  Events events = Events::kAll;
  // Calls at one time, those that hang included.
  int max_calls = 16;
};

struct JobFigures;

// What happened to a domain. Only the kinds after which something is to be read again are told apart.
struct DomainEvent {
  enum class Kind { kLifecycle, kDefinition, kDevices, kMigrationIteration, kJobCompleted, kBalloon };
  Kind kind = Kind::kLifecycle;
  std::string uuid, name;
  // kLifecycle: virDomainEventType and its detail. kMigrationIteration: the iteration.
  int event = 0, detail = 0;
  std::shared_ptr<const JobFigures> job;  // kJobCompleted
};

// Called on libvirt's event thread or on the connection's own; must not wait, and must not call back into the
// connection.
struct LibvirtCallbacks {
  // Connected (why is empty), or an attempt failed or the connection was lost, with the reason. Every `true`
  // is a fresh start: read everything again.
  std::function<void(bool up, const std::string& why)> on_state;
  std::function<void(const DomainEvent&)> on_event;
};

// Thread-safe.
class LibvirtConnection {
 public:
  // Begins to connect and goes on until destruction. Never fails: a daemon that is absent may come.
  static std::unique_ptr<LibvirtConnection> Start(LibvirtOptions options, LibvirtCallbacks callbacks);
  // Leaves the daemon. Waits for calls that end; those that hang go on behind, and touch nothing of this
  // object.
  ~LibvirtConnection();
  LibvirtConnection(const LibvirtConnection&) = delete;
  LibvirtConnection& operator=(const LibvirtConnection&) = delete;

  const std::string& uri() const;
  bool connected() const;
  // Why it is not connected, in words for people; empty if it is.
  std::string trouble() const;

  // Runs `call` with the connection on another thread and waits for it. Unavailable without a connection,
  // DeadlineExceeded when it has not ended in time: it may still take effect. `call` must own what it uses,
  // since it may outlive the caller. ResourceExhausted when max_calls hang.
  absl::Status Call(const std::string& what, std::function<absl::Status(virConnectPtr)> call,
                    Deadline deadline);
  // The same for a call that may last for hours: returns at once, and `done` hears the outcome on the call's
  // thread, once, also after this object is gone. An error that is returned comes instead of `done`.
  //
  // One that does last should have a connection to itself. Where one thread waits for the answer to a long
  // call, libvirt's client sends what others ask on the same connection by waking that thread, and a wake-up
  // between two of its waits is lost (virNetClientIOEventLoop, libvirt 9.0): the question is not sent before
  // the daemon says something else.
  absl::Status Begin(const std::string& what, std::function<absl::Status(virConnectPtr)> call,
                     std::function<void(absl::Status)> done);

 private:
  class Impl;
  explicit LibvirtConnection(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

// Call() with a result.
template <typename T>
absl::StatusOr<T> CallFor(LibvirtConnection& connection, const std::string& what,
                          std::function<absl::StatusOr<T>(virConnectPtr)> call, Deadline deadline) {
  auto result = std::make_shared<absl::StatusOr<T>>(absl::InternalError("no result"));
  RETURN_IF_ERROR(connection.Call(
      what,
      [result, call = std::move(call)](virConnectPtr c) {
        *result = call(c);
        return result->status();
      },
      deadline));
  return std::move(*result);
}

}  // namespace baton::vmm
