// Stands for the destination agent's peer port: accepts connections, reads their preambles and hands them on,
// passing every byte through itself, so that a test can cut all connections at a chosen message of channel 0.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "agent/migration/wake_fd.h"
#include "agent/stream/dial.h"
#include "agent/stream/memory_frame.h"
#include "baton/v1/peer.pb.h"

namespace baton::migration::test {

class CuttingProxy {
 public:
  using Accept = std::function<absl::Status(const stream::PreambleBytes&, UniqueFd)>;
  // Called for every message of channel 0 but clock probes, before it is passed on; false cuts everything.
  using Filter = std::function<bool(bool to_destination, const v1::PeerMessage&)>;

  CuttingProxy() {
    listener_.reset(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    (void)bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), size);
    (void)listen(listener_.get(), 64);
    (void)getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&address), &size);
    address_ = "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
    thread_ = std::thread([this] { Serve(); });
  }
  ~CuttingProxy() {
    stop_.Signal();
    thread_.join();
    Cut();
    for (std::thread& pump : pumps_) pump.join();
  }
  const std::string& address() const { return address_; }
  void set_accept(Accept accept) {
    std::lock_guard lock(mutex_);
    accept_ = std::move(accept);
  }
  // The one before is not running any more when this returns.
  void set_filter(Filter filter) {
    std::unique_lock lock(mutex_);
    filter_ = std::move(filter);
    filtered_.wait(lock, [this] { return filtering_ == 0; });
  }
  // The first bytes of each memory channel, or the next message of channel 0 in one direction, become ones
  // that mean nothing. While set, and not for verdict queries.
  // kPage: only one byte of one page, the last of the first frame of memory, which has at least 64 of them.
  enum class Damage { kNone, kMemory, kPage, kToDestination, kToSource };
  std::atomic<Damage> damage{Damage::kNone};
  std::atomic<int> damaged_pages{0};
  // Verdict queries are dropped for now.
  std::atomic<bool> unreachable{false};

  // Waits until so many verdict queries have come in; false at the deadline.
  bool WaitQueries(int count, Deadline deadline) {
    std::unique_lock lock(mutex_);
    return asked_.wait_until(lock, deadline.when(), [&] { return queries_ >= count; });
  }

  void Cut() {
    std::lock_guard lock(mutex_);
    for (const UniqueFd& fd : sockets_) shutdown(fd.get(), SHUT_RDWR);
  }

 private:
  void Serve() {
    for (;;) {
      pollfd entries[2] = {{listener_.get(), POLLIN, 0}, {stop_.fd(), POLLIN, 0}};
      if (poll(entries, 2, -1) < 0) continue;
      if (entries[1].revents) return;
      UniqueFd client(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      auto bytes = stream::ReadPreamble(client.get(), Deadline::After(std::chrono::seconds(5)));
      if (!bytes.ok()) continue;
      auto preamble = stream::DecodePreamble(*bytes);
      if (!preamble.ok()) continue;
      const bool query = preamble->kind == stream::PreambleKind::kVerdictQuery;
      if (query) {
        std::lock_guard lock(mutex_);
        ++queries_;
        asked_.notify_all();
      }
      int pair[2];
      if (unreachable || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) continue;
      UniqueFd ours(pair[0]), theirs(pair[1]);
      std::lock_guard lock(mutex_);
      if (!accept_ || !accept_(*bytes, std::move(theirs)).ok()) continue;
      const int a = client.get(), b = ours.get();
      sockets_.push_back(std::move(client));
      sockets_.push_back(std::move(ours));
      const bool control = preamble->channel == 0 && !query;
      const Damage memory = query ? Damage::kNone : Damage::kMemory;
      pumps_.emplace_back(
          [=, this] { Pump(a, b, control, true, control ? Damage::kToDestination : memory); });
      pumps_.emplace_back(
          [=, this] { Pump(b, a, control, false, control ? Damage::kToSource : Damage::kNone); });
    }
  }
  // Follows the bytes of a memory channel to the page that is to be damaged.
  class PageDamage {
   public:
    // True if it was in these bytes.
    bool Do(char* data, size_t size) {
      const size_t begin = seen_;
      seen_ += size;
      if (head_.size() < stream::kFrameHeaderSize) {
        head_.append(data, std::min(size, stream::kFrameHeaderSize - head_.size()));
        if (head_.size() < stream::kFrameHeaderSize) return false;
        uint32_t length;
        std::memcpy(&length, head_.data() + 24, sizeof length);
        const auto type = static_cast<stream::FrameType>(head_[4]);
        if (type != stream::FrameType::kData || length < 64 * memory::kPageSize) return false;
        const size_t checksums = head_[5] & stream::kFlagPageChecksums ? length / memory::kPageSize * 8 : 0;
        target_ = stream::kFrameHeaderSize + checksums + length - memory::kPageSize;
      }
      if (target_ < begin || target_ >= seen_) return false;
      data[target_ - begin] = static_cast<char>(data[target_ - begin] ^ 1);
      return true;
    }

   private:
    std::string head_;
    size_t seen_ = 0;
    size_t target_ = SIZE_MAX;
  };

  bool Passes(bool to_destination, const v1::PeerMessage& message) {
    Filter filter;
    {
      std::lock_guard lock(mutex_);
      if (!filter_) return true;
      filter = filter_;
      ++filtering_;
    }
    const bool passes = filter(to_destination, message);
    std::lock_guard lock(mutex_);
    --filtering_;
    filtered_.notify_all();
    return passes;
  }

  // `mine`: the damage that would be done here.
  void Pump(int from, int to, bool control, bool to_destination, Damage mine) {
    bool first = true;
    std::string pending;
    PageDamage page;
    std::vector<char> buffer(1 << 16);
    const auto pass = [&](const char* data, size_t size) {
      while (size > 0) {
        const ssize_t n = send(to, data, size, MSG_NOSIGNAL);
        if (n <= 0) return false;
        data += n;
        size -= static_cast<size_t>(n);
      }
      return true;
    };
    for (;;) {
      pollfd readable{from, POLLIN, 0};
      (void)poll(&readable, 1, -1);
      const ssize_t n = recv(from, buffer.data(), buffer.size(), MSG_DONTWAIT);
      if (n < 0 && errno == EAGAIN) continue;
      if (n <= 0) break;
      if (mine != Damage::kNone && damage == mine && first) {
        std::fill_n(buffer.data(), std::min<ssize_t>(n, 64), '\xff');
        control = false;  // there are no messages to be found any more
      }
      if (mine == Damage::kMemory && damage == Damage::kPage)
        damaged_pages += page.Do(buffer.data(), static_cast<size_t>(n));
      first = false;
      if (!control) {
        if (!pass(buffer.data(), static_cast<size_t>(n))) break;
        continue;
      }
      pending.append(buffer.data(), static_cast<size_t>(n));
      uint32_t length;
      while (pending.size() >= 4 && (std::memcpy(&length, pending.data(), 4), pending.size() >= 4 + length)) {
        v1::PeerMessage message;
        (void)message.ParseFromArray(pending.data() + 4, static_cast<int>(length));
        if (!message.has_clock() && !Passes(to_destination, message)) {
          Cut();
          return;
        }
        if (!pass(pending.data(), 4 + length)) break;
        pending.erase(0, 4 + length);
      }
    }
    shutdown(to, SHUT_WR);
    shutdown(from, SHUT_RD);
  }

  UniqueFd listener_;
  std::string address_;
  WakeFd stop_;
  std::mutex mutex_;
  std::condition_variable asked_;
  int queries_ = 0;    // guarded by mutex_
  Accept accept_;      // guarded by mutex_
  Filter filter_;      // guarded by mutex_
  int filtering_ = 0;  // calls of a filter; guarded by mutex_
  std::condition_variable filtered_;
  std::list<UniqueFd> sockets_;   // guarded by mutex_
  std::list<std::thread> pumps_;  // of the serving thread until it was joined
  std::thread thread_;
};

}  // namespace baton::migration::test
