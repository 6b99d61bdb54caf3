#include "server/schedule/limits.h"

#include <map>

namespace baton::server {

std::vector<std::string> Admit(const ScheduleLimits& limits, const std::vector<Slot>& active,
                               const std::vector<Slot>& queued) {
  std::map<std::string, uint32_t> out, in;
  uint32_t total = 0;
  auto take = [&](const Slot& slot) {
    ++out[slot.source];
    ++in[slot.destination];
    ++total;
  };
  auto full = [](uint32_t count, uint32_t limit) { return limit != 0 && count >= limit; };
  for (const Slot& slot : active) take(slot);
  std::vector<std::string> admitted;
  for (const Slot& slot : queued) {
    if (full(total, limits.cluster)) break;
    if (full(out[slot.source], limits.outgoing_per_host)) continue;
    if (full(in[slot.destination], limits.incoming_per_host)) continue;
    take(slot);
    admitted.push_back(slot.id);
  }
  return admitted;
}

}  // namespace baton::server
