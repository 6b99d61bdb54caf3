// Writes of another process by soft-dirty bits (Documentation/admin-guide/mm/soft-dirty.rst): for kernels
// without asynchronous write protection.
//
// The kernel offers no way to read and clear the bits in one step: what is written after a page's bit was
// read and before all are cleared would be lost. So the process stands still while that happens, about 10 ms
// a GiB.
//
// A shared file's page may leave the page table (reclaim, a hole punched, MADV_DONTNEED) and take its bit
// along. So a page that was there at the last harvest and is gone now counts as written.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "agent/memory/dirty_sources.h"
#include "agent/memory/kernel_abi.h"
#include "agent/memory/process_maps.h"
#include "agent/memory/remote_thread.h"
#include "common/log.h"

namespace baton::memory {
namespace {

constexpr auto kStopLimit = std::chrono::seconds(15);
// Entries of pagemap that are read at once: 512 KiB, 256 MiB of memory.
constexpr size_t kEntries = 64u << 10;

// Reads the entries of [start, end) and calls `entry(page index from start, value)`.
template <typename F>
absl::Status ReadPagemap(int fd, uint64_t start, uint64_t end, std::vector<uint64_t>& buffer, F entry) {
  buffer.resize(kEntries);
  const uint64_t pages = (end - start) / kPageSize;
  for (uint64_t done = 0; done < pages;) {
    const size_t wanted = static_cast<size_t>(std::min<uint64_t>(pages - done, kEntries)) * 8;
    const ssize_t n = ::pread(fd, buffer.data(), wanted, static_cast<off_t>((start / kPageSize + done) * 8));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoError(errno, "pagemap");
    if (n < 8)
      return Error(absl::StatusCode::kUnavailable, "pagemap ends at {:#x}", start + done * kPageSize);
    for (size_t i = 0; i < static_cast<size_t>(n) / 8; ++i) entry(done + i, buffer[i]);
    done += static_cast<uint64_t>(n) / 8;
  }
  return absl::OkStatus();
}

absl::Status ClearSoftDirty(int clear_refs) {
  while (::pwrite(clear_refs, "4", 1, 0) != 1) {
    if (errno != EINTR) return ErrnoError(errno, "clear_refs");
  }
  return absl::OkStatus();
}

class SoftDirtySource final : public DirtySource {
 public:
  SoftDirtySource(pid_t pid, const GuestRam& ram) : pid_(pid), ram_(ram) {}

  std::string name() const override { return "soft-dirty"; }

  absl::Status Start() override {
    Stop();
    absl::Status status = TryStart();
    if (!status.ok()) Stop();
    return TrackingUnavailable(status, name());
  }

  absl::Status Harvest(PageSets& out) override {
    if (!clear_refs_) return Error(absl::StatusCode::kFailedPrecondition, "dirty tracking was not started");
    return RunAsTracer([&]() -> absl::Status {
      ASSIGN_OR_RETURN(auto threads, StopAllThreads(pid_, Deadline::After(kStopLimit)));
      ASSIGN_OR_RETURN(auto mappings, FindBlockMappings(pid_, ram_));
      if (mappings.empty()) {
        return Error(absl::StatusCode::kUnavailable, "process {} no longer maps guest memory", pid_);
      }
      if (mappings != mappings_) {
        // New mappings have every bit set, but the writes through those that went away are lost.
        LOG_WARN("process {} changed its mappings of guest memory; all of it counts as written", pid_);
        mappings_ = std::move(mappings);
        for (PageSet& set : out) set.SetAll();
      }
      RETURN_IF_ERROR(Collect(&out));
      return ClearSoftDirty(clear_refs_.get());
    });
  }

  // Nothing stays behind in the process: the bits have no effect.
  void Stop() override {
    pagemap_.reset();
    clear_refs_.reset();
    mappings_.clear();
    present_.clear();
  }

