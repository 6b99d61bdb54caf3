// A guest with a disk, and the front-end between it and a lab device: both stay when the device dies, as a
// guest and its VMM do.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "agent/vhost/socket.h"
#include "agent/virtio/driver_queue.h"
#include "agent/virtio/features.h"
#include "tests/lab/device/blk_model.h"
#include "tests/lab/device/guest_map.h"
#include "tests/lab/device/lab_device.h"
#include "tests/temp_dir.h"

namespace baton::lab {

inline constexpr uint64_t kMiB = 1 << 20;
inline constexpr uint32_t kRead = 0, kWriteOut = 1, kFlushAll = 4, kIdentify = 8, kAppend = 15;

inline Deadline InTime() { return Deadline::After(std::chrono::seconds(20)); }

// A directory with an image, removed at the end.
class LabDirectory {
 public:
  std::string Path(const std::string& name) const { return dir_ / name; }
  // A disk of zeroes at "image".
  void MakeImage(uint64_t bytes) const;

 private:
  const test::TempDir dir_;
};

// A device on a thread of its own.
class DeviceThread {
 public:
  DeviceThread(LabDeviceOptions options, BlkOptions blk);
  DeviceThread(LabDeviceOptions options, std::unique_ptr<DeviceModel> model);
  ~DeviceThread();
  LabDevice& operator*() { return *device_; }
  LabDevice* operator->() { return device_.get(); }
  // Waits for Run's end without asking for it (a crash).
  absl::Status Join();
  // Succeeds, or the test fails.
  nlohmann::json Command(const nlohmann::json& command);
  int64_t Counter(const std::string& name);
  // Blocks until the counter is at least so much; false after 20 s.
  bool Await(const std::string& counter, int64_t at_least);

 private:
  std::unique_ptr<LabDevice> device_;
  UniqueFd stop_;
  absl::Status result_;
  std::thread thread_;
};

struct Finished {
  uint64_t token;
  uint8_t status;
  uint32_t written;
};

class LabFront {
 public:
  static constexpr uint64_t kMemory = 16 << 20, kUser = 0x7f0000000000, kGpa = 0x100000;
  static constexpr uint64_t kQueueBytes = 1 << 20;
  static constexpr uint32_t kSlotBytes = 8192;

  // `features`: ring features to accept; `size`: of each ring.
  LabFront(uint64_t features, uint32_t queues, uint16_t size);
  ~LabFront() { Disconnect(); }

  // Connects, negotiates, hands over memory and (kept from one connection to the next) the in-flight region,
  // and starts the rings at the bases that SetBase left there.
  absl::Status Connect(const std::string& socket);
  void Disconnect() { connection_.Close(); }
  absl::Status StartQueue(uint32_t queue);
  // Stops a ring and keeps the answer as its base.
  absl::StatusOr<uint32_t> Stop(uint32_t queue, uint32_t message = 11);
  // Sends the request only; Answer waits for the answer.
  absl::Status SendStop(uint32_t queue, uint32_t message);
  absl::StatusOr<uint32_t> Answer(uint32_t queue);
  void SetBase(uint32_t queue, uint32_t base) { bases_[queue] = base; }
  uint32_t base(uint32_t queue) const { return bases_.at(queue); }
  // need_reply, and the reply's value.
  absl::StatusOr<uint64_t> Set(uint32_t request, std::span<const uint8_t> payload, std::vector<int> fds = {});
  absl::StatusOr<uint64_t> Get(uint32_t request);
  absl::Status Send(uint32_t request, std::span<const uint8_t> payload, std::vector<int> fds = {},
                    bool need_reply = false);
  vhost::Connection& connection() { return connection_; }
  absl::Status OpenChannel();
  vhost::Connection& channel() { return channel_; }
  absl::Status StartLog();
  bool Logged(uint64_t gpa) const;

  // A request of one queue; `tag` fills the data of a write, `slot` is its token and its buffer's place. Not
  // visible before Kick.
  absl::Status Add(uint32_t queue, uint32_t slot, uint32_t type, uint64_t sector, uint32_t bytes,
                   uint64_t tag);
  void Kick(uint32_t queue);
  // Adds and kicks; fails the test on an error.
  void Submit(uint32_t queue, uint32_t slot, uint32_t type, uint64_t sector, uint32_t bytes = 512,
              uint64_t tag = 0);
  // What has ended since.
  std::vector<Finished> Reap(uint32_t queue);
  // Waits until so many have ended since the last call (in order of ending), or the time is up.
  std::vector<Finished> Await(uint32_t queue, size_t count, Deadline deadline = InTime());
  // The u64 at byte `offset` of the slot's data.
  uint64_t Data(uint32_t queue, uint32_t slot, uint32_t offset = 8) const;
  uint64_t BufferGpa(uint32_t queue, uint32_t slot) const;
  uint8_t* At(uint64_t gpa) { return map_.data() + (gpa - kGpa); }

  virtio::DriverQueue& driver(uint32_t queue) { return *drivers_[queue]; }
  uint64_t features() const { return features_; }
  // Protocol features that are not accepted.
  uint64_t without_protocol = 0;
  // Names of queues' regions.
  const virtio::QueueLayout& layout(uint32_t queue) const { return layouts_[queue]; }
  const vhost::InflightDescription& inflight() const { return inflight_; }
  int inflight_fd() const { return inflight_fd_.get(); }
  int error_fd(uint32_t queue) const { return errors_[queue].get(); }

 private:
  uint64_t features_;
  uint16_t size_;
  UniqueFd memory_fd_, inflight_fd_, log_fd_;
  SharedMapping map_, log_;
  virtio::GuestMemory memory_;
  std::vector<virtio::QueueLayout> layouts_;
  std::vector<std::unique_ptr<virtio::DriverQueue>> drivers_;
  std::vector<UniqueFd> kicks_, calls_, errors_;
  std::map<uint32_t, uint32_t> bases_;
  vhost::InflightDescription inflight_{};
  vhost::Connection connection_, channel_;
  bool logging_ = false;
};

}  // namespace baton::lab
