// What is known of the kinds of back-ends (docs/backends.md has the table with its sources).
#pragma once

#include "baton/v1/vm_spec.pb.h"

namespace baton::vhost {

struct Quirks {
  const char* name;
  // When its front-end disconnects, it completes what it has before it serves the next one. After a reconnect
  // to the same process nothing is in flight, and used->idx is where to go on.
  bool drains_on_disconnect;
  // Its completions follow the order of the avail ring as long as the visible history says so.
  bool ordered_recovery;
};

Quirks QuirksOf(v1::BackendKind kind);

// Whether RecoverSplit may use the order of completions.
bool AllowOrderedRecovery(const v1::Backend& backend);

}  // namespace baton::vhost
