// The destination's side of a migration with the agent engine: takes in memory and state, checks all of it,
// and then owns the guest or refuses it, for good and durably. Runs on threads of its own in the shim.
//
//   channels arrive → hello → (VMM begins to load) → rounds land → final barrier → VMM state → checks
//   → Yield heard → OWNER to disk → guest starts → Verdict OWNER, Resumed
//
// Anything that fails before OWNER: REFUSED to disk, Verdict REFUSED, VMM killed. It then only answers
// verdict queries.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "agent/memory/guest_ram.h"
#include "agent/migration/control_link.h"
#include "agent/migration/device_set.h"
#include "agent/migration/journal.h"
#include "agent/migration/reporter.h"
#include "agent/stream/preamble.h"
#include "agent/stream/tls.h"
#include "agent/vmm/driver.h"
#include "baton/v1/types.pb.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::migration {

struct DestinationOptions {
  std::string migration_id;
  std::string vm;
  // The source's epoch; this side will own the guest at epoch + 1.
  uint64_t epoch = 0;
  v1::MigrationParams params;
  stream::Token token{};
  // Null: plaintext.
  std::shared_ptr<const stream::TlsContext> tls;
  ControlLinkOptions link;
  std::string pause_dir;
  // The guest has network devices: announce it after the start.
  bool has_network = false;
  // How long to wait for the source's connection.
  Duration connect_timeout = std::chrono::minutes(10);
  // Bound of loading, checking and starting once everything arrived.
  Duration load_timeout = std::chrono::seconds(30);
  // Bound of an answer to a verdict query; past it the answer is IDLE and the source asks again.
  Duration query_timeout = std::chrono::seconds(20);
};

// All must outlive the engine. `ram` gets its layout from the source. Nobody else may use driver, devices and
// journal while it runs, except as their thread rules allow.
struct DestinationParts {
  vmm::VmmDriver& driver;
  memory::GuestRam& ram;
  DeviceSet& devices;
  RecordLog& journal;
  ReportCallback on_report;
};

class IncomingMigration {
 public:
  enum class Outcome {
    kNone,     // under way
    kOwner,    // this side owns the guest and started it
    kRefused,  // never will; the VMM was killed
    // Owns the guest but could not start it (the report says why).
    kPaused,
  };

  // Writes INCOMING to the journal (durable on return) and waits for the source. STATE_WRITE_FAILED.
  static absl::StatusOr<std::unique_ptr<IncomingMigration>> Start(DestinationOptions options,
                                                                  DestinationParts parts);
  // A restarted shim: finishes what the journal decided. OWNER → makes sure that the guest runs; undecided →
  // refuses (what had arrived died with the old shim); REFUSED → only answers.
  static absl::StatusOr<std::unique_ptr<IncomingMigration>> Recover(DestinationOptions options,
                                                                    DestinationParts parts);
  // Stops working, without deciding anything, and joins.
  ~IncomingMigration();
  IncomingMigration(const IncomingMigration&) = delete;
  IncomingMigration& operator=(const IncomingMigration&) = delete;

  // A connection from the peer port: `preamble` as the agent read it, `socket` right behind it. Never waits;
  // errors (wrong token, wrong migration, wrong channel) also close the socket.
  absl::Status AcceptChannel(const stream::PreambleBytes& preamble, UniqueFd socket);
  // Asks to undo; ends with REFUSED. FailedPrecondition once OWNER was begun.
  absl::Status Abort(const std::string& why);

  v1::SideReport report() const;
  Outcome outcome() const;
  absl::StatusOr<Outcome> Wait(Deadline deadline);

 private:
  class Impl;
  explicit IncomingMigration(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace baton::migration
