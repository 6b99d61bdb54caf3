#include "tests/lab/vm/balloon.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "agent/virtio/balloon.h"
#include "common/log.h"

namespace baton::lab {
namespace {

// What Linux names at once: a block of the largest order of its allocator.
constexpr uint64_t kBlockBytes = uint64_t{4} << 20;
// Inflate, deflate, hints: reporting is not asked for.
constexpr uint32_t kBalloonRings = 3, kHintRing = 2;
constexpr uint32_t kCommandWords = 64;
constexpr Duration kConfigTime = std::chrono::seconds(5);

}  // namespace

struct GuestBalloon::State {
  uint32_t seen;    // the command id that the driver acted upon
  uint32_t answer;  // the id that it answers now
  Stage stage;
  uint32_t next_word, next_tag;
  uint32_t padding;
  uint64_t at;  // of the freed memory, named so far in this session
  uint64_t named;
  // Command buffers; each stays as it is until the ring has long gone past it.
  uint32_t words[kCommandWords];
};

GuestBalloon::GuestBalloon(const DeviceOptions& options, const WorkloadOptions& workload, const Ram& ram,
                           DeviceCallbacks callbacks)
    : GuestDevice(options, workload, ram, kBalloonRings, std::move(callbacks)) {}

void GuestBalloon::SetFreed(uint64_t gpa, std::function<uint64_t()> bytes) {
  freed_gpa_ = gpa;
  freed_bytes_ = std::move(bytes);
}

uint64_t GuestBalloon::blocks_named() const { return state().named; }

uint64_t GuestBalloon::Wanted(uint64_t) const { return virtio::kBalloonFFreePageHint; }

absl::Status GuestBalloon::PlaceWorkload(RamLayout& layout) {
  ASSIGN_OR_RETURN(gpa_, layout.Take(sizeof(State), "the state of " + name()));
  return absl::OkStatus();
}

void GuestBalloon::BootWorkload(uint64_t) {
  state() = {};
  state().seen = virtio::kHintDone;
}

void GuestBalloon::Resumed(int64_t) { look_ = true; }

uint64_t GuestBalloon::Digest() const { return state().named * 31 + state().seen; }

void GuestBalloon::Issue(int64_t) {
  if (frontend().TakeConfigChange()) look_ = true;
  if (look_ && frontend().connected()) {
    look_ = false;
    if (absl::Status read = frontend().ReadConfig(Deadline::After(kConfigTime)); !read.ok()) {
      LOG_WARN("device {}: {}", name(), Message(read));
      return;
    }
    uint32_t id = virtio::kHintDone;
    if (frontend().config().size() >= virtio::kBalloonConfigSize)
      std::memcpy(&id, frontend().config().data() + virtio::kBalloonConfigCmdId, sizeof id);
    State& s = state();
    if (id != s.seen) {
      s.seen = id;
      // An answer that is half given ends before another one begins (virtballoon_changed).
      if (s.stage == Stage::kBlocks) s.stage = Stage::kStop;
      if (s.stage == Stage::kIdle && id >= virtio::kHintFirstId) s.stage = Stage::kEcho;
    }
  }
  Pump();
}

bool GuestBalloon::Say(uint32_t word) {
  State& s = state();
  const uint32_t slot = s.next_word % kCommandWords;
  s.words[slot] = word;
  const Piece piece{gpa_ + offsetof(State, words) + 4 * slot, 4, false};
  if (!Submit(kHintRing, s.next_tag, {&piece, 1})) return false;
  ++s.next_word;
  ++s.next_tag;
  return true;
}

// As far as the ring has room; the next interrupt goes on.
void GuestBalloon::Pump() {
  State& s = state();
  if (!frontend().started() || s.stage == Stage::kIdle) return;
  if (s.stage == Stage::kEcho && Say(s.seen)) {
    s.answer = s.seen;
    s.at = 0;
    s.stage = Stage::kBlocks;
  }
  const uint64_t freed = freed_bytes_ ? freed_bytes_() : 0;
  while (s.stage == Stage::kBlocks) {
    if (s.at >= freed) {
      s.stage = Stage::kStop;
      break;
    }
    const uint64_t size = std::min(kBlockBytes, freed - s.at);
    const Piece piece{freed_gpa_ + s.at, static_cast<uint32_t>(size), true};
    if (!Submit(kHintRing, s.next_tag, {&piece, 1})) break;
    ++s.next_tag;
    ++s.named;
    s.at += size;
  }
  if (s.stage == Stage::kStop && Say(virtio::kHintStop))
    s.stage = s.seen >= virtio::kHintFirstId && s.seen != s.answer ? Stage::kEcho : Stage::kIdle;
  Kick(kHintRing);
}

void GuestBalloon::Completed(uint32_t, uint32_t, uint32_t, int64_t) { Pump(); }

}  // namespace baton::lab
