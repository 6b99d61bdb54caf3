#include "tests/lab/device/blk_model.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "tests/lab/device/blk_wire.h"

namespace baton::lab {

using namespace blk;  // NOLINT(google-build-using-namespace): the wire format of this model
namespace {

template <typename T>
void Put(std::span<uint8_t> config, size_t offset, T value) {
  std::memcpy(config.data() + offset, &value, sizeof value);
}

}  // namespace

BlkModel::BlkModel(BlkOptions options) : options_(std::move(options)), random_(options_.seed) {}

absl::StatusOr<std::unique_ptr<BlkModel>> BlkModel::Create(BlkOptions options) {
  std::unique_ptr<BlkModel> out(new BlkModel(std::move(options)));
  const BlkOptions& o = out->options_;
  ASSIGN_OR_RETURN(out->storage_, Storage::Open(o.image, o.io_uring));
  if (!o.journal.empty()) {
    ASSIGN_OR_RETURN(out->journal_, Journal::Open(o.journal));
  }
  out->queues_.resize(o.queues);
  const uint64_t sectors = out->storage_->size() / kSector;
  std::span<uint8_t> config(out->config_);
  Put<uint64_t>(config, 0, sectors);
  Put<uint32_t>(config, 12, kMaxSegments);
  Put<uint32_t>(config, 20, kSector);
  Put<uint8_t>(config, kWritebackAt, 1);
  Put<uint16_t>(config, 34, static_cast<uint16_t>(o.queues));
  Put<uint32_t>(config, 36, kMaxDiscardSectors);
  Put<uint32_t>(config, 40, kMaxDiscardSegments);
  Put<uint32_t>(config, 44, 1);
  Put<uint32_t>(config, 48, kMaxDiscardSectors);
  Put<uint32_t>(config, 52, kMaxDiscardSegments);
  Put<uint8_t>(config, 56, 1);
  if (o.zone_sectors > 0) {
    const std::string path = o.image + ".zones";
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    const uint64_t bytes = std::max<uint64_t>(sectors / o.zone_sectors, 1) * sizeof(uint64_t);
    if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) return ErrnoError(errno, path);
    ASSIGN_OR_RETURN(out->zones_, SharedMapping::Map(fd.get(), 0, bytes));
    Put<uint32_t>(config, 72, o.zone_sectors);
    Put<uint32_t>(config, 84, o.zone_sectors);
    Put<uint32_t>(config, 88, kSector);
    Put<uint8_t>(config, 92, 2);  // host-aware: ordinary writes stay possible
  }
  return out;
}

void BlkModel::Attach(DeviceHost* host) {
  host_ = host;
  held_now_ = &host_->Counter("held");
  held_ever_ = &host_->Counter("held_ever");
  executed_ever_ = &host_->Counter("executed");
  host_->Watch(storage_->event_fd(), [this] {
    storage_->Reap([this](uint64_t tag, int result) {
      OperationEnded(At(static_cast<uint32_t>(tag >> 32), static_cast<uint32_t>(tag)), result);
    });
    ReleaseCollected(false);
    storage_->Submit();
  });
}

uint64_t BlkModel::Features() const {
  return kFSegMax | kFBlkSize | kFFlush | kFConfigWce | kFDiscard | kFWriteZeroes |
         (options_.queues > 1 ? kFMq : 0) | (options_.zone_sectors ? kFZoned : 0);
}

absl::Status BlkModel::WriteConfig(uint32_t offset, std::span<const uint8_t> data, bool /*migration*/) {
  if (offset != kWritebackAt || data.size() != 1 || data[0] > 1) {
    return absl::InvalidArgumentError("only the write-back byte of a disk's config can be written");
  }
  config_[kWritebackAt] = data[0];
  return absl::OkStatus();
}

void BlkModel::FeaturesAccepted(uint64_t /*features*/) {}

bool BlkModel::WriteThrough() const {
  const uint64_t features = host_->features();
  // VIRTIO 1.x 5.2.6.2: a driver that cannot flush must find its writes stable.
  if (features & kFConfigWce) return config_[kWritebackAt] == 0;
  return !(features & kFFlush);
}

