#include "tests/lab/device/blk_model.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "agent/virtio/features.h"

namespace baton::lab {
namespace {

constexpr uint64_t kSector = 512;
constexpr uint32_t kMaxSegments = 128;
constexpr uint32_t kMaxDiscardSectors = 1u << 22;
constexpr uint32_t kMaxDiscardSegments = 16;

// VIRTIO 1.x 5.2.3.
constexpr uint64_t kFSegMax = virtio::Bit(2), kFBlkSize = virtio::Bit(6), kFFlush = virtio::Bit(9),
                   kFConfigWce = virtio::Bit(11), kFMq = virtio::Bit(12), kFDiscard = virtio::Bit(13),
                   kFWriteZeroes = virtio::Bit(14), kFZoned = virtio::Bit(17);
enum Type : uint32_t {
  kIn = 0,
  kOut = 1,
  kFlush = 4,
  kGetId = 8,
  kDiscard = 11,
  kWriteZeroes = 13,
  kZoneAppend = 15,
  kZoneReport = 16,
  kZoneReset = 24,
};
enum Status : uint8_t { kOk = 0, kIoErr = 1, kUnsupp = 2, kZoneInvalidCmd = 3 };
constexpr uint32_t kUnmap = 1;
constexpr size_t kIdBytes = 20;
// Offsets within the config space (VIRTIO 1.x 5.2.4).
constexpr uint32_t kWritebackAt = 32;

struct RequestHeader {
  uint32_t type;
  uint32_t reserved;
  uint64_t sector;
};
struct ZoneReportHeader {
  uint64_t zones;
  uint8_t reserved[56];
};
struct ZoneDescriptor {
  uint64_t capacity, start, write_pointer;
  uint8_t type, state;
  uint8_t reserved[38];
};
static_assert(sizeof(ZoneReportHeader) == 64 && sizeof(ZoneDescriptor) == 64);

template <typename T>
void Put(std::span<uint8_t> config, size_t offset, T value) {
  std::memcpy(config.data() + offset, &value, sizeof value);
}

// Copies up to `size` bytes from `offset` of the chain's readable part; false if there are fewer.
bool CopyOut(const IoRequest& io, uint64_t offset, void* out, size_t size) {
  auto* to = static_cast<uint8_t*>(out);
  for (const IoSegment& s : io.readable) {
    if (offset >= s.len) {
      offset -= s.len;
      continue;
    }
    const size_t part = std::min<uint64_t>(size, s.len - offset);
    std::memcpy(to, s.data + offset, part);
    to += part;
    size -= part;
    offset = 0;
    if (size == 0) return true;
  }
  return size == 0;
}

// Copies into the writable part; returns what fitted.
size_t CopyIn(const IoRequest& io, uint64_t offset, const void* in, size_t size) {
  const auto* from = static_cast<const uint8_t*>(in);
  size_t copied = 0;
  for (const IoSegment& s : io.writable) {
    if (offset >= s.len) {
      offset -= s.len;
      continue;
    }
    const size_t part = std::min<uint64_t>(size - copied, s.len - offset);
    std::memcpy(s.data + offset, from + copied, part);
    copied += part;
    offset = 0;
    if (copied == size) break;
  }
  return copied;
}

bool TakesSpace(uint32_t type) {
  return type == kOut || type == kDiscard || type == kWriteZeroes || type == kZoneAppend;
}
bool IsIdempotent(uint32_t type) { return type != kZoneAppend && type != kZoneReset; }

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

void BlkModel::PointStatus(Work& w) {
  const auto& writable = w.io->writable;
  for (auto it = writable.rbegin(); it != writable.rend(); ++it) {
    if (it->len == 0) continue;
    w.status_at = it->data + it->len - 1;
    return;
  }
}

// Fills in what the request is; false if it has ended with w.status. What the driver may change meanwhile is
// copied here, once.
bool BlkModel::Parse(Work& w) {
  const IoRequest& io = *w.io;
  RequestHeader header;
  w.status = kIoErr;
  w.written = io.writable_bytes > 0 ? 1 : 0;
  if (!w.status_at || !CopyOut(io, 0, &header, sizeof header)) return false;
  w.type = header.type;
  w.sector = header.sector;
  const uint64_t out = io.readable_bytes - sizeof header, in = io.writable_bytes - 1;
  const uint64_t sectors = storage_->size() / kSector;
  auto fits = [&](uint64_t sector, uint64_t bytes) {
    return bytes % kSector == 0 && sector <= sectors && bytes / kSector <= sectors - sector;
  };
  switch (header.type) {
    case kIn:
    case kOut:
      w.length = header.type == kIn ? in : out;
      if (!fits(header.sector, w.length)) return false;
      w.offset = header.sector * kSector;
      if (header.type == kOut && journal_) {
        (void)CopyOut(io, sizeof header + options_.journal_tag_offset, &w.tag, sizeof w.tag);
      }
      return true;
    case kFlush:
      return true;
    case kGetId:
      w.length = std::min<uint64_t>(in, kIdBytes);
      return true;
    case kDiscard:
    case kWriteZeroes: {
      const uint64_t segments = out / sizeof(DiscardSegment);
      if (segments == 0 || segments > kMaxDiscardSegments || out % sizeof(DiscardSegment)) return false;
      uint64_t first = UINT64_MAX, end = 0;
      for (uint64_t i = 0; i < segments; ++i) {
        DiscardSegment s;
        if (!CopyOut(io, sizeof header + i * sizeof s, &s, sizeof s)) return false;
        if (s.num > kMaxDiscardSectors || !fits(s.sector, uint64_t{s.num} * kSector)) return false;
        if (s.flags & ~kUnmap || (header.type == kDiscard && s.flags)) {
          w.status = kUnsupp;
          return false;
        }
        first = std::min(first, s.sector);
        end = std::max(end, s.sector + s.num);
      }
      w.offset = first * kSector;
      w.length = (end - first) * kSector;
      return true;
    }
    case kZoneAppend:
    case kZoneReport:
    case kZoneReset:
      if (!zones_) break;
      w.length = header.type == kZoneAppend ? out : 0;
      w.offset = header.sector * kSector;
      if (!fits(header.sector, w.length)) return false;
      if (header.sector / options_.zone_sectors >= zones_.size() / sizeof(uint64_t) ||
          (header.type == kZoneAppend && in < sizeof(uint64_t)) ||
          (header.type != kZoneReport && header.sector % options_.zone_sectors)) {
        w.status = kZoneInvalidCmd;
        return false;
      }
      // Appends to one zone are not ordered by anybody; their extent is where they may land.
      return true;
    default:
      break;
  }
  w.status = kUnsupp;
  return false;
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

void BlkModel::Begin(Work& w) {
  if (w.refused) {
    w.state = State::kRunning;
    Ended(w);
    return;
  }
  if (options_.no_space && TakesSpace(w.type)) {
    Hold(w);
    return;
  }
  host_->CrashPoint("before_io");
  w.state = State::kRunning;
  StartOperation(w);
}

void BlkModel::GatherIo(Work& w, bool write) {
  scratch_.clear();
  uint64_t skip = write ? sizeof(RequestHeader) : 0, left = w.length;
  for (const IoSegment& s : write ? w.io->readable : w.io->writable) {
    if (skip >= s.len) {
      skip -= s.len;
      continue;
    }
    const uint64_t part = std::min<uint64_t>(s.len - skip, left);
    if (part > 0) scratch_.push_back({s.data + skip, part});
    skip = 0;
    left -= part;
  }
}

void BlkModel::StartOperation(Work& w) {
  const uint64_t tag = uint64_t{w.io->queue} << 32 | w.io->slot;
  switch (w.type) {
    case kIn:
    case kOut:
      if (w.length == 0) break;
      GatherIo(w, w.type == kOut);
      Record(JournalEvent::kBegin, w);
      w.operation = storage_->Start(w.type == kIn    ? Storage::Kind::kRead
                                    : WriteThrough() ? Storage::Kind::kWriteThrough
                                                     : Storage::Kind::kWrite,
                                    scratch_, w.offset, w.length, tag);
      return;
    case kFlush:
      w.operation = storage_->Start(Storage::Kind::kFlush, {}, 0, 0, tag);
      return;
    case kGetId: {
      char id[kIdBytes] = {};
      std::memcpy(id, options_.serial.data(), std::min(options_.serial.size(), kIdBytes));
      w.written = static_cast<uint32_t>(CopyIn(*w.io, 0, id, w.length) + 1);
      break;
    }
    case kDiscard:
    case kWriteZeroes:
      if (w.segment == 0) Record(JournalEvent::kBegin, w);
      if (StartSegment(w)) return;
      break;
    case kZoneAppend:
      StartZoneAppend(w);
      return;
    case kZoneReport:
      AppendToReport(w);
      break;
    case kZoneReset:
      __atomic_store_n(reinterpret_cast<uint64_t*>(zones_.data()) + w.sector / options_.zone_sectors, 0,
                       __ATOMIC_RELEASE);
      break;
    default:
      break;
  }
  w.status = kOk;
  Executed(w);
  Ended(w);
}

// Starts the next segment of a discard or zeroing; false when there is none left.
bool BlkModel::StartSegment(Work& w) {
  DiscardSegment s;
  for (;; ++w.segment) {
    if (!CopyOut(*w.io, sizeof(RequestHeader) + uint64_t{w.segment} * sizeof s, &s, sizeof s)) return false;
    // Checked again: the driver may have changed it since.
    const uint64_t begin = s.sector * kSector, bytes = uint64_t{s.num} * kSector;
    if (s.sector > storage_->size() / kSector || begin < w.offset || begin + bytes > w.offset + w.length) {
      return false;
    }
    if (bytes == 0) continue;
    const bool keep = w.type == kWriteZeroes && !(s.flags & kUnmap) && !w.punch;
    w.operation = storage_->Start(w.type == kDiscard ? Storage::Kind::kDiscard
                                  : keep             ? Storage::Kind::kZero
                                                     : Storage::Kind::kZeroUnmap,
                                  {}, begin, bytes, uint64_t{w.io->queue} << 32 | w.io->slot);
    ++w.segment;
    return true;
  }
}

void BlkModel::StartZoneAppend(Work& w) {
  auto* pointer = reinterpret_cast<uint64_t*>(zones_.data()) + w.sector / options_.zone_sectors;
  const uint64_t at = __atomic_fetch_add(pointer, w.length / kSector, __ATOMIC_ACQ_REL);
  if (w.length == 0 || at > options_.zone_sectors || w.length / kSector > options_.zone_sectors - at) {
    __atomic_fetch_sub(pointer, w.length / kSector, __ATOMIC_ACQ_REL);
    w.status = kZoneInvalidCmd;
    Ended(w);
    return;
  }
  w.sector += at;
  w.offset = w.sector * kSector;
  GatherIo(w, true);
  Record(JournalEvent::kBegin, w);
  w.operation = storage_->Start(Storage::Kind::kWrite, scratch_, w.offset, w.length,
                                uint64_t{w.io->queue} << 32 | w.io->slot);
}

void BlkModel::AppendToReport(Work& w) {
  const uint64_t zones = zones_.size() / sizeof(uint64_t), first = w.sector / options_.zone_sectors;
  const uint64_t room = w.io->writable_bytes - 1;
  uint64_t offset = sizeof(ZoneReportHeader);
  ZoneReportHeader header{};
  for (uint64_t zone = first; zone < zones && offset + sizeof(ZoneDescriptor) <= room; ++zone) {
    ZoneDescriptor d{};
    d.capacity = options_.zone_sectors;
    d.start = zone * options_.zone_sectors;
    const uint64_t pointer =
        __atomic_load_n(reinterpret_cast<uint64_t*>(zones_.data()) + zone, __ATOMIC_ACQUIRE);
    d.write_pointer = d.start + pointer;
    d.type = 3;                                                              // sequential write preferred
    d.state = pointer == 0 ? 1 : pointer >= options_.zone_sectors ? 14 : 2;  // empty, full, implicitly open
    offset += CopyIn(*w.io, offset, &d, sizeof d);
    ++header.zones;
  }
  if (room >= sizeof header) CopyIn(*w.io, 0, &header, sizeof header);
  w.written = static_cast<uint32_t>(std::min<uint64_t>(room + 1, UINT32_MAX));
}

void BlkModel::OperationEnded(Work& w, int result) {
  host_->CrashPoint("after_io");
  if (result == -ECANCELED && w.abandon) {
    Abandon(w);
    return;
  }
  if (result == -ENOSPC && TakesSpace(w.type) && IsIdempotent(w.type) && !w.abandon) {
    Hold(w);
    return;
  }
  const bool segments = w.type == kDiscard || w.type == kWriteZeroes;
  if (result == -EOPNOTSUPP && segments && !w.punch && !w.abandon) {
    // tmpfs has no ZERO_RANGE; a hole reads as zeroes, too.
    w.punch = true;
    --w.segment;
    if (StartSegment(w)) return;
  }
  if (result == 0 && segments && !w.abandon) {
    if (StartSegment(w)) return;
  }
  w.status = result == 0 ? kOk : result == -EOPNOTSUPP ? kUnsupp : kIoErr;
  if (w.type == kIn && result == 0) w.written = static_cast<uint32_t>(w.length + 1);
  if (w.type == kZoneAppend && result == 0) {
    // virtio_blk_zone_append's place: right before the status.
    CopyIn(*w.io, w.io->writable_bytes - 1 - sizeof w.sector, &w.sector, sizeof w.sector);
    w.written = static_cast<uint32_t>(w.io->writable_bytes);
  }
  // A discard that is given up may have segments left.
  if (result == 0 && !(segments && w.abandon)) Executed(w);
  if (w.abandon && IsIdempotent(w.type)) {
    Abandon(w);
    return;
  }
  Ended(w);
}

// What the request was to do has been done.
void BlkModel::Executed(Work& w) {
  w.executed = true;
  ++*executed_ever_;
  Record(JournalEvent::kDone, w);
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
  for (const auto& [key, value] : command.items()) {
    auto number = [&](auto& out) {
      if (!value.is_number_integer() || value.template get<int64_t>() < 0) return false;
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
