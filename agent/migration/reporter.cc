#include "agent/migration/reporter.h"

#include <google/protobuf/util/time_util.h>

#include <ctime>

namespace baton::migration {
namespace {
constexpr Duration kTickInterval = std::chrono::milliseconds(200);
}

using google::protobuf::util::TimeUtil;

Reporter::Reporter(const std::string& migration_id, const std::string& vm, v1::Role role, uint64_t epoch,
                   ReportCallback callback)
    : callback_(std::move(callback)) {
  report_.set_migration_id(migration_id);
  report_.set_vm(vm);
  report_.set_role(role);
  report_.set_epoch(epoch);
  report_.set_handover(v1::IDLE);
  report_.set_sequence(FirstSequence());
}

void Reporter::Publish() {
  report_.set_sequence(report_.sequence() + 1);
  if (callback_) callback_(report_);
}

void Reporter::Update(const std::function<void(v1::SideReport&)>& change) {
  std::lock_guard lock(mutex_);
  change(report_);
  Publish();
}

void Reporter::Tick(const std::function<void(v1::Progress&)>& change) {
  std::lock_guard lock(mutex_);
  change(*report_.mutable_progress());
  const Clock::time_point now = Clock::now();
  if (now - last_tick_ < kTickInterval) return;
  last_tick_ = now;
  Publish();
}

bool Reporter::SetPhase(v1::Phase phase) {
  if (report_.phase() >= phase) return false;
  report_.set_phase(phase);
  v1::PhaseTime* entry = report_.add_phase_times();
  entry->set_phase(phase);
  *entry->mutable_time() = CurrentTime();
  return true;
}

void Reporter::EnterPhase(v1::Phase phase) {
  std::lock_guard lock(mutex_);
  if (SetPhase(phase)) Publish();
}

void Reporter::EnterPhase(v1::Phase phase, const std::function<void(v1::SideReport&)>& change) {
  std::lock_guard lock(mutex_);
  (void)SetPhase(phase);
  change(report_);
  Publish();
}

v1::SideReport Reporter::report() const {
  std::lock_guard lock(mutex_);
  return report_;
}

uint64_t FirstSequence() { return static_cast<uint64_t>(TimeUtil::TimestampToMicroseconds(CurrentTime())); }

google::protobuf::Timestamp CurrentTime() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  google::protobuf::Timestamp out;
  out.set_seconds(now.tv_sec);
  out.set_nanos(static_cast<int32_t>(now.tv_nsec));
  return out;
}

void SetDuration(google::protobuf::Duration* out, Duration value) {
  *out = TimeUtil::NanosecondsToDuration(value.count());
}

Duration ToDuration(const google::protobuf::Duration& value) {
  return Duration(TimeUtil::DurationToNanoseconds(value));
}

Duration DurationOr(bool has, const google::protobuf::Duration& value, Duration fallback) {
  const Duration out = has ? ToDuration(value) : Duration(0);
  return out.count() > 0 ? out : fallback;
}

void AddPart(google::protobuf::RepeatedPtrField<v1::NamedDuration>* parts, const std::string& name,
             Duration value) {
  v1::NamedDuration* part = parts->Add();
  part->set_name(name);
  SetDuration(part->mutable_duration(), value);
}

}  // namespace baton::migration
