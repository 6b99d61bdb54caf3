// What a device side has fetched and not yet returned, and in which order it returns it. Common to split and
// packed rings.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "agent/virtio/chain.h"
#include "agent/virtio/reorder_buffer.h"
#include "common/status.h"

namespace baton::virtio {

// A completed request that Publish will return to the driver.
struct Completion {
  uint64_t sequence = 0;
  uint32_t len = 0;
  uint16_t id = 0;
  uint16_t slots = 0;
  // All of its writable bytes were written: it may stand in a batch without a used element of its own,
  // because the driver takes such buffers as written completely (VIRTIO 2.7.9).
  bool full = false;
};

// One thread. Constant time per request; allocates only until the vectors have grown.
class CompletionQueue {
 public:
  // A ring of `n`; `hold`: completions leave in the order of Begin.
  CompletionQueue(uint16_t n, bool hold);

  // A chain was fetched; sets chain->sequence. STATE_MISMATCH if its id is in flight. `known_order` false: a
  // recovered request, of which nobody knows what was used after it.
  absl::Status Begin(Chain* chain, bool known_order = true);
  // The chain that Begin saw last goes back, unfetched. False if it is not that one.
  bool Undo(const Chain& chain);
  // The request `id` is done, with `len` bytes written. InvalidArgument if it is not in flight, was staged
  // before, or has fewer writable bytes.
  absl::Status Stage(uint16_t id, uint32_t len);

  // Ready to be published, in this order. Valid until the next call that is not const.
  std::span<const Completion> staged() const {
    return std::span<const Completion>(staged_).subspan(staged_begin_);
  }
  // The first `count` of staged() were published.
  void Published(size_t count);

  // Switches. To hold needs prefix() and nothing staged; from hold stages everything that is held.
  void SetHold(bool hold);
  bool hold() const { return hold_; }

  // The published requests are exactly the oldest ones.
  bool prefix() const { return prefix_after(published_, highest_); }
  bool prefix_after(uint64_t published, uint64_t highest) const {
    return published == highest && published >= unknown_;
  }
  // Published so far; and one more than the highest sequence number published.
  uint64_t published() const { return published_; }
  uint64_t highest() const { return highest_; }

  // Chains fetched and not published: in progress, held, or staged. And their ring slots.
  uint16_t in_flight() const { return in_flight_; }
  uint32_t in_flight_slots() const { return slots_; }
  bool IsInFlight(uint16_t id) const { return id < requests_.size() && requests_[id].state != State::kIdle; }

 private:
  enum class State : uint8_t { kIdle, kRunning, kStaged };
  struct Request {
    uint64_t sequence = 0;
    uint64_t writable = 0;
    uint16_t slots = 0;
    State state = State::kIdle;
  };

  const uint16_t n_;
  bool hold_;
  // By id. A packed ring's driver may use any 16 bits as an id: grows to the largest one seen.
  std::vector<Request> requests_;
  std::vector<Completion> staged_;
  size_t staged_begin_ = 0;
  ReorderBuffer<Completion> order_;
  uint64_t next_sequence_ = 0;
  uint64_t published_ = 0;
  uint64_t highest_ = 0;
  // Requests below this number were recovered without knowing what was used after them.
  uint64_t unknown_ = 0;
  uint16_t in_flight_ = 0;
  uint32_t slots_ = 0;
};

}  // namespace baton::virtio
