#include "agent/daemon/peer_port.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <cerrno>
#include <vector>

#include "agent/stream/dial.h"
#include "agent/stream/message_channel.h"
#include "common/log.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;

constexpr Duration kHandOverTimeout = seconds(10);
// Adopting a VM before the connection can be handed over may take this long.
constexpr Duration kSettleTimeout = seconds(40);
constexpr int kLogLinesPerSecond = 5;

std::string NameOfPeer(const sockaddr_storage& address, socklen_t size) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (address.ss_family == AF_UNIX) return "unix";
  if (::getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
    return "unknown";
  return address.ss_family == AF_INET6 ? fmt::format("[{}]:{}", host, port)
                                       : fmt::format("{}:{}", host, port);
}

absl::StatusOr<UniqueFd> ListenTcp(const Address& address, uint16_t* port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  std::string service = std::to_string(address.port);
  int error =
      ::getaddrinfo(address.host.empty() ? nullptr : address.host.c_str(), service.c_str(), &hints, &found);
  if (error != 0)
    return Error(absl::StatusCode::kInvalidArgument, "peer.listen: {}: {}", address.host,
                 ::gai_strerror(error));
  std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> guard(found, ::freeaddrinfo);
  absl::Status last = absl::InternalError("no address");
  for (addrinfo* at = found; at != nullptr; at = at->ai_next) {
    UniqueFd fd(::socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, at->ai_protocol));
    if (!fd) {
      last = ErrnoError(errno, "socket");
      continue;
    }
    int on = 1;
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (::bind(fd.get(), at->ai_addr, at->ai_addrlen) != 0 || ::listen(fd.get(), 128) != 0) {
      last = errno == EADDRINUSE
                 ? Error(absl::StatusCode::kAlreadyExists,
                         "peer.listen: {} is in use by another program (another baton-agent?)",
                         address.ToString())
                 : ErrnoError(errno, "peer.listen: " + address.ToString());
      continue;
    }
    sockaddr_storage bound{};
    socklen_t size = sizeof(bound);
    ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound), &size);
    *port = ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(bound).sin6_port
                                              : reinterpret_cast<sockaddr_in&>(bound).sin_port);
    return fd;
  }
  return last;
}

}  // namespace

struct PeerPort::Unknown {
  UniqueFd socket;
  std::string remote;
  Deadline deadline = Deadline::After(kPreambleTimeout);
  stream::PreambleBytes bytes{};
  size_t got = 0;
};

absl::StatusOr<std::unique_ptr<PeerPort>> PeerPort::Start(const AgentConfig& config, VmManager& vms,
                                                          DomainManager* domains, AgentMetrics& metrics,
                                                          TaskQueue& tasks) {
  std::unique_ptr<PeerPort> port(new PeerPort(config, vms, domains, metrics, tasks));
  RETURN_IF_ERROR(port->Listen());
  port->stop_ = UniqueFd(::eventfd(0, EFD_CLOEXEC));
  if (!port->stop_) return ErrnoError(errno, "eventfd");
  port->thread_ = std::thread([raw = port.get()] { raw->Run(); });
  return port;
}

PeerPort::~PeerPort() {
  if (!thread_.joinable()) return;
  uint64_t one = 1;
  [[maybe_unused]] ssize_t n = ::write(stop_.get(), &one, sizeof(one));
  thread_.join();
}

absl::Status PeerPort::Listen() {
  const Address& address = config_.peer.listen;
  if (address.unix_path.empty()) {
    ASSIGN_OR_RETURN(listener_, ListenTcp(address, &port_));
    return absl::OkStatus();
  }
  auto listener = UnixListener::Listen(address.unix_path);
  if (!listener.ok()) return Annotate(listener.status(), "peer.listen");
  unix_listener_ = *std::move(listener);
  return absl::OkStatus();
}

void PeerPort::Run() {
  std::vector<Unknown> unknown;
  int listen_fd = listener_ ? listener_.get() : unix_listener_.fd();
  while (true) {
    std::vector<pollfd> polls = {{stop_.get(), POLLIN, 0}, {listen_fd, POLLIN, 0}};
    Deadline next = Deadline::After(std::chrono::hours(1));
    for (const Unknown& connection : unknown) {
      polls.push_back({connection.socket.get(), POLLIN, 0});
      next = next.Min(connection.deadline);
    }
    int n = ::poll(polls.data(), polls.size(), unknown.empty() ? -1 : next.PollTimeoutMs());
    if (n < 0 && errno != EINTR) {
      LOG_ERROR("peer port: {}", Message(ErrnoError(errno, "poll")));
      return;
    }
    if (n > 0 && polls[0].revents != 0) return;
    std::vector<Unknown> waiting;
    for (size_t i = 0; i < unknown.size(); ++i) {
      bool ready = n > 0 && polls[i + 2].revents != 0;
      if (ready && !Read(unknown[i])) continue;
      if (unknown[i].deadline.Expired()) {
        Refuse(unknown[i].remote, "timeout", "sent no complete preamble in time");
        continue;
      }
      waiting.push_back(std::move(unknown[i]));
    }
    unknown = std::move(waiting);
    if (n > 0 && polls[1].revents != 0) Accept(unknown);
  }
}

