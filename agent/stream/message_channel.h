// Channel 0: PeerMessages, each behind its length (u32 little endian, at most 16 MiB).
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "agent/stream/channel.h"
#include "baton/v1/peer.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::stream {

// Any thread may send; one thread at a time may receive. Shutdown() is for any thread.
class MessageChannel {
 public:
  static constexpr uint32_t kMaxMessage = 16u << 20;

  explicit MessageChannel(std::unique_ptr<Channel> channel) : channel_(std::move(channel)) {}

  // Messages of several threads do not mix. After an error the channel is of no further use. InvalidArgument
  // for a message above the limit; nothing was sent then.
  absl::Status Send(const v1::PeerMessage& message, Deadline deadline);
  // The next message. DeadlineExceeded may be followed by another Receive(): what had arrived is kept.
  // OutOfRange if the peer closed between messages; DataLoss (Reason PEER_PROTOCOL_ERROR) for a length above
  // the limit, bytes that do not parse, a message without body, or an end inside a message.
  absl::StatusOr<v1::PeerMessage> Receive(Deadline deadline);
  void Shutdown() { channel_->Shutdown(); }

  const Channel& channel() const { return *channel_; }

 private:
  const std::unique_ptr<Channel> channel_;
  std::mutex send_mutex_;
  std::string send_buffer_;  // guarded by send_mutex_
  // Of the receiving thread: the message under way.
  std::string receive_buffer_;
  size_t received_ = 0;
};

}  // namespace baton::stream
