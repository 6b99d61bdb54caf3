// One VM on this host: its memory file, a mediator for each device, its VMM, its journal. Started fresh,
// started to wait for a migration, or taken over from a shim that died.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/migration/handover.h"
#include "agent/migration/journal.h"
#include "agent/shim/config_store.h"
#include "agent/vhost/balloon_backend.h"
#include "agent/vhost/mediator.h"
#include "agent/vmm/qmp/qmp_driver.h"
#include "baton/v1/fleet.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::shim {

// Thread rules: Describe, state, SetState and SetMigration from any thread. The other calls one at a time
// (the shim's one worker for its VM, or the migration that has the VM). What ram(), driver(), mediators() and
// journal() return stays until Dismantle.
class VirtualMachine {
 public:
  struct Callbacks {
    // Something in Describe() changed. Any thread; must not call back into this object.
    std::function<void()> on_change;
  };

  VirtualMachine(ConfigStore& config, Callbacks callbacks);
  // Leaves a VMM that runs as it is; takes the devices away from it until another shim serves them.
  ~VirtualMachine();
  VirtualMachine(const VirtualMachine&) = delete;
  VirtualMachine& operator=(const VirtualMachine&) = delete;

  // Opens the journal. To be called first, also before anything is known to work: it is also the lock that
  // keeps two shims from serving one VM.
  absl::Status OpenJournal();

  // Starts the VM: memory, back-ends, QEMU, OWNER in the journal, first instruction. On failure nothing is
  // left. The error's Reason says what kind of thing failed.
  absl::Status StartFresh(Deadline deadline);
  // The same up to a VMM that waits, with INCOMING in the journal.
  absl::Status StartIncoming(Deadline deadline);
  // Takes over the VMM named by the configuration. Does not run or stop it: see Ownership.
  absl::Status Adopt(Deadline deadline);

  // What the journal says now.
  absl::StatusOr<migration::Ownership> ReadOwnership() const;

  v1::Vm Describe() const;
  v1::Vm::State state() const;
  void SetState(v1::Vm::State state, const std::string& message = "");
  // The migration the VM is in, or empty.
  void SetMigration(const std::string& migration_id);
  void SetEpoch(uint64_t epoch);

  // The VMM ended: takes everything apart, sets STOPPED with how it ended. Memory stays mapped for whoever
  // uses it; its file is removed. Returns the description, and whether the guest wished for it.
  struct Ending {
    std::string text;
    bool wanted = false;
  };
  Ending OnVmmExit();
  // Kills the VMM, disconnects the back-ends, removes memory file and sockets. Idempotent.
  void Dismantle();

  bool has_vmm() const;
  vmm::QmpDriver& driver() { return *driver_; }
  memory::GuestRam& ram() { return *ram_; }
  migration::Journal& journal() { return *journal_; }
  const std::vector<std::unique_ptr<vhost::Mediator>>& mediators() const { return mediators_; }
  vhost::Mediator* FindMediator(const std::string& device) const;
  // Null unless the spec asks for free page hints.
  vhost::BalloonBackend* balloon() const { return balloon_.get(); }
  ConfigStore& config() { return config_; }

 private:
  absl::Status MakeMemory(bool existing);
  absl::Status StartMediators(bool required);
  // What all devices have in common; the rest is in `options`.
  absl::Status AddMediator(vhost::MediatorOptions options);
  absl::Status StartBalloon(bool required);
  absl::Status StartQemu(bool incoming, Deadline deadline);
  void OnMemoryTable(const std::vector<vhost::MemoryRegionInfo>& regions);
  void Changed();

  ConfigStore& config_;
  const Callbacks callbacks_;
  std::unique_ptr<migration::Journal> journal_;
  std::unique_ptr<memory::GuestRam> ram_;
  std::unique_ptr<vhost::BalloonBackend> balloon_;
  std::vector<std::unique_ptr<vhost::Mediator>> mediators_;
  std::unique_ptr<vmm::QmpDriver> driver_;

  mutable std::mutex mutex_;
  // Guards the lists above while they are filled or emptied, and:
  v1::Vm::State state_ = v1::Vm::STARTING;
  std::string message_;
  std::string migration_;
  uint64_t epoch_ = 0;
  int64_t start_time_ = 0;  // real time, seconds
};

}  // namespace baton::shim
