#include "tests/lab/device/storage.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace baton::lab {
namespace {

constexpr unsigned kSubmissionEntries = 1024;
// Every request of 64 queues of 256, twice: each may be followed by its cancellation.
constexpr unsigned kCompletionEntries = 32768;

int FallocateMode(Storage::Kind kind) {
  switch (kind) {
    case Storage::Kind::kZero:
      return FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    default:
      return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Storage>> Storage::Open(const std::string& file, bool io_uring) {
  std::unique_ptr<Storage> out(new Storage);
  out->file_.reset(::open(file.c_str(), O_RDWR | O_CLOEXEC));
  struct stat st;
  if (!out->file_ || ::fstat(out->file_.get(), &st) != 0) return ErrnoError(errno, file);
  out->size_ = static_cast<uint64_t>(st.st_size) / 512 * 512;
  out->event_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!out->event_) return ErrnoError(errno, "eventfd");
  if (!io_uring) return out;
  io_uring_params params{};
  params.flags = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP;
  params.cq_entries = kCompletionEntries;
  const int failed = io_uring_queue_init_params(kSubmissionEntries, &out->ring_, &params);
  if (failed == -EPERM || failed == -ENOSYS || failed == -EACCES) return out;
  if (failed) return ErrnoError(-failed, "io_uring");
  out->ring_ready_ = true;
  if (int error = io_uring_register_eventfd(&out->ring_, out->event_.get()); error) {
    return ErrnoError(-error, "io_uring's eventfd");
  }
  return out;
}

Storage::~Storage() {
  if (!ring_ready_) return;
  for (uint32_t i = 0; i < operations_.size(); ++i) Cancel(i);
  Submit();
  while (running_ > 0) {
    io_uring_cqe* cqe = nullptr;
    if (io_uring_wait_cqe(&ring_, &cqe) < 0) continue;
    if (io_uring_cqe_get_data64(cqe) != 0) --running_;
    io_uring_cqe_seen(&ring_, cqe);
  }
  io_uring_queue_exit(&ring_);
}

io_uring_sqe* Storage::NextEntry() {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
  while (!sqe) {
    io_uring_submit(&ring_);
    sqe = io_uring_get_sqe(&ring_);
  }
  return sqe;
}

uint32_t Storage::Start(Kind kind, std::span<const iovec> buffers, uint64_t offset, uint64_t length,
                        uint64_t tag) {
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(operations_.size()));
    operations_.push_back(std::make_unique<Operation>());
  }
  const uint32_t index = free_.back();
  free_.pop_back();
  Operation& op = *operations_[index];
  op.kind = kind;
  op.buffers.assign(buffers.begin(), buffers.end());
  op.first = 0;
  op.offset = offset;
  op.length = length;
  op.tag = tag;
  op.cancelled = false;
  op.result = 1;  // running
  ++running_;
  if (ring_ready_) {
    Prepare(index);
  } else {
    RunNow(index);
  }
  return index;
}

void Storage::Prepare(uint32_t index) {
  Operation& op = *operations_[index];
  io_uring_sqe* sqe = NextEntry();
  const auto count = static_cast<unsigned>(op.buffers.size() - op.first);
  const iovec* at = op.buffers.data() + op.first;
  switch (op.kind) {
    case Kind::kRead:
      io_uring_prep_readv(sqe, file_.get(), at, count, op.offset);
      break;
    case Kind::kWrite:
      io_uring_prep_writev(sqe, file_.get(), at, count, op.offset);
      break;
    case Kind::kWriteThrough:
      io_uring_prep_writev2(sqe, file_.get(), at, count, op.offset, RWF_DSYNC);
      break;
    case Kind::kFlush:
      io_uring_prep_fsync(sqe, file_.get(), IORING_FSYNC_DATASYNC);
      break;
    default:
      io_uring_prep_fallocate(sqe, file_.get(), FallocateMode(op.kind), static_cast<off_t>(op.offset),
                              static_cast<off_t>(op.length));
      break;
  }
  io_uring_sqe_set_data64(sqe, uint64_t{index} + 1);
}

