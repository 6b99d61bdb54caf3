// In which order requests that were in flight are submitted again by the device that took them over
// (overlapping ones in the order in which they were fetched, the others at once, a flush
// after the writes before it, and nothing new past what it overlaps). Pure.
//
//   ReplayOrder order(std::move(requests));          // oldest first
//   for (size_t i; order.Next(&i);) Submit(i);       // whenever something may start
//   order.Completed(i);                              // then ask Next again
//   if (order.MayStart(fresh)) ...                   // a request that the guest makes meanwhile
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "agent/virtio/request_class.h"

namespace baton::virtio {

// One thread. Quadratic in the number of requests once, at the start; afterwards constant a request, and free
// of cost when all are done.
class ReplayOrder {
 public:
  ReplayOrder() = default;
  explicit ReplayOrder(std::vector<BlkRequest> requests);

  // The next request that may be submitted now; false: none, until one is completed.
  bool Next(size_t* index);
  // Request `index` has been submitted by Next and is complete. Ignored if it is not.
  void Completed(size_t index);
  // All are complete.
  bool done() const { return open_ == 0; }
  // Whether a new request may start beside those that are not complete: it overlaps none of them where one of
  // the two writes, and a flush waits for all writes.
  bool MayStart(const BlkRequest& fresh) const;

 private:
  enum class State : uint8_t { kWaiting, kReady, kSubmitted, kDone };
  struct Entry {
    BlkRequest request;
    State state = State::kWaiting;
    uint32_t waits_for = 0;          // earlier requests that must complete first
    std::vector<uint32_t> holds_up;  // later requests that wait for this one
  };
  std::vector<Entry> entries_;
  std::vector<uint32_t> ready_;  // a queue: oldest first, from next_ready_ on
  size_t next_ready_ = 0;
  size_t open_ = 0;
};

}  // namespace baton::virtio
