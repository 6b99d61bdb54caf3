// Control-queue requests as a guest writes them: any bytes leave a state that is valid, serialises, and can
// be replayed. Input: two bytes of options, then requests, each after its length.
#include <cstdint>
#include <cstdlib>
#include <span>

#include "agent/virtio/net_replay.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace baton::virtio;
  if (size < 2) return 0;
  NetLimits limits;
  limits.features = kNetFCtrlVq | kNetFCtrlRx | kNetFCtrlRxExtra | kNetFCtrlVlan | kNetFCtrlMacAddr |
                    kNetFGuestAnnounce | kNetFHashReport | kNetFCtrlGuestOffloads | kNetFGuestCsum |
                    kNetFNotfCoal | kNetFVqNotfCoal | kNetFHashTunnel;
  limits.features |= data[0] & 1 ? kNetFSteering : kNetFMq | kNetFRss;
  limits.max_pairs = static_cast<uint16_t>(1 + (data[0] >> 4));
  limits.mac_table_entries = data[1];
  limits.hash_types = kHashAllTypes;
  limits.tunnel_types = 0xff;
  limits.rss_contexts = 4;
  const NetControl control(limits);
  NetState state = NetState::Default(limits);
  std::span<const uint8_t> rest(data + 2, size - 2);
  while (!rest.empty()) {
    const size_t length = std::min<size_t>(rest[0], rest.size() - 1);
    const NetState before = state;
    NetReply reply = control.Apply(rest.subspan(1, length), limits.max_pairs, &state);
    if (reply.ack != kNetAckOk && !(state == before)) abort();
    if (!state.Validate(limits).ok()) abort();
    rest = rest.subspan(1 + length);
  }
  auto parsed = ParseNetState(SerializeNetState({state, 1, {}}, limits.features), limits);
  if (!parsed.ok() || !(parsed->state == state)) abort();
  NetState replayed = NetState::Default(limits);
  for (const NetCommand& command : ReplayOf(state, limits)) {
    if (control.Apply(command.Encode(), limits.max_pairs, &replayed).ack != kNetAckOk) abort();
  }
  if (!(replayed == state)) abort();
  return 0;
}