void PeerPort::Accept(std::vector<Unknown>& unknown) {
  int listen_fd = listener_ ? listener_.get() : unix_listener_.fd();
  // All that wait, so that refusing is as fast as flooding.
  for (int i = 0; i < 128; ++i) {
    sockaddr_storage address{};
    socklen_t size = sizeof(address);
    UniqueFd socket(
        ::accept4(listen_fd, reinterpret_cast<sockaddr*>(&address), &size, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
      if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
        Refuse("listener", "accept_failed", Message(ErrnoError(errno, "accept")));
      return;
    }
    std::string remote = NameOfPeer(address, size);
    if (unknown.size() >= kMaxUnknown) {
      Refuse(remote, "too_many", fmt::format("{} connections without preamble already", kMaxUnknown));
      continue;
    }
    unknown.emplace_back();
    unknown.back().socket = std::move(socket);
    unknown.back().remote = std::move(remote);
  }
}

bool PeerPort::Read(Unknown& connection) {
  // Not a byte more than the preamble: what follows belongs to the shim.
  ssize_t n = ::recv(connection.socket.get(), connection.bytes.data() + connection.got,
                     connection.bytes.size() - connection.got, 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (n <= 0) {
    Refuse(connection.remote, "closed",
           n == 0 ? "closed before its preamble was complete" : Message(ErrnoError(errno, "preamble")));
    return false;
  }
  connection.got += static_cast<size_t>(n);
  if (connection.got < connection.bytes.size()) return true;
  // std::function wants copyable captures.
  auto socket = std::make_shared<UniqueFd>(std::move(connection.socket));
  tasks_.Post([this, socket, bytes = connection.bytes, remote = connection.remote] {
    Dispatch(std::move(*socket), bytes, remote);
  });
  return false;
}

void PeerPort::Refuse(const std::string& remote, const std::string& outcome, const std::string& why) {
  metrics_.CountPeerConnection(outcome);
  // A flood must not become a flood of the log.
  int64_t second = MonotonicNs() / 1000000000;
  if (log_window_.exchange(second) != second) logged_ = 0;
  if (logged_++ < kLogLinesPerSecond) LOG_WARN("peer connection from {} closed: {}", remote, why);
}

void PeerPort::Dispatch(UniqueFd socket, stream::PreambleBytes bytes, const std::string& remote) {
  auto preamble = stream::DecodePreamble(bytes);
  if (!preamble.ok()) return Refuse(remote, "bad_preamble", Message(preamble.status()));
  bool query = preamble->kind == stream::PreambleKind::kVerdictQuery;
  auto entry = vms_.FindIncoming(preamble->migration_id, preamble->token);
  if (absl::IsNotFound(entry.status()) && domains_)
    entry = domains_->FindIncoming(preamble->migration_id, preamble->token);
  if (absl::IsPermissionDenied(entry.status())) return Refuse(remote, "bad_token", Message(entry.status()));
  absl::Status handed = entry.status();
  if (entry.ok())
    handed = vms_.HandOver(**entry, bytes, remote, socket.get(), Deadline::After(kHandOverTimeout));
  if (!handed.ok() && query) {
    // No shim that could answer, or one that knows only later migrations.
    auto ended = vms_.Settle(preamble->migration_id, preamble->token, Deadline::After(kSettleTimeout));
    if (ended.ok()) return AnswerVerdict(std::move(socket), *ended, remote);
    if (absl::IsPermissionDenied(ended.status())) return Refuse(remote, "bad_token", Message(ended.status()));
    // Adopted by a new shim meanwhile.
    if (absl::IsFailedPrecondition(ended.status()) && entry.ok())
      handed = vms_.HandOver(**entry, bytes, remote, socket.get(), Deadline::After(kHandOverTimeout));
  }
  if (handed.ok()) return metrics_.CountPeerConnection("handed_over");
  Refuse(remote, absl::IsNotFound(handed) && !entry.ok() ? "unknown_migration" : "shim_failed",
         Message(handed));
}

void PeerPort::AnswerVerdict(UniqueFd socket, const v1::EndedIncoming& ended, const std::string& remote) {
  auto answer = [&]() -> absl::Status {
    Deadline deadline = Deadline::After(kHandOverTimeout);
    std::shared_ptr<const stream::TlsContext> tls;
    if (ended.tls()) {
      ASSIGN_OR_RETURN(
          tls, stream::TlsContext::Load(config_.peer.tls.ca, config_.peer.tls.cert, config_.peer.tls.key));
    }
    ASSIGN_OR_RETURN(auto channel, stream::AcceptChannel(std::move(socket), tls, "", deadline));
    stream::MessageChannel messages(std::move(channel));
    ASSIGN_OR_RETURN(v1::PeerMessage query, messages.Receive(deadline));
    if (!query.has_verdict_query() || query.verdict_query().migration_id() != ended.migration_id())
      return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument, "expected a verdict query");
    v1::PeerMessage verdict;
    verdict.mutable_verdict()->set_migration_id(ended.migration_id());
    verdict.mutable_verdict()->set_verdict(ended.verdict());
    verdict.mutable_verdict()->set_epoch(ended.epoch());
    if (ended.verdict() == v1::REFUSED) {
      verdict.mutable_verdict()->set_reason(v1::DESTINATION_REFUSED);
      verdict.mutable_verdict()->set_message("the destination has ended the migration");
    }
    return messages.Send(verdict, deadline);
  };
  absl::Status answered = answer();
  if (!answered.ok()) return Refuse(remote, "shim_failed", Message(answered));
  metrics_.CountPeerConnection("verdict_answered");
  LOG_INFO("migration {}: answered {} to {}", ended.migration_id(), v1::HandoverState_Name(ended.verdict()),
           remote);
}

}  // namespace baton::daemon
