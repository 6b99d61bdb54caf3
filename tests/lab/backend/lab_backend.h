// A vhost-user block back-end for tests: what qemu-storage-daemon cannot do on request. It keeps an in-flight
// region, completes late and out of order, falls silent, or answers wrongly. Split rings, no indirect
// descriptors.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "agent/vhost/socket.h"
#include "agent/vhost/wire.h"
#include "agent/virtio/inflight.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/unix_socket.h"

namespace baton::lab {

struct LabBackendOptions {
  std::string socket;
  std::string image;
  bool inflight = false;  // offers INFLIGHT_SHMFD
  bool drains = false;    // GET_VRING_BASE waits until nothing is in flight
  // Offers GET_VRING_BASE_SKIP_DRAIN, or protocol bit 20 instead: stops without completing what it has, which
  // stays in the region.
  bool suspends = false, suspends_by_bit_20 = false;
  // Added to the base that such a stop is answered with.
  int32_t base_offset = 0;
  uint32_t delay_us = 0;  // each request takes up to so long, at random: completions come out of order
  uint32_t queues = 1;
  uint64_t less_features = 0;  // not offered
  // Protocol features that are not offered.
  uint64_t less_protocol = 0;
  // The request (by number) that is never answered.
  uint32_t silent_at = 0;
  // The request that is answered with a malformed reply.
  uint32_t garble_at = 0;
  // Tells of an error of the queue with each request that it fetches.
  bool tells_errors = false;
};

// Serves one connection after the other, on the calling thread, until `stop_fd` is readable.
class LabBackend {
 public:
  static absl::StatusOr<std::unique_ptr<LabBackend>> Create(LabBackendOptions options);
  ~LabBackend();
  absl::Status Run(int stop_fd);
  // Requests fetched so far. Any thread.
  uint64_t fetched() const { return fetched_.load(std::memory_order_relaxed); }

  static constexpr uint32_t kConfigSize = 60;

 private:
  struct Mapping {
    vhost::MemRegion region;
    uint8_t* base;
    uint64_t length;
  };
  struct IoRequest {
    uint16_t head;
    Clock::time_point due;
  };
  struct Queue {
    uint16_t size = 0;
    std::optional<vhost::VringAddr> addr;
    UniqueFd kick, call, err;
    bool running = false;
    uint16_t last_avail = 0;
    uint64_t counter = 1;
    std::vector<IoRequest> flight;
  };

  explicit LabBackend(LabBackendOptions options) : options_(std::move(options)) {}
  absl::Status Handle(vhost::WireMessage& m);
  void Reset();
  void Fetch(uint32_t index);
  void CompleteDue(uint32_t index, Clock::time_point now);
  void Complete(uint32_t index, const IoRequest& request);
  void Execute(Queue& queue, uint16_t head);
  void Recover(uint32_t index);
  void LogWrite(uint64_t gpa, uint64_t size);
  uint8_t* AtUser(uint64_t user_addr);
  uint8_t* AtGpa(uint64_t gpa, uint64_t size);
  virtio::InflightSplitHeader* Inflight(uint32_t index);
  absl::Status MapRegion(const vhost::MemRegion& region, int fd);

  const LabBackendOptions options_;
  UnixListener listener_;
  UniqueFd image_;
  uint64_t sectors_ = 0;
  vhost::Connection connection_;
  uint64_t features_ = 0, protocol_ = 0;
  std::vector<Mapping> memory_;
  std::map<uint32_t, Queue> queues_;
  uint8_t* log_ = nullptr;
  uint64_t log_size_ = 0;
  uint8_t* inflight_ = nullptr;
  vhost::InflightDescription inflight_description_{};
  std::mt19937 random_{1};
  std::atomic<uint64_t> fetched_{0};
};

}  // namespace baton::lab
