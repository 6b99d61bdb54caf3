#include "agent/vmm/libvirt/connection.h"

#include <libvirt/virterror.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "agent/vmm/libvirt/job.h"
#include "common/fd.h"
#include "common/log.h"

namespace baton::vmm {
namespace {

// libvirt has one event loop a process, which must exist before the first connection and run as long as there
// is one (virEventRegisterDefaultImpl). It cannot be unregistered, so its thread is never joined.
void StartEventLoop() {
  static std::once_flag once;
  std::call_once(once, [] {
    // Errors are returned, not printed: without a handler libvirt writes them to stderr.
    virSetErrorFunc(nullptr, [](void*, virErrorPtr) {});
    if (virEventRegisterDefaultImpl() != 0) {
      LOG_ERROR("libvirt: its event loop cannot be set up: {}", Message(LibvirtError("")));
      return;
    }
    std::thread([] {
      for (;;) {
        if (virEventRunDefaultImpl() != 0) LOG_WARN("libvirt: event loop: {}", Message(LibvirtError("")));
      }
    }).detach();
  });
}

// The directory in which the daemon's socket appears (libvirt's docs/uri: `socket` parameter, else the
// defaults of system and session).
std::string SocketDirectory(const std::string& uri) {
  if (size_t at = uri.find("socket="); at != std::string::npos) {
    std::string path = uri.substr(at + 7);
    path = path.substr(0, path.find('&'));
    return std::filesystem::path(path).parent_path();
  }
  if (uri.find("/session") != std::string::npos) {
    const char* runtime = std::getenv("XDG_RUNTIME_DIR");
    return runtime ? std::string(runtime) + "/libvirt" : "";
  }
  return "/run/libvirt";
}

absl::StatusCode CodeOf(int error) {
  switch (error) {
    case VIR_ERR_NO_DOMAIN:
      return absl::StatusCode::kNotFound;
    case VIR_ERR_NO_CONNECT:
    case VIR_ERR_INVALID_CONN:
    case VIR_ERR_SYSTEM_ERROR:
    case VIR_ERR_RPC:
      return absl::StatusCode::kUnavailable;
    case VIR_ERR_AUTH_FAILED:
    case VIR_ERR_AUTH_UNAVAILABLE:
    case VIR_ERR_AUTH_CANCELLED:
    case VIR_ERR_ACCESS_DENIED:
    case VIR_ERR_OPERATION_DENIED:
      return absl::StatusCode::kPermissionDenied;
    case VIR_ERR_OPERATION_TIMEOUT:
    case VIR_ERR_AGENT_UNRESPONSIVE:
      return absl::StatusCode::kDeadlineExceeded;
    case VIR_ERR_NO_SUPPORT:
    case VIR_ERR_ARGUMENT_UNSUPPORTED:
    case VIR_ERR_CONFIG_UNSUPPORTED:
      return absl::StatusCode::kUnimplemented;
    case VIR_ERR_XML_ERROR:
    case VIR_ERR_XML_DETAIL:
    case VIR_ERR_INVALID_ARG:
      return absl::StatusCode::kInvalidArgument;
    case VIR_ERR_NO_MEMORY:
      return absl::StatusCode::kResourceExhausted;
    case VIR_ERR_OPERATION_ABORTED:
      return absl::StatusCode::kAborted;
    default:
      return absl::StatusCode::kFailedPrecondition;
  }
}

}  // namespace

absl::Status LibvirtError(const std::string& what) {
  const virError* error = virGetLastError();
  std::string text = error && error->message ? error->message : "libvirt gave no reason";
  return absl::Status(error ? CodeOf(error->code) : absl::StatusCode::kUnknown,
                      what.empty() ? text : fmt::format("{}: {}", what, text));
}

std::string UuidOf(virDomainPtr domain) {
  char text[VIR_UUID_STRING_BUFLEN] = "";
  return virDomainGetUUIDString(domain, text) == 0 ? text : "";
}

class LibvirtConnection::Impl : public std::enable_shared_from_this<LibvirtConnection::Impl> {
 public:
  Impl(LibvirtOptions options, LibvirtCallbacks callbacks)
      : options_(std::move(options)),
        callbacks_(std::move(callbacks)),
        wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        inotify_(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK)) {}

  void Run() {
    keeper_ = std::thread([this] { Keep(); });
  }

