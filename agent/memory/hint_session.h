// One session of free page hints at the source of a migration: which pages need not be sent. Pure.
//
// A guest may take a hinted page back and write it at any time, also before the device has seen the hint. So
// a hint never clears what a dirty source has seen, and means something only together with them:
//
//   S0  every dirty source is on, and harvested: from here each write is seen             BaselineTaken()
//   S1  a command id is published                                                         Published()
//   S2  hints are collected in H, the dirty sources are left alone                        OnHint()
//   S3  the guest has said STOP in-band; if it does not in time, H is dropped             OnStop(), Drop()
//   S4  D: everything written since S0, of all dirty sources
//   S5  H without D is not sent; H and D is dirty as it would be without hints            Resolve(D)
//
// Pages of H without D were not written since the id was issued, which is exactly what the specification
// allows a device to lose (VIRTIO 1.x, 5.5.6.6).
#pragma once

#include <cstdint>
#include <string>

#include "agent/memory/page_set.h"
#include "common/status.h"

namespace baton::memory {

// Not thread-safe.
class HintSession {
 public:
  enum class State { kNew, kBaseline, kPublished, kCollecting, kStopped, kDropped, kResolved };

  struct Conditions {
    // Memory follows a guest that runs already: a page that nobody has could be asked for.
    bool post_copy = false;
    // What the guest says free pages contain. Pages that are not sent arrive as zeroes.
    uint32_t poison = 0;
  };

  // `none`: empty sets of the right sizes.
  explicit HintSession(PageSets none) : hinted_(std::move(none)) {}

  // S0. FailedPrecondition, with why in words, if hints must not be used under these conditions.
  absl::Status BaselineTaken(const Conditions& conditions);
  // S1. FailedPrecondition before S0.
  absl::Status Published();
  // S2. Pages outside the block are ignored, and everything in a state in which hints do not count.
  void OnStart();
  void OnHint(uint32_t block, uint64_t first_page, uint64_t pages);
  // S3. A STOP without a start is that of an earlier session.
  void OnStop();
  // H is worth nothing: no STOP in time, the device or its driver went away, the guest is paused, its poison
  // changed. Nothing after it counts. Without effect once resolved.
  void Drop(std::string why);
  // S4 and S5. `dirty` is everything that was written since S0. Returns the pages that need not be sent; none
  // after Drop. FailedPrecondition while hints may still come: then nothing may be left out.
  absl::StatusOr<PageSets> Resolve(const PageSets& dirty);

  State state() const { return state_; }
  bool collecting() const { return state_ == State::kPublished || state_ == State::kCollecting; }
  const std::string& why_dropped() const { return why_dropped_; }
  // H so far. To be sent last, not to be left out: only Resolve says that.
  const PageSets& hinted() const { return hinted_; }
  // Bytes named by hints so far, each time they are named.
  uint64_t hinted_bytes() const { return hinted_bytes_; }

 private:
  State state_ = State::kNew;
  PageSets hinted_;
  uint64_t hinted_bytes_ = 0;
  std::string why_dropped_;
};

}  // namespace baton::memory
