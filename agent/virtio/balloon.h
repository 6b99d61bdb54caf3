// The device side of virtio-balloon (VIRTIO 1.x, 5.5): which queue is which, the configuration space, and
// what the buffers that a driver puts into the queues mean. Pure: queues and memory are the caller's.
//
// Security model: the driver is the guest. Ranges are reported to the sink as the guest named them, after
// overflow was excluded; whether there is memory at an address is for the sink to judge. Whatever the guest
// sends, it can do no more than make a session of hints useless or lose the content of its own memory.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "agent/virtio/features.h"
#include "agent/virtio/memory_view.h"
#include "common/status.h"

namespace baton::virtio {

// Feature bits of the balloon.
inline constexpr uint64_t kBalloonFMustTellHost = Bit(0);
inline constexpr uint64_t kBalloonFStatsVq = Bit(1);
inline constexpr uint64_t kBalloonFDeflateOnOom = Bit(2);
inline constexpr uint64_t kBalloonFFreePageHint = Bit(3);
inline constexpr uint64_t kBalloonFPagePoison = Bit(4);
inline constexpr uint64_t kBalloonFReporting = Bit(5);

enum class BalloonQueue { kInflate, kDeflate, kStats, kFreePage, kReporting };

// Queues are numbered without gaps: those of features that were not negotiated do not exist and the later
// ones move up. nullopt: there is no such queue with these features.
std::optional<BalloonQueue> BalloonQueueAt(uint64_t acked, uint32_t index);
std::optional<uint32_t> BalloonQueueIndex(uint64_t acked, BalloonQueue queue);
uint32_t BalloonQueueCount(uint64_t acked);

// Unit of inflate and deflate, whatever the guest's page size.
inline constexpr uint64_t kBalloonPage = 4096;

// The configuration space, little endian also for legacy drivers (5.5.4).
inline constexpr uint32_t kBalloonConfigSize = 16;
inline constexpr uint32_t kBalloonConfigNumPages = 0;  // wanted by the device
inline constexpr uint32_t kBalloonConfigActual = 4;    // written by the driver
inline constexpr uint32_t kBalloonConfigCmdId = 8;     // free_page_hint_cmd_id
inline constexpr uint32_t kBalloonConfigPoison = 12;   // written by the driver

// Command ids of free page hinting. 0 and 1 are reserved; sessions take ids from kHintFirstId on and start
// there again after the last one.
inline constexpr uint32_t kHintStop = 0;
inline constexpr uint32_t kHintDone = 1;
inline constexpr uint32_t kHintFirstId = 0x80000000;
// Sessions without an answer that are remembered. A driver that leaves more than that unanswered is asked no
// more.
inline constexpr size_t kMaxOpenIds = 1024;

// A descriptor of a chain, in the order of the chain.
struct BalloonBuffer {
  uint64_t gpa = 0;
  uint32_t size = 0;
  bool device_writes = false;  // the driver made it writable for the device
};

// What the guest said, to whoever has the memory. Called within HandleChain.
class BalloonSink {
 public:
  virtual ~BalloonSink() = default;
  virtual void OnInflate(uint64_t gpa, uint64_t size) = 0;
  virtual void OnDeflate(uint64_t gpa, uint64_t size) = 0;
  // Free until the chain is returned to the driver, and no longer. Not called while the driver has a poison
  // value other than 0: then the content is not the device's to lose.
  virtual void OnReported(uint64_t gpa, uint64_t size) = 0;
  // The driver has begun to answer the current command id.
  virtual void OnHintStart() = 0;
  // Was free at some time after the current command id was published. The driver may take the page back and
  // write it at *any* later time, also before the device has seen this hint.
  virtual void OnHint(uint64_t gpa, uint64_t size) = 0;
  // The driver will send no more hints of this command id (in-band, so behind all of them).
  virtual void OnHintStop() = 0;
};

struct BalloonStat {
  uint16_t tag = 0;
  uint64_t value = 0;
};

// What moves to another host beside the rings.
struct BalloonState {
  uint32_t num_pages = 0;
  uint32_t actual = 0;
  uint32_t cmd_id = kHintDone;  // as in the configuration space
  uint32_t last_id = 0;         // the last id given to a session; 0: none yet
  uint32_t poison_val = 0;
  // Ids that were published and for which no STOP has come: not to be used again.
  std::vector<uint32_t> open_ids;
};

// Not thread-safe.
class BalloonDevice {
 public:
  enum class HintStatus {
    kStop,       // the configuration space says STOP
    kRequested,  // an id was published, the driver has not begun
    kStarted,    // the driver answers it
    kDone,       // the configuration space says DONE
  };

