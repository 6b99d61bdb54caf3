#include "agent/stream/tunnel_relay.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "agent/stream/socket_io.h"
#include "agent/stream/wire.h"
#include "common/log.h"

namespace baton::stream {
namespace {

constexpr int kPipeBytes = 1 << 20;
// Bulk takes few system calls, and stays in a processor's cache. What is never written to takes no memory.
constexpr size_t kBufferBytes = size_t{512} << 10;
// What a program may leave unread of a tunnelled connection. With Linux's 208 KiB the relay is woken for
// every 150 KiB, each time in the place of the QEMU that it writes to, whose processor time bounds a
// migration; with more than a processor's cache holds, QEMU reads from memory.
constexpr int kUnreadBytes = 1 << 20;
// Measured by bench_libvirt: 11 moves of a guest that keeps a processor busy took 1.75 s instead of 1.92.
constexpr int kRelayNice = -5;
// For the last bytes of a direction to leave.
constexpr Duration kCloseTimeout = std::chrono::seconds(30);

// A daemon or a QEMU that is busy (a slow disk, memory being allocated) takes nothing for a while, and its
// host is alive. One that is dead is noticed by libvirt's own keepalive before this.
constexpr std::chrono::milliseconds kStallLimit = std::chrono::minutes(2);

// Ended by Stop(), not by time.
Deadline Whenever() { return Deadline::After(std::chrono::hours(24 * 365)); }

void AwaitReady(int fd, short events) {
  pollfd entry{fd, events, 0};
  ::poll(&entry, 1, -1);
}

// How moving bytes from one socket to another came to its end.
struct Ending {
  enum { kEnd, kSource, kSink } where = kEnd;
  int error = 0;
};

Ending Splice(int from, int to, std::atomic<uint64_t>& count) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return {Ending::kSource, errno};
  const UniqueFd out(ends[0]), in(ends[1]);
  // Smaller where the user's pipes have taken all that they may (pipe(7)).
  (void)::fcntl(in.get(), F_SETPIPE_SZ, kPipeBytes);
  constexpr unsigned kFlags = SPLICE_F_MOVE | SPLICE_F_NONBLOCK;
  for (;;) {
    ssize_t held = ::splice(from, nullptr, in.get(), nullptr, kPipeBytes, kFlags);
    if (held == 0) return {};
    if (held < 0) {
      if (errno == EAGAIN) {
        AwaitReady(from, POLLIN);
      } else if (errno != EINTR) {
        return {Ending::kSource, errno};
      }
      continue;
    }
    while (held > 0) {
      const ssize_t n = ::splice(out.get(), nullptr, to, nullptr, static_cast<size_t>(held), kFlags);
      if (n >= 0) {
        held -= n;
        count.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
      } else if (errno == EAGAIN) {
        AwaitReady(to, POLLOUT);
      } else if (errno != EINTR) {
        return {Ending::kSink, errno};
      }
    }
  }
}

// splice(2) to a socket whose other end is gone raises SIGPIPE, which no flag of it prevents.
void BlockSignals() {
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, nullptr);
}

// SO_SNDBUF is bounded by net.core.wmem_max; who may administer the network is not (socket(7)).
void AllowUnread(int fd) {
  if (::setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &kUnreadBytes, sizeof(kUnreadBytes)) != 0)
    (void)::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kUnreadBytes, sizeof(kUnreadBytes));
}

// A relay is one of several steps between two QEMUs, each of which waits for the one before it: where the
// processors are busy, a turn that a relay has to wait for (3 ms of Linux's scheduler) is a turn in which the
// 208 KiB that QEMU may write to its unix socket are all that moves. It takes no more of a processor for
// being in front of others. Of this thread only (setpriority(2), "C library/kernel differences"); who is not
// allowed to goes on as before.
void GoFirst() { (void)::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), kRelayNice); }

void MakeNonBlocking(int fd) {
  if (const int flags = ::fcntl(fd, F_GETFL); flags >= 0) (void)::fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

}  // namespace

absl::Status SendTunnelAnswer(Channel& channel, const absl::Status& connected, Deadline deadline) {
  if (connected.ok()) return channel.Write(&kTunnelConnected, 1, deadline);
  const std::string text = Message(connected).substr(0, kMaxTunnelReason);
  std::vector<uint8_t> bytes(3);
  bytes[0] = kTunnelRefused;
  StoreLe<uint16_t>(&bytes[1], static_cast<uint16_t>(text.size()));
  bytes.insert(bytes.end(), text.begin(), text.end());
  return channel.Write(bytes.data(), bytes.size(), deadline);
}

