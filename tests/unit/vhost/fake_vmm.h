// A VMM for tests of the mediator: speaks vhost-user by hand, right or wrong, and owns a little guest memory
// with one split ring in it. And the threads and files around it.
#pragma once

#include <gtest/gtest.h>
#include <sys/eventfd.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "agent/vhost/mediator.h"
#include "agent/vhost/socket.h"
#include "agent/virtio/features.h"
#include "tests/lab/device/blk_model.h"
#include "tests/lab/device/lab_device.h"
#include "tests/temp_dir.h"

namespace baton::vhost {

inline Deadline Soon() { return Deadline::After(std::chrono::seconds(30)); }

// What tests of the mediator want of a lab device: split rings, as plain as FakeVmm drives them.
struct BackendOptions {
  std::string socket, image;
  bool inflight = false;  // offers INFLIGHT_SHMFD
  // Offers GET_VRING_BASE_SKIP_DRAIN, or protocol bit 20 instead.
  bool suspends = false, suspends_by_bit_20 = false;
  // Added to the base that such a stop is answered with.
  int32_t base_offset = 0;
  uint32_t delay_us = 0;  // each request takes up to so long, at random: completions come out of order
  bool no_space = false;  // holds writes, and tells of an error for each
  bool suspends_by_status = false;                // offers the feature SUSPEND of VIRTIO 1.4
  uint64_t less_features = 0, less_protocol = 0;  // not offered
  uint32_t silent_at = 0;                         // the request (by number) that is never answered
  uint32_t garble_at = 0;                         // the request that is answered with a malformed reply
};

// A lab device on a thread.
class BackendThread {
 public:
  explicit BackendThread(const BackendOptions& options);
  ~BackendThread();
  // Waits until `n` requests have been fetched by it in all.
  bool AwaitFetched(uint64_t n);
  // A counter of the lab device.
  uint64_t Counter(const std::string& name);

 private:
  std::unique_ptr<lab::LabDevice> backend_;
  UniqueFd stop_;
  std::thread thread_;
};

class FakeVmm {
 public:
  static constexpr uint64_t kMemory = 1 << 20, kUser = 0x7f0000000000;
  static constexpr uint16_t kRingSize = 16;
  static constexpr uint64_t kDesc = 0x1000, kAvail = 0x2000, kUsed = 0x3000, kBuffers = 0x10000;

  explicit FakeVmm(const std::string& socket);
  ~FakeVmm();

  // The message and, where one is due, its reply.
  absl::Status Send(Request request, std::span<const uint8_t> payload, std::vector<int> fds = {},
                    bool need_reply = false);
  absl::StatusOr<WireMessage> Receive();
  // A request with need_reply; the result, or an error when the connection was closed.
  absl::StatusOr<uint64_t> Set(Request request, std::span<const uint8_t> payload, std::vector<int> fds = {});
  template <typename T>
  absl::StatusOr<uint64_t> Set(Request request, const T& payload, std::vector<int> fds = {}) {
    return Set(request, Bytes(payload), std::move(fds));
  }
  absl::StatusOr<uint64_t> Get(Request request);
  absl::StatusOr<uint32_t> GetBase(uint32_t index = 0);
  // True if the mediator has closed the connection.
  bool Closed();

  // Everything up to a running ring.
  void Negotiate(uint64_t less_protocol = 0);
  void SetMemory();
  void StartRing(uint16_t base = 0);

  // A new connection of the same VMM: its memory, rings and notifications stay.
  void Reconnect(const std::string& socket);
  // The guest was reset: its driver sets an empty ring up at the same place.
  void ClearRing();

  // Puts a write (or read) of sector `sector` at descriptors 3 * slot and, unless told otherwise, kicks.
  void Submit(uint16_t slot, bool write, uint64_t sector, uint8_t fill = 0, bool kick = true);
  uint16_t UsedIndex() const;
  // Waits until used->idx is `index`.
  bool AwaitUsed(uint16_t index);
  // A copy of another VMM's memory was put here, whose avail->idx that is.
  void SetAvail(uint16_t avail) { avail_ = avail; }
  uint8_t* At(uint64_t gpa) { return memory_ + gpa; }
  int memory_fd() const { return memory_fd_.get(); }

 private:
  Connection connection_;
  UniqueFd memory_fd_, kick_, call_;
  uint8_t* memory_ = nullptr;
  uint16_t avail_ = 0;
};

// A directory, an image, a back-end, a mediator.
class MediatorFixture : public ::testing::Test {
 protected:
  MediatorFixture();
  ~MediatorFixture() override;
  void StartBackend(BackendOptions options = {});
  MediatorOptions Options();
  void StartMediator();
  // `on_change` is the fixture's.
  void StartMediator(MediatorOptions options, MediatorCallbacks callbacks = {});
  // Waits until the mediator says so of its device.
  bool AwaitDevice(const std::function<bool(const v1::Device&)>& wanted);
  bool Becomes(v1::Device::State state);
  bool AwaitReconnects(uint32_t count);

  std::mutex change_mutex_;
  std::condition_variable device_changed_;  // by the mediator, of a change
  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  std::unique_ptr<BackendThread> backend_;
  std::unique_ptr<memory::GuestRam> ram_;
  std::unique_ptr<Mediator> mediator_;
};

}  // namespace baton::vhost
