// What is known of the kinds of back-ends (docs/backends.md has the table with its sources).
#pragma once

#include "agent/virtio/inflight_layout.h"
#include "baton/v1/vm_spec.pb.h"

namespace baton::vhost {

struct Quirks {
  const char* name;
  // When its front-end disconnects, it completes what it has before it serves the next one. After a reconnect
  // to the same process nothing is in flight, and used->idx is where to go on.
  bool drains_on_disconnect;
  // What was in flight when it died may be worked out from both rings (RecoverSplit), because it starts to
  // serve a new connection only when nothing of an older one is in flight.
  bool window_recovery;
  // Layout of its in-flight region, and what ring bases mean while something is in flight.
  virtio::InflightKind inflight = virtio::InflightKind::kUnknown;
  // Protocol bit 20 is what QEMU made of it (in rust-vmm it was another feature for a time), and it may be
  // negotiated for one stop only. Bit 23 needs no such knowledge.
  bool bit_20 = false;
  // What GET_VRING_BASE carries beside the index to suspend under bit 20.
  uint32_t suspend_num = 0;
  // Before it answers a stop without completing, it has cancelled what it had and knows that.
  bool confirms_cancel = false;
  // It submits what it finds in the region in the order of the counters, overlapping requests one after the
  // other.
  bool replays_in_order = false;
  // It bears requests that come before it has answered the one before.
  bool pipelines = false;
  // As a NIC it completes each ring in the order of the buffers it took, whether or not that was negotiated:
  // what was not completed when it died are the avail entries from used->idx on.
  bool packets_in_order = false;
};

Quirks QuirksOf(v1::BackendKind kind);

// Whether RecoverSplit may go by the window in which both rings are visible.
bool AllowWindowRecovery(const v1::Backend& backend);

}  // namespace baton::vhost