  // What the driver has negotiated; queues and the meaning of writes to the configuration space follow it.
  void SetFeatures(uint64_t acked) { acked_ = acked; }
  uint64_t features() const { return acked_; }

  // The configuration space. Reads beyond its end give zeroes.
  void ReadConfig(uint32_t offset, std::span<uint8_t> out) const;
  // A write of the driver. InvalidArgument if it leaves the space. Fields that are not the driver's to write
  // are ignored. `front_end`: the VMM puts back what a device at another host had; all fields are taken.
  absl::Status WriteConfig(uint32_t offset, std::span<const uint8_t> data, bool front_end = false);
  uint32_t actual() const { return state_.actual; }
  uint32_t poison() const { return acked_ & kBalloonFPagePoison ? state_.poison_val : 0; }
  // Pages that the driver shall give up; needs a configuration interrupt.
  void SetNumPages(uint32_t pages) { state_.num_pages = pages; }

  // Whether a chain may be returned at once.
  enum class Disposition { kUsed, kHeld };
  // One chain of `queue`. Held is only a statistics buffer; it is returned by TakeHeldStats. Malformed
  // content is ignored, as a device does, and counted.
  Disposition HandleChain(BalloonQueue queue, uint16_t head, std::span<const BalloonBuffer> chain,
                          const MemoryView& memory, BalloonSink& sink);
  uint64_t malformed() const { return malformed_; }

  // Statistics: the last ones that came. The chain of the statistics queue that the device keeps until it
  // wants new ones: nullopt if there is none. After TakeHeldStats the caller returns it (to ask for new ones)
  // or winds the queue back by one entry (at a stop: the driver will find it not fetched).
  const std::vector<BalloonStat>& stats() const { return stats_; }
  std::optional<uint16_t> TakeHeldStats();

  // --- free page hinting ---
  HintStatus hint_status() const { return status_; }
  // Publishes a new command id, which is returned; it was never used before without a STOP for it. Needs a
  // configuration interrupt, like the two below. FailedPrecondition: the driver has not negotiated hints, or
  // has left too many questions unanswered.
  absl::StatusOr<uint32_t> StartHinting();
  // Publishes STOP. Hints that come from now on are ignored; the in-band STOP is still reported.
  void StopHinting();
  // Publishes DONE: the driver may have all hinted memory back. Whatever comes now is ignored.
  void FinishHinting();

  // The driver reset the device or a new one took over: what was said in the queues is forgotten, the
  // configuration space says DONE, ids go on.
  void Reset();

  const BalloonState& state() const { return state_; }
  // Of another host, or of a process before this one. InvalidArgument: values that no device can have.
  absl::Status Restore(BalloonState state);

 private:
  void HandlePfns(std::span<const BalloonBuffer> chain, const MemoryView& memory, bool inflate,
                  BalloonSink& sink);
  void HandleStats(uint16_t head, std::span<const BalloonBuffer> chain, const MemoryView& memory);
  void HandleFreePage(std::span<const BalloonBuffer> chain, const MemoryView& memory, BalloonSink& sink);
  void HandleReporting(std::span<const BalloonBuffer> chain, BalloonSink& sink);
  void TakeCommand(uint32_t id, BalloonSink& sink);
  void CloseIdsUpTo(uint32_t id);

  uint64_t acked_ = 0;
  BalloonState state_;
  HintStatus status_ = HintStatus::kDone;
  uint32_t stream_id_ = kHintStop;  // under which the driver speaks on the queue now
  std::vector<BalloonStat> stats_;
  std::optional<uint16_t> held_stats_;
  uint64_t malformed_ = 0;
};

}  // namespace baton::virtio
