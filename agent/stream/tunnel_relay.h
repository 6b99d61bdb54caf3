// One connection of a tunnel: a program's socket on one side, a peer connection on the other, and what keeps
// many of them. Internal to the tunnel.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "agent/stream/channel.h"
#include "agent/stream/tunnel.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::stream {

// The exit's answer, before anything that the service sends: one byte, and after kRefused the reason (two
// bytes of length, little endian, and so many of text).
inline constexpr uint8_t kTunnelConnected = 1;
inline constexpr uint8_t kTunnelRefused = 2;
inline constexpr size_t kMaxTunnelReason = 1024;

absl::Status SendTunnelAnswer(Channel& channel, const absl::Status& connected, Deadline deadline);
// The exit's refusal, as an error with its words; a peer that sends anything else is PEER_PROTOCOL_ERROR.
absl::Status ReceiveTunnelAnswer(Channel& channel, Deadline deadline);

// Counters of one service, for any thread.
struct TunnelTraffic {
  std::atomic<uint64_t> to_peer{0}, from_peer{0}, opened{0}, broken{0};
  std::atomic<uint32_t> active{0};
};

// Relays both directions, each on a thread of its own, so that one that cannot get rid of its bytes holds up
// nothing else.
class TunnelRelay {
 public:
  // `transfer` holds for plaintext channels.
  TunnelRelay(std::unique_ptr<Channel> channel, TunnelTransfer transfer, TunnelTraffic& traffic)
      : channel_(std::move(channel)), traffic_(traffic), splice_(transfer == TunnelTransfer::kSplice) {}

  Channel& channel() { return *channel_; }
  // Relays until both directions have ended, on this thread and one more. `local` is non-blocking. OK if both
  // ended in good order (or by Stop()); otherwise why the peer connection broke.
  absl::Status Run(UniqueFd local);
  // Any thread, at any time: ends what waits, now and later.
  void Stop();

 private:
  absl::Status ToPeer();
  absl::Status FromPeer();
  absl::Status CopyToPeer();
  absl::Status CopyFromPeer();
  // At least one byte, and with TLS all that has arrived. `ended` is why there will be no more, if that is
  // known.
  absl::StatusOr<size_t> Collect(char* buffer, absl::Status& ended);
  // To the program; false if it has closed its connection.
  bool PassOn(const char* data, size_t size);
  absl::Status EndToPeer();
  // The program cannot be written to any more: it has closed its connection.
  void LocalGone();

  const std::unique_ptr<Channel> channel_;
  TunnelTraffic& traffic_;
  bool splice_;  // constant after the beginning of Run()
  std::mutex mutex_;
  bool stopped_ = false;  // guarded by mutex_
  UniqueFd local_;        // set once under mutex_, closed with the object
};

// The connections of one end: how many, their threads, their end. Thread-safe.
class TunnelConnections {
 public:
  TunnelConnections(size_t max, TunnelCallbacks callbacks) : max_(max), callbacks_(std::move(callbacks)) {}
  ~TunnelConnections() { Stop(); }

  // Room for one more connection. ResourceExhausted, or Cancelled after Stop(). Every OK is followed by
  // Release(), or by Relay(), which calls it.
  absl::Status Reserve();
  void Release();
  // Lets Stop() reach a relay that waits. False after Stop(): it was stopped.
  bool Add(const std::shared_ptr<TunnelRelay>& relay);
  void Remove(const std::shared_ptr<TunnelRelay>& relay);
  // Until there is no relay; false if there is one at the deadline.
  bool AwaitNone(Deadline deadline);
  // Runs `work` on a thread that Stop() waits for. False after Stop(): it does not run.
  bool Launch(std::function<void()> work);
  // Relays for as long as there is something to relay, and tells how it ended.
  void Relay(TunnelService service, const std::shared_ptr<TunnelRelay>& relay, UniqueFd local);
  // A connection of `service` came to nothing.
  void Broken(TunnelService service, const absl::Status& why);
  // Stops all relays and waits for all threads.
  void Stop();
  bool stopping() const;

  TunnelTraffic& traffic(TunnelService service) { return traffic_[static_cast<size_t>(service) - 1]; }
  TunnelCounts counts(TunnelService service) const;

 private:
  const size_t max_;
  const TunnelCallbacks callbacks_;
  std::array<TunnelTraffic, kTunnelServices.size()> traffic_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::set<std::shared_ptr<TunnelRelay>> relays_;  // guarded by mutex_, as all below
  size_t reserved_ = 0;
  size_t threads_ = 0;
  // The thread that ended last, joined by the next one that ends: so none is left behind, and nobody waits.
  std::thread ended_;
  bool stopping_ = false;
};

}  // namespace baton::stream
