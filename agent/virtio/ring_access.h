// Single accesses to words of a ring that the other side reads and writes at the same time, and the layout of
// what rings are made of (VIRTIO 1.x, 2.7 and 2.8). Hosts of this program are little-endian, and so is
// everything here.
#pragma once

#include <cstdint>
#include <cstring>

namespace baton::virtio {

// Flags of descriptors, of both kinds of rings.
inline constexpr uint16_t kDescNext = 1;
inline constexpr uint16_t kDescWrite = 2;
inline constexpr uint16_t kDescIndirect = 4;
inline constexpr uint16_t kDescAvail = 1 << 7;
inline constexpr uint16_t kDescUsed = 1 << 15;

// avail->flags and used->flags of a split ring.
inline constexpr uint16_t kAvailNoInterrupt = 1;
inline constexpr uint16_t kUsedNoNotify = 1;

// Flags of a packed ring's event suppression areas.
inline constexpr uint16_t kEventEnable = 0;
inline constexpr uint16_t kEventDisable = 1;
inline constexpr uint16_t kEventDesc = 2;

struct SplitDesc {
  uint64_t addr;
  uint32_t len;
  uint16_t flags;
  uint16_t next;
};
struct PackedDesc {
  uint64_t addr = 0;
  uint32_t len = 0;
  uint16_t id = 0;
  uint16_t flags = 0;
  friend bool operator==(const PackedDesc&, const PackedDesc&) = default;
};
static_assert(sizeof(SplitDesc) == 16 && sizeof(PackedDesc) == 16);

// Offsets within the avail and used areas of a split ring.
inline constexpr uint64_t kRingFlags = 0;
inline constexpr uint64_t kRingIdx = 2;
inline constexpr uint64_t kRingEntries = 4;

// One load or store each, whatever the other side does meanwhile. `at` must be aligned to the word.
template <typename Word>
struct SharedWord {
  typedef Word __attribute__((may_alias)) Aliased;
};
template <typename Word>
Word Load(const uint8_t* at) {
  return __atomic_load_n(reinterpret_cast<const typename SharedWord<Word>::Aliased*>(at), __ATOMIC_RELAXED);
}
template <typename Word>
Word LoadAcquire(const uint8_t* at) {
  return __atomic_load_n(reinterpret_cast<const typename SharedWord<Word>::Aliased*>(at), __ATOMIC_ACQUIRE);
}
template <typename Word>
void Store(uint8_t* at, Word value) {
  __atomic_store_n(reinterpret_cast<typename SharedWord<Word>::Aliased*>(at), value, __ATOMIC_RELAXED);
}
template <typename Word>
void StoreRelease(uint8_t* at, Word value) {
  __atomic_store_n(reinterpret_cast<typename SharedWord<Word>::Aliased*>(at), value, __ATOMIC_RELEASE);
}

// Orders stores before it with loads after it: between publishing an index and reading the other side's
// event.
inline void FullFence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// A descriptor by two 8-byte loads.
template <typename Desc>
Desc LoadDesc(const uint8_t* at) {
  const uint64_t words[2] = {Load<uint64_t>(at), Load<uint64_t>(at + 8)};
  Desc out;
  std::memcpy(&out, words, sizeof out);
  return out;
}

// One load wherever the word lies: for what the other side may place at any address. (Ordinary memory of the
// hosts that this program runs on; the compiler may neither repeat nor split the access.)
template <typename Word>
Word LoadAnywhere(const uint8_t* at) {
  typedef Word __attribute__((may_alias, aligned(1))) Unaligned;
  return *reinterpret_cast<const volatile Unaligned*>(at);
}

// vring_need_event of VIRTIO 2.7.10: an index moved from `old` to `now`; did it pass `event`?
constexpr bool PassedEvent(uint16_t event, uint16_t now, uint16_t old) {
  return static_cast<uint16_t>(now - event - 1) < static_cast<uint16_t>(now - old);
}

// The same in a packed ring of `n`: the position (idx, wrap) was reached after `moved` <= n descriptors, and
// the other side asked to be told about descriptor `off_wrap` (15 bits and a wrap counter).
constexpr bool PassedPackedEvent(uint16_t off_wrap, uint16_t idx, bool wrap, uint16_t moved, uint16_t n) {
  uint16_t event = off_wrap & 0x7fff;
  if ((off_wrap >> 15 != 0) != wrap) event = static_cast<uint16_t>(event - n);
  return PassedEvent(event, idx, static_cast<uint16_t>(idx - moved));
}

}  // namespace baton::virtio