absl::Status ReceiveTunnelAnswer(Channel& channel, Deadline deadline) {
  uint8_t answer = 0;
  absl::Status read = channel.Read(&answer, 1, deadline);
  if (absl::IsOutOfRange(read))
    return Error(absl::StatusCode::kUnavailable, "{}: the destination closed the connection unanswered",
                 channel.peer());
  RETURN_IF_ERROR(read);
  if (answer == kTunnelConnected) return absl::OkStatus();
  uint8_t length[2];
  if (answer == kTunnelRefused) {
    RETURN_IF_ERROR(channel.Read(length, sizeof length, deadline));
  }
  if (answer != kTunnelRefused || LoadLe<uint16_t>(length) > kMaxTunnelReason)
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss, "{}: unknown answer {}",
                 channel.peer(), answer);
  std::string text(LoadLe<uint16_t>(length), '\0');
  RETURN_IF_ERROR(channel.Read(text.data(), text.size(), deadline));
  // The peer's words end in logs and records.
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return Error(absl::StatusCode::kUnavailable, "at the destination: {}", text);
}

absl::Status TunnelRelay::Run(UniqueFd local) {
  {
    std::lock_guard lock(mutex_);
    local_ = std::move(local);
    if (stopped_) ::shutdown(local_.get(), SHUT_RDWR);
  }
  if (absl::Status set = SetStallLimit(channel_->socket_fd(), kStallLimit); !set.ok())
    LOG_WARN("{}: {}", channel_->peer(), Message(set));
  splice_ = splice_ && channel_->plain_fd() >= 0;
  if (splice_) MakeNonBlocking(channel_->plain_fd());
  BlockSignals();
  AllowUnread(local_.get());
  // QEMU and its guest need the processors for what they wait for us to carry.
  channel_->SleepAtOnce();
  GoFirst();
  absl::Status from;
  std::thread back([this, &from] {
    from = FromPeer();
    // Nothing more comes, and nothing that is sent would arrive.
    if (!from.ok()) Stop();
  });
  absl::Status to = ToPeer();
  if (!to.ok()) Stop();
  back.join();
  // Whichever was first made the other say "cancelled".
  for (const absl::Status& status : {to, from}) {
    if (!status.ok() && !absl::IsCancelled(status)) return status;
  }
  return absl::OkStatus();
}

void TunnelRelay::Stop() {
  std::lock_guard lock(mutex_);
  stopped_ = true;
  channel_->Shutdown();
  if (local_) ::shutdown(local_.get(), SHUT_RDWR);
}

void TunnelRelay::LocalGone() {
  // Ends the other direction too, once what the program has written is through.
  ::shutdown(local_.get(), SHUT_RD);
}

absl::Status TunnelRelay::EndToPeer() {
  absl::Status closed = channel_->CloseWrite(Deadline::After(kCloseTimeout));
  // A peer that has closed both ways needs to hear nothing.
  return absl::IsUnavailable(closed) ? absl::OkStatus() : closed;
}

absl::Status TunnelRelay::ToPeer() {
  if (!splice_) return CopyToPeer();
  const Ending ending = Splice(local_.get(), channel_->plain_fd(), traffic_.to_peer);
  if (ending.where == Ending::kSink) return SocketError(ending.error, channel_->peer());
  // A program that closed with something unread is ECONNRESET, after all that it wrote.
  if (ending.where == Ending::kSource && ending.error != ECONNRESET)
    return ErrnoError(ending.error, "reading what is to be sent");
  return EndToPeer();
}

absl::Status TunnelRelay::FromPeer() {
  if (!splice_) return CopyFromPeer();
  const Ending ending = Splice(channel_->plain_fd(), local_.get(), traffic_.from_peer);
  if (ending.where == Ending::kSource) return SocketError(ending.error, channel_->peer());
  if (ending.where == Ending::kSink) {
    LocalGone();
  } else {
    ::shutdown(local_.get(), SHUT_WR);
  }
  return absl::OkStatus();
}

absl::Status TunnelRelay::CopyToPeer() {
  const auto buffer = std::make_unique_for_overwrite<char[]>(kBufferBytes);
  for (;;) {
    const ssize_t n = ::recv(local_.get(), buffer.get(), kBufferBytes, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno == ECONNRESET)) return EndToPeer();
    if (n < 0) {
      if (errno == EAGAIN) {
        AwaitReady(local_.get(), POLLIN);
      } else if (errno != EINTR) {
        return ErrnoError(errno, "reading what is to be sent");
      }
      continue;
    }
    RETURN_IF_ERROR(channel_->Write(buffer.get(), static_cast<size_t>(n), Whenever()));
    traffic_.to_peer.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
  }
}

