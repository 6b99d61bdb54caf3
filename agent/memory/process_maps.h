// Where another process has mapped the blocks of guest memory.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "common/status.h"

namespace baton::memory {

// Addresses [start, end) of the process show `block` from `offset` on. Clipped to the block.
struct BlockMapping {
  uint64_t start = 0;
  uint64_t end = 0;
  uint32_t block = 0;
  uint64_t offset = 0;

  bool operator==(const BlockMapping&) const = default;
};

// All shared mappings of the blocks' files, by address. Read-only ones count, as they can be made writable.
absl::StatusOr<std::vector<BlockMapping>> FindBlockMappings(pid_t pid, const GuestRam& ram);

// The same from the text of /proc/PID/maps.
std::vector<BlockMapping> ParseBlockMappings(const std::string& maps, const GuestRam& ram);

// Reads a file of /proc whole.
absl::StatusOr<std::string> ReadProcFile(const std::string& path);

}  // namespace baton::memory
