// Builds the reports of one side of a migration and hands them on.
#pragma once

#include <functional>
#include <mutex>
#include <string>

#include "baton/v1/types.pb.h"
#include "common/clock.h"

namespace baton::migration {

// Called with every report, from any thread of the engine, in the order of their sequence. Must not block and
// must not call back into the engine.
using ReportCallback = std::function<void(const v1::SideReport&)>;

// The report of one side as it grows. Any thread.
class Reporter {
 public:
  Reporter(const std::string& migration_id, const std::string& vm, v1::Role role, uint64_t epoch,
           ReportCallback callback);

  // Changes the report under the lock and publishes it.
  void Update(const std::function<void(v1::SideReport&)>& change);
  // Changes progress figures; published at most five times a second.
  void Tick(const std::function<void(v1::Progress&)>& change);
  // Enters `phase` (with its time stamp, once) and publishes. Phases only move forward.
  void EnterPhase(v1::Phase phase);
  // Both in one report: whoever hears of the phase hears of the rest.
  void EnterPhase(v1::Phase phase, const std::function<void(v1::SideReport&)>& change);
  v1::SideReport report() const;

 private:
  void Publish();  // needs mutex_
  // False if the report is there already, or further. Needs mutex_.
  bool SetPhase(v1::Phase phase);

  const ReportCallback callback_;
  mutable std::mutex mutex_;
  v1::SideReport report_;          // guarded by mutex_
  Clock::time_point last_tick_{};  // guarded by mutex_
};

// A sequence number for the first report of a process about a migration: above everything that a process
// before it may have said. Microseconds of real time.
uint64_t FirstSequence();

// The real time with all its digits (TimeUtil::GetCurrentTime() knows whole seconds only).
google::protobuf::Timestamp CurrentTime();

// Conversions between durations of the contract and of the code.
void SetDuration(google::protobuf::Duration* out, Duration value);
Duration ToDuration(const google::protobuf::Duration& value);
// `value` if set and positive, else `fallback`.
Duration DurationOr(bool has, const google::protobuf::Duration& value, Duration fallback);
// Appends {name, value}.
void AddPart(google::protobuf::RepeatedPtrField<v1::NamedDuration>* parts, const std::string& name,
             Duration value);

}  // namespace baton::migration
