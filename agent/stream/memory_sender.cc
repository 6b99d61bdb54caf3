#include "agent/stream/memory_sender.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>

#include "agent/stream/frame_writer.h"
#include "agent/stream/memory_frame.h"
#include "agent/stream/page_ops.h"
#include "agent/stream/wire.h"

namespace baton::stream {

using memory::kPageSize;
using memory::PageSet;
using memory::PageSets;

namespace {
void Add(std::atomic<uint64_t>& counter, uint64_t value) {
  counter.fetch_add(value, std::memory_order_relaxed);
}
}  // namespace

absl::StatusOr<SendStrategy> ParseSendStrategy(const std::string& name) {
  if (name == "write") return SendStrategy::kWrite;
  if (name == "sendfile") return SendStrategy::kSendfile;
  if (name == "zerocopy") return SendStrategy::kZeroCopy;
  return Error(absl::StatusCode::kInvalidArgument,
               "unknown send strategy '{}'; write, sendfile and zerocopy exist", name);
}

// A round as its workers see it.
struct Round {
  const PageSets* pages;
  uint32_t number;
  RoundOptions options;
  Deadline deadline;
};

struct MemorySender::Shared {
  Shared(const memory::GuestRam& r, SenderOptions o)
      : ram(r), options(o), pacer(o.bandwidth), sent(r.MakeSets()) {}

  // Remembers the first error and makes every worker stop.
  void Fail(const absl::Status& status) {
    {
      std::lock_guard lock(mutex);
      if (error.ok()) error = status;
    }
    failed.store(true, std::memory_order_release);
    pacer.Cancel();
    for (const auto& channel : channels) channel->Shutdown();
  }

  const memory::GuestRam& ram;
  const SenderOptions options;
  std::vector<std::unique_ptr<Channel>> channels;  // constant after construction
  Pacer pacer;
  // Pages that were sent as data. A worker touches only its own stripes, which are whole words.
  PageSets sent;
  std::atomic<uint64_t> remaining_pages{0};
  std::atomic<bool> failed{false};

  std::mutex mutex;
  std::condition_variable work;
  std::condition_variable done;
  std::optional<Round> round;  // guarded by mutex, as all below
  uint64_t generation = 0;     // grows with each round
  size_t active = 0;           // workers that have not finished this round
  bool stopping = false;
  absl::Status error;
};

class MemorySender::Worker {
 public:
  Worker(Shared& shared, uint32_t index)
      : shared_(shared),
        index_(index),
        writer_(MakeFrameWriter(*shared.channels[index], shared.options.strategy)),
        thread_([this] { Loop(); }) {}
  ~Worker() { thread_.join(); }

  std::atomic<uint64_t> frames{0}, data{0}, zero{0}, free{0}, resent{0};

 private:
  void Loop() {
    // sendfile(2) has no MSG_NOSIGNAL.
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
    uint64_t seen = 0;
    std::unique_lock lock(shared_.mutex);
    for (;;) {
      shared_.work.wait(lock, [&] { return shared_.stopping || shared_.generation != seen; });
      if (shared_.stopping) return;
      seen = shared_.generation;
      const Round round = *shared_.round;
      lock.unlock();
      if (absl::Status status = Send(round); !status.ok()) shared_.Fail(status);
      lock.lock();
      if (--shared_.active == 0) shared_.done.notify_all();
    }
  }

  absl::Status Send(const Round& round) {
    const uint32_t channels = static_cast<uint32_t>(shared_.channels.size());
    for (uint32_t block = 0; block < round.pages->size(); ++block) {
      const PageSet& set = (*round.pages)[block];
      // The first stripe of this block that is ours; see ChannelOf().
      uint64_t stripe = (index_ + channels - block % channels) % channels;
      for (; stripe * kPagesPerStripe < set.pages(); stripe += channels) {
        const uint64_t end = std::min(set.pages(), (stripe + 1) * kPagesPerStripe);
        for (uint64_t page = stripe * kPagesPerStripe; page < end;) {
          const PageSet::Run run = set.NextRun(page, end);
          if (run.count == 0) break;
          page = run.first + run.count;
          RETURN_IF_ERROR(SendRun(round, block, run.first, page));
        }
      }
    }
    RETURN_IF_ERROR(FlushBatch(round));
    return writer_->Finish(round.deadline);
  }

