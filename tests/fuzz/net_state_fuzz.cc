// A device state as a peer sends it: refused, or valid, and then steering has an answer for any packet.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "agent/virtio/net_state.h"
#include "agent/virtio/steering.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace baton::virtio;
  NetLimits limits;
  limits.features = kNetFCtrlVq | kNetFCtrlRx | kNetFCtrlVlan | kNetFMq | kNetFRss | kNetFHashReport;
  limits.max_pairs = 4;
  limits.hash_types = kHashAllTypes;
  auto parsed = ParseNetState(std::string(reinterpret_cast<const char*>(data), size), limits);
  if (!parsed.ok()) return 0;
  if (!parsed->state.Validate(limits).ok()) abort();
  Steering steering(0);
  steering.flows().Import(parsed->flow_seed, parsed->flows);
  if (auto packet = ParsePacket({data, size})) {
    if (steering.Receive(parsed->state, *packet).pair >= limits.max_pairs) abort();
    PassesFilter(parsed->state, limits, packet->destination, packet->vlan);
  }
  auto again = ParseNetState(SerializeNetState(*parsed, limits.features), limits);
  if (!again.ok() || !(again->state == parsed->state)) abort();
  return 0;
}
