// Puts completions back into the order of submission: the buffer that IN_ORDER needs in a device whose
// requests end in any order.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace baton::virtio {

// Values keyed by consecutive sequence numbers, given in any order, taken in order. Constant time per value
// and no allocation after construction: the numbers outstanding at one time span a window that the ring's
// size bounds, so a number's slot is its remainder, and no hash is needed.
template <typename T>
class ReorderBuffer {
 public:
  // Sequence numbers from next() to next() + window - 1 are accepted. `window` >= 1.
  explicit ReorderBuffer(uint32_t window)
      : slots_(std::bit_ceil(window)), mask_(std::bit_ceil(window) - 1), window_(window) {}

  // False if `sequence` was completed already or is outside the window.
  bool Complete(uint64_t sequence, const T& value) {
    if (sequence - next_ >= window_) return false;
    Slot& slot = slots_[sequence & mask_];
    if (slot.filled) return false;
    slot = {value, true};
    ++held_;
    return true;
  }

  // Calls take(const T&) for every value whose turn has come. Returns how many.
  template <typename Take>
  uint32_t Drain(Take&& take) {
    const uint64_t before = next_;
    for (Slot* slot = &slots_[next_ & mask_]; slot->filled; slot = &slots_[++next_ & mask_]) {
      slot->filled = false;
      take(slot->value);
    }
    const auto taken = static_cast<uint32_t>(next_ - before);
    held_ -= taken;
    return taken;
  }

  // Gives up the order: calls take(const T&) for everything that is held, oldest first, and empties the
  // buffer. Walks at most one window.
  template <typename Take>
  void Release(Take&& take) {
    for (uint64_t sequence = next_; held_; ++sequence) {
      Slot& slot = slots_[sequence & mask_];
      if (!slot.filled) continue;
      slot.filled = false;
      --held_;
      take(slot.value);
    }
  }

  // Continues at `sequence`. The buffer must be empty.
  void Restart(uint64_t sequence) { next_ = sequence; }

  // The number whose turn it is.
  uint64_t next() const { return next_; }
  // Values that wait for their turn.
  uint32_t held() const { return held_; }

 private:
  struct Slot {
    T value{};
    bool filled = false;
  };

  std::vector<Slot> slots_;
  uint64_t mask_;
  uint64_t window_;
  uint64_t next_ = 0;
  uint32_t held_ = 0;
};

}  // namespace baton::virtio
