#include "agent/virtio/balloon.h"

#include <algorithm>
#include <utility>

namespace baton::virtio {
namespace {

// More page frame numbers than a driver puts into one buffer (Linux: 256); the rest is not looked at.
constexpr uint32_t kMaxPfnBytes = 64 * 1024;
// struct virtio_balloon_stat: le16 tag, le64 value, packed.
constexpr uint32_t kStatBytes = 10;
constexpr uint32_t kMaxStats = 64;

bool Sane(const BalloonBuffer& buffer) { return buffer.size > 0 && buffer.gpa + buffer.size > buffer.gpa; }

void Put(std::array<uint8_t, kBalloonConfigSize>& bytes, uint32_t at, uint32_t value) {
  for (int i = 0; i < 4; ++i) bytes[at + i] = static_cast<uint8_t>(value >> (8 * i));
}

uint32_t Get32(const uint8_t* bytes) {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) value |= uint32_t{bytes[i]} << (8 * i);
  return value;
}

std::array<uint8_t, kBalloonConfigSize> Encode(const BalloonState& state) {
  std::array<uint8_t, kBalloonConfigSize> bytes{};
  Put(bytes, kBalloonConfigNumPages, state.num_pages);
  Put(bytes, kBalloonConfigActual, state.actual);
  Put(bytes, kBalloonConfigCmdId, state.cmd_id);
  Put(bytes, kBalloonConfigPoison, state.poison_val);
  return bytes;
}

}  // namespace

std::optional<uint32_t> BalloonQueueIndex(uint64_t acked, BalloonQueue queue) {
  const bool stats = acked & kBalloonFStatsVq, hints = acked & kBalloonFFreePageHint;
  switch (queue) {
    case BalloonQueue::kInflate:
      return 0;
    case BalloonQueue::kDeflate:
      return 1;
    case BalloonQueue::kStats:
      return stats ? std::optional<uint32_t>(2) : std::nullopt;
    case BalloonQueue::kFreePage:
      return hints ? std::optional<uint32_t>(2 + stats) : std::nullopt;
    case BalloonQueue::kReporting:
      return acked & kBalloonFReporting ? std::optional<uint32_t>(2 + stats + hints) : std::nullopt;
  }
  return std::nullopt;
}

std::optional<BalloonQueue> BalloonQueueAt(uint64_t acked, uint32_t index) {
  for (BalloonQueue queue : {BalloonQueue::kInflate, BalloonQueue::kDeflate, BalloonQueue::kStats,
                             BalloonQueue::kFreePage, BalloonQueue::kReporting}) {
    if (BalloonQueueIndex(acked, queue) == index) return queue;
  }
  return std::nullopt;
}

uint32_t BalloonQueueCount(uint64_t acked) {
  uint32_t count = 2;
  for (uint64_t feature : {kBalloonFStatsVq, kBalloonFFreePageHint, kBalloonFReporting})
    if (acked & feature) ++count;
  return count;
}

void BalloonDevice::ReadConfig(uint32_t offset, std::span<uint8_t> out) const {
  const auto bytes = Encode(state_);
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = uint64_t{offset} + i < bytes.size() ? bytes[offset + i] : 0;
}

absl::Status BalloonDevice::WriteConfig(uint32_t offset, std::span<const uint8_t> data, bool front_end) {
  if (uint64_t{offset} + data.size() > kBalloonConfigSize)
    return Error(absl::StatusCode::kInvalidArgument,
                 "{} bytes at {} are not in the balloon's configuration space of {}", data.size(), offset,
                 kBalloonConfigSize);
  auto bytes = Encode(state_);
  std::copy(data.begin(), data.end(), bytes.begin() + offset);
  state_.actual = Get32(&bytes[kBalloonConfigActual]);
  // Without the feature the field is not there for the driver (5.5.4).
  if (acked_ & kBalloonFPagePoison || front_end) state_.poison_val = Get32(&bytes[kBalloonConfigPoison]);
  if (front_end) {
    state_.num_pages = Get32(&bytes[kBalloonConfigNumPages]);
    state_.cmd_id = Get32(&bytes[kBalloonConfigCmdId]);
  }
  return absl::OkStatus();
}

