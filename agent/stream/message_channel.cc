#include "agent/stream/message_channel.h"

#include <algorithm>

#include "agent/stream/wire.h"

namespace baton::stream {
namespace {

constexpr size_t kLengthSize = 4;
// A buffer that has grown beyond this for one message is given back.
constexpr size_t kKeepBuffer = 64u << 10;

absl::Status Broken(const std::string& peer, const std::string& why) {
  return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss, "{}: {}", peer, why);
}

}  // namespace

absl::Status MessageChannel::Send(const v1::PeerMessage& message, Deadline deadline) {
  const size_t size = message.ByteSizeLong();
  if (size == 0 || size > kMaxMessage) {
    return Error(absl::StatusCode::kInvalidArgument, "peer message of {} bytes; the limit is {}", size,
                 kMaxMessage);
  }
  std::lock_guard lock(send_mutex_);
  send_buffer_.resize(kLengthSize + size);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(send_buffer_.data());
  StoreLe<uint32_t>(bytes, static_cast<uint32_t>(size));
  message.SerializeWithCachedSizesToArray(bytes + kLengthSize);
  absl::Status status = channel_->Write(bytes, send_buffer_.size(), deadline);
  if (send_buffer_.capacity() > kKeepBuffer) std::string().swap(send_buffer_);
  // What was written of the message cannot be taken back, and nothing may follow half a message.
  if (!status.ok()) channel_->Shutdown();
  return status;
}

absl::StatusOr<v1::PeerMessage> MessageChannel::Receive(Deadline deadline) {
  for (;;) {
    size_t wanted = kLengthSize;
    if (received_ >= kLengthSize) {
      uint32_t size = LoadLe<uint32_t>(reinterpret_cast<const uint8_t*>(receive_buffer_.data()));
      if (size == 0 || size > kMaxMessage) {
        return Broken(channel_->peer(),
                      fmt::format("message of {} bytes; the limit is {}", size, kMaxMessage));
      }
      wanted += size;
    }
    if (received_ == wanted && wanted > kLengthSize) break;
    // Grows with what has arrived, at most doubling, so that a length alone makes nobody allocate 16 MiB.
    const size_t room = std::min(wanted, std::max<size_t>(kKeepBuffer, 2 * received_));
    if (receive_buffer_.size() < room) receive_buffer_.resize(room);
    iovec buffer{receive_buffer_.data() + received_, room - received_};
    auto n = channel_->ReadSome(&buffer, 1, deadline);
    if (!n.ok()) {
      if (n.status().code() == absl::StatusCode::kOutOfRange && received_ > 0) {
        return Broken(channel_->peer(), "connection ended inside a message");
      }
      return n.status();
    }
    received_ += *n;
  }
  v1::PeerMessage message;
  const bool parsed =
      message.ParseFromArray(receive_buffer_.data() + kLengthSize, static_cast<int>(received_ - kLengthSize));
  received_ = 0;
  if (receive_buffer_.capacity() > kKeepBuffer) std::string().swap(receive_buffer_);
  if (!parsed) return Broken(channel_->peer(), "message does not parse");
  if (message.body_case() == v1::PeerMessage::BODY_NOT_SET) {
    return Broken(channel_->peer(), "message without a body this version knows");
  }
  return message;
}

}  // namespace baton::stream
