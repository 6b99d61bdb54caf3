// Moving the VMM's opaque state between its descriptor and the messages of channel 0.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::migration {

// State travels in pieces of this size, well under the limit of a message.
inline constexpr size_t kStatePiece = 1u << 20;

// Reads what is there now, without waiting, at most `limit` bytes. Sets `eof` if the VMM closed its end.
absl::StatusOr<std::string> ReadAvailable(int fd, size_t limit, bool& eof);

// Reads to the end, handing on pieces of at most kStatePiece. Stops at the first error of `piece`.
absl::Status ReadToEnd(int fd, Deadline deadline, const std::function<absl::Status(std::string)>& piece);

// Writes all of `data`; waits for the VMM to take it.
absl::Status WriteState(int fd, const std::string& data, Deadline deadline);

}  // namespace baton::migration
