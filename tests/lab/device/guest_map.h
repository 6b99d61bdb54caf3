// Guest memory as a vhost-user front-end hands it out, and the log of what the device writes to it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "agent/vhost/wire.h"
#include "agent/virtio/guest_memory.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::lab {

// A shared mapping of [offset, offset + size) of a descriptor. Move-only.
class SharedMapping {
 public:
  // InvalidArgument if the file ends before the range does: touching what is not there would end the process.
  static absl::StatusOr<SharedMapping> Map(int fd, uint64_t offset, uint64_t size);
  SharedMapping() = default;
  SharedMapping(SharedMapping&& other) noexcept { *this = std::move(other); }
  SharedMapping& operator=(SharedMapping&& other) noexcept;
  ~SharedMapping();
  uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  uint8_t* base_ = nullptr;
  uint64_t mapped_ = 0;
  uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

// The memory table. A region that is removed stays mapped until ReleaseOld, because requests may still be
// using it.
class GuestMap {
 public:
  absl::Status Add(const vhost::MemRegion& region, int fd);
  // NotFound if there is no such region.
  absl::Status Remove(const vhost::MemRegion& region);
  void Clear();
  // Nothing uses removed regions any more.
  void ReleaseOld() { old_.clear(); }

  // By guest physical address. The object stays where it is; what it holds changes with the table.
  const virtio::GuestMemory& memory() const { return memory_; }
  // The guest physical address of the front-end's address.
  std::optional<uint64_t> FromUser(uint64_t user_addr) const;

 private:
  struct Region {
    vhost::MemRegion description;
    SharedMapping mapping;
  };
  absl::Status Rebuild();

  std::vector<Region> regions_;
  std::vector<SharedMapping> old_;
  virtio::GuestMemory memory_;
};

// The shared dirty log: a bit for each 4 KiB page, set after the data was written (VHOST_USER_SET_LOG_BASE).
class SharedLog {
 public:
  absl::Status Set(const vhost::LogDescription& description, int fd);
  void Clear() { mapping_ = {}; }
  explicit operator bool() const { return static_cast<bool>(mapping_); }
  // What lies beyond the log is not logged.
  void Mark(uint64_t gpa, uint64_t size);

 private:
  SharedMapping mapping_;
};

}  // namespace baton::lab
