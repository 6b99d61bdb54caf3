#include "tests/lab/net/net_switch.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/unix_socket.h"

namespace baton::lab {
namespace {

// Room for some hundred full frames in flight.
constexpr int kWireBuffer = 1 << 20;

absl::StatusOr<UniqueFd> PacketSocket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return ErrnoError(errno, "a wire's socket");
  ::setsockopt(fd.get(), SOL_SOCKET, SO_SNDBUF, &kWireBuffer, sizeof kWireBuffer);
  return fd;
}

sockaddr_un WireAddress(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(), std::min(path.size(), sizeof address.sun_path - 1));
  return address;
}

}  // namespace

void LearningSwitch::Learn(const virtio::MacAddress& source, int port) {
  if (source[0] & 1) return;
  auto [it, fresh] = ports_.try_emplace(source, port);
  if (!fresh) {
    it->second = port;
    return;
  }
  order_.push_back(source);
  if (order_.size() > capacity_) {
    ports_.erase(order_.front());
    order_.pop_front();
  }
}

int LearningSwitch::Lookup(const virtio::MacAddress& destination) const {
  auto it = ports_.find(destination);
  return it == ports_.end() ? kFlood : it->second;
}

void LearningSwitch::Forget(int port) {
  std::erase_if(ports_, [&](const auto& entry) { return entry.second == port; });
  std::erase_if(order_, [&](const auto& mac) { return !ports_.count(mac); });
}

std::vector<std::pair<virtio::MacAddress, int>> LearningSwitch::Export() const {
  std::vector<std::pair<virtio::MacAddress, int>> out;
  for (const auto& mac : order_) out.emplace_back(mac, ports_.at(mac));
  return out;
}

absl::StatusOr<Wire> Wire::Connect(const std::string& path) {
  RETURN_IF_ERROR(CheckUnixPath(path));
  ASSIGN_OR_RETURN(UniqueFd fd, PacketSocket());
  const sockaddr_un address = WireAddress(path);
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return ErrnoError(errno, "wire " + path);
  return Wire(std::move(fd));
}

absl::StatusOr<std::pair<Wire, Wire>> Wire::Pair() {
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0)
    return ErrnoError(errno, "a wire's sockets");
  for (int fd : fds) ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kWireBuffer, sizeof kWireBuffer);
  return std::pair(Wire(UniqueFd(fds[0])), Wire(UniqueFd(fds[1])));
}

bool Wire::Send(std::span<const uint8_t> frame) {
  return ::send(fd_.get(), frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT) ==
         static_cast<ssize_t>(frame.size());
}

absl::StatusOr<std::optional<std::vector<uint8_t>>> Wire::Receive() {
  std::vector<uint8_t> frame(kMaxFrame);
  const ssize_t n = ::recv(fd_.get(), frame.data(), frame.size(), MSG_DONTWAIT);
  if (n > 0) {
    frame.resize(static_cast<size_t>(n));
    return std::optional(std::move(frame));
  }
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return std::nullopt;
  return absl::UnavailableError("the other end of the wire is gone");
}

absl::StatusOr<WireListener> WireListener::Listen(const std::string& path) {
  RETURN_IF_ERROR(CheckUnixPath(path));
  ASSIGN_OR_RETURN(UniqueFd fd, PacketSocket());
  ::unlink(path.c_str());
  const sockaddr_un address = WireAddress(path);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(fd.get(), 16) != 0)
    return ErrnoError(errno, "wire " + path);
  return WireListener(std::move(fd), path);
}

WireListener::~WireListener() {
  if (fd_) ::unlink(path_.c_str());
}

std::optional<Wire> WireListener::Accept() {
  UniqueFd fd(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!fd) return std::nullopt;
  ::setsockopt(fd.get(), SOL_SOCKET, SO_SNDBUF, &kWireBuffer, sizeof kWireBuffer);
  return Wire(std::move(fd));
}

}  // namespace baton::lab
