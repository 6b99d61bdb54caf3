// The source's side of a migration with the agent engine: rounds of pre-copy, the blackout, the handover, and
// after it either release or resume. Runs on a thread of its own in the shim.
//
//   connect, hello → dirty sources on → round 0 (populated pages) → rounds of dirty pages, judged by
//   convergence.h
//   → blackout: Freeze → device states → YIELDED to disk  ‖  VMM state  ‖  harvest, last pages
//             → Yield → verdict: OWNER → RELEASED, VMM killed;  REFUSED → refusal to disk, resume; connection
//             lost → ask until one of them is heard
//
// Every failure before YIELDED resumes the guest here and tells the destination to undo; after YIELDED only
// the rules of handover.h decide.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "agent/memory/guest_ram.h"
#include "agent/migration/control_link.h"
#include "agent/migration/device_set.h"
#include "agent/migration/hint_round.h"
#include "agent/migration/journal.h"
#include "agent/migration/reporter.h"
#include "agent/stream/dial.h"
#include "agent/stream/memory_sender.h"
#include "agent/vmm/driver.h"
#include "baton/v1/types.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::migration {

struct SourceOptions {
  std::string migration_id;
  std::string vm;
  // The epoch at which this side owns the guest.
  uint64_t epoch = 0;
  v1::MigrationParams params;
  // Address, token, TLS. migration_id and data_channels are filled in by the engine.
  stream::DialOptions dial;
  stream::SenderOptions sender;
  ControlLinkOptions link;
  // Directory for pause points (common/pause_point.h).
  std::string pause_dir;
  // The guest has network devices: announcements matter.
  bool has_network = false;
  HintOptions hints;
  Duration connect_timeout = std::chrono::seconds(10);
  // Bound of the blackout before Yield was sent; at the bound the guest resumes here.
  Duration switchover_timeout = std::chrono::seconds(30);
  // How long to wait for the verdict on the live connection before asking on another one.
  Duration verdict_timeout = std::chrono::seconds(30);
  // Between questions after the connection was lost: from the first to the second, doubling.
  Duration ask_backoff = std::chrono::milliseconds(100);
  Duration ask_backoff_max = std::chrono::seconds(5);
};

// All must outlive the engine. Nobody else may use driver, devices and journal while it runs, except as their
// thread rules allow.
struct SourceParts {
  vmm::VmmDriver& driver;
  const memory::GuestRam& ram;
  DeviceSet& devices;
  RecordLog& journal;
  // The tracker of the VMM's own writes; called once, at the start of pre-copy.
  std::function<absl::StatusOr<std::unique_ptr<memory::DirtySource>>()> make_vmm_dirty_source;
  ReportCallback on_report;
};

class OutgoingMigration {
 public:
  enum class Outcome {
    kNone,      // under way
    kReleased,  // the destination owns the guest; the VMM here was killed
    kResumed,   // the guest goes on at this side
    kLost,      // the VMM died before the handover
    // The guest stands still here and Baton could not resume it (the report says why).
    kPaused,
  };

  // Starts the migration. The journal must say that this side owns the guest at options.epoch.
  static std::unique_ptr<OutgoingMigration> Start(SourceOptions options, SourceParts parts);
  // A restarted shim whose journal ends with a word of this migration: YIELDED → goes on asking; REFUSED →
  // resumes; RELEASED → releases. FailedPrecondition if the journal says nothing of it, DataLoss if it is
  // impossible.
  static absl::StatusOr<std::unique_ptr<OutgoingMigration>> ResumeAsking(SourceOptions options,
                                                                         SourceParts parts);
  // Stops working wherever it is, without deciding anything (the journal keeps what was decided), and joins.
  ~OutgoingMigration();
  OutgoingMigration(const OutgoingMigration&) = delete;
  OutgoingMigration& operator=(const OutgoingMigration&) = delete;

  // Asks to give up; the guest goes on here. FailedPrecondition once YIELDED was begun: then only the
  // destination can say. Any thread, like all below.
  absl::Status Cancel();
  absl::Status Retune(std::optional<uint64_t> bandwidth, std::optional<Duration> max_downtime);
  // batond's answer to a side that yielded and cannot reach its peer: OWNER or REFUSED as the destination's
  // journal has it, or `fenced`. FailedPrecondition if this side is not waiting for a verdict.
  absl::Status Resolve(v1::HandoverState verdict, bool fenced);

  v1::SideReport report() const;
  Outcome outcome() const;
  // Waits for the end; DeadlineExceeded.
  absl::StatusOr<Outcome> Wait(Deadline deadline);

 private:
  class Impl;
  explicit OutgoingMigration(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace baton::migration