  // Pages [first, end) of one stripe.
  absl::Status SendRun(const Round& round, uint32_t block, uint64_t first, uint64_t end) {
    if (shared_.failed.load(std::memory_order_acquire)) {
      return Error(absl::StatusCode::kCancelled, "another channel failed");
    }
    const memory::RamBlock& ram = shared_.ram.blocks()[block];
    while (first < end) {
      if (round.options.skip_holes) {
        const uint64_t hole_end = EndOfHole(ram, first, end);
        if (hole_end > first) {
          RETURN_IF_ERROR(AddRun(round, FrameType::kFree, block, first, hole_end - first));
          first = hole_end;
          continue;
        }
      }
      uint64_t next = first;
      const bool zero = IsZeroPage(ram.base() + first * kPageSize);
      if (zero) {
        do ++next;
        while (next < end && IsData(round, ram, next) && IsZeroPage(ram.base() + next * kPageSize));
        RETURN_IF_ERROR(AddRun(round, FrameType::kZero, block, first, next - first));
      } else {
        const uint64_t limit = std::min(end, first + shared_.options.frame_bytes / kPageSize);
        do ++next;
        while (next < limit && IsData(round, ram, next) && !IsZeroPage(ram.base() + next * kPageSize));
        RETURN_IF_ERROR(AddData(round, block, ram, first, next - first));
      }
      first = next;
    }
    return absl::OkStatus();
  }

  static bool IsData(const Round& round, const memory::RamBlock& ram, uint64_t page) {
    return !round.options.skip_holes || EndOfHole(ram, page, page + 1) == page;
  }

  // If `page` is a hole: where it ends, at most `limit`; else `page`. SEEK_DATA looks no further than the
  // page if that has data, while SEEK_HOLE would walk over all data that follows.
  static uint64_t EndOfHole(const memory::RamBlock& ram, uint64_t page, uint64_t limit) {
    const off_t at = static_cast<off_t>(page * kPageSize);
    const off_t data = ::lseek(ram.fd(), at, SEEK_DATA);
    if (data < 0) return errno == ENXIO ? limit : page;
    return std::min(limit, std::max(page, static_cast<uint64_t>(data) / kPageSize));
  }

  absl::Status AddRun(const Round& round, FrameType type, uint32_t block, uint64_t first, uint64_t count) {
    if (batch_.full()) RETURN_IF_ERROR(FlushBatch(round));
    FrameHeader header;
    header.type = type;
    header.block = block;
    header.round = round.number;
    header.offset = first * kPageSize;
    header.length = static_cast<uint32_t>(count * kPageSize);
    batch_.AddHeader(header, 0);
    ++batch_frames_;
    Add(type == FrameType::kZero ? zero : free, header.length);
    Done(count);
    return absl::OkStatus();
  }

  absl::Status AddData(const Round& round, uint32_t block, const memory::RamBlock& ram, uint64_t first,
                       uint64_t count) {
    if (batch_.full()) RETURN_IF_ERROR(FlushBatch(round));
    FrameHeader header;
    header.type = FrameType::kData;
    header.block = block;
    header.round = round.number;
    header.offset = first * kPageSize;
    header.length = header.payload = static_cast<uint32_t>(count * kPageSize);
    if (shared_.options.page_checksums) {
      header.flags = kFlagPageChecksums;
      uint8_t* at = batch_.AddHeader(header, static_cast<uint32_t>(count));
      for (uint64_t i = 0; i < count; ++i)
        StoreLe<uint64_t>(at + i * 8, PageChecksum(ram.base() + (first + i) * kPageSize));
    } else {
      batch_.AddHeader(header, 0);
    }
    batch_.AddData(ram.base(), ram.fd(), header.offset, header.length);
    ++batch_frames_;
    Add(data, header.length);
    uint64_t again = 0;
    PageSet& sent = shared_.sent[block];
    for (uint64_t page = first; page < first + count; ++page) {
      again += sent.Test(page);
      sent.Set(page);
    }
    Add(resent, again * kPageSize);
    Done(count);
    if (batch_.data_bytes() >= shared_.options.frame_bytes) return FlushBatch(round);
    return absl::OkStatus();
  }

  void Done(uint64_t pages) { shared_.remaining_pages.fetch_sub(pages, std::memory_order_relaxed); }

