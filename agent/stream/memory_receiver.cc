#include "agent/stream/memory_receiver.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#include "agent/stream/memory_frame.h"
#include "agent/stream/page_ops.h"
#include "agent/stream/socket_io.h"
#include "agent/stream/wire.h"

namespace baton::stream {

using memory::kPageSize;
using memory::PageSet;
using memory::PageSets;
using memory::RamBlock;

namespace {

// Populated zero pages in a row from which on a hole is made instead of writing zeroes: a hole saves memory,
// but costs a system call, and another page fault if data follows later.
constexpr uint64_t kPunchPages = 64;

// From this many bytes on a frame is worth a system call of its own that returns only when it is whole.
constexpr uint32_t kBulk = 32u << 10;

// An idle channel is no error: liveness is channel 0's business, and Shutdown() ends the wait.
Deadline Unbounded() { return Deadline::After(std::chrono::hours(24 * 365)); }

}  // namespace

struct MemoryReceiver::Shared {
  Shared(const memory::GuestRam& r, ReceiverOptions o, std::function<void(const absl::Status&)> e)
      : ram(r),
        options(o),
        on_error(std::move(e)),
        doubtful(r.MakeSets()),
        untouched(r.MakeSets()),
        lanes(o.channels) {
    for (size_t i = 0; i < untouched.size(); ++i) {
      untouched[i].SetAll();
      auto populated = ram.blocks()[i].Populated();
      // If holes cannot be told, every page may hold something.
      if (populated.ok()) {
        untouched[i].Subtract(*populated);
      } else {
        untouched[i].Reset();
      }
    }
  }

  // Called by lanes.
  void Fail(const absl::Status& status) {
    {
      std::lock_guard lock(mutex);
      if (stopping || !error.ok()) return;
      error = status;
    }
    changed.notify_all();
    if (on_error) on_error(status);
  }

  const memory::GuestRam& ram;
  const ReceiverOptions options;
  const std::function<void(const absl::Status&)> on_error;
  // A lane touches only its own stripes, which are whole words of these.
  PageSets doubtful;
  // Holes: reading them gives zeroes, and writing them allocates.
  PageSets untouched;

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::unique_ptr<Lane>> lanes;  // guarded by mutex, as all below
  absl::Status error;
  bool stopping = false;
  int waiting = 0;
};

// One data channel.
class MemoryReceiver::Lane {
 public:
  Lane(Shared& shared, uint32_t index, std::unique_ptr<Channel> channel)
      : shared_(shared), channel_(std::move(channel)) {
    for (const RamBlock& block : shared.ram.blocks()) limits_.block_sizes.push_back(block.size());
    limits_.channels = shared.options.channels;
    limits_.channel = index;
    limits_.page_checksums = shared.options.page_checksums;
    thread_ = std::thread([this] { Loop(); });
  }

  void Shutdown() { channel_->Shutdown(); }
  void Join() {
    if (thread_.joinable()) thread_.join();
  }

  // Guarded by shared_.mutex.
  uint64_t frames = 0;
  bool ended = false;

  std::atomic<uint64_t> data{0}, zero{0}, doubtful_pages{0};
  uint64_t wire() const { return channel_->bytes_read(); }

 private:
  void Loop() {
    absl::Status status = absl::OkStatus();
    while (status.ok()) status = ReceiveFrame();
    // The source closes its channels when it is done.
    if (status.code() != absl::StatusCode::kOutOfRange) shared_.Fail(status);
    {
      std::lock_guard lock(shared_.mutex);
      ended = true;
    }
    shared_.changed.notify_all();
  }

  absl::Status ReceiveFrame() {
    RETURN_IF_ERROR(ReadHeader());
    ASSIGN_OR_RETURN(FrameHeader header, DecodeFrameHeader(header_.data(), limits_));
    header_used_ = 0;
    switch (header.type) {
      case FrameType::kData:
        RETURN_IF_ERROR(ReceiveData(header));
        break;
      case FrameType::kZero:
        RETURN_IF_ERROR(ApplyZero(header));
        break;
      default:
        RETURN_IF_ERROR(ApplyFree(header));
        break;
    }
    std::lock_guard lock(shared_.mutex);
    ++frames;
    if (shared_.waiting > 0) shared_.changed.notify_all();
    return absl::OkStatus();
  }

  // Completes header_; part of it may have come with the data before it.
  absl::Status ReadHeader() {
    while (header_used_ < kFrameHeaderSize) {
      iovec rest{header_.data() + header_used_, kFrameHeaderSize - header_used_};
      auto n = channel_->ReadSome(&rest, 1, Unbounded());
      if (!n.ok()) {
        if (n.status().code() == absl::StatusCode::kOutOfRange && header_used_ > 0) return Truncated();
        return n.status();
      }
      header_used_ += *n;
    }
    return absl::OkStatus();
  }

  absl::Status Truncated() const {
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss,
                 "{}: connection ended inside a memory frame", channel_->peer());
  }

