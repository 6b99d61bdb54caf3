// The workload of a disk of the lab guest, and the judge of what the disk did.
//
// The disk is divided into regions, one a writer (tests/lab/guest/block_format.h, so that baton-lab-check
// judges the image from outside). A writer writes, reads the block back, reads a random block of its region,
// flushes now and then, and begins again. What every block must hold follows from the acknowledged writes, so
// that a write that was lost, carried out twice, torn, or put somewhere else is found by the next read of its
// block.
//
// Everything that the judgement rests on (requests under way, newest acknowledged write of each block) lies
// in guest memory: it moves with the guest, and a page that was lost on the way shows. Pure: no clock, no
// thread, no file descriptor.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "common/status.h"
#include "tests/lab/guest/block_format.h"
#include "tests/lab/vm/options.h"
#include "tests/lab/vm/ram.h"

namespace baton::lab {

// One descriptor of a request.
struct Piece {
  uint64_t gpa = 0;
  uint32_t size = 0;
  bool device_writes = false;
};

// The queues of a device, as a workload sees them.
class QueuePort {
 public:
  virtual ~QueuePort() = default;
  // Makes a request available; `tag` comes back with its completion. False: the queue is full.
  virtual bool Submit(uint32_t queue, uint32_t tag, std::span<const Piece> pieces) = 0;
  // Tells the device about what was submitted to `queue`.
  virtual void Kick(uint32_t queue) = 0;
};

// Not thread-safe.
class BlockWorkload {
 public:
  struct Setup {
    uint32_t disk = 0;    // number of the disk in the guest
    uint32_t queues = 1;  // writer w uses queue w % queues
    WorkloadOptions options;
  };
  struct Counters {
    uint64_t writes = 0, reads = 0, flushes = 0, errors = 0;
  };
  // Every finding: "block 17: torn …".
  using OnError = std::function<void(const std::string&)>;

  // Bytes of guest memory that the workload needs.
  static uint64_t Bytes(const WorkloadOptions& options);
  // `gpa`: where they are.
  BlockWorkload(const Ram& ram, uint64_t gpa, Setup setup, QueuePort& port, OnError on_error);

  // A new guest. `run`: random.
  void Boot(uint64_t run);
  // A guest whose memory arrived: InvalidArgument if what lies there is not the state of this workload.
  absl::Status Check() const;

  // Submits whatever may be submitted now; `now_us` paces.
  void Issue(int64_t now_us);
  // When Issue has something to do next; INT64_MAX: after the next completion.
  int64_t NextDue() const { return next_due_; }
  // A completion: checks it and advances the writer.
  void Complete(uint32_t queue, uint32_t tag, uint32_t written, int64_t now_us);
  // The guest ran again: requests that wait do so from now.
  void Resumed(int64_t now_us);

  // Writers stop after their present step and read all of their regions; Verified() once all have done so.
  void BeginVerify();
  bool Verified() const;
  // Write on.
  void GoOn();

  // Requests that the device has.
  uint32_t outstanding() const;
  // Reports, once each, requests that the device has had for longer than `limit_us`.
  void FindLost(int64_t now_us, int64_t limit_us);
  // XXH3 of the tables, for a comparison before and after a move.
  uint64_t Digest() const;

  const Counters& counters() const;
  uint64_t region_blocks() const { return region_; }
  uint32_t writers() const { return setup_.options.writers; }
  uint64_t sequence(uint32_t writer) const;

 private:
  struct Header;
  struct Writer;
  enum class Phase : uint32_t;
  Header& header() const;
  Writer& writer(uint32_t index) const;
  uint64_t* expected(uint32_t index) const;
  uint64_t buffers(uint32_t index) const;
  void Start(uint32_t index, Phase phase, uint64_t block, int64_t now_us);
  void Next(uint32_t index, int64_t now_us);
  bool SubmitRequest(uint32_t index, uint32_t slot, uint32_t type, uint64_t block, uint64_t data_gpa,
                     bool in);
  void Judge(uint32_t index, uint64_t block);
  void Report(const std::string& what);

  const Ram& ram_;
  const uint64_t gpa_;
  const Setup setup_;
  const uint64_t region_;
  QueuePort& port_;
  const OnError on_error_;
  int64_t next_due_ = 0;
};

}  // namespace baton::lab
