// The implementations behind MakeVmmDirtySource(). Internal to the room.
#pragma once

#include <sys/types.h>

#include <memory>

#include "agent/memory/dirty_source.h"
#include "agent/memory/guest_ram.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::memory {

// OK if this kernel has what the source needs; else DIRTY_TRACKING_UNAVAILABLE with the feature that is
// missing. What the permissions allow shows at Start().
absl::Status ProbeUffd();
absl::Status ProbeSoftDirty();

std::unique_ptr<DirtySource> MakeUffdSource(pid_t pid, const GuestRam& ram);
std::unique_ptr<DirtySource> MakeSoftDirtySource(pid_t pid, const GuestRam& ram);

// A userfaultfd for the memory of process `pid`, made by one of its threads and taken from it; nothing is
// left behind there. Ready for use: features agreed. `pidfd` is that of `pid`.
absl::StatusOr<UniqueFd> TakeUserfaultfd(pid_t pid, int pidfd, Deadline deadline);

// Agrees on the features that the uffd source needs.
absl::Status AgreeOnUffdFeatures(int uffd);

// `status` with Reason DIRTY_TRACKING_UNAVAILABLE and a prefix that says what it stops.
absl::Status TrackingUnavailable(const absl::Status& status, const std::string& source);

}  // namespace baton::memory
