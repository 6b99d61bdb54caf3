// Other programs' connections inside a migration's own: unix sockets at both ends, peer connections between.
//
// libvirt and QEMU connect to sockets at the source (TunnelEntrance); each of their connections becomes one
// peer connection (PreambleKind::kTunnel, the service as its channel), and the destination (TunnelExit)
// connects it to the service's socket there. So everything that moves a libvirt domain takes the one peer
// port and, with TLS, its encryption. What the connections carry is never looked at.
//
// Order: the entrance takes a service's next connection only when the exit has answered for the one before.
// So the service's program sees connections in the order in which they were made; QEMU 7.2 takes the first of
// several for its main channel.
//
// An end is passed on as it is: a half-close as a half-close, a connection that broke as the end of both
// directions. A peer that is gone without a word is noticed by TCP (PrepareSocket).
//
// Security model: who may connect to the entrance is decided by owner and mode of its sockets. The exit
// connects to the paths that its owner configured; the peer chooses among them, by number, and nothing else.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/stream/channel.h"
#include "agent/stream/dial.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::stream {

// What a tunnelled connection is for: `channel` of its preamble.
enum class TunnelService : uint32_t {
  kLibvirt = 1,  // the daemon's control connection
  kVmm = 2,      // QEMU's migration stream, all of its channels
  kNbd = 3,      // QEMU's copying of disks
};
inline constexpr std::array<TunnelService, 3> kTunnelServices = {TunnelService::kLibvirt, TunnelService::kVmm,
                                                                 TunnelService::kNbd};
// "libvirt", "vmm", "nbd": also the names of the sockets in a tunnel's directory.
const char* NameOf(TunnelService service);

// What went through so far, of one service. `to_peer`: bytes that entered here; `from_peer`: bytes that came.
struct TunnelCounts {
  uint64_t to_peer = 0;
  uint64_t from_peer = 0;
  uint64_t opened = 0;  // connections that were relayed, ever
  uint64_t broken = 0;  // connections that came to no good end, or to nothing at all
  uint32_t active = 0;  // relayed now
};

// Called on threads of the tunnel; must not wait and must not destroy or stop the tunnel.
struct TunnelCallbacks {
  // A connection came to nothing (the peer or the service could not be reached) or broke; in words for
  // people. An orderly end is not told.
  std::function<void(TunnelService service, const absl::Status& why)> on_broken;
  // The last of the connections, of whichever service, has ended.
  std::function<void()> on_idle = nullptr;
};

inline constexpr size_t kMaxTunnelConnections = 128;

// How plaintext bytes get from one socket to the other.
enum class TunnelTransfer {
  // Through a buffer of ours. On loopback twice as fast as kSplice, at half of its processor time
  // (Linux 6.18:
  // 2.5 GB/s at 0.4 CPU-s/GB, both ends and both programs together): copying from a warm cache costs less
  // than passing
  // on pages one by one.
  kCopy,
  // Through a pipe with splice(2), pages and not copies of them: for NICs and memory with which copying is
  // what costs.
  kSplice,
};

// A socket of the entrance.
struct TunnelListen {
  TunnelService service = TunnelService::kLibvirt;
  // Made by Start(), removed by Stop(); its directory must exist.
  std::string path;
  // Who may connect: owner, group and mode of the socket. -1: those of this process.
  uid_t uid = static_cast<uid_t>(-1);
  gid_t gid = static_cast<gid_t>(-1);
  mode_t mode = 0600;
};

struct TunnelEntranceOptions {
  std::vector<TunnelListen> listen;
  // The destination, for each connection. `data_channels` is ignored.
  DialOptions dial;
  // From a program's connection to the exit's answer.
  Duration connect_timeout = std::chrono::seconds(15);
  // For how long of that a destination is dialled again that cannot be reached: its agent may be on its way
  // back, and the migrations of an agent that is restarted go on.
  Duration agent_patience = std::chrono::seconds(5);
  // Of all services together. One more is closed at once.
  size_t max_connections = kMaxTunnelConnections;
  TunnelTransfer transfer = TunnelTransfer::kCopy;
  TunnelCallbacks callbacks;
};

// The source's end. Thread-safe.
class TunnelEntrance {
 public:
  // Listens. AlreadyExists if another process listens at one of the paths; errors name the path.
  static absl::StatusOr<std::unique_ptr<TunnelEntrance>> Start(TunnelEntranceOptions options);
  // Stop().
  ~TunnelEntrance();
  TunnelEntrance(const TunnelEntrance&) = delete;
  TunnelEntrance& operator=(const TunnelEntrance&) = delete;

  // Waits until every connection has ended by itself; false if one has not by the deadline. Between that and
  // Stop() nothing is cut, so that the other end sees orderly ends only.
  bool Drain(Deadline deadline);
  // Removes the sockets and ends every connection, at both ends, with all of its threads; one that is being
  // dialled as well (looking up a name takes until connect_timeout at most). No callback is called after it.
  void Stop();
  TunnelCounts counts(TunnelService service) const;

 private:
  class Impl;
  explicit TunnelEntrance(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct TunnelExitOptions {
  // The socket of each service that may be reached. A service that is not listed is refused.
  std::map<TunnelService, std::string> paths;
  // For the service to take the connection, and for the TLS handshake.
  Duration connect_timeout = std::chrono::seconds(7);
  size_t max_connections = kMaxTunnelConnections;
  TunnelTransfer transfer = TunnelTransfer::kCopy;
  TunnelCallbacks callbacks;
};

// The destination's end. Thread-safe.
class TunnelExit {
 public:
  explicit TunnelExit(TunnelExitOptions options);
  // Stop().
  ~TunnelExit();
  TunnelExit(const TunnelExit&) = delete;
  TunnelExit& operator=(const TunnelExit&) = delete;

  // Takes a connection whose preamble has kind kTunnel and was checked; `service` is its channel. Returns at
  // once: TLS (where `tls` is given), connecting to the service and relaying happen on threads of the tunnel.
  // What goes wrong is told to the entrance as far as possible, and to on_broken.
  void Accept(UniqueFd socket, uint32_t service, std::shared_ptr<const TlsContext> tls,
              const std::string& expected_host = "");
  // The same for a channel that is established.
  void Serve(std::unique_ptr<Channel> channel, uint32_t service);
  // Ends every connection with its threads; later ones are closed. A service that is just being connected to
  // may take until connect_timeout. No callback is called after it.
  void Stop();
  TunnelCounts counts(TunnelService service) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace baton::stream
