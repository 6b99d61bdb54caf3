// How many migrations may be under way at once. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace baton::server {

// 0 is "no limit".
struct ScheduleLimits {
  uint32_t outgoing_per_host = 2;
  uint32_t incoming_per_host = 2;
  uint32_t cluster = 16;
};

// What the scheduler needs to know of a migration.
struct Slot {
  std::string id;
  std::string source;
  std::string destination;
};

// Which of `queued` (oldest first) may start beside `active`, in order. One that has no place does not hold
// up those behind it that have one.
std::vector<std::string> Admit(const ScheduleLimits& limits, const std::vector<Slot>& active,
                               const std::vector<Slot>& queued);

}  // namespace baton::server
