#include "agent/vhost/frontend.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include "common/log.h"

namespace baton::vhost {
namespace {

// A message of the back-end's channel arrives whole; one that stops half-way must not stop us.
constexpr auto kChannelMessageTime = std::chrono::milliseconds(500);

}  // namespace

absl::Status Frontend::Send(Request request, uint32_t flags, std::span<const uint8_t> payload,
                            std::span<const int> fds, Deadline deadline) {
  if (overdue_) return absl::InternalError("a request while the answer to another is overdue");
  absl::Status sent =
      connection_.Send(static_cast<uint32_t>(request), kVersion | flags, payload, fds, deadline);
  // Half a message may be out; this is not a late answer.
  if (absl::IsDeadlineExceeded(sent)) return absl::UnavailableError(Message(sent));
  return sent;
}

absl::Status Frontend::AwaitReadable(Request request, Deadline deadline) {
  for (;;) {
    pollfd p[2] = {{connection_.fd(), POLLIN, 0}, {channel_.fd(), POLLIN, 0}};
    Duration left = deadline.Left();
    timespec ts{static_cast<time_t>(left.count() / 1000000000), static_cast<long>(left.count() % 1000000000)};
    int n = ::ppoll(p, channel_.valid() ? 2 : 1, &ts, nullptr);
    if (n < 0 && errno != EINTR) return ErrnoError(errno, "poll");
    if (n == 0) {
      return Error(absl::StatusCode::kDeadlineExceeded, "the back-end does not answer {}",
                   RequestName(static_cast<uint32_t>(request)));
    }
    if (n > 0 && channel_.valid() && p[1].revents) ServeChannel();
    if (n > 0 && p[0].revents) return absl::OkStatus();
  }
}

absl::StatusOr<WireMessage> Frontend::Await(Request request, uint32_t sent_size, Deadline deadline) {
  if (absl::Status readable = AwaitReadable(request, deadline); !readable.ok()) {
    if (absl::IsDeadlineExceeded(readable)) overdue_ = {request, sent_size};
    return readable;
  }
  const std::string name = RequestName(static_cast<uint32_t>(request));
  auto reply = connection_.Receive(/*reply=*/true, deadline);
  if (!reply.ok()) {
    if (absl::IsUnavailable(reply.status())) {
      return Error(absl::StatusCode::kUnavailable, "the back-end hung up instead of answering {}", name);
    }
    return Annotate(reply.status(), "reply to " + name);
  }
  RETURN_IF_ERROR(ValidateReply(request, *reply, sent_size));
  return reply;
}

absl::StatusOr<WireMessage> Frontend::Call(Request request, std::span<const uint8_t> payload,
                                           std::span<const int> fds, Deadline deadline) {
  RETURN_IF_ERROR(Send(request, 0, payload, fds, deadline));
  return Await(request, static_cast<uint32_t>(payload.size()), deadline);
}

absl::StatusOr<uint64_t> Frontend::GetU64(Request request, Deadline deadline) {
  ASSIGN_OR_RETURN(WireMessage reply, Call(request, {}, {}, deadline));
  return reply.As<uint64_t>();
}

absl::StatusOr<uint32_t> Frontend::GetVringBase(uint32_t index, Deadline deadline) {
  VringState wanted{index, 0};
  ASSIGN_OR_RETURN(WireMessage reply, Call(Request::kGetVringBase, Bytes(wanted), {}, deadline));
  auto state = reply.As<VringState>();
  if (state.index != index) {
    return Error(absl::StatusCode::kInvalidArgument, "reply to GET_VRING_BASE of ring {} is about ring {}",
                 index, state.index);
  }
  return state.num;
}

absl::Status Frontend::GetVringBases(Request request, std::span<const uint32_t> indices, uint32_t num,
                                     bool pipelined, Deadline deadline,
                                     absl::FunctionRef<void(uint32_t index, uint32_t base)> take) {
  if (overdue_) return absl::InternalError("a request while the answer to another is overdue");
  auto check_and_take = [&](uint32_t index, const VringState& state) -> absl::Status {
    if (state.index != index) {
      return Error(absl::StatusCode::kInvalidArgument, "reply to {} of ring {} is about ring {}",
                   RequestName(static_cast<uint32_t>(request)), index, state.index);
    }
    take(index, state.num);
    return absl::OkStatus();
  };
  if (!pipelined) {
    for (uint32_t index : indices) {
      const VringState wanted{index, num};
      ASSIGN_OR_RETURN(WireMessage reply, Call(request, Bytes(wanted), {}, deadline));
      RETURN_IF_ERROR(check_and_take(index, reply.As<VringState>()));
    }
    return absl::OkStatus();
  }
  struct Pipelined {
    Header header;
    VringState state;
  };
  static_assert(sizeof(Pipelined) == sizeof(Header) + sizeof(VringState));
  std::vector<Pipelined> batch(indices.size());
  for (size_t i = 0; i < batch.size(); ++i)
    batch[i] = {{static_cast<uint32_t>(request), kVersion, sizeof(VringState)}, {indices[i], num}};
  const std::span<uint8_t> bytes(reinterpret_cast<uint8_t*>(batch.data()), batch.size() * sizeof(Pipelined));
  if (absl::Status sent = connection_.SendRaw(static_cast<uint32_t>(request), bytes, deadline); !sent.ok())
    return absl::IsDeadlineExceeded(sent) ? absl::UnavailableError(Message(sent)) : sent;
  // The answers take the requests' place: all of one length, and while one is taken the next ones come.
  WireMessage reply;
  reply.payload.resize(sizeof(VringState));
  size_t taken = 0;
  for (size_t got = 0; taken < batch.size();) {
    ASSIGN_OR_RETURN(const size_t n, connection_.ReceiveRaw(bytes.subspan(got)));
    if (n == 0) {
      RETURN_IF_ERROR(AwaitReadable(request, deadline));
      continue;
    }
    got += n;
    while (taken < batch.size()) {
      const size_t begin = taken * sizeof(Pipelined);
      if (got < begin + sizeof(Header)) break;
      const Pipelined& answer = batch[taken];
      // Of another length it would be out of step with those that follow.
      if (answer.header.size != sizeof(VringState)) {
        return Error(absl::StatusCode::kInvalidArgument, "reply to {}: {} bytes instead of {}",
                     RequestName(static_cast<uint32_t>(request)), answer.header.size, sizeof(VringState));
      }
      if (got < begin + sizeof(Pipelined)) break;
      reply.header = answer.header;
      RETURN_IF_ERROR(ValidateReply(request, reply, sizeof(VringState)));
      RETURN_IF_ERROR(check_and_take(indices[taken], answer.state));
      ++taken;
    }
  }
  return absl::OkStatus();
}

absl::Status Frontend::Unasked() const {
  Header header;
  const ssize_t n = ::recv(fd(), &header, sizeof header, MSG_PEEK | MSG_DONTWAIT);
  if (n == 0 || (n < 0 && errno == ECONNRESET)) return absl::UnavailableError("the back-end hung up");
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return absl::OkStatus();
  if (n < 0) return ErrnoError(errno, "receiving");
  if (n < static_cast<ssize_t>(sizeof header) ||
      !(CheckHeader(header, /*reply=*/true).ok() || CheckHeader(header, /*reply=*/false).ok()))
    return absl::InvalidArgumentError("the back-end sent bytes that are no message, and nobody had asked");
  return Error(absl::StatusCode::kInvalidArgument, "the back-end sent {} ({} bytes), and nobody had asked",
               RequestName(header.request), header.size);
}

absl::StatusOr<WireMessage> Frontend::FinishOverdue(Deadline deadline) {
  if (!overdue_) return absl::InternalError("no answer is overdue");
  Overdue overdue = *std::exchange(overdue_, std::nullopt);
  return Await(overdue.request, overdue.sent_size, deadline);
}

absl::StatusOr<std::vector<uint8_t>> Frontend::GetConfig(uint32_t offset, uint32_t size, Deadline deadline) {
  ConfigHeader header{offset, size, 0};
  std::vector<uint8_t> payload(sizeof header + size, 0);
  std::memcpy(payload.data(), &header, sizeof header);
  RETURN_IF_ERROR(Send(Request::kGetConfig, 0, payload, {}, deadline));
  auto reply = Await(Request::kGetConfig, static_cast<uint32_t>(payload.size()), deadline);
  if (!reply.ok()) return reply.status();
  auto answered = reply->As<ConfigHeader>();
  if (answered.offset != offset || answered.size != size) {
    return Error(absl::StatusCode::kInvalidArgument, "reply to GET_CONFIG is about offset {} size {}",
                 answered.offset, answered.size);
  }
  return std::vector<uint8_t>(reply->payload.begin() + sizeof header, reply->payload.end());
}

absl::StatusOr<std::pair<InflightDescription, UniqueFd>> Frontend::GetInflight(uint16_t num_queues,
                                                                               uint16_t queue_size,
                                                                               Deadline deadline) {
  InflightDescription wanted{0, 0, num_queues, queue_size, 0};
  ASSIGN_OR_RETURN(WireMessage reply, Call(Request::kGetInflightFd, Bytes(wanted), {}, deadline));
  return std::make_pair(reply.As<InflightDescription>(), std::move(reply.fds[0]));
}

absl::Status Frontend::SetLogBase(uint64_t size, int fd, Deadline deadline) {
  LogDescription log{size, 0};
  return Call(Request::kSetLogBase, Bytes(log), {&fd, 1}, deadline).status();
}

absl::StatusOr<UniqueFd> Frontend::SetDeviceStateFd(TransferState transfer, int fd, Deadline deadline) {
  ASSIGN_OR_RETURN(WireMessage reply, Call(Request::kSetDeviceStateFd, Bytes(transfer), {&fd, 1}, deadline));
  if (const uint64_t error = reply.As<uint64_t>() & kTransferErrorMask; error != 0) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "the back-end refused SET_DEVICE_STATE_FD (result {})", error);
  }
  return reply.fds.empty() ? UniqueFd() : std::move(reply.fds[0]);
}

