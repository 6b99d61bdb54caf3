// The vring base of GET_VRING_BASE and SET_VRING_BASE: where a back-end continues in a ring. Pure arithmetic.
//
// Split rings: bits 0-15 are the free-running index of the next avail entry to fetch; the used index is in
// guest memory. Packed rings: bits 0-14 next avail descriptor, 15 its wrap counter, 16-30 next used
// descriptor, 31 its wrap counter. After a reset a packed base is 0x80008000 (both wrap counters start at
// one).
#pragma once

#include <cstdint>

namespace baton::virtio {

inline constexpr uint32_t kPackedBaseAfterReset = 0x80008000;

// A place in a packed ring.
struct PackedPosition {
  uint16_t idx = 0;
  bool wrap = true;
  friend bool operator==(PackedPosition, PackedPosition) = default;
};

struct PackedBase {
  PackedPosition avail;
  PackedPosition used;
  friend bool operator==(PackedBase, PackedBase) = default;
};

constexpr uint32_t EncodePackedBase(PackedBase base) {
  return uint32_t{base.avail.idx} | uint32_t{base.avail.wrap} << 15 | uint32_t{base.used.idx} << 16 |
         uint32_t{base.used.wrap} << 31;
}

constexpr PackedBase DecodePackedBase(uint32_t raw) {
  return {{static_cast<uint16_t>(raw & 0x7fff), (raw >> 15 & 1) != 0},
          {static_cast<uint16_t>(raw >> 16 & 0x7fff), (raw >> 31) != 0}};
}

// `p` moved on by `k` <= `n` descriptors in a ring of `n`.
constexpr PackedPosition Advance(PackedPosition p, uint16_t k, uint16_t n) {
  uint32_t idx = uint32_t{p.idx} + k;
  if (idx >= n) {
    idx -= n;
    p.wrap = !p.wrap;
  }
  p.idx = static_cast<uint16_t>(idx);
  return p;
}

// Descriptors from `from` to `to`, or -1 if `to` is not within one lap after `from`.
constexpr int32_t Distance(PackedPosition from, PackedPosition to, uint16_t n) {
  if (from.wrap == to.wrap) return to.idx >= from.idx ? to.idx - from.idx : -1;
  return to.idx <= from.idx ? n - from.idx + to.idx : -1;
}

}  // namespace baton::virtio