absl::StatusOr<size_t> TunnelRelay::Collect(char* buffer, absl::Status& ended) {
  iovec space{buffer, kBufferBytes};
  ASSIGN_OR_RETURN(size_t held, channel_->ReadSome(&space, 1, Whenever()));
  // A read gives one TLS record at most: what has arrived is collected before it is passed on.
  while (channel_->plain_fd() < 0 && held < kBufferBytes) {
    space = {buffer + held, kBufferBytes - held};
    auto more = channel_->ReadSome(&space, 1, Deadline::After(Duration(0)));
    if (!more.ok()) {
      if (!absl::IsDeadlineExceeded(more.status())) ended = more.status();
      break;
    }
    held += *more;
  }
  return held;
}

bool TunnelRelay::PassOn(const char* data, size_t size) {
  while (size > 0) {
    const ssize_t n = ::send(local_.get(), data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) {
      data += n;
      size -= static_cast<size_t>(n);
      traffic_.from_peer.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
    } else if (errno == EAGAIN) {
      AwaitReady(local_.get(), POLLOUT);
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

absl::Status TunnelRelay::CopyFromPeer() {
  const auto buffer = std::make_unique_for_overwrite<char[]>(kBufferBytes);
  absl::Status ended;
  while (ended.ok()) {
    auto held = Collect(buffer.get(), ended);
    if (!held.ok()) {
      ended = held.status();
    } else if (!PassOn(buffer.get(), *held)) {
      LocalGone();
      return absl::OkStatus();
    }
  }
  if (!absl::IsOutOfRange(ended)) return ended;
  ::shutdown(local_.get(), SHUT_WR);
  return absl::OkStatus();
}

absl::Status TunnelConnections::Reserve() {
  std::lock_guard lock(mutex_);
  if (stopping_) return absl::CancelledError("the tunnel was stopped");
  if (reserved_ >= max_)
    return Error(absl::StatusCode::kResourceExhausted, "{} connections are open already", max_);
  ++reserved_;
  return absl::OkStatus();
}

void TunnelConnections::Release() {
  std::lock_guard lock(mutex_);
  --reserved_;
}

bool TunnelConnections::Add(const std::shared_ptr<TunnelRelay>& relay) {
  std::lock_guard lock(mutex_);
  if (stopping_) {
    relay->Stop();
    return false;
  }
  relays_.insert(relay);
  return true;
}

void TunnelConnections::Remove(const std::shared_ptr<TunnelRelay>& relay) {
  std::lock_guard lock(mutex_);
  relays_.erase(relay);
  changed_.notify_all();
}

bool TunnelConnections::AwaitNone(Deadline deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline.when(), [this] { return relays_.empty(); });
}

bool TunnelConnections::Launch(std::function<void()> work) {
  std::lock_guard lock(mutex_);
  if (stopping_) return false;
  ++threads_;
  // The thread's own handle, set before the thread can need it: mutex_ is held.
  auto self = std::make_shared<std::thread>();
  *self = std::thread([this, self, work = std::move(work)] {
    work();
    std::thread before;
    {
      std::lock_guard inner(mutex_);
      before = std::exchange(ended_, std::move(*self));
      --threads_;
      changed_.notify_all();
    }
    if (before.joinable()) before.join();
  });
  return true;
}

void TunnelConnections::Relay(TunnelService service, const std::shared_ptr<TunnelRelay>& relay,
                              UniqueFd local) {
  TunnelTraffic& counters = traffic(service);
  ++counters.opened;
  ++counters.active;
  absl::Status ended = relay->Run(std::move(local));
  // In this order: who sees one connection less finds room for another.
  Release();
  --counters.active;
  if (!ended.ok()) Broken(service, ended);
  if (!callbacks_.on_idle || stopping()) return;
  uint32_t active = 0;
  for (const TunnelTraffic& t : traffic_) active += t.active;
  if (active == 0) callbacks_.on_idle();
}

void TunnelConnections::Broken(TunnelService service, const absl::Status& why) {
  if (stopping()) return;
  ++traffic(service).broken;
  LOG_INFO("tunnel, {}: {}", NameOf(service), Message(why));
  if (callbacks_.on_broken) callbacks_.on_broken(service, why);
}

void TunnelConnections::Stop() {
  std::unique_lock lock(mutex_);
  stopping_ = true;
  for (const auto& relay : relays_) relay->Stop();
  changed_.wait(lock, [this] { return threads_ == 0; });
  std::thread last = std::exchange(ended_, {});
  lock.unlock();
  if (last.joinable()) last.join();
}

bool TunnelConnections::stopping() const {
  std::lock_guard lock(mutex_);
  return stopping_;
}

TunnelCounts TunnelConnections::counts(TunnelService service) const {
  const TunnelTraffic& t = traffic_[static_cast<size_t>(service) - 1];
  return {t.to_peer.load(), t.from_peer.load(), t.opened.load(), t.broken.load(), t.active.load()};
}

}  // namespace baton::stream
