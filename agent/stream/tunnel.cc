#include "agent/stream/tunnel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cerrno>
#include <mutex>
#include <thread>

#include "absl/cleanup/cleanup.h"
#include "agent/stream/tunnel_relay.h"
#include "common/unix_socket.h"

namespace baton::stream {

static_assert(static_cast<uint32_t>(kTunnelServices.back()) == kMaxTunnelService);

const char* NameOf(TunnelService service) {
  switch (service) {
    case TunnelService::kLibvirt:
      return "libvirt";
    case TunnelService::kVmm:
      return "vmm";
    case TunnelService::kNbd:
      return "nbd";
  }
  return "unknown";
}

class TunnelEntrance::Impl {
 public:
  explicit Impl(TunnelEntranceOptions options)
      : options_(std::move(options)),
        connections_(options_.max_connections, options_.callbacks),
        stop_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~Impl() { Stop(); }

  absl::Status Start() {
    if (!stop_) return ErrnoError(errno, "eventfd");
    std::vector<UnixListener> listeners;
    for (const TunnelListen& listen : options_.listen) {
      ASSIGN_OR_RETURN(UnixListener listener, UnixListener::Listen(listen.path));
      // The owner first: it may not be widened for somebody else.
      if (::lchown(listen.path.c_str(), listen.uid, listen.gid) != 0 ||
          ::chmod(listen.path.c_str(), listen.mode) != 0)
        return ErrnoError(errno, listen.path);
      listeners.push_back(std::move(listener));
    }
    dialled_.resize(listeners.size());
    for (size_t i = 0; i < listeners.size(); ++i) {
      acceptors_.emplace_back(
          [this, i, listener = std::move(listeners[i])]() mutable { Accept(i, listener); });
    }
    return absl::OkStatus();
  }

  void Stop() {
    if (stop_) {
      const uint64_t one = 1;
      (void)!::write(stop_.get(), &one, sizeof one);
    }
    // Ends waits for the exit's answer as well.
    connections_.Stop();
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      for (const UniqueFd& socket : dialled_) {
        if (socket) ::shutdown(socket.get(), SHUT_RDWR);
      }
    }
    for (std::thread& acceptor : acceptors_) {
      if (acceptor.joinable()) acceptor.join();
    }
  }

  bool Drain(Deadline deadline) { return connections_.AwaitNone(deadline); }
  TunnelCounts counts(TunnelService service) const { return connections_.counts(service); }

 private:
  // How long an acceptor rests when the process has no descriptors left: the connection it cannot take stays
  // pending, and nothing tells when there is one.
  static constexpr int kRestMs = 100;
  // Between two attempts to reach the destination.
  static constexpr Duration kFirstPause = std::chrono::milliseconds(20);
  static constexpr Duration kLongestPause = std::chrono::milliseconds(500);

  // `index` is that of the listener.
  void Accept(size_t index, UnixListener& listener) {
    const TunnelService service = options_.listen[index].service;
    bool rest = false;
    for (;;) {
      pollfd waits[2] = {{stop_.get(), POLLIN, 0}, {listener.fd(), POLLIN, 0}};
      const int n = ::poll(waits, rest ? 1 : 2, rest ? kRestMs : -1);
      if (n < 0 && errno != EINTR) return;
      if (waits[0].revents != 0) return;
      rest = false;
      auto accepted = listener.Accept();
      if (!accepted.ok()) {
        connections_.Broken(service, accepted.status());
        rest = true;
      } else if (accepted->valid()) {
        if (absl::Status taken = Take(index, *std::move(accepted)); !taken.ok())
          connections_.Broken(service, taken);
      }
    }
  }

  // Returns when the exit has answered; until then no other connection of the service is taken.
  absl::Status Take(size_t index, UniqueFd local) {
    const TunnelService service = options_.listen[index].service;
    RETURN_IF_ERROR(connections_.Reserve());
    const Deadline deadline = Deadline::After(options_.connect_timeout);
    std::shared_ptr<TunnelRelay> relay;
    absl::Status connected = [&]() -> absl::Status {
      ASSIGN_OR_RETURN(auto channel, Dial(index, deadline));
      relay =
          std::make_shared<TunnelRelay>(std::move(channel), options_.transfer, connections_.traffic(service));
      if (!connections_.Add(relay)) return absl::CancelledError("the tunnel was stopped");
      return ReceiveTunnelAnswer(relay->channel(), deadline);
    }();
    auto program = std::make_shared<UniqueFd>(std::move(local));
    if (connected.ok() && connections_.Launch([this, service, relay, program] {
          connections_.Relay(service, relay, std::move(*program));
          connections_.Remove(relay);
        }))
      return absl::OkStatus();
    if (relay) connections_.Remove(relay);
    connections_.Release();
    return connected;
  }

  // Nothing of the program's has left yet, so nothing is sent twice.
  absl::StatusOr<std::unique_ptr<Channel>> Dial(size_t index, Deadline deadline) {
    const auto service = static_cast<uint32_t>(options_.listen[index].service);
    const Deadline patience = deadline.Min(Deadline::After(options_.agent_patience));
    Duration pause = kFirstPause;
    for (;; pause = std::min(2 * pause, kLongestPause)) {
      auto dialled =
          DialTunnel(options_.dial, service, deadline, [this, index](int fd) { NoteDialled(index, fd); });
      NoteDialled(index, -1);
      if (dialled.ok() || !absl::IsUnavailable(dialled.status()) || patience.Expired()) return dialled;
      pollfd stop{stop_.get(), POLLIN, 0};
      if (::poll(&stop, 1, patience.Min(Deadline::After(pause)).PollTimeoutMs()) != 0) return dialled;
    }
  }

