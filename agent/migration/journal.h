// A side's durable journal: an append-only file of handover records (byte layout in docs/handover.md).
//
// Every record fills one slot of 512 bytes, a disk sector, so that a crash leaves a record either whole or
// not there. From this follows what a reader may forgive: a part of a slot, or a slot of zeroes, at the end
// of the file is the torn tail of a write that was never acknowledged, and is dropped; anything else that
// does not check is corruption of something that *was* acknowledged, and is reported as DataLoss, because
// resuming a guest after forgetting a YIELDED would make two of it.
//
// Any thread may call; calls are serialised.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "agent/migration/handover.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::migration {

// How long a side waits before it tries again to write a record that has to be written.
inline constexpr Duration kRetryWrite = std::chrono::seconds(1);

// Where a side of a migration writes its records. An interface so that tests can make writes fail at will.
class RecordLog {
 public:
  virtual ~RecordLog() = default;
  // Durable on return. An error carries STATE_WRITE_FAILED; see certainly_absent().
  virtual absl::Status Append(const JournalRecord& record) = 0;
  // After a failed Append: true if the record is certainly not in the log; false if a later reader might
  // find it (then every further Append fails, too, until Repair succeeds).
  virtual bool certainly_absent() const = 0;
  // Tries again to make the record of a failed Append certainly absent. OK if it is.
  virtual absl::Status Repair() = 0;
  // The history, oldest first.
  virtual std::vector<JournalRecord> Records() const = 0;
  // Sets room for `records` more records aside, so that a full disk is met now and not in the blackout.
  // STATE_WRITE_FAILED if there is none.
  virtual absl::Status Reserve(size_t records) = 0;
};

class Journal final : public RecordLog {
 public:
  static constexpr size_t kSlotSize = 512;
  // Longest migration id that fits into a slot.
  static constexpr size_t kMaxMigrationId = 400;

  // Opens the journal at `path`, or creates it (durable with the first record); locks it against other
  // processes for the life of the object, waiting for one that holds it until the deadline; drops a
  // torn tail. Errors: FailedPrecondition if another process keeps it; STATE_WRITE_FAILED if it cannot be
  // created, locked or written; DataLoss if it is corrupt.
  static absl::StatusOr<std::unique_ptr<Journal>> Open(const std::string& path,
                                                       Deadline deadline = Deadline::After(Duration(0)));
  // The records of the journal at `path`, without lock and without changing anything. NotFound if there is
  // none, DataLoss if it is corrupt.
  static absl::StatusOr<std::vector<JournalRecord>> Read(const std::string& path);

  ~Journal() override;
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  absl::Status Append(const JournalRecord& record) override;
  bool certainly_absent() const override;
  absl::Status Repair() override;
  std::vector<JournalRecord> Records() const override;
  // The last record; kInvalid if there is none.
  JournalRecord Latest() const;
  absl::Status Reserve(size_t records) override;
  // Bytes of a torn tail that Open dropped.
  size_t dropped_bytes() const { return dropped_; }
  const std::string& path() const { return path_; }

 private:
  Journal(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  bool CutTail();
  absl::Status WriteSlot(const std::string& slot, uint64_t offset);
  absl::Status SyncSlots();
  absl::Status FinishCreation();

  const std::string path_;
  const UniqueFd fd_;
  size_t dropped_ = 0;  // constant after Open
  mutable std::mutex mutex_;
  std::vector<JournalRecord> records_;  // guarded by mutex_
  uint64_t end_ = 0;                    // guarded by mutex_
  bool created_ = true;                 // guarded by mutex_: header and directory entry are durable
  bool absent_ = true;                  // guarded by mutex_: the last failure left nothing behind
};

// Answers a verdict query for `migration` from a *destination's* log when no shim of the VM lives there to do
// so (what it had received died with it). An undecided migration is refused, durably, before the answer; so
// the caller must hold the log's lock (Journal::Open) and should then end the VMM that waits. Never answers
// IDLE. FailedPrecondition if this side owns or yielded the guest in another migration; errors of Append.
absl::StatusOr<JournalVerdict> DecideVerdict(RecordLog& log, const std::string& migration);

}  // namespace baton::migration