absl::Status Frontend::CheckDeviceState(Deadline deadline) {
  ASSIGN_OR_RETURN(uint64_t result, GetU64(Request::kCheckDeviceState, deadline));
  if (result != 0) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "the back-end could not transfer its state (CHECK_DEVICE_STATE: {})", result);
  }
  return absl::OkStatus();
}

absl::Status Frontend::Set(Request request, std::span<const uint8_t> payload, std::span<const int> fds,
                           Deadline deadline, bool fence) {
  const bool ack = (protocol_features_ & pf::kReplyAck) != 0;
  RETURN_IF_ERROR(Send(request, ack ? kFlagNeedReply : 0, payload, fds, deadline));
  if (!ack) return fence ? GetU64(Request::kGetFeatures, deadline).status() : absl::OkStatus();
  ASSIGN_OR_RETURN(WireMessage reply, Await(request, static_cast<uint32_t>(payload.size()), deadline));
  if (uint64_t result = reply.As<uint64_t>(); result != 0) {
    return Error(absl::StatusCode::kFailedPrecondition, "the back-end refused {} (result {})",
                 RequestName(static_cast<uint32_t>(request)), result);
  }
  return absl::OkStatus();
}

absl::Status Frontend::SetU64(Request request, uint64_t value, Deadline deadline, bool fence) {
  return Set(request, Bytes(value), {}, deadline, fence);
}

