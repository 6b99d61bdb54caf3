#include "agent/memory/dirty_source.h"

#include "agent/memory/dirty_sources.h"

namespace baton::memory {
namespace {

// What "auto" falls back to, and what both lack if neither works.
absl::StatusOr<std::string> Choose(const std::string& mode) {
  if (mode == "uffd" || mode == "soft-dirty") {
    RETURN_IF_ERROR(mode == "uffd" ? ProbeUffd() : ProbeSoftDirty());
    return mode;
  }
  if (mode != "auto" && !mode.empty()) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "dirty tracking '{}' is unknown; auto, uffd and soft-dirty exist", mode);
  }
  absl::Status uffd = ProbeUffd();
  if (uffd.ok()) return std::string("uffd");
  absl::Status soft_dirty = ProbeSoftDirty();
  if (soft_dirty.ok()) return std::string("soft-dirty");
  return Error(v1::DIRTY_TRACKING_UNAVAILABLE, absl::StatusCode::kFailedPrecondition, "{}; {}", Message(uffd),
               Message(soft_dirty));
}

}  // namespace

absl::Status TrackingUnavailable(const absl::Status& status, const std::string& source) {
  return WithReason(Annotate(status, fmt::format("dirty tracking by {} is not possible", source)),
                    v1::DIRTY_TRACKING_UNAVAILABLE);
}

absl::StatusOr<std::unique_ptr<DirtySource>> MakeVmmDirtySource(pid_t pid, const GuestRam& ram,
                                                                const std::string& mode) {
  ASSIGN_OR_RETURN(std::string chosen, Choose(mode));
  return chosen == "uffd" ? MakeUffdSource(pid, ram) : MakeSoftDirtySource(pid, ram);
}

absl::StatusOr<std::string> ProbeDirtyTracking() {
  ASSIGN_OR_RETURN(std::string chosen, Choose("auto"));
  return chosen == "uffd" ? std::string("uffd-wp-async") : chosen;
}

}  // namespace baton::memory
