// Channel 0 of a migration with a thread that keeps it alive: receives, answers and sends clock probes, knows
// the offset between the hosts' clocks, and tells when the peer is gone.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "agent/stream/message_channel.h"
#include "baton/v1/peer.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::migration {

struct ControlLinkOptions {
  // A probe is sent this often; a peer that says nothing for `silence` is lost.
  Duration ping_interval = std::chrono::seconds(1);
  Duration silence = std::chrono::seconds(10);
};

// All methods are for any thread. One thread of its own from construction to destruction.
class ControlLink {
 public:
  using Message = v1::PeerMessage;

  // `on_event` is called from the link's thread after a message was queued and once when the link is lost;
  // it must not destroy the link.
  ControlLink(std::unique_ptr<stream::MessageChannel> channel, ControlLinkOptions options,
              std::function<void()> on_event = nullptr);
  ~ControlLink();
  ControlLink(const ControlLink&) = delete;
  ControlLink& operator=(const ControlLink&) = delete;

  absl::Status Send(const Message& message, Deadline deadline);
  // The next queued message; nullopt if there is none now. Messages that arrived before the link was lost are
  // still delivered.
  std::optional<Message> TryNext();
  // Waits for the next message. DeadlineExceeded, or lost_status() once the link is lost and the queue empty.
  absl::StatusOr<Message> Next(Deadline deadline);
  // OK as long as the peer is there; then Unavailable with Reason PEER_CONNECTION_FAILED, or what the peer
  // did wrong with PEER_PROTOCOL_ERROR.
  absl::Status lost_status() const;
  // Waits until the peer has closed, or the link is lost otherwise; false at the deadline.
  bool WaitLost(Deadline deadline);
  // The peer's CLOCK_MONOTONIC minus ours, nanoseconds, from the probe with the shortest way so far; nullopt
  // before the first answer.
  std::optional<int64_t> clock_offset() const;
  // Round trip of that probe.
  Duration round_trip() const;
  void Shutdown();

 private:
  void Run();
  void HandleClock(const v1::ClockProbe& probe, int64_t now);
  void Lose(const absl::Status& status);

  const std::unique_ptr<stream::MessageChannel> channel_;
  const ControlLinkOptions options_;
  const std::function<void()> on_event_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Message> queue_;  // guarded by mutex_, as all below
  absl::Status lost_;
  std::optional<int64_t> offset_;
  Duration round_trip_{0};
  bool closing_ = false;
  std::thread thread_;  // last: uses everything above
};

}  // namespace baton::migration
