#include "agent/virtio/replay_order.h"

#include <utility>

namespace baton::virtio {
namespace {

// Whether `later` must not start before `earlier` is complete.
bool MustWait(const BlkRequest& earlier, const BlkRequest& later) {
  // The specification asks less of a flush (writes that were complete when it was submitted), but the guest
  // may have meant it for these.
  if (later.flush() && earlier.writes()) return true;
  return Conflicts(earlier, later);
}

}  // namespace

ReplayOrder::ReplayOrder(std::vector<BlkRequest> requests)
    : entries_(requests.size()), open_(requests.size()) {
  ready_.reserve(requests.size());
  for (uint32_t i = 0; i < requests.size(); ++i) {
    Entry& entry = entries_[i];
    entry.request = std::move(requests[i]);
    for (uint32_t k = 0; k < i; ++k) {
      if (!MustWait(entries_[k].request, entry.request)) continue;
      entries_[k].holds_up.push_back(i);
      ++entry.waits_for;
    }
    if (entry.waits_for == 0) {
      entry.state = State::kReady;
      ready_.push_back(i);
    }
  }
}

bool ReplayOrder::Next(size_t* index) {
  if (next_ready_ == ready_.size()) return false;
  *index = ready_[next_ready_++];
  entries_[*index].state = State::kSubmitted;
  return true;
}

void ReplayOrder::Completed(size_t index) {
  if (index >= entries_.size() || entries_[index].state != State::kSubmitted) return;
  entries_[index].state = State::kDone;
  --open_;
  for (uint32_t later : entries_[index].holds_up) {
    if (--entries_[later].waits_for == 0) {
      entries_[later].state = State::kReady;
      ready_.push_back(later);
    }
  }
}

bool ReplayOrder::MayStart(const BlkRequest& fresh) const {
  if (open_ == 0) return true;
  for (const Entry& entry : entries_) {
    if (entry.state != State::kDone && MustWait(entry.request, fresh)) return false;
  }
  return true;
}

}  // namespace baton::virtio
