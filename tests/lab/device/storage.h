// A file as a disk: reads, writes, flushes, discards, done by io_uring (or at once where the kernel refuses
// it, as the default seccomp profile of containers makes it), with cancellation that can be waited for.
#pragma once

#include <liburing.h>
#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/fd.h"
#include "common/status.h"

namespace baton::lab {

// Not thread-safe. Operations may run in any order among themselves.
class Storage {
 public:
  enum class Kind { kRead, kWrite, kWriteThrough, kFlush, kDiscard, kZero, kZeroUnmap };

  // `file` exists already; its size is the disk's. `io_uring` false: every operation is done at its start.
  static absl::StatusOr<std::unique_ptr<Storage>> Open(const std::string& file, bool io_uring);
  // Cancels, and waits until nothing runs any more.
  ~Storage();

  uint64_t size() const { return size_; }
  bool asynchronous() const { return ring_ready_; }
  int file() const { return file_.get(); }
  // Readable when Reap has something.
  int event_fd() const { return event_.get(); }
  uint32_t running() const { return running_; }

  // Starts an operation on [offset, offset + length). `buffers` (for reads and writes) is copied, what it
  // points to must stay until the operation has been reaped. `tag` comes back from Reap. The return value is
  // for Cancel. Started for good by Submit.
  uint32_t Start(Kind kind, std::span<const iovec> buffers, uint64_t offset, uint64_t length, uint64_t tag);
  void Submit();
  // Asks for the operation's end. It is reaped as usual, with -ECANCELED or with its result if it was too
  // late; until then it may still act.
  void Cancel(uint32_t operation);
  // Calls `done(tag, result)` for each operation that has ended; result 0 or a negative errno (a short read
  // or write is continued first). `done` may start others.
  void Reap(const std::function<void(uint64_t, int)>& done);

 private:
  struct Operation {
    Kind kind;
    std::vector<iovec> buffers;
    size_t first = 0;  // of `buffers`, not done yet
    uint64_t offset = 0;
    uint64_t length = 0;
    uint64_t tag = 0;
    int result = 0;
    bool cancelled = false;
  };

  Storage() = default;
  void Prepare(uint32_t operation);
  void RunNow(uint32_t operation);
  io_uring_sqe* NextEntry();
  // What is left to do after `bytes`; true if the operation goes on.
  static bool Advance(Operation& operation, uint64_t bytes);
  void Signal();

  UniqueFd file_, event_;
  uint64_t size_ = 0;
  io_uring ring_{};
  bool ring_ready_ = false;
  uint32_t running_ = 0;
  std::vector<std::unique_ptr<Operation>> operations_;
  std::vector<uint32_t> free_;
  // Ended already (without io_uring).
  std::vector<uint32_t> ended_, reaping_;
};

}  // namespace baton::lab