absl::Status Frontend::SetProtocolFeatures(uint64_t features, Deadline deadline) {
  RETURN_IF_ERROR(SetU64(Request::kSetProtocolFeatures, features, deadline));
  protocol_features_ = features;
  return absl::OkStatus();
}

absl::Status Frontend::OpenChannel(Deadline deadline) {
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return ErrnoError(errno, "socketpair");
  UniqueFd ours(pair[0]), theirs(pair[1]);
  channel_ = Connection(std::move(ours));
  int fd = theirs.get();
  return Set(Request::kSetBackendReqFd, {}, {&fd, 1}, deadline);
}

absl::Status Frontend::SendGetFeatures(Deadline deadline) {
  return Send(Request::kGetFeatures, 0, {}, {}, deadline);
}

absl::StatusOr<uint64_t> Frontend::FinishGetFeatures(Deadline deadline) {
  ASSIGN_OR_RETURN(WireMessage reply, Await(Request::kGetFeatures, 0, deadline));
  return reply.As<uint64_t>();
}

void Frontend::ServeChannel() {
  if (!channel_.valid()) return;
  auto message = channel_.Receive(/*reply=*/false, Deadline::After(kChannelMessageTime));
  if (!message.ok()) {
    if (!absl::IsUnavailable(message.status())) {
      LOG_WARN("back-end channel closed: {}", Message(message.status()));
    }
    channel_.Close();
    return;
  }
  absl::Status valid = ValidateBackendRequest(*message);
  uint64_t result = valid.ok() ? 0 : 1;
  if (!valid.ok()) LOG_WARN("back-end channel: {}", Message(valid));
  if (message->need_reply()) {
    absl::Status sent = channel_.Send(message->header.request, kReplyFlags, Bytes(result), {},
                                      Deadline::After(kChannelMessageTime));
    if (!sent.ok()) channel_.Close();
  }
  if (!valid.ok()) return;
  if (static_cast<BackendRequest>(message->header.request) == BackendRequest::kVringErr) {
    if (on_vring_error_) on_vring_error_(message->As<VringState>().index);
  } else if (on_config_change_) {
    on_config_change_();
  }
}

}  // namespace baton::vhost
