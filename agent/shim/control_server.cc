#include "agent/shim/control_server.h"

#include <utility>

#include "common/log.h"

namespace baton::shim {
namespace {

v1::ShimReply ErrorReply(const absl::Status& status) {
  v1::ShimReply reply;
  reply.set_code(static_cast<int32_t>(status.code()));
  reply.set_message(Message(status));
  reply.set_reason(ReasonOf(status, v1::REASON_UNSPECIFIED));
  return reply;
}

}  // namespace

absl::StatusOr<std::shared_ptr<ControlServer>> ControlServer::Start(EventLoop& loop, const std::string& path,
                                                                    Handlers handlers) {
  ASSIGN_OR_RETURN(UnixListener listener, UnixListener::Listen(path));
  std::shared_ptr<ControlServer> server(new ControlServer(loop, std::move(listener), std::move(handlers)));
  RETURN_IF_ERROR(
      loop.Watch(server->listener_.fd(), EPOLLIN, [raw = server.get()](uint32_t) { raw->Accept(); }));
  return server;
}

ControlServer::~ControlServer() { Close(); }

void ControlServer::Close() {
  if (listener_.fd() >= 0) loop_.Unwatch(listener_.fd());
  listener_.Close();
  while (!connections_.empty()) {
    auto it = connections_.begin();
    (void)it->second.socket.Flush();
    loop_.Unwatch(it->second.socket.fd());
    connections_.erase(it);
  }
}

void ControlServer::Accept() {
  for (;;) {
    auto fd = listener_.Accept();
    if (!fd.ok()) {
      LOG_WARN("control socket: {}", Message(fd.status()));
      return;
    }
    if (!fd->valid()) return;
    uint64_t id = next_id_++;
    Connection& connection = connections_[id];
    connection.socket = MessageSocket(*std::move(fd));
    absl::Status status =
        loop_.Watch(connection.socket.fd(), EPOLLIN, [this, id](uint32_t events) { OnReady(id, events); });
    if (!status.ok()) connections_.erase(id);
  }
}

void ControlServer::OnReady(uint64_t id, uint32_t events) {
  auto it = connections_.find(id);
  if (it == connections_.end()) return;
  if (events & EPOLLOUT) {
    if (absl::Status status = it->second.socket.Flush(); !status.ok()) return Drop(id, status);
    if (!it->second.socket.wants_write()) loop_.Change(it->second.socket.fd(), EPOLLIN);
  }
  if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) Receive(id);
}

void ControlServer::Receive(uint64_t id) {
  for (;;) {
    auto it = connections_.find(id);
    if (it == connections_.end()) return;  // dropped while it was answered
    v1::ShimRequest request;
    std::vector<UniqueFd> fds;
    auto received = it->second.socket.TryReceive(request, &fds);
    if (!received.ok()) return Drop(id, received.status());
    if (!*received) return;
    uint64_t request_id = request.id();
    if (request_id == 0) return Drop(id, absl::InvalidArgumentError("a request with id 0"));
    if (fds.size() > 1)
      return Drop(id, absl::InvalidArgumentError("more than one descriptor with a request"));
    Respond respond = [weak = weak_from_this(), &loop = loop_, id,
                       request_id](absl::StatusOr<v1::ShimReply> result) {
      v1::ShimReply reply = result.ok() ? *std::move(result) : ErrorReply(result.status());
      reply.set_id(request_id);
      loop.Post([weak, id, reply = std::move(reply)] {
        if (auto self = weak.lock()) self->Send(id, reply);
      });
    };
    if (request.has_subscribe()) {
      it->second.subscribed = true;
      v1::ShimReply reply;
      reply.set_id(request_id);
      Send(id, reply);
      for (v1::ShimReply& event : handlers_.snapshot()) {
        event.set_id(0);
        Send(id, event);
      }
      continue;
    }
    handlers_.on_request(std::move(request), fds.empty() ? UniqueFd() : std::move(fds[0]),
                         std::move(respond));
  }
}

void ControlServer::Send(uint64_t id, const v1::ShimReply& reply) {
  auto it = connections_.find(id);
  if (it == connections_.end()) return;
  if (absl::Status status = it->second.socket.Enqueue(reply); !status.ok()) return Drop(id, status);
  if (it->second.socket.wants_write()) loop_.Change(it->second.socket.fd(), EPOLLIN | EPOLLOUT);
}

void ControlServer::Drop(uint64_t id, const absl::Status& why) {
  auto it = connections_.find(id);
  if (it == connections_.end()) return;
  // A peer that simply left is no news.
  if (why.code() != absl::StatusCode::kOutOfRange) LOG_WARN("control connection closed: {}", Message(why));
  loop_.Unwatch(it->second.socket.fd());
  connections_.erase(it);
}

void ControlServer::Publish(v1::ShimReply event) {
  event.set_id(0);
  loop_.Post([weak = weak_from_this(), event = std::move(event)] {
    auto self = weak.lock();
    if (!self) return;
    std::vector<uint64_t> subscribers;
    for (auto& [id, connection] : self->connections_) {
      if (connection.subscribed) subscribers.push_back(id);
    }
    for (uint64_t id : subscribers) self->Send(id, event);
  });
}

}  // namespace baton::shim
