#include "tests/lab/vm/block_workload.h"

#include <algorithm>
#include <climits>
#include <vector>

namespace baton::lab {

enum class BlockWorkload::Phase : uint32_t {
  kIdle,        // a write is due at due_us
  kWrite,       // submitted
  kReadBack,    // of the block just written
  kReadRandom,  // of the region
  kFlush,
  kVerify,  // reading all blocks
  kVerifyFlush,
  kVerified,
  kStuck,  // its request was reported lost
};

// All of it in guest memory; plain words.
struct BlockWorkload::Header {
  uint64_t magic, run;
  uint64_t writers, region;
  uint64_t verifying;
  Counters counters;
};

struct BlockWorkload::Writer {
  uint64_t sequence;
  uint64_t random;
  uint64_t block;     // of the request under way
  int64_t due_us;     // of a phase that waits to be submitted
  int64_t since_us;   // when the request was submitted
  uint64_t verified;  // blocks read so far
  Phase phase;
  uint32_t waiting;  // the phase's request could not be submitted yet
  uint32_t busy[2];  // slot 0: the request; 1: the overlapping write before it
};

namespace {

constexpr uint64_t kStateMagic = 0x3130574b4c424e42;  // "BNBLKW01"
constexpr uint32_t kIn = 0, kOut = 1, kFlushRequest = 4;
constexpr uint64_t kSectorsPerBlock = kBlockSize / 512;
constexpr uint8_t kNoStatus = 0xee;
constexpr uint64_t kPoison = 0xb0b0feedfacecafe;
constexpr uint64_t kFlushEvery = 64;
// The sequence number of an overlapping write has this bit, too: it may never be read.
constexpr uint64_t kOverlapped = uint64_t{1} << 63;

// A writer's buffers, from its first byte.
constexpr uint64_t kOutPage = 0x1000, kInPage = 0x2000, kOverlapPage = 0x3000, kBuffers = 0x4000;
// In its first page, for each of the two slots.
constexpr uint64_t kSlot = 0x100, kStatus = 0x80;

struct RequestHeader {
  uint32_t type, reserved;
  uint64_t sector;
};

constexpr uint64_t RoundUp(uint64_t bytes) { return (bytes + 4095) & ~uint64_t{4095}; }

uint64_t NextRandom(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

void Poison(uint64_t* page) { page[0] = page[255] = page[511] = kPoison; }
bool Poisoned(const uint64_t* page) {
  return page[0] == kPoison && page[255] == kPoison && page[511] == kPoison;
}

}  // namespace

uint64_t BlockWorkload::Bytes(const WorkloadOptions& options) {
  const uint64_t region = options.blocks / options.writers;
  return RoundUp(sizeof(Header) + sizeof(Writer) * options.writers + 8 * region * options.writers) +
         kBuffers * options.writers;
}

BlockWorkload::BlockWorkload(const Ram& ram, uint64_t gpa, Setup setup, QueuePort& port, OnError on_error)
    : ram_(ram),
      gpa_(gpa),
      setup_(setup),
      region_(setup_.options.blocks / setup_.options.writers),
      port_(port),
      on_error_(std::move(on_error)) {}

BlockWorkload::Header& BlockWorkload::header() const { return *ram_.At<Header>(gpa_); }
BlockWorkload::Writer& BlockWorkload::writer(uint32_t index) const {
  return ram_.At<Writer>(gpa_ + sizeof(Header))[index];
}
uint64_t* BlockWorkload::expected(uint32_t index) const {
  return ram_.At<uint64_t>(gpa_ + sizeof(Header) + sizeof(Writer) * setup_.options.writers) + region_ * index;
}
uint64_t BlockWorkload::buffers(uint32_t index) const {
  return gpa_ + RoundUp(sizeof(Header) + (sizeof(Writer) + 8 * region_) * setup_.options.writers) +
         kBuffers * index;
}

const BlockWorkload::Counters& BlockWorkload::counters() const { return header().counters; }
uint64_t BlockWorkload::sequence(uint32_t index) const { return writer(index).sequence; }

void BlockWorkload::Boot(uint64_t run) {
  header() = {kStateMagic, run, setup_.options.writers, region_, 0, {}};
  for (uint32_t i = 0; i < writers(); ++i) {
    writer(i) = {};
    writer(i).random = 0x853c49e6748fea9b + setup_.disk * 4096 + i;
    std::fill_n(expected(i), region_, 0);
    *ram_.At<uint8_t>(buffers(i) + kStatus) = kNoStatus;
    *ram_.At<uint8_t>(buffers(i) + kSlot + kStatus) = kNoStatus;
    Poison(ram_.At<uint64_t>(buffers(i) + kInPage));
  }
  next_due_ = 0;
}

absl::Status BlockWorkload::Check() const {
  const Header& h = header();
  if (h.magic == kStateMagic && h.writers == setup_.options.writers && h.region == region_)
    return absl::OkStatus();
  return Error(absl::StatusCode::kInvalidArgument,
               "guest memory at {:#x} does not hold the state of disk {}: other options, or pages were lost",
               gpa_, setup_.disk);
}

void BlockWorkload::Report(const std::string& what) {
  ++header().counters.errors;
  on_error_(fmt::format("disk {}: {}", setup_.disk, what));
}

bool BlockWorkload::SubmitRequest(uint32_t index, uint32_t slot, uint32_t type, uint64_t block,
                                  uint64_t data_gpa, bool in) {
  const uint64_t control = buffers(index) + slot * kSlot;
  *ram_.At<RequestHeader>(control) = {type, 0, (region_ * index + block) * kSectorsPerBlock};
  const Piece pieces[3] = {
      {control, sizeof(RequestHeader), false}, {data_gpa, kBlockSize, in}, {control + kStatus, 1, true}};
  const Piece bare[2] = {pieces[0], pieces[2]};
  const uint32_t queue = index % setup_.queues;
  return port_.Submit(queue, index * 2 + slot, type == kFlushRequest ? std::span<const Piece>(bare) : pieces);
}

// Submits the request of `phase`; if the queue is full, Issue tries again after the next completion.
void BlockWorkload::Start(uint32_t index, Phase phase, uint64_t block, int64_t now_us) {
  Writer& w = writer(index);
  const uint64_t base = buffers(index);
  w.phase = phase;
  w.block = block;
  w.waiting = 1;
  bool sent = false;
  switch (phase) {
    case Phase::kWrite: {
      const uint64_t sequence = w.sequence + 1, number = region_ * index + block;
      const uint32_t overlap = setup_.options.overlap;
      if (overlap != 0 && sequence % overlap == 0 && !w.busy[1]) {
        FillBlock(*ram_.At<Block>(base + kOverlapPage), header().run, index, sequence | kOverlapped, number);
        w.busy[1] = SubmitRequest(index, 1, kOut, block, base + kOverlapPage, false);
        if (!w.busy[1]) break;
      }
      FillBlock(*ram_.At<Block>(base + kOutPage), header().run, index, sequence, number);
      sent = SubmitRequest(index, 0, kOut, block, base + kOutPage, false);
      break;
    }
    case Phase::kFlush:
    case Phase::kVerifyFlush:
      sent = SubmitRequest(index, 0, kFlushRequest, 0, 0, false);
      break;
    default:
      if (!Poisoned(ram_.At<uint64_t>(base + kInPage))) {
        Report(fmt::format("writer {}: its read buffer was written when no read was under way", index));
        Poison(ram_.At<uint64_t>(base + kInPage));
      }
      sent = SubmitRequest(index, 0, kIn, block, base + kInPage, true);
  }
  if (!sent) return;
  w.busy[0] = 1;
  w.waiting = 0;
  w.since_us = now_us;
}

// What a writer does after a step.
void BlockWorkload::Next(uint32_t index, int64_t now_us) {
  Writer& w = writer(index);
  if (header().verifying != 0) {
    if (w.phase == Phase::kVerifyFlush) {
      w.phase = Phase::kVerified;
    } else if (w.phase != Phase::kVerify) {
      w.verified = 0;
      Start(index, Phase::kVerify, 0, now_us);
    } else if (++w.verified < region_) {
      Start(index, Phase::kVerify, w.verified, now_us);
    } else {
      Start(index, Phase::kVerifyFlush, 0, now_us);
    }
    return;
  }
  switch (w.phase) {
    case Phase::kWrite:
      return Start(index, Phase::kReadBack, w.block, now_us);
    case Phase::kReadBack:
      return Start(index, Phase::kReadRandom, NextRandom(w.random) % region_, now_us);
    case Phase::kReadRandom:
      if (w.sequence % kFlushEvery == 0) return Start(index, Phase::kFlush, 0, now_us);
      break;
    default:
      break;
  }
  w.phase = Phase::kIdle;
  w.due_us = now_us + static_cast<int64_t>(setup_.options.delay_us);
  if (setup_.options.delay_us == 0 && !w.busy[1]) {
    Start(index, Phase::kWrite, BlockOf(w.sequence + 1, region_), now_us);
  } else {
    next_due_ = std::min(next_due_, w.due_us);
  }
}

void BlockWorkload::Issue(int64_t now_us) {
  next_due_ = INT64_MAX;
  for (uint32_t i = 0; i < writers(); ++i) {
    Writer& w = writer(i);
    if (w.busy[0]) continue;
    if (w.waiting) {
      Start(i, w.phase, w.block, now_us);
    } else if (w.phase == Phase::kIdle && header().verifying != 0) {
      Next(i, now_us);
    } else if (w.phase == Phase::kIdle && !w.busy[1]) {
      if (w.due_us <= now_us) {
        Start(i, Phase::kWrite, BlockOf(w.sequence + 1, region_), now_us);
      } else {
        next_due_ = std::min(next_due_, w.due_us);
      }
    }
  }
  for (uint32_t queue = 0; queue < setup_.queues; ++queue) port_.Kick(queue);
}

void BlockWorkload::Judge(uint32_t index, uint64_t block) {
  const uint64_t number = region_ * index + block, sequence = expected(index)[block];
  const Block& found = *ram_.At<Block>(buffers(index) + kInPage);
  const BlockState state = CheckBlock(found, header().run, index, sequence, number);
  if (state == BlockState::kGood || state == BlockState::kNeverWritten) return;
  const bool overlapped = state == BlockState::kFuture && (found.sequence & kOverlapped) != 0;
  Report(fmt::format("block {}: {} (sequence {}, expected {})", number,
                     overlapped ? "overlapping writes in the wrong order" : BlockStateName(state),
                     found.sequence & ~kOverlapped, sequence));
}

void BlockWorkload::Complete(uint32_t queue, uint32_t tag, uint32_t written, int64_t now_us) {
  const uint32_t index = tag / 2, slot = tag % 2;
  if (index >= writers() || index % setup_.queues != queue || !writer(index).busy[slot]) {
    return Report(
        fmt::format("queue {}: a completion of request {}, which is not under way (repeated)", queue, tag));
  }
  Writer& w = writer(index);
  uint8_t* status = ram_.At<uint8_t>(buffers(index) + slot * kSlot + kStatus);
  const uint8_t result = std::exchange(*status, kNoStatus);
  w.busy[slot] = 0;
  const bool read = slot == 0 && (w.phase == Phase::kReadBack || w.phase == Phase::kReadRandom ||
                                  w.phase == Phase::kVerify);
  if (result != 0 || written > (read ? kBlockSize + 1 : 1)) {
    Report(fmt::format("writer {}: {} of block {} ended with status {:#x}, {} bytes written", index,
                       slot == 1 ? "overlapping write"
                       : read    ? "read"
                                 : "write or flush",
                       region_ * index + w.block, result, written));
  }
  if (slot == 1 || w.phase == Phase::kStuck) {
    if (!w.busy[0] && w.phase == Phase::kIdle) next_due_ = 0;
    return;
  }
  if (read) {
    if (result == 0) Judge(index, w.block);
    Poison(ram_.At<uint64_t>(buffers(index) + kInPage));
    ++header().counters.reads;
  } else if (w.phase == Phase::kWrite) {
    // A failed write is written again: the block holds the old content, the new one, or a mix of both.
    if (result != 0) return Start(index, Phase::kWrite, w.block, now_us);
    ++w.sequence;
    expected(index)[w.block] = w.sequence;
    ++header().counters.writes;
  } else {
    ++header().counters.flushes;
  }
  Next(index, now_us);
}

void BlockWorkload::Resumed(int64_t now_us) {
  for (uint32_t i = 0; i < writers(); ++i) writer(i).since_us = now_us;
  next_due_ = 0;
}

void BlockWorkload::BeginVerify() {
  header().verifying = 1;
  next_due_ = 0;
}

bool BlockWorkload::Verified() const {
  for (uint32_t i = 0; i < writers(); ++i) {
    const Writer& w = writer(i);
    if (w.phase != Phase::kStuck && (w.phase != Phase::kVerified || w.busy[1])) return false;
  }
  return true;
}

void BlockWorkload::GoOn() {
  header().verifying = 0;
  for (uint32_t i = 0; i < writers(); ++i) {
    if (writer(i).phase == Phase::kVerified) writer(i).phase = Phase::kIdle;
  }
  next_due_ = 0;
}

uint32_t BlockWorkload::outstanding() const {
  uint32_t count = 0;
  for (uint32_t i = 0; i < writers(); ++i) count += writer(i).busy[0] + writer(i).busy[1];
  return count;
}

void BlockWorkload::FindLost(int64_t now_us, int64_t limit_us) {
  for (uint32_t i = 0; i < writers(); ++i) {
    Writer& w = writer(i);
    if (!(w.busy[0] || w.busy[1]) || w.phase == Phase::kStuck || now_us - w.since_us <= limit_us) continue;
    Report(fmt::format(
        "writer {}: the request for block {} was not completed in {} ms (lost, or its completion was)", i,
        region_ * i + w.block, (now_us - w.since_us) / 1000));
    w.phase = Phase::kStuck;
  }
}

uint64_t BlockWorkload::Digest() const {
  return XXH3_64bits(&header(), sizeof(Header) + (sizeof(Writer) + 8 * region_) * writers());
}

}  // namespace baton::lab