BalloonDevice::Disposition BalloonDevice::HandleChain(BalloonQueue queue, uint16_t head,
                                                      std::span<const BalloonBuffer> chain,
                                                      const MemoryView& memory, BalloonSink& sink) {
  switch (queue) {
    case BalloonQueue::kInflate:
    case BalloonQueue::kDeflate:
      HandlePfns(chain, memory, queue == BalloonQueue::kInflate, sink);
      return Disposition::kUsed;
    case BalloonQueue::kStats:
      // One buffer is held; a second one can only come from a driver that broke the rules.
      if (held_stats_) {
        ++malformed_;
        return Disposition::kUsed;
      }
      HandleStats(head, chain, memory);
      return Disposition::kHeld;
    case BalloonQueue::kFreePage:
      HandleFreePage(chain, memory, sink);
      return Disposition::kUsed;
    case BalloonQueue::kReporting:
      HandleReporting(chain, sink);
      return Disposition::kUsed;
  }
  return Disposition::kUsed;
}

void BalloonDevice::HandlePfns(std::span<const BalloonBuffer> chain, const MemoryView& memory, bool inflate,
                               BalloonSink& sink) {
  std::array<uint8_t, 1024> piece;
  uint64_t first = 0, count = 0;
  const auto flush = [&] {
    if (count == 0) return;
    inflate ? sink.OnInflate(first * kBalloonPage, count * kBalloonPage)
            : sink.OnDeflate(first * kBalloonPage, count * kBalloonPage);
    count = 0;
  };
  for (const BalloonBuffer& buffer : chain) {
    if (buffer.device_writes || !Sane(buffer) || buffer.size % 4 != 0 || buffer.size > kMaxPfnBytes) {
      ++malformed_;
      continue;
    }
    for (uint32_t done = 0; done < buffer.size;) {
      const uint32_t size = std::min<uint32_t>(buffer.size - done, piece.size());
      if (!memory.Read(buffer.gpa + done, piece.data(), size).ok()) {
        ++malformed_;
        break;
      }
      for (uint32_t at = 0; at < size; at += 4) {
        const uint64_t pfn = Get32(&piece[at]);
        if (count > 0 && pfn == first + count) {
          ++count;
          continue;
        }
        flush();
        first = pfn;
        count = 1;
      }
      done += size;
    }
  }
  flush();
}

void BalloonDevice::HandleStats(uint16_t head, std::span<const BalloonBuffer> chain,
                                const MemoryView& memory) {
  held_stats_ = head;
  stats_.clear();
  for (const BalloonBuffer& buffer : chain) {
    if (buffer.device_writes || !Sane(buffer)) {
      ++malformed_;
      continue;
    }
    // A driver that rounds the size or knows more tags than we do is understood as far as it goes.
    for (uint32_t at = 0; at + kStatBytes <= buffer.size && stats_.size() < kMaxStats; at += kStatBytes) {
      uint8_t bytes[kStatBytes];
      if (!memory.Read(buffer.gpa + at, bytes, sizeof bytes).ok()) {
        ++malformed_;
        break;
      }
      const uint64_t low = Get32(bytes + 2), high = Get32(bytes + 6);
      stats_.push_back({static_cast<uint16_t>(bytes[0] | bytes[1] << 8), low | high << 32});
    }
  }
}

std::optional<uint16_t> BalloonDevice::TakeHeldStats() { return std::exchange(held_stats_, std::nullopt); }

void BalloonDevice::HandleFreePage(std::span<const BalloonBuffer> chain, const MemoryView& memory,
                                   BalloonSink& sink) {
  for (const BalloonBuffer& buffer : chain) {
    if (!Sane(buffer)) {
      ++malformed_;
    } else if (!buffer.device_writes) {
      uint8_t bytes[4];
      if (buffer.size != sizeof bytes || !memory.Read(buffer.gpa, bytes, sizeof bytes).ok()) {
        ++malformed_;
        continue;
      }
      TakeCommand(Get32(bytes), sink);
    } else if (status_ == HintStatus::kStarted && stream_id_ == state_.cmd_id) {
      // Of the current id, and not after STOP or DONE was published ("MUST ignore", 5.5.6.6.1).
      sink.OnHint(buffer.gpa, buffer.size);
    }
  }
}

