// Any 128 bytes decode to an error or to a preamble that encodes to the same bytes.
#include <algorithm>
#include <cstdlib>

#include "agent/stream/preamble.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace baton::stream;
  PreambleBytes bytes{};
  std::copy_n(data, std::min(size, bytes.size()), bytes.begin());
  auto preamble = DecodePreamble(bytes);
  if (!preamble.ok()) return 0;
  auto again = EncodePreamble(*preamble);
  if (!again.ok() || *again != bytes) std::abort();
  return 0;
}