  void Stop() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    {
      // Waits for a callback that runs; none begins after this.
      std::lock_guard lock(callback_mutex_);
      muted_ = true;
    }
    Wake();
    keeper_.join();
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPatience, [this] { return calls_ == 0; });
    if (calls_ > 0) LOG_WARN("libvirt {}: {} calls hang and are left behind", options_.uri, calls_);
  }

  const std::string& uri() const { return options_.uri; }
  bool connected() const {
    std::lock_guard lock(mutex_);
    return connection_ != nullptr;
  }
  std::string trouble() const {
    std::lock_guard lock(mutex_);
    return connection_ ? "" : trouble_;
  }

  absl::Status Call(const std::string& what, std::function<absl::Status(virConnectPtr)> call,
                    Deadline deadline) {
    ASSIGN_OR_RETURN(virConnectPtr connection, Hold());
    return Detached(
        what,
        [connection, call = std::move(call)] {
          absl::Status status = call(connection);
          virConnectClose(connection);
          return status;
        },
        [connection] { virConnectClose(connection); }, deadline);
  }

  absl::Status Begin(const std::string& what, std::function<absl::Status(virConnectPtr)> call,
                     std::function<void(absl::Status)> done) {
    ASSIGN_OR_RETURN(virConnectPtr connection, Hold());
    if (absl::Status taken = TakePlace(what); !taken.ok()) {
      virConnectClose(connection);
      return taken;
    }
    std::thread([self = shared_from_this(), connection, call = std::move(call), done = std::move(done)] {
      absl::Status status = call(connection);
      virConnectClose(connection);
      done(std::move(status));
      self->GivePlaceBack();
    }).detach();
    return absl::OkStatus();
  }

 private:
  // A reference to the connection, to be given back with virConnectClose.
  absl::StatusOr<virConnectPtr> Hold() {
    std::lock_guard lock(mutex_);
    if (!connection_)
      return Error(absl::StatusCode::kUnavailable, "libvirt {}: {}", options_.uri,
                   trouble_.empty() ? "not connected yet" : trouble_);
    virConnectRef(connection_);
    return connection_;
  }

  absl::Status TakePlace(const std::string& what) {
    std::lock_guard lock(mutex_);
    if (calls_ >= options_.max_calls)
      return Error(absl::StatusCode::kResourceExhausted,
                   "libvirt {}: {}: {} calls have not returned; is its daemon or a QEMU monitor stuck?",
                   options_.uri, what, calls_);
    ++calls_;
    return absl::OkStatus();
  }

  void GivePlaceBack() {
    std::lock_guard lock(mutex_);
    --calls_;
    changed_.notify_all();
  }

  // For calls that are about to end when the connection goes.
  static constexpr auto kPatience = std::chrono::seconds(2);

  struct Pending {
    std::mutex mutex;
    std::condition_variable changed;
    std::optional<absl::Status> status;
  };

  // Runs `work` on a thread that nobody has to wait for; `refused` instead when there are too many.
  absl::Status Detached(const std::string& what, std::function<absl::Status()> work,
                        const std::function<void()>& refused, Deadline deadline) {
    if (absl::Status taken = TakePlace(what); !taken.ok()) {
      refused();
      return taken;
    }
    auto pending = std::make_shared<Pending>();
    std::thread([self = shared_from_this(), pending, work = std::move(work)] {
      absl::Status status = work();
      {
        std::lock_guard lock(pending->mutex);
        pending->status = std::move(status);
      }
      pending->changed.notify_all();
      self->GivePlaceBack();
    }).detach();
    std::unique_lock lock(pending->mutex);
    if (!pending->changed.wait_until(lock, deadline.when(), [&] { return pending->status.has_value(); }))
      return Error(absl::StatusCode::kDeadlineExceeded, "libvirt {}: {} did not return in time", options_.uri,
                   what);
    return *pending->status;
  }

  void Wake() {
    uint64_t one = 1;
    if (::write(wake_.get(), &one, sizeof one) < 0) LOG_DEBUG("libvirt: wake-up: {}", errno);
  }

  bool stopping() const {
    std::lock_guard lock(mutex_);
    return stopping_;
  }

  // The keeper thread: connects, waits for the end of the connection, connects again.
  void Keep() {
    Duration pause = options_.backoff;
    while (!stopping()) {
      absl::Status opened = Open();
      if (opened.ok()) {
        pause = options_.backoff;
        TellState(true);
        AwaitEnd();
        Close();
        TellState(false);
        continue;
      }
      {
        std::lock_guard lock(mutex_);
        if (trouble_ != Message(opened)) LOG_WARN("{}", Message(opened));
        trouble_ = Message(opened);
      }
      TellState(false);
      Pause(pause);
      pause = std::min(2 * pause, options_.backoff_max);
    }
    Close();
  }

  void TellState(bool up) {
    const std::string why = up ? "" : trouble();
    std::lock_guard lock(callback_mutex_);
    if (!muted_) callbacks_.on_state(up, why);
  }

  // Until `pause` has passed, something appears beside the daemon's socket, or the end.
  void Pause(Duration pause) {
    const std::string directory = SocketDirectory(options_.uri);
    if (!directory.empty())
      ::inotify_add_watch(inotify_.get(), directory.c_str(), IN_CREATE | IN_MOVED_TO | IN_ATTRIB);
    pollfd p[2] = {{wake_.get(), POLLIN, 0}, {inotify_.get(), POLLIN, 0}};
    ::poll(p, 2, static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(pause).count()));
    char drain[4096];
    while (::read(inotify_.get(), drain, sizeof drain) > 0) {
    }
  }

  absl::Status Open() {
    auto opened = std::make_shared<std::atomic<virConnectPtr>>(nullptr);
    auto settled = std::make_shared<std::atomic<bool>>(false);
    absl::Status status = Detached(
        "connecting",
        [opened, settled, uri = options_.uri] {
          virConnectPtr c = virConnectOpen(uri.c_str());
          if (!c) return LibvirtError(fmt::format("libvirt {}", uri));
          opened->store(c);
          if (settled->exchange(true)) virConnectClose(c);
          return absl::OkStatus();
        },
        [] {}, Deadline::After(options_.connect_timeout));
    if (!status.ok()) {
      // A connection that comes after its deadline: whoever settles second closes it.
      if (settled->exchange(true) && opened->load()) virConnectClose(opened->load());
      return status;
    }
    virConnectPtr c = opened->load();
    RETURN_IF_ERROR(Subscribe(c));
    std::lock_guard lock(mutex_);
    connection_ = c;
    trouble_.clear();
    return absl::OkStatus();
  }

  // Everything on the daemon's side of a new connection: its end, pings, events.
  absl::Status Subscribe(virConnectPtr c) {
    auto fail = [&](const std::string& what) {
      absl::Status status = LibvirtError(fmt::format("libvirt {}: {}", options_.uri, what));
      virConnectClose(c);
      return status;
    };
    closed_ = false;
    // A reference a registration, given back by libvirt's free callback.
    auto hold = [this] { return static_cast<void*>(new std::shared_ptr<Impl>(shared_from_this())); };
    const virFreeCallback release = [](void* opaque) { delete static_cast<std::shared_ptr<Impl>*>(opaque); };
    if (virConnectRegisterCloseCallback(c, &Impl::OnClose, hold(), release) != 0)
      return fail("its end cannot be watched");
    const int seconds = std::max<int>(
        1,
        static_cast<int>(std::chrono::duration_cast<std::chrono::seconds>(options_.keepalive).count()) / 3);
    if (virConnectSetKeepAlive(c, seconds, 2) < 0) return fail("keepalive");
    struct Wanted {
      int id;
      virConnectDomainEventGenericCallback callback;
    };
    // Those of the fewest first.
    constexpr size_t kOfLifecycle = 1, kOfMigration = 3;
    using Events = LibvirtOptions::Events;
    const Wanted wanted[] = {
        {VIR_DOMAIN_EVENT_ID_LIFECYCLE, VIR_DOMAIN_EVENT_CALLBACK(&Impl::OnLifecycle)},
        {VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, VIR_DOMAIN_EVENT_CALLBACK(&Impl::OnIteration)},
        {VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, VIR_DOMAIN_EVENT_CALLBACK(&Impl::OnJobCompleted)},
        {VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, VIR_DOMAIN_EVENT_CALLBACK(&Impl::OnDevice)},
        {VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, VIR_DOMAIN_EVENT_CALLBACK(&Impl::OnDevice)},
        {VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE, VIR_DOMAIN_EVENT_CALLBACK(&Impl::OnBalloon)},
    };
    const size_t count = options_.events == Events::kNone        ? 0
                         : options_.events == Events::kLifecycle ? kOfLifecycle
                         : options_.events == Events::kMigration ? kOfMigration
                                                                 : std::size(wanted);
    registrations_.clear();
    for (const Wanted& w : std::span(wanted).first(count)) {
      const int id = virConnectDomainEventRegisterAny(c, nullptr, w.id, w.callback, hold(), release);
      if (id < 0) return fail(fmt::format("event {}", w.id));
      registrations_.push_back(id);
    }
    return absl::OkStatus();
  }

  void AwaitEnd() {
    for (;;) {
      pollfd p{wake_.get(), POLLIN, 0};
      ::poll(&p, 1, -1);
      uint64_t count = 0;
      if (::read(wake_.get(), &count, sizeof count) < 0 && errno != EAGAIN) LOG_DEBUG("libvirt: {}", errno);
      if (stopping() || closed_) return;
    }
  }

  void Close() {
    virConnectPtr c = nullptr;
    {
      std::lock_guard lock(mutex_);
      c = std::exchange(connection_, nullptr);
    }
    if (!c) return;
    // These talk to the daemon, which may hang: not on this thread.
    (void)Detached(
        "leaving",
        [c, ids = registrations_, dead = closed_.load()] {
          if (!dead) {
            for (int id : ids) virConnectDomainEventDeregisterAny(c, id);
            virConnectUnregisterCloseCallback(c, &Impl::OnClose);
          }
          virConnectClose(c);
          return absl::OkStatus();
        },
        [] {}, Deadline::After(kPatience));
  }

  static void OnClose(virConnectPtr, int reason, void* opaque) { Self(opaque).Closed(reason); }

  void Closed(int reason) {
    static constexpr const char* kWhy[] = {"its connection broke",
                                           "the daemon ended or closed the connection",
                                           "the daemon does not answer", "the connection was closed"};
    {
      std::lock_guard lock(mutex_);
      trouble_ =
          fmt::format("libvirt {}: {}", options_.uri, reason >= 0 && reason < 4 ? kWhy[reason] : "lost");
    }
    closed_ = true;
    Wake();
  }

  static Impl& Self(void* opaque) { return **static_cast<std::shared_ptr<Impl>*>(opaque); }

  void Tell(virDomainPtr domain, DomainEvent::Kind kind, int event = 0, int detail = 0,
            std::shared_ptr<const JobFigures> job = nullptr) {
    DomainEvent e;
    e.kind = kind;
    e.uuid = UuidOf(domain);
    e.name = virDomainGetName(domain);
    e.event = event;
    e.detail = detail;
    e.job = std::move(job);
    std::lock_guard lock(callback_mutex_);
    if (!muted_) callbacks_.on_event(e);
  }

  static void OnLifecycle(virConnectPtr, virDomainPtr domain, int event, int detail, void* opaque) {
    const bool definition = event == VIR_DOMAIN_EVENT_DEFINED || event == VIR_DOMAIN_EVENT_UNDEFINED;
    Self(opaque).Tell(domain, definition ? DomainEvent::Kind::kDefinition : DomainEvent::Kind::kLifecycle,
                      event, detail);
  }
  static void OnDevice(virConnectPtr, virDomainPtr domain, const char*, void* opaque) {
    Self(opaque).Tell(domain, DomainEvent::Kind::kDevices);
  }
  static void OnIteration(virConnectPtr, virDomainPtr domain, int iteration, void* opaque) {
    Self(opaque).Tell(domain, DomainEvent::Kind::kMigrationIteration, iteration);
  }
  static void OnJobCompleted(virConnectPtr, virDomainPtr domain, virTypedParameterPtr params, int count,
                             void* opaque) {
    auto job = std::make_shared<const JobFigures>(ReadJobFigures(VIR_DOMAIN_JOB_COMPLETED, params, count));
    Self(opaque).Tell(domain, DomainEvent::Kind::kJobCompleted, 0, 0, std::move(job));
  }
  static void OnBalloon(virConnectPtr, virDomainPtr domain, unsigned long long, void* opaque) {
    Self(opaque).Tell(domain, DomainEvent::Kind::kBalloon);
  }

  const LibvirtOptions options_;
  const LibvirtCallbacks callbacks_;
  const UniqueFd wake_, inotify_;
  std::thread keeper_;
  std::vector<int> registrations_;  // keeper thread
  std::atomic<bool> closed_ = false;
  std::mutex callback_mutex_;
  bool muted_ = false;  // guarded by callback_mutex_
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  virConnectPtr connection_ = nullptr;  // guarded by mutex_, as all below
  std::string trouble_;
  bool stopping_ = false;
  int calls_ = 0;
};

std::unique_ptr<LibvirtConnection> LibvirtConnection::Start(LibvirtOptions options,
                                                            LibvirtCallbacks callbacks) {
  StartEventLoop();
  auto impl = std::make_shared<Impl>(std::move(options), std::move(callbacks));
  impl->Run();
  return std::unique_ptr<LibvirtConnection>(new LibvirtConnection(std::move(impl)));
}

LibvirtConnection::LibvirtConnection(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
LibvirtConnection::~LibvirtConnection() { impl_->Stop(); }
const std::string& LibvirtConnection::uri() const { return impl_->uri(); }
bool LibvirtConnection::connected() const { return impl_->connected(); }
std::string LibvirtConnection::trouble() const { return impl_->trouble(); }
absl::Status LibvirtConnection::Begin(const std::string& what,
                                      std::function<absl::Status(virConnectPtr)> call,
                                      std::function<void(absl::Status)> done) {
  return impl_->Begin(what, std::move(call), std::move(done));
}
absl::Status LibvirtConnection::Call(const std::string& what, std::function<absl::Status(virConnectPtr)> call,
                                     Deadline deadline) {
  return impl_->Call(what, std::move(call), deadline);
}

}  // namespace baton::vmm
