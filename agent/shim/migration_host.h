// The migrations of one VM in its shim: at most one out of this host, and the one that brought it here. Gives
// the engines (agent/migration) the real memory, devices, VMM and journal, and follows what becomes of them.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "agent/migration/destination.h"
#include "agent/migration/device_set.h"
#include "agent/migration/source.h"
#include "agent/shim/virtual_machine.h"
#include "baton/v1/shim.pb.h"
#include "common/status.h"

namespace baton::shim {

// All methods by one thread (the loop's), except where noted. Callbacks come from other threads and must not
// call back.
class MigrationHost {
 public:
  enum class End {
    kReleased,  // the destination owns the guest; the VMM here was killed
    kRunning,   // the guest runs here
    kPaused,    // this side owns the guest, but it stands still; the report says why
    kRefused,   // incoming: this side will never own the guest; the VMM was killed
    kLost,      // the VMM died
  };
  struct Callbacks {
    std::function<void(const v1::SideReport&)> on_report;
    // A migration ended; to be followed by OnEnd() on the loop's thread.
    std::function<void(const std::string& migration_id)> on_end;
  };

  MigrationHost(VirtualMachine& vm, Callbacks callbacks);
  // Stops engines without deciding anything; the journal keeps what was decided.
  ~MigrationHost();
  MigrationHost(const MigrationHost&) = delete;
  MigrationHost& operator=(const MigrationHost&) = delete;

  // --- source ---
  // Idempotent by migration id. Makes the command durable, then starts. Waits for the disk, not for the peer.
  absl::Status StartOutgoing(const v1::StartOutgoingCommand& command);
  // The shim that had this migration died; the journal ends with a word of it. FailedPrecondition if it does
  // not.
  absl::Status ResumeOutgoing();
  absl::Status Cancel(const std::string& migration_id);
  absl::Status Retune(const v1::RetuneCommand& command);
  absl::Status Resolve(const v1::ResolveCommand& command);

  // --- destination ---
  // Of the configuration. `recover`: after a shim died; finishes what the journal decided.
  absl::Status StartIncoming(bool recover);
  absl::Status AcceptChannel(const v1::AcceptChannelRequest& request, UniqueFd socket);
  // Asks to undo; the end comes by on_end. FailedPrecondition once this side owns the guest.
  absl::Status AbortIncoming(const std::string& migration_id);

  // The VMM ended. True if a migration is under way, which then ends by itself and deals with it.
  bool OnVmmExit(const std::string& how);

  // What became of the migration that on_end named: joins its engine where nothing more is to be answered.
  // nullopt if it was dealt with before.
  struct Ended {
    v1::Role role = v1::ROLE_UNSPECIFIED;
    End end = End::kRunning;
    v1::SideReport report;
  };
  std::optional<Ended> OnEnd(const std::string& migration_id);

  // A migration of a shim before this one of which nothing is in the journal: it had not yet frozen or given
  // away the guest. Reports it as failed.
  void ReportInterrupted(const v1::StartOutgoingCommand& command);

  // The id of the migration under way, or empty.
  std::string active() const;
  // An engine that answers verdict queries counts as idle.
  bool busy() const { return !active().empty(); }

  // Reports that were not acknowledged, oldest first. Any thread.
  std::vector<v1::SideReport> Reports() const;
  // Forgets a final report.
  void Acknowledge(const v1::ReportAck& ack);

 private:
  struct Outgoing {
    std::string id;
    std::unique_ptr<migration::OutgoingMigration> engine;
    std::thread waiter;
  };
  struct Incoming {
    std::string id;
    std::unique_ptr<migration::IncomingMigration> engine;
    std::thread waiter;
    bool ended = false;
  };
  absl::StatusOr<migration::SourceOptions> MakeSourceOptions(const v1::StartOutgoingCommand& command) const;
  migration::SourceParts MakeSourceParts();
  void MakeDevices();
  void Follow(std::unique_ptr<migration::OutgoingMigration> engine, const std::string& id);
  void TakeReport(const v1::SideReport& report);

  VirtualMachine& vm_;
  const Callbacks callbacks_;
  std::unique_ptr<migration::DeviceSet> devices_;
  std::optional<Outgoing> outgoing_;
  std::optional<Incoming> incoming_;
  mutable std::mutex mutex_;
  // By migration and role; the newest of each, until a final one is acknowledged.
  std::map<std::pair<std::string, v1::Role>, v1::SideReport> reports_;  // guarded by mutex_
};

}  // namespace baton::shim
