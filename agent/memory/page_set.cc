#include "agent/memory/page_set.h"

#include <algorithm>
#include <bit>

namespace baton::memory {
namespace {

// Bits [low, high) of a word; 0 <= low < high <= 64.
uint64_t Mask(uint64_t low, uint64_t high) {
  uint64_t upper = high == 64 ? ~uint64_t{0} : (uint64_t{1} << high) - 1;
  return upper & ~((uint64_t{1} << low) - 1);
}

// Calls `apply(word, mask)` for each word that [first, first+count) touches.
template <typename F>
void ForEachWord(uint64_t first, uint64_t count, F apply) {
  uint64_t end = first + count;
  while (first < end) {
    uint64_t word_end = std::min(end, (first / 64 + 1) * 64);
    apply(first / 64, Mask(first % 64, (word_end - 1) % 64 + 1));
    first = word_end;
  }
}

}  // namespace

void PageSet::SetRange(uint64_t first, uint64_t count) {
  if (first >= pages_) return;
  ForEachWord(first, std::min(count, pages_ - first), [&](uint64_t w, uint64_t mask) { words_[w] |= mask; });
}

void PageSet::ClearRange(uint64_t first, uint64_t count) {
  if (first >= pages_) return;
  ForEachWord(first, std::min(count, pages_ - first), [&](uint64_t w, uint64_t mask) { words_[w] &= ~mask; });
}

void PageSet::Reset() { std::fill(words_.begin(), words_.end(), 0); }

uint64_t PageSet::Count() const {
  uint64_t count = 0;
  for (uint64_t word : words_) count += static_cast<uint64_t>(std::popcount(word));
  return count;
}

bool PageSet::Empty() const {
  return std::all_of(words_.begin(), words_.end(), [](uint64_t word) { return word == 0; });
}

void PageSet::Union(const PageSet& other) {
  for (size_t i = 0; i < words_.size(); ++i) words_[i] |= other.words_[i];
}

void PageSet::Subtract(const PageSet& other) {
  for (size_t i = 0; i < words_.size(); ++i) words_[i] &= ~other.words_[i];
}

PageSet::Run PageSet::NextRun(uint64_t from, uint64_t limit) const {
  limit = std::min(limit, pages_);
  if (from >= limit) return {};
  const size_t words = (limit + 63) / 64;
  // First set bit at or after `from`.
  size_t w = from / 64;
  uint64_t word = words_[w] & ~((uint64_t{1} << (from % 64)) - 1);
  while (word == 0) {
    if (++w == words) return {};
    word = words_[w];
  }
  const uint64_t first = w * 64 + static_cast<uint64_t>(std::countr_zero(word));
  if (first >= limit) return {};
  // First clear bit after it.
  word = ~words_[w] & ~((uint64_t{1} << (first % 64)) - 1);
  while (word == 0) {
    if (++w == words) return {first, limit - first};
    word = ~words_[w];
  }
  const uint64_t end = std::min(limit, w * 64 + static_cast<uint64_t>(std::countr_zero(word)));
  return {first, end - first};
}

}  // namespace baton::memory
