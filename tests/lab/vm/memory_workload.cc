#include "tests/lab/vm/memory_workload.h"

#include <algorithm>
#include <climits>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace baton::lab {

struct MemoryWorkload::Header {
  uint64_t writes, errors, random;
  uint64_t reused;  // pages of the freed area, from its end
};

namespace {

constexpr uint64_t kPage = 4096;
constexpr size_t kWords = kPage / sizeof(uint64_t);
constexpr int64_t kMillion = 1000000;
// Pages are rewritten in little batches.
constexpr int64_t kPeriodUs = 2000;

// What the words of a page are made with where pages have no generation of their own.
constexpr uint64_t kLiveGeneration = 7, kFreedGeneration = 9, kReusedGeneration = 11;

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
      reuse_(freed_ ? options.reuse : 0),
      on_error_(std::move(on_error)) {}

uint32_t* MemoryWorkload::generations() const { return ram_.At<uint32_t>(gpa_ + 64); }
uint64_t* MemoryWorkload::page(uint64_t index) const {
  return ram_.At<uint64_t>(gpa_ + TableBytes(pages_) + index * kPage);
}
uint64_t MemoryWorkload::live_gpa() const { return gpa_ + TableBytes(pages_) + pages_ * kPage; }
uint64_t MemoryWorkload::freed_gpa() const { return live_gpa() + live_; }
uint64_t MemoryWorkload::freed_bytes() const { return freed_ - header().reused * kPage; }
uint64_t MemoryWorkload::writes() const { return header().writes; }
uint64_t MemoryWorkload::errors() const { return header().errors; }

void MemoryWorkload::Report(const std::string& what) {
  ++header().errors;
  on_error_(what);
}

void MemoryWorkload::Boot() {
  header() = {0, 0, 0xda3e39cb94b95bdb, 0};
  // The live area is different in each page and costs one pass; the freed one only has to be there.
  for (uint64_t at = 0; at < live_; at += kPage) {
    uint64_t* words = ram_.At<uint64_t>(live_gpa() + at);
    for (size_t i = 0; i < kWords; ++i) words[i] = PageWord(at, kLiveGeneration, i);
  }
  for (uint64_t at = 0; at < freed_; at += kPage)
    *ram_.At<uint64_t>(freed_gpa() + at) = PageWord(at, kFreedGeneration, 0);
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

uint64_t MemoryWorkload::Pace::Due(int64_t now_us, uint64_t rate) {
  if (start_us == 0) start_us = now_us;
  const uint64_t due = static_cast<uint64_t>(now_us - start_us) * rate / kMillion;
  if (due <= done + rate / 10 + 1) return due - std::min(due, done);
  *this = {now_us, 0};
  return 1;
}

void MemoryWorkload::Issue(int64_t now_us) {
  next_due_ = INT64_MAX;
  if (rate_ != 0) Rewrite(now_us);
  if (reuse_ != 0 && header().reused < freed_ / kPage / 2) Reuse(now_us);
}

void MemoryWorkload::Rewrite(int64_t now_us) {
  for (uint64_t left = rewrites_.Due(now_us, rate_); left > 0; --left, ++rewrites_.done) {
    uint64_t& random = header().random;
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    CheckPage(random % pages_);
    WritePage(random % pages_);
  }
  next_due_ = now_us + std::max<int64_t>(kPeriodUs, kMillion / static_cast<int64_t>(rate_));
}

void MemoryWorkload::Reuse(int64_t now_us) {
  for (uint64_t left = reuses_.Due(now_us, reuse_); left > 0; --left, ++reuses_.done) {
    const uint64_t at = ++header().reused * kPage;
    uint64_t* words = ram_.At<uint64_t>(freed_gpa() + freed_ - at);
    for (size_t i = 0; i < kWords; ++i) words[i] = PageWord(freed_ - at, kReusedGeneration, i);
  }
  next_due_ =
      std::min(next_due_, now_us + std::max<int64_t>(kPeriodUs, kMillion / static_cast<int64_t>(reuse_)));
}

void MemoryWorkload::Resumed(int64_t now_us) {
  rewrites_ = reuses_ = {now_us, 0};
  next_due_ = now_us;
}

// Words carry their page's place in their area; that of the freed one begins where nothing is reused.
void MemoryWorkload::CheckArea(const char* what, uint64_t gpa, uint64_t bytes, uint64_t generation) {
  const uint64_t origin = generation == kLiveGeneration ? live_gpa() : freed_gpa();
  for (uint64_t at = gpa; at < gpa + bytes; at += kPage) {
    const uint64_t* words = ram_.At<uint64_t>(at);
    for (size_t i = 0; i < kWords; ++i) {
      const uint64_t expected = PageWord(at - origin, generation, i);
      if (words[i] == expected) continue;
      Report(
          fmt::format("{} memory at {:#x}: {:016x}, expected {:016x}", what, at + 8 * i, words[i], expected));
      break;
    }
  }
}

void MemoryWorkload::Verify() {
  for (uint64_t i = 0; i < pages_; ++i) CheckPage(i);
  CheckArea("live", live_gpa(), live_, kLiveGeneration);
  const uint64_t reused = header().reused * kPage;
  CheckArea("reused", freed_gpa() + freed_ - reused, reused, kReusedGeneration);
}

uint64_t MemoryWorkload::Digest() const {
  return XXH3_64bits(ram_.At<uint8_t>(gpa_), 64 + pages_ * sizeof(uint32_t));
}

}  // namespace baton::lab
