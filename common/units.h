// Sizes and durations as people write them: "256MiB", "300ms". Pure; any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/clock.h"
#include "common/status.h"

namespace baton {

// "4096", "64B", "16KiB", "256MiB", "1.5GiB", "2TiB" in bytes. Decimal units (kB, MB, GB) are refused,
// because guest memory is never meant that way; the error says what to write. InvalidArgument.
absl::StatusOr<uint64_t> ParseSize(const std::string& text);
// The largest binary unit in which the size is a whole number: 268435456 → "256MiB", 1000 → "1000B".
std::string FormatSize(uint64_t bytes);

// "300ms", "5s", "1m30s", "1h", "250us"; a number without unit is refused (except 0). InvalidArgument, also
// for negative and infinite ones.
absl::StatusOr<Duration> ParseDuration(const std::string& text);
// "300ms", "1m30s".
std::string FormatDuration(Duration duration);

// host:port, [v6]:port, :port (all addresses) or unix:/path.
struct Address {
  std::string host;       // without brackets; empty is "all addresses"
  uint16_t port = 0;      // 0 picks a free one when listening
  std::string unix_path;  // set for unix:/path; host and port are then empty
  // Loopback or unix socket: insecure connections are allowed only there.
  bool IsLocal() const;
  // As it would be written again.
  std::string ToString() const;
};
absl::StatusOr<Address> ParseAddress(const std::string& text);

// The candidate nearest to `word` if it is near enough to be a slip of the pen: for "did you mean …?".
template <typename Range>
std::optional<std::string> Nearest(const std::string& word, const Range& candidates);
// Edits (insert, delete, replace, swap of neighbours) between two words.
size_t EditDistance(const std::string& a, const std::string& b);

template <typename Range>
std::optional<std::string> Nearest(const std::string& word, const Range& candidates) {
  std::optional<std::string> best;
  // A third of the word may differ, at least one letter, at most three.
  size_t limit = word.size() < 6 ? (word.size() < 3 ? 1 : 2) : 3;
  for (const auto& candidate : candidates) {
    size_t distance = EditDistance(word, candidate);
    if (distance <= limit) {
      limit = distance;
      best = candidate;
      if (distance == 0) break;
      --limit;  // later ones must be strictly nearer
    }
  }
  return best;
}

}  // namespace baton
