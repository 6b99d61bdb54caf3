// Writes of another process by asynchronous write protection: userfaultfd protects the pages of its mappings,
// the first write to each is let through by the kernel itself, which remembers it, and PAGEMAP_SCAN reads and
// protects again what was written, in one step under the page table lock
// (Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst).
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "agent/memory/dirty_sources.h"
#include "agent/memory/kernel_abi.h"
#include "agent/memory/process_maps.h"
#include "common/log.h"

namespace baton::memory {
namespace {

constexpr auto kAttachLimit = std::chrono::seconds(15);
// Runs of written pages that one scan returns; more take another call.
constexpr size_t kRegions = 4096;

class UffdSource final : public DirtySource {
 public:
  UffdSource(pid_t pid, const GuestRam& ram) : pid_(pid), ram_(ram) {}
  ~UffdSource() override { Stop(); }

  std::string name() const override { return "uffd-wp-async"; }

  absl::Status Start() override {
    Stop();
    absl::Status status = TryStart();
    if (!status.ok()) Stop();
    return TrackingUnavailable(status, name());
  }

  absl::Status Harvest(PageSets& out) override {
    if (!uffd_) return Error(absl::StatusCode::kFailedPrecondition, "dirty tracking was not started");
    ASSIGN_OR_RETURN(auto mappings, FindBlockMappings(pid_, ram_));
    if (mappings.empty())
      return Error(absl::StatusCode::kUnavailable, "process {} no longer maps guest memory", pid_);
    if (mappings != mappings_) {
      // Whatever was written through a mapping that came since was not seen.
      LOG_WARN("process {} changed its mappings of guest memory; all of it counts as written", pid_);
      mappings_ = std::move(mappings);
      return Rearm(out);
    }
    for (const BlockMapping& mapping : mappings_) {
      absl::StatusOr<bool> tracked = Scan(mapping, out[mapping.block]);
      if (!tracked.ok()) return tracked.status();
      if (!*tracked) {
        LOG_WARN("process {} mapped guest memory anew at {:#x}; all of it counts as written", pid_,
                 mapping.start);
        return Rearm(out);
      }
    }
    return absl::OkStatus();
  }

  void Stop() override {
    if (!uffd_) return;
    for (const BlockMapping& mapping : mappings_) {
      uffdio_range range{mapping.start, mapping.end - mapping.start};
      ::ioctl(uffd_.get(), UFFDIO_UNREGISTER, &range);  // fails where the process has unmapped it, or ended
    }
    // The last descriptor: the kernel undoes what may be left.
    uffd_.reset();
    pagemap_.reset();
    pidfd_.reset();
    mappings_.clear();
  }