BlkModel::Work& BlkModel::WorkOf(const IoRequest& io) {
  auto& work = queues_[io.queue].work;
  if (io.slot >= work.size()) work.resize(io.slot + 1);
  return work[io.slot];
}

void BlkModel::Started(uint32_t queue) {
  Queue& q = queues_[queue];
  q.stopping.reset();
  q.replays.clear();
  q.order.reset();
  q.blocked.clear();
  if (journal_) queues_[queue].run = journal_.NewRun();
}

void BlkModel::Replay(IoRequest* request) {
  Work& w = Admit(request);
  w.state = State::kBlocked;
  queues_[request->queue].replays.push_back(request->slot);
  Record(JournalEvent::kReplay, w);
}

void BlkModel::Available(uint32_t queue) {
  if (!queues_[queue].replays.empty()) StartReplays(queue);
  while (IoRequest* io = host_->Pop(queue)) Start(Admit(io));
  ReleaseCollected(false);
  storage_->Submit();
}

BlkModel::Work& BlkModel::Admit(IoRequest* io) {
  Work& w = WorkOf(*io);
  const uint32_t generation = w.generation + 1;
  w = Work{};
  w.io = io;
  w.generation = generation;
  w.order = ++next_order_;
  w.state = State::kRunning;
  ++outstanding_;
  PointStatus(w);
  w.refused = !Parse(w);
  return w;
}

void BlkModel::Start(Work& w) {
  Queue& q = queues_[w.io->queue];
  if (!w.refused && fail_next_ > 0) {
    --fail_next_;
    w.status = kIoErr;
    w.refused = true;
  }
  if (!w.refused && !w.io->replayed && q.order && !q.order->MayStart(Classify(w))) {
    w.state = State::kBlocked;
    q.blocked.push_back(w.io->slot);
    return;
  }
  if (!options_.latency_after && Delay(w, State::kDelayed)) return;
  Begin(w);
}

virtio::BlkRequest BlkModel::Classify(const Work& w) {
  const IoRequest& io = *w.io;
  head_.resize(std::min<uint64_t>(io.readable_bytes, virtio::kBlkHeadBytes));
  (void)CopyOut(io, 0, head_.data(), head_.size());
  return virtio::ClassifyBlk(head_, io.readable_bytes, io.writable_bytes);
}

// Starts what may start of the requests from the in-flight region.
void BlkModel::StartReplays(uint32_t queue) {
  Queue& q = queues_[queue];
  if (!q.order) {
    std::vector<virtio::BlkRequest> requests;
    for (size_t i = 0; i < q.replays.size(); ++i) {
      q.work[q.replays[i]].replay = i;
      requests.push_back(Classify(q.work[q.replays[i]]));
    }
    q.order.emplace(std::move(requests));
  }
  for (size_t next; q.order && q.order->Next(&next);) Start(q.work[q.replays[next]]);
}

void BlkModel::ReplayEnded(Work& w) {
  const uint32_t queue = w.io->queue;
  Queue& q = queues_[queue];
  if (!q.order) return;
  q.order->Completed(w.replay);
  if (q.order->done()) {
    q.order.reset();
    q.replays.clear();
  } else {
    StartReplays(queue);
  }
  std::vector<uint32_t> waiting;
  waiting.swap(q.blocked);
  for (uint32_t slot : waiting) {
    if (q.work[slot].state == State::kBlocked && !q.work[slot].io->replayed) Start(q.work[slot]);
  }
}

bool BlkModel::Delay(Work& w, State state) {
  const uint64_t most = std::max(options_.latency_us, options_.latency_max_us);
  if (most == 0 || (w.io->replayed && !options_.delay_replays)) return false;
  uint64_t us = options_.latency_us;
  if (most > us) us += random_() % (most - us + 1);
  const Clock::time_point when = Clock::now() + std::chrono::microseconds(us);
  w.state = state;
  times_.push({when, w.order, w.io->queue, w.io->slot, w.generation});
  host_->TickAt(times_.top().when);
  return true;
}

