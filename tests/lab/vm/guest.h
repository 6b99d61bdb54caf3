// The lab guest: guest memory, virtio drivers and workloads that know every byte they wrote, in one object
// with one thread that stands for the vCPU. What a real guest keeps in its memory is kept in guest memory
// here as well, so that it moves, and a loss shows.
//
// The VMM's part of it (vhost-user front-ends, rings' positions) is saved to and loaded from a stream of its
// own format: magic, version, length, JSON, checksum (docs/lab.md).
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"
#include "tests/lab/vm/balloon.h"
#include "tests/lab/vm/guest_device.h"
#include "tests/lab/vm/memory_workload.h"
#include "tests/lab/vm/options.h"
#include "tests/lab/vm/ram.h"

namespace baton::lab {

struct GuestConfig {
  std::string name = "lab";
  // Must exist with its size; left where it is.
  std::string memory_path;
  uint64_t memory_bytes = 0;
  std::vector<DeviceOptions> devices;
  WorkloadOptions options;
  // The guest comes from elsewhere: its memory is not touched before Load.
  bool incoming = false;
  // A request that a running device does not complete in this time counts as lost.
  Duration lost_after = std::chrono::seconds(20);
};

// Called on the guest's thread; must not call back into the guest.
struct GuestCallbacks {
  // A line that the guest prints on its console, without the newline.
  std::function<void(const std::string& line)> say;
  std::function<void()> on_power_off;
};

// What the guest found out about its world.
struct GuestFigures {
  uint64_t writes = 0, reads = 0, errors = 0;
  // Missing and duplicate ones among those of other guests; a network may do both.
  uint64_t packets_sent = 0, packets_received = 0, packets_missing = 0, packet_duplicates = 0;
  uint64_t memory_writes = 0, memory_errors = 0;
  // Times it stood still, the longest of them, and the longest time from one completed request to the next.
  uint64_t stops = 0;
  Duration longest_stop{0}, longest_gap{0};
  uint32_t outstanding = 0;
  bool clean() const { return errors == 0 && memory_errors == 0; }
};

// Thread-safe. Calls wait for the guest's thread, at most until their deadline.
class LabGuest {
 public:
  // Connects to the devices, as QEMU does when it realizes them. The guest stands still.
  static absl::StatusOr<std::unique_ptr<LabGuest>> Create(GuestConfig config, GuestCallbacks callbacks,
                                                          Deadline deadline);
  // Disconnects from the devices without stopping them, like the end of a VMM.
  ~LabGuest();
  LabGuest(const LabGuest&) = delete;
  LabGuest& operator=(const LabGuest&) = delete;

  // Boots, or goes on. A device that is not there now is started when it comes back. Idempotent.
  absl::Status Run(Deadline deadline);
  // The vCPU stops, then the devices. Idempotent.
  absl::Status Pause(Deadline deadline);
  bool running() const { return running_; }
  // CLOCK_MONOTONIC, nanoseconds, when the vCPU stopped last.
  int64_t paused_at_ns() const { return paused_at_ns_; }

  // The state to move, of a paused guest; its memory moves by other means. FailedPrecondition.
  absl::StatusOr<std::string> Save(Deadline deadline);
  // Into a guest that was created with `incoming`. DataLoss: not such a state, or damaged.
  // FailedPrecondition: of another guest. Memory must have arrived: it is checked against the state.
  absl::Status Load(const std::string& state, Deadline deadline);
  // True if `bytes` hold a whole state (or can never become one), so that Load has an answer.
  static bool Complete(const std::string& bytes);

  // A letter typed on the console: s status, r reset the gaps, q verify, g go on, x power off. The answers
  // come by `say`, as from the Linux guest (tests/lab/guest/workload.cc).
  void Type(char letter);
  // The power button.
  void PowerDown();

  absl::StatusOr<GuestFigures> Figures(Deadline deadline);
  // Stops writing, waits for all requests, reads everything back, checks all memory. The guest must run. The
  // errors found so far are in errors_text(). GoOn() lets it write again.
  absl::StatusOr<GuestFigures> Verify(Deadline deadline);
  absl::Status GoOn(Deadline deadline);
  // Waits until so many more writes were acknowledged.
  absl::Status AwaitWrites(uint64_t more, Deadline deadline);
  // The first findings, one a line.
  std::string errors_text() const;
  // What baton-lab-check reads.
  absl::StatusOr<std::string> ResultLine(Deadline deadline);

 private:
  struct Shared;  // in guest memory
  LabGuest(GuestConfig config, GuestCallbacks callbacks, Ram ram);
  absl::Status Build(Deadline deadline);
  Shared& shared() const;
  void Loop();
  void RunPosted();
  int64_t Poll();
  void Advance(int64_t now_us);
  absl::Status Do(std::function<absl::Status()> work, Deadline deadline);
  void Post(std::function<void()> work);
  absl::Status Boot();
  absl::Status RunNow(Deadline deadline);
  absl::Status PauseNow(Deadline deadline);
  absl::StatusOr<std::string> SaveNow();
  absl::Status LoadNow(const std::string& state);
  void Obey(char letter);
  std::string StatusLine(const char* word);
  GuestFigures FiguresNow() const;
  void BeginVerify(bool say_result);
  void FinishVerify();
  void Beat(int64_t now_us);
  void Report(const std::string& what);
  uint64_t Digest() const;
  void Say(const std::string& line);

  const GuestConfig config_;
  const GuestCallbacks callbacks_;
  const Ram ram_;
  uint64_t shared_gpa_ = 0;
  std::unique_ptr<MemoryWorkload> memory_;
  std::vector<std::unique_ptr<GuestDevice>> devices_;
  GuestBalloon* balloon_ = nullptr;  // one of them, if there is one
  bool here_ = false;                // memory holds a guest: booted or loaded
  int64_t lost_check_us_ = 0;
  std::string typed_;  // and not obeyed yet

  std::atomic<bool> running_ = false;
  std::atomic<int64_t> paused_at_ns_ = 0;
  UniqueFd wake_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> posted_;  // guarded by mutex_
  bool exit_ = false;                         // guarded by mutex_
  std::string errors_text_;                   // guarded by mutex_
  uint64_t writes_ = 0;                       // guarded by mutex_; acknowledged, of all disks
  std::atomic<uint64_t> wanted_writes_ = UINT64_MAX;
  bool verified_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace baton::lab
