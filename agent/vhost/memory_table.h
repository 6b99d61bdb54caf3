// The memory that the VMM handed over: regions, their files, and reads of guest memory through them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "agent/vhost/mediator.h"
#include "agent/vhost/wire.h"
#include "agent/virtio/memory_view.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::vhost {

// Regions by the rules of CheckRegions, each with a file that is large enough. Memory is accessed by
// system calls and not through a mapping: whoever owns the file may truncate it, and a mapping would then end
// this process with SIGBUS. Not thread-safe.
class MemoryTable : public virtio::MemoryView {
 public:
  struct Region {
    MemRegion wire;
    UniqueFd fd;
    dev_t device = 0;
    ino_t inode = 0;
  };

  // All or nothing. InvalidArgument names region and value (overlap, file smaller than offset + size, not a
  // file that can be mapped).
  absl::Status Replace(std::vector<MemRegion> regions, std::vector<UniqueFd> fds);
  absl::Status Add(const MemRegion& region, UniqueFd fd);
  // By gpa, user address and size, as the specification says. NotFound.
  absl::Status Remove(const MemRegion& region);
  void Clear() { regions_.clear(); }

  const std::vector<Region>& regions() const { return regions_; }
  bool empty() const { return regions_.empty(); }
  // The highest guest physical address.
  uint64_t last_gpa() const;
  std::vector<MemoryRegionInfo> Describe() const;

  // Guest physical address of [user_addr, user_addr + size), if it lies within one region.
  std::optional<uint64_t> ToGpa(uint64_t user_addr, uint64_t size) const;
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override;
  // Huge pages too. The caller answers for the dirty page.
  absl::Status Write(uint64_t gpa, const void* data, size_t size) const;

 private:
  // The region that holds [gpa, gpa + size) and the file offset of its first byte.
  absl::StatusOr<std::pair<const Region*, uint64_t>> Locate(uint64_t gpa, size_t size) const;
  static absl::StatusOr<Region> MakeRegion(const MemRegion& wire, UniqueFd fd);
  std::vector<Region> regions_;
};

}  // namespace baton::vhost
