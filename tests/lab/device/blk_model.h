// The lab's virtio-blk device: requests of VIRTIO 1.x 5.2 over a file, with latency, reordering and a full
// disk on command.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <random>
#include <string>
#include <vector>

#include "agent/virtio/replay_order.h"
#include "agent/virtio/request_class.h"
#include "tests/lab/device/device_model.h"
#include "tests/lab/device/guest_map.h"
#include "tests/lab/device/journal.h"
#include "tests/lab/device/storage.h"

namespace baton::lab {

struct BlkOptions {
  std::string image;
  uint32_t queues = 1;
  bool io_uring = true;
  std::string serial = "baton-lab";
  // Zones of so many sectors (0: not zoned). Write pointers are kept in IMAGE.zones, shared by all devices
  // over the image.
  uint32_t zone_sectors = 0;
  // Appends what it does to this file (see journal.h); the tag of a write is the u64 at this offset of its
  // data.
  std::string journal;
  uint32_t journal_tag_offset = 8;
  // Each request takes a time between these two, at random.
  uint32_t latency_us = 0;
  uint32_t latency_max_us = 0;
  // The time passes after the storage did its work, before the guest is told; else before it is asked.
  bool latency_after = false;
  // Requests from the in-flight region take their time like others.
  bool delay_replays = true;
  // Ended requests are collected until there are so many (or nothing else runs) and completed in random
  // order.
  uint32_t shuffle = 0;
  // No space left: writes, discards and zeroing are held until there is.
  bool no_space = false;
  uint64_t seed = 1;
};

class BlkModel final : public DeviceModel {
 public:
  static absl::StatusOr<std::unique_ptr<BlkModel>> Create(BlkOptions options);

  void Attach(DeviceHost* host) override;
  uint64_t Features() const override;
  uint32_t Queues() const override { return options_.queues; }
  std::span<const uint8_t> Config() const override { return config_; }
  absl::Status WriteConfig(uint32_t offset, std::span<const uint8_t> data, bool migration) override;
  void FeaturesAccepted(uint64_t features) override;
  void Started(uint32_t queue) override;
  void Replay(IoRequest* request) override;
  void Available(uint32_t queue) override;
  void Published(uint32_t queue, uint64_t counter) override;
  void Stop(uint32_t queue, StopMode mode) override;
  void Reset() override;
  void Tick(Clock::time_point now) override;
  nlohmann::json Describe() const override;
  absl::Status Set(const nlohmann::json& command) override;

  static constexpr uint32_t kConfigSize = 96;

 private:
  enum class State : uint8_t {
    kFree,
    kDelayed,   // waits for its time before the storage is asked
    kBlocked,   // a request from the in-flight region that overlaps goes first
    kRunning,   // the storage works
    kHeld,      // no space left
    kRested,    // done, waits for its time before the guest is told
    kCollected  // done, waits for others
  };
  struct Work {
    IoRequest* io = nullptr;
    State state = State::kFree;
    uint32_t generation = 0;  // of this slot: what the heap of times names may be gone
    uint32_t type = 0;
    uint64_t sector = 0;
    uint64_t offset = 0;  // extent, in bytes
    uint64_t length = 0;
    uint64_t order = 0;
    uint64_t tag = 0;
    uint32_t operation = 0;
    uint32_t segment = 0;  // of a discard or zeroing, next to do
    uint8_t status = 0;
    bool refused = false;  // it has its status already
    uint32_t written = 0;
    size_t replay = 0;      // index in the queue's order, if it is one
    bool punch = false;     // zeroes by holes
    bool executed = false;  // the storage has done it
    bool abandon = false;   // is to be given up as soon as the storage lets go
    uint8_t* status_at = nullptr;
  };
  struct Queue {
    std::vector<Work> work;  // by slot
    std::optional<StopMode> stopping;
    // Slots of what came from the in-flight region, oldest first, and in which order they go. Empty when all
    // are done.
    std::vector<uint32_t> replays;
    std::optional<virtio::ReplayOrder> order;
    // New requests that wait for one of them.
    std::vector<uint32_t> blocked;
    uint64_t run = 0;  // of the journal
  };
  struct DiscardSegment {
    uint64_t sector;
    uint32_t num;
    uint32_t flags;
  };
  struct Due {
    Clock::time_point when;
    uint64_t order;
    uint32_t queue, slot, generation;
    friend bool operator>(const Due& a, const Due& b) {
      return a.when != b.when ? a.when > b.when : a.order > b.order;
    }
  };

  explicit BlkModel(BlkOptions options);
  Work& At(uint32_t queue, uint32_t slot) { return queues_[queue].work[slot]; }
  Work& WorkOf(const IoRequest& io);
  // Takes a request over; Start lets it go.
  Work& Admit(IoRequest* io);
  void Start(Work& w);
  bool Parse(Work& w);
  virtio::BlkRequest Classify(const Work& w);
  void StartReplays(uint32_t queue);
  void ReplayEnded(Work& w);
  bool Delay(Work& w, State state);
  void Begin(Work& w);
  void StartOperation(Work& w);
  void StartZoneAppend(Work& w);
  bool StartSegment(Work& w);
  void OperationEnded(Work& w, int result);
  void Executed(Work& w);
  void Ended(Work& w);
  void Collect(Work& w);
  void ReleaseCollected(bool all);
  void Finish(Work& w);
  void Abandon(Work& w);
  void Hold(Work& w);
  void RetryHeld();
  void Retime();
  void GatherIo(Work& w, bool write);
  void Record(JournalEvent event, const Work& w);
  void PointStatus(Work& w);
  void AppendToReport(Work& w);
  bool WriteThrough() const;

  BlkOptions options_;
  DeviceHost* host_ = nullptr;
  std::unique_ptr<Storage> storage_;
  Journal journal_;
  std::array<uint8_t, kConfigSize> config_{};
  SharedMapping zones_;  // a u64 write pointer (sectors from the zone's start) for each zone
  std::vector<Queue> queues_;
  std::priority_queue<Due, std::vector<Due>, std::greater<>> times_;
  std::vector<std::pair<uint32_t, uint32_t>> held_, collected_;
  std::vector<uint8_t> head_;
  std::vector<iovec> scratch_;
  std::mt19937_64 random_;
  uint64_t next_order_ = 0;
  uint32_t outstanding_ = 0;
  int64_t *held_now_ = nullptr, *held_ever_ = nullptr, *executed_ever_ = nullptr;
  uint64_t fail_next_ = 0;
  struct Extent {
    uint64_t offset, length, tag;
  };
  // Finished and not seen by the driver yet, for the journal: by queue and counter.
  std::map<std::pair<uint32_t, uint64_t>, Extent> unpublished_;
};

}  // namespace baton::lab
