#include "agent/virtio/handoff.h"

#include <fmt/format.h>

namespace baton::virtio {
namespace {

// The device completes what it has, or the migration ends.
HandoffDecision Drain(const HandoffQuestion& q, const std::string& why) {
  if (!q.bound_passed) return {HandoffVerdict::kDrain, "drains: " + why, false};
  return {HandoffVerdict::kAbort,
          fmt::format("aborts: {}, and its requests were not completed within the bound of the drain", why),
          false};
}

}  // namespace

HandoffDecision DecideHandoff(const HandoffQuestion& q) {
  if (q.wanted == InflightAnswer::kDrain) return Drain(q, "the policy wants its requests completed");
  if (!q.suspends) return Drain(q, "the back-end cannot stop without completing its requests");
  if (!q.exact) return Drain(q, "what it has in flight cannot be told exactly");
  if (q.classes.not_idempotent) {
    return Drain(q, "requests are in flight that may differ when they are done twice");
  }
  const bool confirmed = q.confirms_cancel || q.fenced;
  if (q.classes.writes && !confirmed) {
    return Drain(q, "writes are in flight, and nothing confirms that the back-end has given them up");
  }
  HandoffDecision out{HandoffVerdict::kHandoff, "", false};
  if (q.classes.none()) {
    out.reason = "handed off: nothing is in flight";
  } else if (q.confirms_cancel) {
    out.reason = "handed off: the back-end confirms that it has given its requests up";
  } else if (q.fenced) {
    out.reason = "handed off: the back-end is fenced from its storage";
    // A fence keeps late writes from the storage, not late reads from guest memory.
    out.resume_must_wait = q.classes.reads;
  } else if (q.classes.reads) {
    out.reason = "handed off: only reads are in flight";
    out.resume_must_wait = true;
  } else {
    out.reason = "handed off: what is in flight may be lost or done twice without harm";
  }
  return out;
}

}  // namespace baton::virtio
