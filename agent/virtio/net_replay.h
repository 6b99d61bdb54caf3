// A NetState as the commands that bring a fresh device into it.
#pragma once

#include <vector>

#include "agent/virtio/net_control.h"

namespace baton::virtio {

// Commands that bring a device of `limits` from NetState::Default to `state`, in the order in which QEMU
// restores a vDPA NIC (net/vhost-vdpa.c: address, tables, pairs, RSS or hash, offloads, receive modes,
// VLANs), followed by what it forgets: hash without MQ, coalescing, hash tunnel, RSS contexts. To be sent
// with the control ring running and the data rings not yet enabled, and every acknowledgement checked.
// `state` must be valid for `limits`. What no command can set (announce_pending, a MAC address without
// CTRL_MAC_ADDR) is left out.
std::vector<NetCommand> ReplayOf(const NetState& state, const NetLimits& limits);

}  // namespace baton::virtio
