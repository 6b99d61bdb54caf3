// The front-end side of vhost-user: what the mediator and the probe say to a back-end.
#pragma once

#include <absl/functional/function_ref.h>

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "agent/vhost/socket.h"
#include "agent/vhost/wire.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::vhost {

// One connection to a back-end. Every call that waits for an answer waits until its deadline and meanwhile
// serves the back-end's own channel: a back-end may ask there while it handles our request, and would
// otherwise never answer. After an error whose code is not kFailedPrecondition (the back-end answered "no")
// the connection is out of step and must be dropped. Not thread-safe.
class Frontend {
 public:
  explicit Frontend(Connection connection) : connection_(std::move(connection)) {}

  // Called for each CONFIG_CHANGE_MSG of the back-end, from within any call and from ServeChannel.
  void set_on_config_change(std::function<void()> callback) { on_config_change_ = std::move(callback); }

  // The same for VRING_ERR, with the ring's index.
  void set_on_vring_error(std::function<void(uint32_t index)> callback) {
    on_vring_error_ = std::move(callback);
  }

  int fd() const { return connection_.fd(); }
  int channel_fd() const { return channel_.fd(); }
  const Connection& connection() const { return connection_; }
  uint64_t protocol_features() const { return protocol_features_; }

  // Requests with an answer of their own. `request` must be one that answers with a u64.
  absl::StatusOr<uint64_t> GetU64(Request request, Deadline deadline);
  absl::StatusOr<uint32_t> GetVringBase(uint32_t index, Deadline deadline);
  // The bases of many rings by `request` (GET_VRING_BASE or GET_VRING_BASE_SKIP_DRAIN): `take` is called with
  // each, in the order of `indices`, as soon as it is there. `num`: what the request carries beside the
  // index; 0 by the specification. `pipelined`: all requests leave with one system call, before the first
  // answer is there; vhost-user.rst leaves open whether a back-end has to bear that, so only for kinds that
  // are known to. kDeadlineExceeded: not all have answered; unlike elsewhere, the connection must be dropped
  // then if `pipelined`. `take` may not use this object.
  absl::Status GetVringBases(Request request, std::span<const uint32_t> indices, uint32_t num, bool pipelined,
                             Deadline deadline, absl::FunctionRef<void(uint32_t index, uint32_t base)> take);
  // After a request that ended with kDeadlineExceeded its answer is still to come: nothing else may be sent
  // until FinishOverdue has succeeded (call it when fd() is readable).
  bool overdue() const { return overdue_.has_value(); }
  absl::StatusOr<WireMessage> FinishOverdue(Deadline deadline);
  absl::StatusOr<std::vector<uint8_t>> GetConfig(uint32_t offset, uint32_t size, Deadline deadline);
  // The region that the back-end allocated, and its descriptor.
  absl::StatusOr<std::pair<InflightDescription, UniqueFd>> GetInflight(uint16_t num_queues,
                                                                       uint16_t queue_size,
                                                                       Deadline deadline);
  absl::Status SetLogBase(uint64_t size, int fd, Deadline deadline);
  // Hands `fd` over for a transfer of device state. An invalid descriptor: the back-end uses it; a valid one:
  // it wants that one to be used instead. FailedPrecondition: it refused.
  absl::StatusOr<UniqueFd> SetDeviceStateFd(TransferState transfer, int fd, Deadline deadline);
  // FailedPrecondition: the transfer failed at the back-end.
  absl::Status CheckDeviceState(Deadline deadline);

  // Requests without an answer of their own: confirmed by REPLY_ACK where negotiated; otherwise sent, and
  // followed by a GET_FEATURES round trip if `fence`. kFailedPrecondition: the back-end refused.
  absl::Status Set(Request request, std::span<const uint8_t> payload, std::span<const int> fds,
                   Deadline deadline, bool fence = false);
  absl::Status SetU64(Request request, uint64_t value, Deadline deadline, bool fence = false);
  // Remembers them for the use of need_reply.
  absl::Status SetProtocolFeatures(uint64_t features, Deadline deadline);
  // Makes a socket pair, gives one end to the back-end and serves the other.
  absl::Status OpenChannel(Deadline deadline);

  // First half of the handshake, so that a silent back-end can be waited for without a thread.
  absl::Status SendGetFeatures(Deadline deadline);
  absl::StatusOr<uint64_t> FinishGetFeatures(Deadline deadline);

  // fd() is readable although nothing was asked: Unavailable (the back-end hung up), InvalidArgument (what
  // came instead; it stays unread, and the connection must be dropped), or OK if there is nothing after all.
  absl::Status Unasked() const;

  // Handles what waits on channel_fd(). A back-end that closes or misuses its channel loses it, nothing else.
  void ServeChannel();

 private:
  absl::Status Send(Request request, uint32_t flags, std::span<const uint8_t> payload,
                    std::span<const int> fds, Deadline deadline);
  // Until something comes from the back-end, serving its channel meanwhile. DeadlineExceeded.
  absl::Status AwaitReadable(Request request, Deadline deadline);
  absl::StatusOr<WireMessage> Await(Request request, uint32_t sent_size, Deadline deadline);
  absl::StatusOr<WireMessage> Call(Request request, std::span<const uint8_t> payload,
                                   std::span<const int> fds, Deadline deadline);

  Connection connection_;
  Connection channel_;
  struct Overdue {
    Request request;
    uint32_t sent_size;
  };
  std::optional<Overdue> overdue_;
  uint64_t protocol_features_ = 0;
  std::function<void()> on_config_change_;
  std::function<void(uint32_t)> on_vring_error_;
};

}  // namespace baton::vhost
