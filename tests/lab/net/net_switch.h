// The learning switch that a lab net device sits behind, and the wires that join such switches: in one
// process, between processes, and (a unix socket being a matter of the file system) between the network
// namespaces that play hosts.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "agent/virtio/net_protocol.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::lab {

// Longer than any frame of a device without segmentation offload.
inline constexpr size_t kMaxFrame = 65536;

// Which port an address was last seen at. Bounded: the address that was learnt first gives way.
class LearningSwitch {
 public:
  static constexpr int kFlood = -1;
  explicit LearningSwitch(size_t capacity = 1024) : capacity_(capacity) {}
  // Group addresses are not learnt.
  void Learn(const virtio::MacAddress& source, int port);
  int Lookup(const virtio::MacAddress& destination) const;
  // Forgets what was learnt at a port.
  void Forget(int port);
  // (address, port), in the order in which they were learnt.
  std::vector<std::pair<virtio::MacAddress, int>> Export() const;
  size_t size() const { return ports_.size(); }

 private:
  const size_t capacity_;
  std::map<virtio::MacAddress, int> ports_;
  std::deque<virtio::MacAddress> order_;
};

// One end of a wire: SOCK_SEQPACKET, a frame a packet. Never blocks; what the other end does not take in time
// is dropped, as on a real wire. Move-only, not thread-safe.
class Wire {
 public:
  // To a path where somebody listens. Unavailable or NotFound: nobody does (yet).
  static absl::StatusOr<Wire> Connect(const std::string& path);
  // Two ends within this process.
  static absl::StatusOr<std::pair<Wire, Wire>> Pair();
  explicit Wire(UniqueFd fd) : fd_(std::move(fd)) {}
  int fd() const { return fd_.get(); }
  // False: dropped.
  bool Send(std::span<const uint8_t> frame);
  // The next frame; nullopt: none is waiting. Unavailable: the other end is gone.
  absl::StatusOr<std::optional<std::vector<uint8_t>>> Receive();

 private:
  UniqueFd fd_;
};

// Where wires are plugged in. Removes its path at the end.
class WireListener {
 public:
  static absl::StatusOr<WireListener> Listen(const std::string& path);
  WireListener(WireListener&&) = default;
  WireListener& operator=(WireListener&&) = delete;
  ~WireListener();
  int fd() const { return fd_.get(); }
  // nullopt: nobody is waiting.
  std::optional<Wire> Accept();

 private:
  WireListener(UniqueFd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}
  UniqueFd fd_;
  std::string path_;
};

}  // namespace baton::lab
