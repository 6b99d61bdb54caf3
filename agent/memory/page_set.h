// Sets of pages of one RAM block: a bitmap with run iteration. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace baton::memory {

inline constexpr uint64_t kPageSize = 4096;
inline constexpr uint64_t kPageShift = 12;

// Pages [0, pages). Not thread-safe.
class PageSet {
 public:
  PageSet() = default;
  explicit PageSet(uint64_t pages) : pages_(pages), words_((pages + 63) / 64, 0) {}

  uint64_t pages() const { return pages_; }
  // `page` must be < pages().
  void Set(uint64_t page) { words_[page / 64] |= uint64_t{1} << (page % 64); }
  void Clear(uint64_t page) { words_[page / 64] &= ~(uint64_t{1} << (page % 64)); }
  bool Test(uint64_t page) const { return words_[page / 64] >> (page % 64) & 1; }
  // Ranges are clipped to pages().
  void SetRange(uint64_t first, uint64_t count);
  void ClearRange(uint64_t first, uint64_t count);
  void SetAll() { SetRange(0, pages_); }
  void Reset();
  // Number of pages in the set.
  uint64_t Count() const;
  bool Empty() const;
  // this |= other / this &= ~other. Sizes must be equal.
  void Union(const PageSet& other);
  void Subtract(const PageSet& other);
  // The first run of set pages at or after `from`: {first, count}; count 0 at the end.
  struct Run {
    uint64_t first = 0;
    uint64_t count = 0;
  };
  Run NextRun(uint64_t from) const { return NextRun(from, pages_); }
  // The same, looking only at pages below `limit`: the run ends there at the latest.
  Run NextRun(uint64_t from, uint64_t limit) const;
  // Direct access to the words (bit i of word w is page 64*w+i), for merging logs.
  std::vector<uint64_t>& words() { return words_; }
  const std::vector<uint64_t>& words() const { return words_; }

 private:
  uint64_t pages_ = 0;
  std::vector<uint64_t> words_;
};

// One set for each RAM block, in block order.
using PageSets = std::vector<PageSet>;

}  // namespace baton::memory