 private:
  absl::Status TryStart() {
    pidfd_.reset(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
    if (!pidfd_) return ErrnoError(errno, fmt::format("process {}", pid_));
    pagemap_.reset(::open(fmt::format("/proc/{}/pagemap", pid_).c_str(), O_RDONLY | O_CLOEXEC));
    if (!pagemap_) return ErrnoError(errno, fmt::format("/proc/{}/pagemap", pid_));
    ASSIGN_OR_RETURN(mappings_, FindBlockMappings(pid_, ram_));
    for (uint32_t i = 0; i < ram_.blocks().size(); ++i) {
      if (std::none_of(mappings_.begin(), mappings_.end(),
                       [i](const BlockMapping& m) { return m.block == i; })) {
        return Error(absl::StatusCode::kFailedPrecondition,
                     "process {} has not mapped RAM block {} shared; its writes cannot be seen", pid_,
                     ram_.blocks()[i].id());
      }
    }
    ASSIGN_OR_RETURN(uffd_, TakeUserfaultfd(pid_, pidfd_.get(), Deadline::After(kAttachLimit)));
    return ArmAll();
  }

  absl::Status ArmAll() {
    for (const BlockMapping& mapping : mappings_) RETURN_IF_ERROR(Arm(mapping));
    return absl::OkStatus();
  }

  absl::Status Arm(const BlockMapping& mapping) {
    uffdio_register registration{};
    registration.range = {mapping.start, mapping.end - mapping.start};
    registration.mode = UFFDIO_REGISTER_MODE_WP;
    if (::ioctl(uffd_.get(), UFFDIO_REGISTER, &registration) != 0) {
      const int error = errno;
      if (error == EBUSY) {
        return Error(absl::StatusCode::kFailedPrecondition,
                     "guest memory of process {} is registered with another userfaultfd (of the VMM itself?)",
                     pid_);
      }
      return ErrnoError(
          error, fmt::format("UFFDIO_REGISTER {:#x}-{:#x} of process {}", mapping.start, mapping.end, pid_));
    }
    uffdio_writeprotect protect{};
    protect.range = registration.range;
    protect.mode = UFFDIO_WRITEPROTECT_MODE_WP;
    while (::ioctl(uffd_.get(), UFFDIO_WRITEPROTECT, &protect) != 0) {
      if (errno == EAGAIN || errno == EINTR) continue;  // the process changes its mappings just now
      return ErrnoError(errno, fmt::format("UFFDIO_WRITEPROTECT {:#x}-{:#x} of process {}", mapping.start,
                                           mapping.end, pid_));
    }
    return absl::OkStatus();
  }

  absl::Status Rearm(PageSets& out) {
    // Protect first: what is written from here on is seen, what was written before is in "all".
    RETURN_IF_ERROR(ArmAll());
    for (PageSet& set : out) set.SetAll();
    return absl::OkStatus();
  }

  // False if the range is not under protection.
  absl::StatusOr<bool> Scan(const BlockMapping& mapping, PageSet& out) {
    PagemapScanAbi scan{};
    scan.size = sizeof(scan);
    scan.flags = kScanWpMatching | kScanCheckWpAsync;
    scan.start = mapping.start;
    scan.end = mapping.end;
    scan.vec = reinterpret_cast<uint64_t>(regions_.data());
    scan.vec_len = regions_.size();
    scan.category_mask = kPageIsWritten;
    scan.return_mask = kPageIsWritten;
    while (scan.start < mapping.end) {
      const int count = ::ioctl(pagemap_.get(), kPagemapScan, &scan);
      if (count < 0) {
        if (errno == EINTR) continue;
        if (errno == EPERM) return false;
        return ErrnoError(errno, fmt::format("PAGEMAP_SCAN of process {}", pid_));
      }
      for (int i = 0; i < count; ++i) {
        const PageRegionAbi& region = regions_[static_cast<size_t>(i)];
        const uint64_t begin = std::max(region.start, mapping.start);
        const uint64_t end = std::min(region.end, mapping.end);
        if (begin >= end) continue;
        out.SetRange((mapping.offset + begin - mapping.start) / kPageSize, (end - begin) / kPageSize);
      }
      if (scan.walk_end <= scan.start) {
        return Error(absl::StatusCode::kInternal, "PAGEMAP_SCAN of process {} makes no progress", pid_);
      }
      scan.start = scan.walk_end;
    }
    return true;
  }

  const pid_t pid_;
  const GuestRam& ram_;
  UniqueFd pidfd_;
  UniqueFd pagemap_;
  UniqueFd uffd_;
  std::vector<BlockMapping> mappings_;
  std::vector<PageRegionAbi> regions_{kRegions};
};

}  // namespace

absl::Status ProbeUffd() {
  UniqueFd uffd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | kUffdUserModeOnly)));
  if (!uffd) {
    UniqueFd device(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
    if (device) uffd.reset(::ioctl(device.get(), kUserfaultfdIocNew, O_CLOEXEC | O_NONBLOCK));
  }
  if (!uffd)
    return TrackingUnavailable(ErrnoError(errno, "userfaultfd(2) and /dev/userfaultfd"), "uffd-wp-async");
  RETURN_IF_ERROR(TrackingUnavailable(AgreeOnUffdFeatures(uffd.get()), "uffd-wp-async"));
  UniqueFd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pagemap) return TrackingUnavailable(ErrnoError(errno, "/proc/self/pagemap"), "uffd-wp-async");
  PagemapScanAbi scan{};
  scan.size = sizeof(scan);
  scan.category_mask = kPageIsWritten;
  if (::ioctl(pagemap.get(), kPagemapScan, &scan) < 0) {
    return TrackingUnavailable(Error(absl::StatusCode::kUnimplemented,
                                     "this kernel lacks PAGEMAP_SCAN (Linux 6.7): {}", std::strerror(errno)),
                               "uffd-wp-async");
  }
  return absl::OkStatus();
}

std::unique_ptr<DirtySource> MakeUffdSource(pid_t pid, const GuestRam& ram) {
  return std::make_unique<UffdSource>(pid, ram);
}

}  // namespace baton::memory