  // Lets Stop() reach a socket that is being connected or is in its handshake; -1 when it is not any more.
  void NoteDialled(size_t index, int fd) {
    std::lock_guard lock(mutex_);
    dialled_[index].reset(fd < 0 ? -1 : ::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (stopping_ && fd >= 0) ::shutdown(fd, SHUT_RDWR);
  }

  const TunnelEntranceOptions options_;
  TunnelConnections connections_;
  const UniqueFd stop_;
  std::vector<std::thread> acceptors_;
  std::mutex mutex_;
  std::vector<UniqueFd> dialled_;  // by listener; guarded by mutex_
  bool stopping_ = false;          // guarded by mutex_
};

absl::StatusOr<std::unique_ptr<TunnelEntrance>> TunnelEntrance::Start(TunnelEntranceOptions options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<TunnelEntrance>(new TunnelEntrance(std::move(impl)));
}

TunnelEntrance::TunnelEntrance(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TunnelEntrance::~TunnelEntrance() = default;
bool TunnelEntrance::Drain(Deadline deadline) { return impl_->Drain(deadline); }
void TunnelEntrance::Stop() { impl_->Stop(); }
TunnelCounts TunnelEntrance::counts(TunnelService service) const { return impl_->counts(service); }

class TunnelExit::Impl {
 public:
  explicit Impl(TunnelExitOptions options)
      : options_(std::move(options)), connections_(options_.max_connections, options_.callbacks) {}

  void Accept(UniqueFd socket, uint32_t number, std::shared_ptr<const TlsContext> tls,
              const std::string& expected_host) {
    auto held = std::make_shared<UniqueFd>(std::move(socket));
    Take(number, [held, tls = std::move(tls), expected_host](Deadline deadline) {
      return AcceptChannel(std::move(*held), tls, expected_host, deadline);
    });
  }

  void Serve(std::unique_ptr<Channel> channel, uint32_t number) {
    auto held = std::make_shared<std::unique_ptr<Channel>>(std::move(channel));
    Take(number, [held](Deadline) -> absl::StatusOr<std::unique_ptr<Channel>> { return std::move(*held); });
  }

  void Stop() { connections_.Stop(); }
  TunnelCounts counts(TunnelService service) const { return connections_.counts(service); }

 private:
  using Opener = std::function<absl::StatusOr<std::unique_ptr<Channel>>(Deadline)>;

  void Take(uint32_t number, Opener open) {
    // The preamble was checked; a number that is unknown all the same is nobody's.
    if (number == 0 || number > kMaxTunnelService) return;
    const auto service = static_cast<TunnelService>(number);
    if (absl::Status room = connections_.Reserve(); !room.ok()) return connections_.Broken(service, room);
    const bool launched = connections_.Launch([this, service, open = std::move(open)] {
      if (absl::Status served = Connect(service, open); !served.ok()) connections_.Broken(service, served);
    });
    if (!launched) connections_.Release();
  }

  // In the room that was reserved, which it gives back.
  absl::Status Connect(TunnelService service, const Opener& open) {
    absl::Cleanup room = [this] { connections_.Release(); };
    const Deadline deadline = Deadline::After(options_.connect_timeout);
    ASSIGN_OR_RETURN(auto channel, open(deadline));
    auto relay =
        std::make_shared<TunnelRelay>(std::move(channel), options_.transfer, connections_.traffic(service));
    if (!connections_.Add(relay)) return absl::CancelledError("the tunnel was stopped");
    UniqueFd local;
    absl::Status connected = [&]() -> absl::Status {
      const auto path = options_.paths.find(service);
      if (path == options_.paths.end())
        return Error(absl::StatusCode::kFailedPrecondition, "{} is not served here", NameOf(service));
      ASSIGN_OR_RETURN(local, ConnectUnix(path->second, deadline));
      return absl::OkStatus();
    }();
    // What went wrong is told in any case, to both sides.
    absl::Status answered = SendTunnelAnswer(relay->channel(), connected, deadline);
    if (connected.ok() && answered.ok()) {
      std::move(room).Cancel();
      connections_.Relay(service, relay, std::move(local));
    }
    connections_.Remove(relay);
    return connected.ok() ? answered : Annotate(connected, "the service cannot be reached");
  }

  const TunnelExitOptions options_;
  TunnelConnections connections_;
};

TunnelExit::TunnelExit(TunnelExitOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
TunnelExit::~TunnelExit() { impl_->Stop(); }
void TunnelExit::Accept(UniqueFd socket, uint32_t service, std::shared_ptr<const TlsContext> tls,
                        const std::string& expected_host) {
  impl_->Accept(std::move(socket), service, std::move(tls), expected_host);
}
void TunnelExit::Serve(std::unique_ptr<Channel> channel, uint32_t service) {
  impl_->Serve(std::move(channel), service);
}
void TunnelExit::Stop() { impl_->Stop(); }
TunnelCounts TunnelExit::counts(TunnelService service) const { return impl_->counts(service); }

}  // namespace baton::stream
