// PARTIAL_ORDER: state machines of both sides (docs/partial-order.md). Experimental: no version of VIRTIO has
// this feature, and the bits are Baton's own choice. Pure; one thread.
#pragma once

#include <cstdint>

namespace baton::virtio {

// Packed rings: flag of a used descriptor. Set: every buffer that was available before the one it names is
// used. Two of them in a row: all buffers between the two are used, in order.
inline constexpr uint16_t kDescFlush = 1 << 14;

// Split rings: the handshake in used->flags (device) and avail->flags (driver).
inline constexpr uint16_t kUsedInOrder = 1 << 14;
inline constexpr uint16_t kAvailInOrderAck = 1 << 14;

// How a device with PARTIAL_ORDER completes.
enum class Ordering {
  // Buffers are used as their requests end.
  kAsCompleted,
  // A completion that overtakes others is held, so that batches need one used element.
  kInOrder,
};

// Device side of the split handshake. IN_ORDER and IN_ORDER_ACK go through all four combinations in turn:
//
//   kFree (0,0) -> kAsserting (1,0) -> kAgreed (1,1) -> kReleasing (0,1) -> kFree
//
// In kFree buffers are used one by one in any order, in kAgreed in order and in batches. In between nobody
// can tell whether the driver reads an element before or after it changed its mind, so what is published then
// must mean the same in both readings: one by one and in order. That is also why the device withdraws an
// assertion only after the acknowledgement: otherwise a late acknowledgement of the first could be taken for
// one of a second.
class SplitOrderDevice {
 public:
  enum class State { kFree, kAsserting, kAgreed, kReleasing };

  // At start, from the flags that the ring's memory holds: a device continues what its predecessor began.
  explicit SplitOrderDevice(bool asserted = false, bool acked = false)
      : state_(asserted ? (acked ? State::kAgreed : State::kAsserting)
                        : (acked ? State::kReleasing : State::kFree)) {}

  // Moves on. `acked`: IN_ORDER_ACK as just read (acquire). `want`: what the device wishes. `prefix`: what
  // the driver has seen used is exactly what was available first, nothing later. True if IN_ORDER must be
  // written to used->flags now (asserted()), after everything published so far, and the driver be told.
  bool Step(bool acked, Ordering want, bool prefix) {
    const bool before = asserted();
    switch (state_) {
      case State::kFree:
        if (want == Ordering::kInOrder && prefix && !acked) state_ = State::kAsserting;
        break;
      case State::kAsserting:
        if (acked) state_ = want == Ordering::kInOrder ? State::kAgreed : State::kReleasing;
        break;
      case State::kAgreed:
        if (want == Ordering::kAsCompleted) state_ = State::kReleasing;
        break;
      case State::kReleasing:
        if (!acked) state_ = State::kFree;
        break;
    }
    return asserted() != before;
  }

  State state() const { return state_; }
  bool asserted() const { return state_ == State::kAsserting || state_ == State::kAgreed; }
  // Completions must be published in order.
  bool in_order() const { return state_ != State::kFree; }
  // One used element may stand for a batch.
  bool batches() const { return state_ == State::kAgreed; }

 private:
  State state_;
};

// Driver side of the split handshake. The driver reads used->flags (acquire), then used->idx (acquire), takes
// everything up to that index as the present mode says, and then calls Follow: whatever the flag separates is
// then on the right side of the change.
class SplitOrderDriver {
 public:
  explicit SplitOrderDriver(bool acked = false) : acked_(acked) {}

  // `asserted`: IN_ORDER as read before the index. True if IN_ORDER_ACK must be written (acked()) and the
  // device be notified.
  bool Follow(bool asserted) {
    if (asserted == acked_) return false;
    acked_ = asserted;
    return true;
  }
  bool acked() const { return acked_; }
  // A used element may stand for a batch, and is in order.
  bool batches() const { return acked_; }

 private:
  bool acked_;
};

// Packed rings, either side: whether the last used descriptor carried FLUSH. After a restart a device that
// does not know begins with false, which is safe: it then sends no batch before it has set FLUSH itself, and
// a single in-order descriptor means the same after a FLUSH as without one.
class FlushState {
 public:
  explicit FlushState(bool flushed = false) : flushed_(flushed) {}
  // The next used descriptor, if it carries FLUSH, stands for all buffers up to the one that it names.
  bool batches() const { return flushed_; }
  void Used(bool flush) { flushed_ = flush; }

 private:
  bool flushed_;
};

}  // namespace baton::virtio