  absl::Status ReceiveData(const FrameHeader& header) {
    const RamBlock& block = shared_.ram.blocks()[header.block];
    RETURN_IF_ERROR(Populate(block, header));
    const size_t checksums = limits_.page_checksums ? header.pages() * 8u : 0;
    iovec buffers[3] = {{checksums_.data(), checksums},
                        {block.base() + header.offset, header.length},
                        {header_.data(), kFrameHeaderSize}};
    iovec* next = buffers;
    int count = 3;
    if (checksums == 0) ++next, --count;
    if (header.length >= kBulk) {
      absl::Status read = channel_->ReadAll(next, count - 1, Unbounded());
      if (!read.ok()) return read.code() == absl::StatusCode::kOutOfRange ? Truncated() : read;
    } else {
      // As much of the next header as is there, too: one system call for a small frame.
      for (size_t left = checksums + header.length; left > 0;) {
        auto n = channel_->ReadSome(next, count, Unbounded());
        if (!n.ok()) return n.status().code() == absl::StatusCode::kOutOfRange ? Truncated() : n.status();
        header_used_ = *n > left ? *n - left : 0;
        left -= std::min(left, *n);
        Advance(next, count, *n);
      }
    }
    data.fetch_add(header.length, std::memory_order_relaxed);
    if (checksums != 0) Verify(header, block);
    return absl::OkStatus();
  }

  void Verify(const FrameHeader& header, const RamBlock& block) {
    PageSet& doubtful = shared_.doubtful[header.block];
    const uint8_t* page = block.base() + header.offset;
    uint64_t count = doubtful_pages.load(std::memory_order_relaxed);
    for (uint32_t i = 0; i < header.pages(); ++i, page += kPageSize) {
      const uint64_t number = header.first_page() + i;
      const bool good = PageChecksum(page) == LoadLe<uint64_t>(&checksums_[i * 8]);
      if ((good && count == 0) || good != doubtful.Test(number)) continue;
      if (good) {
        doubtful.Clear(number), --count;
      } else {
        doubtful.Set(number), ++count;
      }
    }
    doubtful_pages.store(count, std::memory_order_relaxed);
  }

  // Runs replace whatever came before.
  void ClearDoubt(const FrameHeader& header) {
    uint64_t count = doubtful_pages.load(std::memory_order_relaxed);
    if (count == 0) return;
    PageSet& doubtful = shared_.doubtful[header.block];
    for (uint64_t page = header.first_page(); page < header.first_page() + header.pages(); ++page) {
      if (doubtful.Test(page)) doubtful.Clear(page), --count;
    }
    doubtful_pages.store(count, std::memory_order_relaxed);
  }

  // Allocates the frame's pages at once, which is cheaper than a fault for each while data is copied, and
  // turns "the memory file system is full" into an error instead of SIGBUS.
  absl::Status Populate(const RamBlock& block, const FrameHeader& header) {
    PageSet& untouched = shared_.untouched[header.block];
    const uint64_t end = header.first_page() + header.pages();
    for (auto run = untouched.NextRun(header.first_page(), end); run.count != 0;
         run = untouched.NextRun(run.first + run.count, end)) {
      const uint64_t count = run.count;
      while (::madvise(block.base() + run.first * kPageSize, count * kPageSize, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINTR || errno == EAGAIN) continue;
        // EINVAL: before Linux 5.14.
        if (errno == EINVAL && ::fallocate(block.fd(), 0, static_cast<off_t>(run.first * kPageSize),
                                           static_cast<off_t>(count * kPageSize)) == 0) {
          break;
        }
        return Error(v1::RESOURCE_EXHAUSTED_REASON, absl::StatusCode::kResourceExhausted,
                     "memory of RAM block {} at {:#x}+{:#x} could not be allocated: {}", block.id(),
                     run.first * kPageSize, count * kPageSize, std::strerror(errno));
      }
      untouched.ClearRange(run.first, count);
    }
    return absl::OkStatus();
  }

  // Makes [first, first+count) a hole; false if the file cannot.
  bool Punch(const RamBlock& block, uint32_t block_index, uint64_t first, uint64_t count) {
    if (::fallocate(block.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    static_cast<off_t>(first * kPageSize), static_cast<off_t>(count * kPageSize)) != 0) {
      return false;
    }
    shared_.untouched[block_index].SetRange(first, count);
    return true;
  }

  absl::Status ApplyZero(const FrameHeader& header) {
    zero.fetch_add(header.length, std::memory_order_relaxed);
    ClearDoubt(header);
    const RamBlock& block = shared_.ram.blocks()[header.block];
    const PageSet& untouched = shared_.untouched[header.block];
    const uint64_t end = header.first_page() + header.pages();
    for (uint64_t page = header.first_page(); page < end;) {
      uint64_t next = page;
      // Holes are zero already, and stay holes; so do pages that happen to hold zeroes.
      while (next < end && !untouched.Test(next) && !IsZeroPage(block.base() + next * kPageSize)) ++next;
      if (next > page) {
        if (next - page < kPunchPages || !Punch(block, header.block, page, next - page)) {
          std::memset(block.base() + page * kPageSize, 0, (next - page) * kPageSize);
        }
      }
      page = next + 1;
    }
    return absl::OkStatus();
  }