void BlkModel::Tick(Clock::time_point now) {
  while (!times_.empty() && times_.top().when <= now) {
    const Due due = times_.top();
    times_.pop();
    Work& w = At(due.queue, due.slot);
    if (w.generation != due.generation) continue;
    if (w.state == State::kDelayed) {
      Begin(w);
    } else if (w.state == State::kRested) {
      Collect(w);
    }
  }
  host_->TickAt(times_.empty() ? Clock::time_point::max() : times_.top().when);
  ReleaseCollected(false);
  storage_->Submit();
}

// The latency was changed: it goes for what is waiting, too.
void BlkModel::Retime() {
  times_ = {};
  host_->TickAt(Clock::time_point::max());
  for (Queue& q : queues_) {
    for (Work& w : q.work) {
      if (w.state != State::kDelayed && w.state != State::kRested) continue;
      const State state = w.state;
      if (Delay(w, state)) continue;
      if (state == State::kDelayed) {
        Begin(w);
      } else {
        Collect(w);
      }
    }
  }
  ReleaseCollected(false);
  storage_->Submit();
}

// The request has its status: the guest may be told, at once or later.
void BlkModel::Ended(Work& w) {
  if (w.io->replayed) ReplayEnded(w);
  if (options_.latency_after && !queues_[w.io->queue].stopping && Delay(w, State::kRested)) return;
  Collect(w);
}

void BlkModel::Collect(Work& w) {
  if (options_.shuffle <= 1 || queues_[w.io->queue].stopping) {
    Finish(w);
    return;
  }
  w.state = State::kCollected;
  collected_.emplace_back(w.io->queue, w.io->slot);
}

void BlkModel::ReleaseCollected(bool all) {
  if (collected_.empty()) return;
  if (!all && collected_.size() < options_.shuffle && collected_.size() + held_.size() < outstanding_) return;
  std::vector<std::pair<uint32_t, uint32_t>> ready;
  ready.swap(collected_);
  std::shuffle(ready.begin(), ready.end(), random_);
  for (const auto& [queue, slot] : ready) {
    if (At(queue, slot).state == State::kCollected) Finish(At(queue, slot));
  }
}

void BlkModel::Finish(Work& w) {
  if (w.status_at) *w.status_at = w.status;
  IoRequest* io = w.io;
  if (journal_ && w.executed && TakesSpace(w.type)) {
    unpublished_[{io->queue, io->counter}] = {w.offset, w.length, w.tag};
  }
  const uint32_t written = w.written;
  w.state = State::kFree;
  ++w.generation;
  w.io = nullptr;
  --outstanding_;
  host_->Complete(io, written);
}

void BlkModel::Published(uint32_t queue, uint64_t counter) {
  if (!journal_) return;
  auto it = unpublished_.find({queue, counter});
  if (it == unpublished_.end()) return;
  const auto [offset, length, tag] = it->second;
  journal_.Record(queues_[queue].run, JournalEvent::kPublish, queue, counter, offset, length, tag);
  unpublished_.erase(it);
}

void BlkModel::Abandon(Work& w) {
  IoRequest* io = w.io;
  Record(JournalEvent::kCancel, w);
  w.state = State::kFree;
  ++w.generation;
  w.io = nullptr;
  --outstanding_;
  host_->Abandon(io);
}

void BlkModel::Hold(Work& w) {
  if (queues_[w.io->queue].stopping == StopMode::kSuspend) {
    Abandon(w);
    return;
  }
  w.state = State::kHeld;
  held_.emplace_back(w.io->queue, w.io->slot);
  ++*held_now_;
  ++*held_ever_;
  host_->QueueError(w.io->queue);
}

void BlkModel::RetryHeld() {
  std::vector<std::pair<uint32_t, uint32_t>> retry;
  retry.swap(held_);
  *held_now_ = 0;
  for (const auto& [queue, slot] : retry) {
    if (At(queue, slot).state == State::kHeld) Begin(At(queue, slot));
  }
  ReleaseCollected(false);
  storage_->Submit();
}

