#include "agent/memory/process_maps.h"

#include <fcntl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>

namespace baton::memory {

absl::StatusOr<std::string> ReadProcFile(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoError(errno, path);
  std::string text;
  size_t used = 0;
  for (;;) {
    if (text.size() - used < 16384) text.resize(text.size() + 65536);
    ssize_t n = ::read(fd.get(), text.data() + used, text.size() - used);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoError(errno, path);
    if (n == 0) break;
    used += static_cast<size_t>(n);
  }
  text.resize(used);
  return text;
}

std::vector<BlockMapping> ParseBlockMappings(const std::string& maps, const GuestRam& ram) {
  std::vector<BlockMapping> mappings;
  for (size_t at = 0; at < maps.size();) {
    size_t line_end = maps.find('\n', at);
    if (line_end == std::string::npos) line_end = maps.size();
    // "7f00-7f10 rw-s 00000000 00:1c 42   /dev/shm/vm.ram"
    uint64_t start, end, offset;
    unsigned major, minor;
    uint64_t inode;
    char permissions[5];
    // The line ends in '\n' or the string's NUL, where sscanf stops.
    const int fields =
        std::sscanf(maps.c_str() + at, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64, &start, &end,
                    permissions, &offset, &major, &minor, &inode);
    at = line_end + 1;
    if (fields != 7 || inode == 0 || permissions[3] != 's' || start >= end) continue;
    for (uint32_t i = 0; i < ram.blocks().size(); ++i) {
      const RamBlock& block = ram.blocks()[i];
      if (inode != block.inode() || makedev(major, minor) != block.device() || offset >= block.size())
        continue;
      mappings.push_back({start, start + std::min(end - start, block.size() - offset), i, offset});
    }
  }
  return mappings;
}

absl::StatusOr<std::vector<BlockMapping>> FindBlockMappings(pid_t pid, const GuestRam& ram) {
  ASSIGN_OR_RETURN(std::string maps, ReadProcFile(fmt::format("/proc/{}/maps", pid)));
  return ParseBlockMappings(maps, ram);
}

}  // namespace baton::memory
