// A source of dirty pages. All sources of a VM are merged at each round boundary.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/memory/page_set.h"
#include "common/status.h"

namespace baton::memory {

// Between Start and Stop, Harvest adds to `out` every page written since the last Harvest (or Start), and
// starts over. A page written while Harvest runs is reported by this or by the next one, never lost. If a
// source cannot vouch for its completeness any more it adds *all* pages and says so in the log. One thread at
// a time.
class DirtySource {
 public:
  virtual ~DirtySource() = default;
  virtual std::string name() const = 0;
  // Start before the first copy of any page.
  virtual absl::Status Start() = 0;
  virtual absl::Status Harvest(PageSets& out) = 0;
  // Undoes everything in the VMM; safe to call twice and after the VMM died. Also done by the destructor.
  virtual void Stop() = 0;
};

// Tracks writes that the process `pid` makes to `ram` through its own mappings of the blocks' files (found by
// device and inode in /proc/PID/maps). `mode`: "auto" (userfaultfd write-protect async + PAGEMAP_SCAN, else
// soft-dirty), "uffd", "soft-dirty". Errors carry Reason DIRTY_TRACKING_UNAVAILABLE and say which permission
// or kernel feature is missing. `ram` must outlive the source.
absl::StatusOr<std::unique_ptr<DirtySource>> MakeVmmDirtySource(pid_t pid, const GuestRam& ram,
                                                                const std::string& mode);

// What MakeVmmDirtySource("auto") would use on this host: "uffd-wp-async", "soft-dirty" or an error.
absl::StatusOr<std::string> ProbeDirtyTracking();

}  // namespace baton::memory
