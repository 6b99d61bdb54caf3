// What the lab guest writes to its disk, shared by the guest and by the program that checks the image from
// outside.
//
// The disk is divided into one region a writer. A writer counts its writes from 1; the block a write goes to
// follows from its number alone (BlockOf), so that the number of the last acknowledged write says what every
// block must hold. Odd writes stay within a few hot blocks: a request that is carried out a second time,
// later, would put an older number over a newer one there. Even writes cycle over the rest of the region.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace baton::lab {

constexpr uint64_t kBlockMagic = 0x31304b4c424e5442;  // "BTNBLK01"
constexpr size_t kBlockSize = 4096;
constexpr uint64_t kHotBlocks = 8;

struct Block {
  uint64_t magic;
  uint64_t sequence;
  // From the start of the disk, in blocks.
  uint64_t number;
  uint64_t writer;
  // Chosen at random at each boot: what an earlier boot left on the disk is not this one's.
  uint64_t run;
  uint64_t filler[506];
  // XXH3-64 of everything before.
  uint64_t checksum;
};
static_assert(sizeof(Block) == kBlockSize);

inline uint64_t Checksum(const Block& block) { return XXH3_64bits(&block, offsetof(Block, checksum)); }

// Block, relative to the writer's region of `blocks` blocks (more than kHotBlocks), that write `sequence`
// goes to.
inline uint64_t BlockOf(uint64_t sequence, uint64_t blocks) {
  return sequence % 2 == 1 ? sequence / 2 % kHotBlocks : kHotBlocks + sequence / 2 % (blocks - kHotBlocks);
}

inline void FillBlock(Block& block, uint64_t run, uint64_t writer, uint64_t sequence, uint64_t number) {
  block.magic = kBlockMagic;
  block.sequence = sequence;
  block.number = number;
  block.writer = writer;
  block.run = run;
  uint64_t word = run ^ (writer << 56) ^ sequence * 0x9e3779b97f4a7c15;
  for (uint64_t& filler : block.filler) filler = word += 0x9e3779b97f4a7c15;
  block.checksum = Checksum(block);
}

enum class BlockState { kGood, kNeverWritten, kTorn, kWrongPlace, kLost, kFuture };

// What `block`, read from position `number`, is when the newest acknowledged write there was `sequence` (0:
// none).
inline BlockState CheckBlock(const Block& block, uint64_t run, uint64_t writer, uint64_t sequence,
                             uint64_t number) {
  if (sequence == 0 && (block.magic != kBlockMagic || block.run != run)) return BlockState::kNeverWritten;
  if (block.magic != kBlockMagic || block.checksum != Checksum(block)) return BlockState::kTorn;
  if (block.number != number || block.writer != writer || block.run != run) return BlockState::kWrongPlace;
  if (block.sequence < sequence) return BlockState::kLost;
  if (block.sequence > sequence) return BlockState::kFuture;
  return BlockState::kGood;
}

inline const char* BlockStateName(BlockState state) {
  switch (state) {
    case BlockState::kGood:
      return "good";
    case BlockState::kNeverWritten:
      return "never written";
    case BlockState::kTorn:
      return "torn or overwritten by something else";
    case BlockState::kWrongPlace:
      return "data of another block";
    case BlockState::kLost:
      return "older than the last acknowledged write (lost, or an old write repeated)";
    case BlockState::kFuture:
      return "newer than the last acknowledged write";
  }
  return "?";
}

}  // namespace baton::lab
