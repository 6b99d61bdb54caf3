// Whether the requests that a device has in flight are handed to the destination, completed first, or end the
// migration. Pure. The rules: an exact set or no commit; a confirmed cancellation (or a fence) or no handoff
// of writes; what is not idempotent drains; a device whose set cannot be told drains, and ends the migration
// at its bound.
#pragma once

#include <cstdint>
#include <string>

#include "agent/virtio/request_class.h"

namespace baton::virtio {

enum class InflightAnswer : uint8_t { kDrain, kHandoff };

// What is known of a device when the question is asked: before the stop, with nothing known of what is in
// flight, and after it, with the set at hand.
struct HandoffQuestion {
  // What policy or request wants.
  InflightAnswer wanted = InflightAnswer::kDrain;
  // The back-end can stop without completing what it has (protocol features 20, 23; SUSPEND does not).
  bool suspends = false;
  // It confirms that what it has stopped will have no effect any more.
  bool confirms_cancel = false;
  // Or something else keeps its late writes from the storage before the destination submits them.
  bool fenced = false;
  // What is in flight can be told exactly: in-flight region, IN_ORDER, shadow virtqueue.
  bool exact = false;
  // What is in flight; none() if nothing, or if not known yet.
  ClassesPresent classes;
  // The drain's bound has passed and requests are still in flight.
  bool bound_passed = false;
};

enum class HandoffVerdict : uint8_t { kHandoff, kDrain, kAbort };

struct HandoffDecision {
  HandoffVerdict verdict = HandoffVerdict::kDrain;
  // In words, for progress and audit: "handed off: ...", "drains: ...", "aborts: ...".
  std::string reason;
  // Reads were handed off that nobody confirmed to be cancelled: should the source resume, it must let its
  // back-end complete them before the guest runs, because a late one would write into a buffer that the guest
  // uses again.
  bool resume_must_wait = false;
};

HandoffDecision DecideHandoff(const HandoffQuestion& question);

}  // namespace baton::virtio
