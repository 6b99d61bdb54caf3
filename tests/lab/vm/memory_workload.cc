#include "tests/lab/vm/memory_workload.h"

#include <algorithm>
#include <climits>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace baton::lab {

struct MemoryWorkload::Header {
  uint64_t writes, errors, random;
};

namespace {

constexpr uint64_t kPage = 4096;
constexpr size_t kWords = kPage / sizeof(uint64_t);
constexpr int64_t kMillion = 1000000;
// Pages are rewritten in little batches.
constexpr int64_t kPeriodUs = 2000;

constexpr uint64_t ToPages(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
constexpr uint64_t TableBytes(uint64_t pages) { return ToPages(64 + pages * sizeof(uint32_t)); }

uint64_t PageWord(uint64_t page, uint64_t generation, size_t word) {
  return (page << 40) ^ (generation * 0x9e3779b97f4a7c15) ^ word;
}

}  // namespace

uint64_t MemoryWorkload::Bytes(const WorkloadOptions& options) {
  return TableBytes(options.pages) + options.pages * kPage + ToPages(options.live) + ToPages(options.freed);
}

MemoryWorkload::MemoryWorkload(const Ram& ram, uint64_t gpa, const WorkloadOptions& options, OnError on_error)
    : ram_(ram),
      gpa_(gpa),
      pages_(options.pages),
      rate_(options.pages ? options.dirty : 0),
      live_(ToPages(options.live)),
      freed_(ToPages(options.freed)),
      on_error_(std::move(on_error)) {}

uint32_t* MemoryWorkload::generations() const { return ram_.At<uint32_t>(gpa_ + 64); }
uint64_t* MemoryWorkload::page(uint64_t index) const {
  return ram_.At<uint64_t>(gpa_ + TableBytes(pages_) + index * kPage);
}
uint64_t MemoryWorkload::live_gpa() const { return gpa_ + TableBytes(pages_) + pages_ * kPage; }
uint64_t MemoryWorkload::freed_gpa() const { return live_gpa() + live_; }
uint64_t MemoryWorkload::freed_bytes() const { return freed_; }
uint64_t MemoryWorkload::writes() const { return header().writes; }
uint64_t MemoryWorkload::errors() const { return header().errors; }

void MemoryWorkload::Report(const std::string& what) {
  ++header().errors;
  on_error_(what);
}

void MemoryWorkload::Boot() {
  header() = {0, 0, 0xda3e39cb94b95bdb};
  // The live area is different in each page and costs one pass; the freed one only has to be there.
  for (uint64_t at = 0; at < live_; at += kPage) {
    uint64_t* words = ram_.At<uint64_t>(live_gpa() + at);
    for (size_t i = 0; i < kWords; ++i) words[i] = PageWord(at, 7, i);
  }
  for (uint64_t at = 0; at < freed_; at += kPage) *ram_.At<uint64_t>(freed_gpa() + at) = PageWord(at, 9, 0);
}

void MemoryWorkload::CheckPage(uint64_t index) {
  const uint32_t generation = generations()[index];
  if (generation == 0) return;
  const uint64_t* words = page(index);
  for (size_t i = 0; i < kWords; ++i) {
    if (words[i] == PageWord(index, generation, i)) continue;
    return Report(fmt::format("memory page {} word {}: {:016x}, expected {:016x} (generation {})", index, i,
                              words[i], PageWord(index, generation, i), generation));
  }
}

void MemoryWorkload::WritePage(uint64_t index) {
  const uint32_t generation = ++generations()[index];
  uint64_t* words = page(index);
  for (size_t i = 0; i < kWords; ++i) words[i] = PageWord(index, generation, i);
  ++header().writes;
}

void MemoryWorkload::Issue(int64_t now_us) {
  next_due_ = INT64_MAX;
  if (rate_ == 0) return;
  if (start_us_ == 0) start_us_ = now_us;
  uint64_t due = static_cast<uint64_t>(now_us - start_us_) * rate_ / kMillion;
  if (due > done_ + rate_ / 10 + 1) {
    start_us_ = now_us;
    done_ = 0;
    due = 1;
  }
  for (; done_ < due; ++done_) {
    uint64_t& random = header().random;
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    CheckPage(random % pages_);
    WritePage(random % pages_);
  }
  next_due_ = now_us + std::max<int64_t>(kPeriodUs, kMillion / static_cast<int64_t>(rate_));
}

void MemoryWorkload::Resumed(int64_t now_us) {
  start_us_ = now_us;
  done_ = 0;
  next_due_ = now_us;
}

void MemoryWorkload::Verify() {
  for (uint64_t i = 0; i < pages_; ++i) CheckPage(i);
  for (uint64_t at = 0; at < live_; at += kPage) {
    const uint64_t* words = ram_.At<uint64_t>(live_gpa() + at);
    for (size_t i = 0; i < kWords; ++i) {
      if (words[i] == PageWord(at, 7, i)) continue;
      Report(fmt::format("live memory at {:#x}: {:016x}, expected {:016x}", live_gpa() + at + 8 * i, words[i],
                         PageWord(at, 7, i)));
      break;
    }
  }
}

uint64_t MemoryWorkload::Digest() const {
  return XXH3_64bits(ram_.At<uint8_t>(gpa_), 64 + pages_ * sizeof(uint32_t));
}

}  // namespace baton::lab
