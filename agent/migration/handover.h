// The handover of a guest's ownership between two hosts as a pure state machine: no clock, no descriptor, no
// thread. The same class runs in shims, in tests and under fault injection; tests/model/ holds its Promela
// model.
//
// Rules (design, section 5):
//  1. The source may resume after freezing only while its journal holds no YIELDED(m), or once it holds
//  REFUSED(m).
//  2. The destination may start the guest only when the whole state arrived and was checked, the source has
//  yielded, and
//     its own journal holds OWNER(epoch+1).
//  3. The destination may write REFUSED(m) at any time before OWNER, and never OWNER after REFUSED.
//  4. After YIELDED the source asks until it hears OWNER (then it releases) or REFUSED (then it resumes).
//  5. If the destination is gone for good, only a confirmed fencing lets the source resume.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"

namespace baton::migration {

// A record of a side's journal. One journal holds one VM's history on one host.
struct JournalRecord {
  enum class Kind : uint8_t {
    kInvalid = 0,
    // This side owns the guest at `epoch` (fresh start, or after a handover).
    kOwner = 1,
    kYielded = 2,
    kRefused = 3,
    // Source: heard OWNER; will never run this guest again at this epoch.
    kReleased = 4,
    // Destination: a migration was prepared here. Nothing owned.
    kIncoming = 5,
    // Source, after an operator or hook confirmed that the destination is fenced; counts as REFUSED.
    kFenced = 6,
  };
  Kind kind = Kind::kInvalid;
  uint64_t epoch = 0;
  std::string migration;  // empty for a fresh start

  bool operator==(const JournalRecord&) const = default;
};

}  // namespace baton::migration
