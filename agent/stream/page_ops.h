// What the stream computes over single pages. Pure, apart from reading memory that a guest may be writing.
#pragma once

#include <cstdint>

namespace baton::stream {

// Whether the 4096 bytes at `page` are all zero. Vectorised where the processor allows it.
bool IsZeroPage(const uint8_t* page);

// XXH3-64 of the 4096 bytes at `page`.
uint64_t PageChecksum(const uint8_t* page);

// The portable version of IsZeroPage, for comparison in tests.
bool IsZeroPagePortable(const uint8_t* page);

}  // namespace baton::stream
