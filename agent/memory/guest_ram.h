// Guest memory as the shim has it: RAM blocks (backing files, mapped once, shared) and where they lie in
// guest physical address space.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "agent/memory/page_set.h"
#include "common/fd.h"
#include "common/guarded_mapping.h"
#include "common/status.h"

namespace baton::memory {

// A shared file that backs guest memory. The stream names memory by (block index, offset in the file).
// Move-only; unmaps and closes at destruction. The mapping is valid as long as the object lives; reading it
// is safe from any thread, against a running guest the content is simply racy. A file that others make
// shorter does no harm but to what it holds: see GuestRam::CheckIntact().
class RamBlock {
 public:
  // Creates (or truncates to) a file of `size` bytes with mode 0600 and maps it. `size` must be a multiple of
  // 4096.
  static absl::StatusOr<RamBlock> Create(const std::string& id, const std::string& path, uint64_t size);
  // Maps an existing file, whole.
  static absl::StatusOr<RamBlock> Open(const std::string& id, const std::string& path);
  // Maps a descriptor, whole (its size by fstat).
  static absl::StatusOr<RamBlock> FromFd(const std::string& id, UniqueFd fd);

  const std::string& id() const { return id_; }
  uint8_t* base() const { return map_.base(); }
  uint64_t size() const { return map_.size(); }
  uint64_t pages() const { return size() / kPageSize; }
  // See GuardedMapping.
  bool intact() const { return map_.intact(); }
  int fd() const { return fd_.get(); }
  dev_t device() const { return device_; }
  ino_t inode() const { return inode_; }
  // Pages that are not holes of the file (SEEK_DATA/SEEK_HOLE).
  absl::StatusOr<PageSet> Populated() const;

 private:
  RamBlock() = default;
  std::string id_;
  UniqueFd fd_;
  GuardedMapping map_;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

// A range of guest physical addresses that a block backs.
struct GpaRange {
  uint64_t gpa = 0;
  uint64_t size = 0;
  uint32_t block = 0;
  uint64_t offset = 0;  // in the block's file
};

// All blocks and the guest physical layout. The layout may be set later (from a vhost-user memory table) and
// changed by any thread while others use it: each call sees one layout, whole.
class GuestRam {
 public:
  explicit GuestRam(std::vector<RamBlock> blocks)
      : blocks_(std::move(blocks)), state_(std::make_unique<State>()) {}
  const std::vector<RamBlock>& blocks() const { return blocks_; }
  uint64_t total_bytes() const;
  // DataLoss if the file of a block is shorter than it was, or once an access has not found it: zeroes were
  // read instead. To be asked after the use of memory and before anything is made of it.
  absl::Status CheckIntact() const;
  // Rejects ranges that overlap, are unaligned, overflow or lie outside their block.
  absl::Status SetLayout(std::vector<GpaRange> layout);
  // Sorted by address.
  std::vector<GpaRange> layout() const { return *Layout(); }
  // Block and offset of a guest physical address, or nullopt.
  struct Place {
    uint32_t block;
    uint64_t offset;
    uint64_t contiguous;  // bytes from here to the end of the range
  };
  std::optional<Place> Find(uint64_t gpa) const;
  // Pointer to [gpa, gpa+size) if it lies within one range, else nullptr.
  uint8_t* At(uint64_t gpa, uint64_t size) const;
  // Merges a vhost dirty log (bit i of word w is guest page 64*w+i) into `out`; bits outside the layout are
  // ignored.
  void MergeGpaLog(const uint64_t* words, size_t count, PageSets& out) const;
  // Empty sets of the right sizes.
  PageSets MakeSets() const;

 private:
  using LayoutPtr = std::shared_ptr<const std::vector<GpaRange>>;
  struct State {
    std::mutex mutex;
    LayoutPtr layout = std::make_shared<const std::vector<GpaRange>>();  // guarded by mutex
  };
  LayoutPtr Layout() const;
  std::vector<RamBlock> blocks_;
  std::unique_ptr<State> state_;  // on the heap, so that this stays movable
};

}  // namespace baton::memory