  absl::Status ApplyFree(const FrameHeader& header) {
    ClearDoubt(header);
    // A file that cannot have holes keeps what it has, which is as good.
    Punch(shared_.ram.blocks()[header.block], header.block, header.first_page(), header.pages());
    return absl::OkStatus();
  }

  Shared& shared_;
  const std::unique_ptr<Channel> channel_;
  FrameLimits limits_;
  std::array<uint8_t, kFrameHeaderSize> header_;
  size_t header_used_ = 0;
  std::array<uint8_t, kPagesPerStripe * 8> checksums_;
  std::thread thread_;
};

MemoryReceiver::MemoryReceiver(const memory::GuestRam& ram, ReceiverOptions options,
                               std::function<void(const absl::Status&)> on_error)
    : shared_(std::make_unique<Shared>(ram, options, std::move(on_error))) {}

MemoryReceiver::~MemoryReceiver() { Stop(); }

absl::Status MemoryReceiver::AddChannel(uint32_t channel, std::unique_ptr<Channel> connection) {
  std::lock_guard lock(shared_->mutex);
  if (shared_->stopping) return Error(absl::StatusCode::kCancelled, "receiving was stopped");
  if (channel == 0 || channel > shared_->options.channels) {
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument, "data channel {} of {}",
                 channel, shared_->options.channels);
  }
  auto& lane = shared_->lanes[channel - 1];
  if (lane != nullptr) {
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kAlreadyExists, "data channel {} is connected",
                 channel);
  }
  lane = std::make_unique<Lane>(*shared_, channel - 1, std::move(connection));
  shared_->changed.notify_all();
  return absl::OkStatus();
}

absl::Status MemoryReceiver::WaitForFrames(const std::vector<uint64_t>& frames, Deadline deadline) {
  if (frames.size() != shared_->options.channels) {
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument,
                 "frame counts of {} channels, not {}", frames.size(), shared_->options.channels);
  }
  std::unique_lock lock(shared_->mutex);
  absl::Status result;
  auto settled = [&] {
    result = shared_->error;
    if (!result.ok()) return true;
    if (shared_->stopping) {
      result = Error(absl::StatusCode::kCancelled, "receiving was stopped");
      return true;
    }
    bool complete = true;
    for (size_t i = 0; i < frames.size(); ++i) {
      const Lane* lane = shared_->lanes[i].get();
      if (frames[i] == 0 || (lane != nullptr && lane->frames >= frames[i])) continue;
      complete = false;
      if (lane != nullptr && lane->ended) {
        result = Error(v1::PEER_CONNECTION_FAILED, absl::StatusCode::kUnavailable,
                       "data channel {} ended after {} of {} frames", i + 1, lane->frames, frames[i]);
        return true;
      }
    }
    return complete;
  };
  ++shared_->waiting;
  const bool in_time = shared_->changed.wait_until(lock, deadline.when(), settled);
  --shared_->waiting;
  if (!in_time) return Error(absl::StatusCode::kDeadlineExceeded, "memory frames did not arrive in time");
  return result;
}

uint64_t MemoryReceiver::doubtful_pages() const {
  std::lock_guard lock(shared_->mutex);
  uint64_t total = 0;
  for (const auto& lane : shared_->lanes) {
    if (lane) total += lane->doubtful_pages.load(std::memory_order_relaxed);
  }
  return total;
}

PageSets MemoryReceiver::doubtful() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->doubtful;
}

v1::ByteCounts MemoryReceiver::counts() const {
  std::lock_guard lock(shared_->mutex);
  uint64_t data = 0, zero = 0, wire = 0;
  for (const auto& lane : shared_->lanes) {
    if (!lane) continue;
    data += lane->data.load(std::memory_order_relaxed);
    zero += lane->zero.load(std::memory_order_relaxed);
    wire += lane->wire();
  }
  v1::ByteCounts counts;
  counts.set_data(data);
  counts.set_zero(zero);
  counts.set_wire(wire);
  return counts;
}

absl::Status MemoryReceiver::status() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->error;
}

void MemoryReceiver::Stop() {
  std::vector<Lane*> lanes;
  {
    std::lock_guard lock(shared_->mutex);
    shared_->stopping = true;
    for (const auto& lane : shared_->lanes) {
      if (lane) lanes.push_back(lane.get());
    }
  }
  shared_->changed.notify_all();
  for (Lane* lane : lanes) lane->Shutdown();
  for (Lane* lane : lanes) lane->Join();
}

}  // namespace baton::stream
