// The dirty log of vhost-user: a shared bitmap, one bit for each 4 KiB page of guest physical memory, that a
// back-end sets and the front-end takes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/fd.h"
#include "common/status.h"

namespace baton::vhost {

// A sealed memfd and its mapping. Take and Mark may run while back-ends set bits; one taker at a time.
class DirtyLog {
 public:
  // A VMM's own log, which it takes itself. InvalidArgument unless the file is at least `size` bytes, whole
  // words, from its beginning, and cannot be made shorter under our mapping.
  static absl::StatusOr<std::unique_ptr<DirtyLog>> Adopt(UniqueFd fd, uint64_t size, uint64_t offset);
  // Big enough for guest physical address `last_gpa`. The size is a multiple of 8 bytes, because back-ends
  // set bits by whole words (DPDK); its offset in the file is 0, because DPDK before 2024 counts an offset
  // twice.
  static absl::StatusOr<std::unique_ptr<DirtyLog>> Create(uint64_t last_gpa);
  ~DirtyLog();
  DirtyLog(const DirtyLog&) = delete;
  DirtyLog& operator=(const DirtyLog&) = delete;

  static constexpr uint64_t WordsFor(uint64_t last_gpa) { return last_gpa / (uint64_t{4096} * 64) + 1; }

  int fd() const { return fd_.get(); }
  uint64_t size() const { return words_ * 8; }
  // Whether `gpa` has a bit.
  bool Covers(uint64_t gpa) const { return gpa / (uint64_t{4096} * 64) < words_; }
  // Exchanges every word with zero and ORs what was there into `words` (grown to the size of the log).
  void Take(std::vector<uint64_t>& words);
  // Sets the bits of these bytes of guest memory, as far as the log reaches.
  void Mark(uint64_t gpa, uint64_t size);

 private:
  DirtyLog() = default;
  absl::Status Map();
  UniqueFd fd_;
  uint64_t* map_ = nullptr;
  uint64_t words_ = 0;
};

}  // namespace baton::vhost
