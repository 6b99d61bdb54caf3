// The integrity witness: what lab devices did to a disk, in the order in which they did it, and the proof
// from it that nothing was done twice or in the wrong order. Devices of several processes, one after the
// other or at the same time, append to one file.
//
// Records are lines of words: DEVICE EVENT QUEUE COUNTER OFFSET LENGTH TAG and a full stop, without which a
// line is what a killed process has left of one. DEVICE tells runs apart, each
// from the start of a queue to its stop; QUEUE and COUNTER name the request (a request that is replayed keeps
// its counter, under the next DEVICE); TAG is a number found in the data of a write, by which a workload
// tells its writes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/fd.h"
#include "common/status.h"

namespace baton::lab {

enum class JournalEvent : char {
  kReplay = 'R',   // taken from the in-flight region
  kBegin = 'B',    // the storage has been asked
  kDone = 'D',     // the storage has done it
  kPublish = 'P',  // the guest can see that it is done
  kCancel = 'C',   // given up, confirmed: nothing of it can happen any more
};

struct JournalRecord {
  uint64_t device = 0;
  JournalEvent event = JournalEvent::kBegin;
  uint32_t queue = 0;
  uint64_t counter = 0;
  uint64_t offset = 0;
  uint64_t length = 0;
  uint64_t tag = 0;
};

class Journal {
 public:
  // Appends to `path`; each record is one write(2) and begins with the line break, so that it survives the
  // process and does not mix with those of others, nor with a torn one before it.
  static absl::StatusOr<Journal> Open(const std::string& path);
  Journal() = default;
  explicit operator bool() const { return fd_.valid(); }
  // A number for a run of one queue, from its start to its stop, unique among the devices of one host.
  uint64_t NewRun();
  void Record(uint64_t device, JournalEvent event, uint32_t queue, uint64_t counter, uint64_t offset,
              uint64_t length, uint64_t tag);

 private:
  UniqueFd fd_;
};

absl::StatusOr<std::vector<JournalRecord>> ReadJournal(const std::string& path);

struct JournalRules {
  // The workload numbers its writes to each sector upwards from 1, and waits for one to be complete before it
  // writes the sector again.
  bool tags_grow = true;
};

struct JournalVerdict {
  uint64_t writes = 0;     // begun
  uint64_t published = 0;  // of these
  uint64_t replayed = 0;
  uint64_t cancelled = 0;
};

// Fails (DataLoss, naming the records) if
//   - a write began after the guest had been told that it was complete;
//   - a write of a lower tag was begun or ended on a sector after one of a higher tag had (tags_grow);
//   - a write was published that had not been done;
//   - something of a request happened after its confirmed cancellation, on that device.
absl::StatusOr<JournalVerdict> CheckJournal(const std::vector<JournalRecord>& records,
                                            JournalRules rules = {});

}  // namespace baton::lab
