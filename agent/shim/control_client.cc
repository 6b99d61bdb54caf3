#include "agent/shim/control_client.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <cerrno>
#include <utility>

namespace baton::shim {

absl::StatusOr<std::unique_ptr<ControlClient>> ControlClient::Connect(const std::string& path,
                                                                      Handlers handlers, Deadline deadline) {
  ASSIGN_OR_RETURN(MessageSocket socket, MessageSocket::Connect(path, deadline));
  std::unique_ptr<ControlClient> client(new ControlClient(std::move(socket), std::move(handlers)));
  if (!client->stop_) return ErrnoError(errno, "eventfd");
  client->reader_ = std::thread([raw = client.get()] { raw->Read(); });
  return client;
}

ControlClient::ControlClient(MessageSocket socket, Handlers handlers)
    : socket_(std::move(socket)),
      handlers_(std::move(handlers)),
      stop_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

ControlClient::~ControlClient() {
  Close();
  if (reader_.joinable()) reader_.join();
}

void ControlClient::Close() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof(one));
}

bool ControlClient::closed() const {
  std::lock_guard lock(mutex_);
  return stopping_ || !broken_.ok();
}

absl::StatusOr<v1::ShimReply> ControlClient::Call(v1::ShimRequest request, Deadline deadline, int fd) {
  Pending pending;
  uint64_t id;
  {
    std::lock_guard lock(mutex_);
    if (!broken_.ok()) return broken_;
    if (stopping_) return absl::UnavailableError("the connection to the shim is closed");
    id = next_id_++;
    calls_[id] = &pending;
  }
  request.set_id(id);
  absl::Status sent;
  {
    std::lock_guard lock(send_mutex_);
    sent = socket_.Send(request, deadline, fd >= 0 ? std::vector<int>{fd} : std::vector<int>{});
  }
  std::unique_lock lock(mutex_);
  if (sent.ok()) {
    pending.done.wait_until(lock, deadline.when(), [&] { return pending.reply || pending.broken; });
  }
  calls_.erase(id);
  if (!sent.ok()) {
    // A request that went out in part makes the stream useless; the reader learns of it by the shutdown.
    if (broken_.ok())
      broken_ = Error(absl::StatusCode::kUnavailable, "connection to the shim: {}", Message(sent));
    (void)::shutdown(socket_.fd(), SHUT_RDWR);
    return Annotate(sent, "request to the shim");
  }
  // An answer that came before the end counts: a shim that stops its VM answers and leaves.
  if (!pending.reply && pending.broken)
    return broken_.ok() ? absl::UnavailableError("the connection to the shim is closed") : broken_;
  if (!pending.reply) return absl::DeadlineExceededError("the shim did not answer in time");
  v1::ShimReply reply = std::move(*pending.reply);
  if (reply.code() != 0) {
    absl::Status status(static_cast<absl::StatusCode>(reply.code()), reply.message());
    return reply.reason() == v1::REASON_UNSPECIFIED ? status : WithReason(status, reply.reason());
  }
  return reply;
}

absl::Status ControlClient::Subscribe(Deadline deadline) {
  v1::ShimRequest request;
  request.mutable_subscribe();
  return Call(std::move(request), deadline).status();
}

void ControlClient::Read() {
  absl::Status end;
  for (;;) {
    pollfd items[2] = {{socket_.fd(), POLLIN, 0}, {stop_.get(), POLLIN, 0}};
    if (::poll(items, 2, -1) < 0) {
      if (errno == EINTR) continue;
      end = ErrnoError(errno, "poll");
      break;
    }
    if (items[1].revents != 0) break;
    v1::ShimReply reply;
    auto received = socket_.TryReceive(reply);
    if (!received.ok()) {
      end = Error(absl::StatusCode::kUnavailable, "connection to the shim: {}", Message(received.status()));
      break;
    }
    if (!*received) continue;
    if (reply.id() == 0) {
      if (handlers_.on_event) handlers_.on_event(reply);
      continue;
    }
    std::lock_guard lock(mutex_);
    auto it = calls_.find(reply.id());
    if (it == calls_.end()) continue;  // its caller's deadline passed
    it->second->reply = std::move(reply);
    it->second->done.notify_all();
  }
  bool tell;
  {
    std::lock_guard lock(mutex_);
    tell = !stopping_ && !end.ok();
    broken_ = end.ok() ? absl::UnavailableError("the connection to the shim is closed") : end;
    for (auto& [id, pending] : calls_) {
      pending->broken = true;
      pending->done.notify_all();
    }
  }
  if (tell && handlers_.on_close) handlers_.on_close(end);
}

}  // namespace baton::shim
