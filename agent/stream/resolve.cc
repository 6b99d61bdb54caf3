#include "agent/stream/resolve.h"

#include <netdb.h>

#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>

namespace baton::stream {
namespace {

struct Lookup {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  int result = EAI_FAIL;
  std::vector<SocketAddress> addresses;
};

int Query(const std::string& host, uint16_t port, int flags, std::vector<SocketAddress>& out) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  int result = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list);
  if (result != 0) return result;
  for (const addrinfo* entry = list; entry != nullptr; entry = entry->ai_next) {
    SocketAddress address;
    std::memcpy(&address.storage, entry->ai_addr, entry->ai_addrlen);
    address.length = entry->ai_addrlen;
    out.push_back(address);
  }
  ::freeaddrinfo(list);
  return 0;
}

}  // namespace

absl::StatusOr<std::vector<SocketAddress>> Resolve(const std::string& host, uint16_t port,
                                                   Deadline deadline) {
  std::vector<SocketAddress> numeric;
  if (Query(host, port, AI_NUMERICHOST, numeric) == 0) return numeric;
  // getaddrinfo(3) takes no deadline and cannot be interrupted; a thread of its own can be left behind. It
  // holds nothing but the lookup, and ends when the resolver's own time-outs do.
  auto lookup = std::make_shared<Lookup>();
  std::thread([lookup, host, port] {
    std::vector<SocketAddress> addresses;
    int result = Query(host, port, AI_ADDRCONFIG, addresses);
    std::lock_guard lock(lookup->mutex);
    lookup->done = true;
    lookup->result = result;
    lookup->addresses = std::move(addresses);
    lookup->changed.notify_all();
  }).detach();
  std::unique_lock lock(lookup->mutex);
  if (!lookup->changed.wait_until(lock, deadline.when(), [&] { return lookup->done; })) {
    return Error(absl::StatusCode::kDeadlineExceeded, "the name '{}' could not be resolved in time", host);
  }
  if (lookup->result != 0) {
    return Error(absl::StatusCode::kNotFound, "the name '{}' could not be resolved: {}", host,
                 ::gai_strerror(lookup->result));
  }
  return std::move(lookup->addresses);
}

}  // namespace baton::stream
