// Little-endian integers in byte arrays. Internal to the stream.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace baton::stream {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "guest memory and wire format are little endian");

template <typename T>
void StoreLe(uint8_t* out, T value) {
  static_assert(std::is_unsigned_v<T>);
  std::memcpy(out, &value, sizeof(value));
}

template <typename T>
T LoadLe(const uint8_t* in) {
  static_assert(std::is_unsigned_v<T>);
  T value;
  std::memcpy(&value, in, sizeof(value));
  return value;
}

}  // namespace baton::stream
