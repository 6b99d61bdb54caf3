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
  // How it lays out an in-flight region, and which base it means and wants.
  virtio::InflightKind inflight;
};

Quirks QuirksOf(v1::BackendKind kind);

// Whether RecoverSplit may go by the window in which both rings are visible.
bool AllowWindowRecovery(const v1::Backend& backend);

}  // namespace baton::vhost