void BlkModel::Stop(uint32_t queue, StopMode mode) {
  queues_[queue].stopping = mode;
  // A ring that was never enabled has not begun with them.
  Queue& q = queues_[queue];
  if (mode == StopMode::kSuspend) {
    q.order.reset();
    q.replays.clear();
    q.blocked.clear();
  } else if (!q.replays.empty()) {
    StartReplays(queue);
  }
  for (size_t slot = 0; slot < q.work.size(); ++slot) {
    Work& w = q.work[slot];
    switch (w.state) {
      case State::kFree:
        break;
      case State::kDelayed:
      case State::kBlocked:
      case State::kHeld:
        if (mode == StopMode::kSuspend) {
          if (w.state == State::kHeld) {
            --*held_now_;
            std::erase(held_, std::pair(queue, static_cast<uint32_t>(slot)));
          }
          Abandon(w);
        }
        break;
      case State::kRunning:
        if (mode == StopMode::kSuspend && !w.abandon) {
          w.abandon = true;
          if (IsIdempotent(w.type)) storage_->Cancel(w.operation);
        }
        break;
      case State::kRested:
      case State::kCollected:
        if (mode == StopMode::kSuspend && IsIdempotent(w.type)) {
          Abandon(w);
        } else {
          Finish(w);
        }
        break;
    }
  }
  storage_->Submit();
}

void BlkModel::Reset() {
  config_[kWritebackAt] = 1;
  times_ = {};
  held_.clear();
  collected_.clear();
  unpublished_.clear();
  *held_now_ = 0;
}

void BlkModel::Record(JournalEvent event, const Work& w) {
  if (!journal_ || !TakesSpace(w.type)) return;
  journal_.Record(queues_[w.io->queue].run, event, w.io->queue, w.io->counter, w.offset, w.length, w.tag);
}

nlohmann::json BlkModel::Describe() const {
  return {{"type", "blk"},
          {"sectors", storage_->size() / kSector},
          {"engine", storage_->asynchronous() ? "io_uring" : "synchronous"},
          {"latency_us", options_.latency_us},
          {"latency_max_us", options_.latency_max_us},
          {"shuffle", options_.shuffle},
          {"no_space", options_.no_space}};
}

absl::Status BlkModel::Set(const nlohmann::json& command) {
  BlkOptions next = options_;
  uint64_t fail_next = fail_next_;
  for (const auto& item : command.items()) {
    // Not a structured binding: the clang of clang-tidy captures none in a lambda.
    const std::string& key = item.key();
    const nlohmann::json& value = item.value();
    auto number = [&](auto& out) {
      if (!value.is_number_integer() || value.get<int64_t>() < 0) return false;
      out = value.get<std::decay_t<decltype(out)>>();
      return true;
    };
    auto flag = [&](bool& out) {
      if (!value.is_boolean()) return false;
      out = value.get<bool>();
      return true;
    };
    bool good = false;
    if (key == "latency_us") {
      good = number(next.latency_us);
    } else if (key == "latency_max_us") {
      good = number(next.latency_max_us);
    } else if (key == "latency_after") {
      good = flag(next.latency_after);
    } else if (key == "delay_replays") {
      good = flag(next.delay_replays);
    } else if (key == "shuffle") {
      good = number(next.shuffle);
    } else if (key == "no_space") {
      good = flag(next.no_space);
    } else if (key == "fail_next") {
      good = number(fail_next);
    } else {
      return Error(absl::StatusCode::kInvalidArgument, "a disk has no setting {}", key);
    }
    if (!good) return Error(absl::StatusCode::kInvalidArgument, "{} cannot be {}", key, value.dump());
  }
  const bool had_no_space = options_.no_space;
  const bool retime =
      next.latency_us != options_.latency_us || next.latency_max_us != options_.latency_max_us;
  options_ = std::move(next);
  fail_next_ = fail_next;
  if (retime && host_) Retime();
  if (had_no_space && !options_.no_space) RetryHeld();
  return absl::OkStatus();
}

}  // namespace baton::lab