void Storage::RunNow(uint32_t index) {
  Operation& op = *operations_[index];
  ssize_t done = 0;
  do {
    const auto count = static_cast<int>(op.buffers.size() - op.first);
    const iovec* at = op.buffers.data() + op.first;
    const auto offset = static_cast<off_t>(op.offset);
    switch (op.kind) {
      case Kind::kRead:
        done = ::preadv(file_.get(), at, count, offset);
        break;
      case Kind::kWrite:
        done = ::pwritev(file_.get(), at, count, offset);
        break;
      case Kind::kWriteThrough:
        done = ::pwritev2(file_.get(), at, count, offset, RWF_DSYNC);
        break;
      case Kind::kFlush:
        done = ::fdatasync(file_.get());
        break;
      default:
        done = ::fallocate(file_.get(), FallocateMode(op.kind), offset, static_cast<off_t>(op.length));
        break;
    }
    op.result = done < 0 ? -errno : 0;
  } while (done > 0 && Advance(op, static_cast<uint64_t>(done)));
  if (op.result == 0 && done == 0 && op.first < op.buffers.size()) op.result = -EIO;
  ended_.push_back(index);
  Signal();
}

bool Storage::Advance(Operation& op, uint64_t bytes) {
  op.offset += bytes;
  while (op.first < op.buffers.size()) {
    iovec& at = op.buffers[op.first];
    if (bytes < at.iov_len) {
      at.iov_base = static_cast<uint8_t*>(at.iov_base) + bytes;
      at.iov_len -= bytes;
      return true;
    }
    bytes -= at.iov_len;
    ++op.first;
  }
  return false;
}

void Storage::Signal() {
  const uint64_t one = 1;
  // Only fails when the counter is full, which is as good.
  if (::write(event_.get(), &one, sizeof one) < 0) return;
}

void Storage::Submit() {
  if (ring_ready_ && io_uring_sq_ready(&ring_) > 0) io_uring_submit(&ring_);
}

void Storage::Cancel(uint32_t index) {
  Operation& op = *operations_[index];
  if (!ring_ready_ || op.result != 1 || op.cancelled) return;
  op.cancelled = true;
  io_uring_sqe* sqe = NextEntry();
  io_uring_prep_cancel64(sqe, uint64_t{index} + 1, 0);
  io_uring_sqe_set_data64(sqe, 0);
}

void Storage::Reap(const std::function<void(uint64_t, int)>& done) {
  uint64_t count;
  if (::read(event_.get(), &count, sizeof count) < 0 && errno != EAGAIN) return;
  auto end = [&](uint32_t index) {
    Operation& op = *operations_[index];
    const uint64_t tag = op.tag;
    const int result = op.result;
    --running_;
    free_.push_back(index);
    done(tag, result);
  };
  if (!ring_ready_) {
    reaping_.swap(ended_);
    for (uint32_t index : reaping_) end(index);
    reaping_.clear();
    return;
  }
  io_uring_cqe* cqe = nullptr;
  while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
    const uint64_t data = io_uring_cqe_get_data64(cqe);
    const int result = cqe->res;
    io_uring_cqe_seen(&ring_, cqe);
    if (data == 0) continue;  // the answer to a cancellation says nothing that the operation does not say
    const auto index = static_cast<uint32_t>(data - 1);
    Operation& op = *operations_[index];
    const bool transfer = op.first < op.buffers.size();
    if (result > 0 && transfer) {
      if (Advance(op, static_cast<uint64_t>(result))) {
        if (!op.cancelled) {
          Prepare(index);
          continue;
        }
        op.result = -ECANCELED;
      } else {
        op.result = 0;
      }
    } else {
      op.result = result == 0 && transfer ? -EIO : result;
    }
    end(index);
  }
  Submit();
}

}  // namespace baton::lab
