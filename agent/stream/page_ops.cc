#include "agent/stream/page_ops.h"

#include <immintrin.h>
#include <xxh_x86dispatch.h>

#include <cstring>

#include "agent/memory/page_set.h"

namespace baton::stream {
namespace {

using memory::kPageSize;

uint64_t Word(const uint8_t* at) {
  uint64_t word;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

// Nearly every page that is not zero shows it here.
bool SampleIsZero(const uint8_t* page) {
  return (Word(page) | Word(page + kPageSize / 2) | Word(page + kPageSize - 8)) == 0;
}

__attribute__((target("avx2"))) bool IsZeroAvx2(const uint8_t* page) {
  if (!SampleIsZero(page)) return false;
  const __m256i* at = reinterpret_cast<const __m256i*>(page);
  const __m256i* end = at + kPageSize / sizeof(__m256i);
  for (; at < end; at += 8) {
    __m256i a = _mm256_or_si256(_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1));
    __m256i b = _mm256_or_si256(_mm256_loadu_si256(at + 2), _mm256_loadu_si256(at + 3));
    __m256i c = _mm256_or_si256(_mm256_loadu_si256(at + 4), _mm256_loadu_si256(at + 5));
    __m256i d = _mm256_or_si256(_mm256_loadu_si256(at + 6), _mm256_loadu_si256(at + 7));
    __m256i all = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
    if (!_mm256_testz_si256(all, all)) return false;
  }
  return true;
}

using IsZeroFunction = bool (*)(const uint8_t*);
const IsZeroFunction kIsZero = __builtin_cpu_supports("avx2") ? IsZeroAvx2 : IsZeroPagePortable;

}  // namespace

bool IsZeroPagePortable(const uint8_t* page) {
  if (!SampleIsZero(page)) return false;
  for (size_t i = 0; i < kPageSize; i += 64) {
    uint64_t all = 0;
    for (size_t j = 0; j < 64; j += 8) all |= Word(page + i + j);
    if (all != 0) return false;
  }
  return true;
}

bool IsZeroPage(const uint8_t* page) { return kIsZero(page); }

uint64_t PageChecksum(const uint8_t* page) { return XXH3_64bits_dispatch(page, kPageSize); }

}  // namespace baton::stream