  absl::Status FlushBatch(const Round& round) {
    if (batch_.empty()) return absl::OkStatus();
    RETURN_IF_ERROR(shared_.pacer.Acquire(batch_.wire_bytes(), round.deadline));
    RETURN_IF_ERROR(writer_->Write(batch_, round.deadline));
    Add(frames, batch_frames_);
    batch_frames_ = 0;
    batch_.Clear();
    return absl::OkStatus();
  }

  Shared& shared_;
  const uint32_t index_;
  const std::unique_ptr<FrameWriter> writer_;
  FrameBatch batch_;
  uint64_t batch_frames_ = 0;
  std::thread thread_;  // last: runs on the members above
};

MemorySender::MemorySender(const memory::GuestRam& ram, std::vector<std::unique_ptr<Channel>> channels,
                           SenderOptions options) {
  options.frame_bytes = static_cast<uint32_t>(
      std::clamp<uint64_t>(options.frame_bytes / kPageSize * kPageSize, kPageSize, kStripeSize));
  shared_ = std::make_unique<Shared>(ram, options);
  shared_->channels = std::move(channels);
  for (uint32_t i = 0; i < shared_->channels.size(); ++i)
    workers_.push_back(std::make_unique<Worker>(*shared_, i));
}

MemorySender::~MemorySender() {
  bool busy;
  {
    std::lock_guard lock(shared_->mutex);
    shared_->stopping = true;
    busy = shared_->active != 0;
  }
  if (busy) Cancel();
  shared_->work.notify_all();
  workers_.clear();
}

absl::Status MemorySender::SendRound(const PageSets& pages, uint32_t round, const RoundOptions& options,
                                     Deadline deadline) {
  uint64_t total = 0;
  if (pages.size() != shared_->ram.blocks().size()) {
    return Error(absl::StatusCode::kInvalidArgument, "{} page sets for {} blocks", pages.size(),
                 shared_->ram.blocks().size());
  }
  for (size_t i = 0; i < pages.size(); ++i) {
    if (pages[i].pages() != shared_->ram.blocks()[i].pages()) {
      return Error(absl::StatusCode::kInvalidArgument, "page set {} has {} pages, its block {}", i,
                   pages[i].pages(), shared_->ram.blocks()[i].pages());
    }
    total += pages[i].Count();
  }
  std::unique_lock lock(shared_->mutex);
  if (!shared_->error.ok()) return shared_->error;
  shared_->remaining_pages.store(total, std::memory_order_relaxed);
  if (total == 0) return absl::OkStatus();
  shared_->round.emplace(Round{&pages, round, options, deadline});
  ++shared_->generation;
  shared_->active = workers_.size();
  shared_->work.notify_all();
  shared_->done.wait(lock, [&] { return shared_->active == 0; });
  return shared_->error;
}

std::vector<uint64_t> MemorySender::frames() const {
  std::vector<uint64_t> frames;
  for (const auto& worker : workers_) frames.push_back(worker->frames.load(std::memory_order_relaxed));
  return frames;
}

v1::ByteCounts MemorySender::counts() const {
  uint64_t data = 0, zero = 0, free = 0, resent = 0, wire = 0;
  for (const auto& worker : workers_) {
    data += worker->data.load(std::memory_order_relaxed);
    zero += worker->zero.load(std::memory_order_relaxed);
    free += worker->free.load(std::memory_order_relaxed);
    resent += worker->resent.load(std::memory_order_relaxed);
  }
  for (const auto& channel : shared_->channels) wire += channel->bytes_written();
  v1::ByteCounts counts;
  counts.set_data(data);
  counts.set_zero(zero);
  counts.set_hole_skipped(free);
  counts.set_resent(resent);
  counts.set_wire(wire);
  return counts;
}

uint64_t MemorySender::remaining() const {
  return shared_->remaining_pages.load(std::memory_order_relaxed) * kPageSize;
}

void MemorySender::SetBandwidth(uint64_t bytes_per_second) { shared_->pacer.SetRate(bytes_per_second); }

void MemorySender::Cancel() {
  shared_->Fail(Error(absl::StatusCode::kCancelled, "sending memory was cancelled"));
}

size_t MemorySender::channels() const { return workers_.size(); }

}  // namespace baton::stream