 private:
  absl::Status TryStart() {
    ASSIGN_OR_RETURN(mappings_, FindBlockMappings(pid_, ram_));
    for (uint32_t i = 0; i < ram_.blocks().size(); ++i) {
      if (std::none_of(mappings_.begin(), mappings_.end(),
                       [i](const BlockMapping& m) { return m.block == i; })) {
        return Error(absl::StatusCode::kFailedPrecondition,
                     "process {} has not mapped RAM block {} shared; its writes cannot be seen", pid_,
                     ram_.blocks()[i].id());
      }
    }
    pagemap_.reset(::open(fmt::format("/proc/{}/pagemap", pid_).c_str(), O_RDONLY | O_CLOEXEC));
    if (!pagemap_) return ErrnoError(errno, fmt::format("/proc/{}/pagemap", pid_));
    clear_refs_.reset(::open(fmt::format("/proc/{}/clear_refs", pid_).c_str(), O_WRONLY | O_CLOEXEC));
    if (!clear_refs_) return ErrnoError(errno, fmt::format("/proc/{}/clear_refs", pid_));
    // Tells now, not at the first harvest, whether the process may be stopped.
    return RunAsTracer([&]() -> absl::Status {
      ASSIGN_OR_RETURN(auto threads, StopAllThreads(pid_, Deadline::After(kStopLimit)));
      RETURN_IF_ERROR(Collect(nullptr));
      return ClearSoftDirty(clear_refs_.get());
    });
  }

  // Adds written pages to `out` (if any) and remembers which are present.
  absl::Status Collect(PageSets* out) {
    std::vector<PageSet> present;
    for (size_t m = 0; m < mappings_.size(); ++m) {
      const BlockMapping& mapping = mappings_[m];
      const uint64_t first = mapping.offset / kPageSize;
      PageSet now((mapping.end - mapping.start) / kPageSize);
      const PageSet* before =
          m < present_.size() && present_[m].pages() == now.pages() ? &present_[m] : nullptr;
      RETURN_IF_ERROR(
          ReadPagemap(pagemap_.get(), mapping.start, mapping.end, buffer_, [&](uint64_t i, uint64_t entry) {
            const bool here = (entry & (kPagemapPresent | kPagemapSwapped)) != 0;
            if (here) now.Set(i);
            if (out == nullptr) return;
            const bool gone = !here && before != nullptr && before->Test(i);
            if ((entry & kPagemapSoftDirty) != 0 || gone) (*out)[mapping.block].Set(first + i);
          }));
      present.push_back(std::move(now));
    }
    present_ = std::move(present);
    return absl::OkStatus();
  }

  const pid_t pid_;
  const GuestRam& ram_;
  UniqueFd pagemap_;
  UniqueFd clear_refs_;
  std::vector<BlockMapping> mappings_;
  std::vector<PageSet> present_;  // at the last harvest, one for each mapping
  std::vector<uint64_t> buffer_;
};

}  // namespace

absl::Status ProbeSoftDirty() {
  // Fresh memory is soft-dirty from its first write, where the kernel keeps the bit at all.
  void* page = ::mmap(nullptr, kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return TrackingUnavailable(ErrnoError(errno, "mmap"), "soft-dirty");
  *static_cast<volatile uint8_t*>(page) = 1;
  absl::Status status;
  UniqueFd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pagemap) {
    status = ErrnoError(errno, "/proc/self/pagemap");
  } else {
    std::vector<uint64_t> buffer;
    const uint64_t at = reinterpret_cast<uint64_t>(page);
    bool seen = false;
    status = ReadPagemap(pagemap.get(), at, at + kPageSize, buffer,
                         [&](uint64_t, uint64_t entry) { seen = (entry & kPagemapSoftDirty) != 0; });
    if (status.ok() && !seen) {
      status = Error(absl::StatusCode::kUnimplemented,
                     "this kernel keeps no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)");
    }
  }
  ::munmap(page, kPageSize);
  return TrackingUnavailable(status, "soft-dirty");
}

std::unique_ptr<DirtySource> MakeSoftDirtySource(pid_t pid, const GuestRam& ram) {
  return std::make_unique<SoftDirtySource>(pid, ram);
}

}  // namespace baton::memory
