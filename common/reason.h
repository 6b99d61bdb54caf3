// What each baton.v1.Reason means to programs: its canonical code on the wire and its name in metrics. One
// table.
#pragma once

#include <string>

#include "common/status.h"

namespace baton {

// The code under which an error with this reason travels when nothing more precise is known. OK for
// REASON_UNSPECIFIED and NONE. An unknown value (from a newer peer) is kInternal.
absl::StatusCode CodeOf(v1::Reason reason);

// The lower-case name that metrics use as label value: "drain_timeout"; "unspecified" for 0, "unknown" for
// values that this version does not know. Bounded by the enum.
std::string LabelOf(v1::Reason reason);
std::string LabelOf(v1::Phase phase);

// An error of `reason` with the table's code.
absl::Status ErrorOf(v1::Reason reason, const std::string& message);

}  // namespace baton