void BalloonDevice::TakeCommand(uint32_t id, BalloonSink& sink) {
  if (id == kHintStop) {
    // A STOP that belongs to no start we heard of ends nothing: it is that of a round long given up.
    const uint32_t ended = std::exchange(stream_id_, kHintStop);
    if (ended == kHintStop) return;
    CloseIdsUpTo(ended);
    if (ended == state_.last_id && status_ != HintStatus::kDone) sink.OnHintStop();
    return;
  }
  const bool known = std::find(state_.open_ids.begin(), state_.open_ids.end(), id) != state_.open_ids.end();
  if (!known) {
    // No id of ours: what follows belongs to nothing, until the driver says an id that does.
    ++malformed_;
    stream_id_ = kHintStop;
    return;
  }
  stream_id_ = id;
  if (status_ == HintStatus::kRequested && id == state_.cmd_id) {
    status_ = HintStatus::kStarted;
    sink.OnHintStart();
  }
}

// The driver answers ids in the order in which it sees them, so the end of one is the end of those before it.
void BalloonDevice::CloseIdsUpTo(uint32_t id) {
  auto& open = state_.open_ids;
  const auto at = std::find(open.begin(), open.end(), id);
  if (at != open.end()) open.erase(open.begin(), at + 1);
}

void BalloonDevice::HandleReporting(std::span<const BalloonBuffer> chain, BalloonSink& sink) {
  for (const BalloonBuffer& buffer : chain) {
    if (!Sane(buffer) || !buffer.device_writes) {
      ++malformed_;
    } else if (poison() == 0) {
      sink.OnReported(buffer.gpa, buffer.size);
    }
  }
}

absl::StatusOr<uint32_t> BalloonDevice::StartHinting() {
  if (!(acked_ & kBalloonFFreePageHint))
    return Error(absl::StatusCode::kFailedPrecondition, "the guest's balloon driver gives no hints");
  if (state_.open_ids.size() >= kMaxOpenIds)
    return Error(absl::StatusCode::kFailedPrecondition,
                 "the guest's balloon driver has left {} requests for hints unanswered",
                 state_.open_ids.size());
  uint32_t id = state_.last_id;
  do {
    id = id < kHintFirstId || id == UINT32_MAX ? kHintFirstId : id + 1;
  } while (std::find(state_.open_ids.begin(), state_.open_ids.end(), id) != state_.open_ids.end());
  state_.last_id = state_.cmd_id = id;
  state_.open_ids.push_back(id);
  status_ = HintStatus::kRequested;
  return id;
}

void BalloonDevice::StopHinting() {
  if (status_ == HintStatus::kDone) return;
  state_.cmd_id = kHintStop;
  status_ = HintStatus::kStop;
}

void BalloonDevice::FinishHinting() {
  state_.cmd_id = kHintDone;
  status_ = HintStatus::kDone;
}

void BalloonDevice::Reset() {
  FinishHinting();
  // A driver that begins anew has nothing of the old ids left in its queues.
  state_.open_ids.clear();
  stream_id_ = kHintStop;
  held_stats_.reset();
  stats_.clear();
  acked_ = 0;
  state_.actual = 0;
  state_.poison_val = 0;
}

absl::Status BalloonDevice::Restore(BalloonState state) {
  const auto is_id = [](uint32_t id) { return id >= kHintFirstId; };
  if (state.last_id != 0 && !is_id(state.last_id))
    return Error(absl::StatusCode::kInvalidArgument, "last command id {:#x} of the balloon", state.last_id);
  if (!is_id(state.cmd_id) && state.cmd_id != kHintStop && state.cmd_id != kHintDone)
    return Error(absl::StatusCode::kInvalidArgument, "command id {:#x} of the balloon", state.cmd_id);
  if (state.open_ids.size() > kMaxOpenIds)
    return Error(absl::StatusCode::kInvalidArgument, "{} open command ids of the balloon",
                 state.open_ids.size());
  for (uint32_t id : state.open_ids)
    if (!is_id(id))
      return Error(absl::StatusCode::kInvalidArgument, "open command id {:#x} of the balloon", id);
  state_ = std::move(state);
  // Whoever asked is not here; its session has ended one way or the other.
  status_ = state_.cmd_id == kHintDone ? HintStatus::kDone : HintStatus::kStop;
  stream_id_ = kHintStop;
  return absl::OkStatus();
}

}  // namespace baton::virtio
