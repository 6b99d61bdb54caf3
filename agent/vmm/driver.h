// One VMM process and how a migration handles it. Implementations: qmp/ (QEMU that Baton starts), later
// libvirt/ and the lab guest.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::vmm {

// What makes a VMM unfit for a migration, in the words of a finding (BLOCKER).
struct Obstacle {
  std::string code, subject, message, remedy;
};

// Thread rules: one caller at a time, except pid(), exit_fd() and Kill(), which any thread may call. No call
// waits past its deadline. A VMM that died makes every call fail with Unavailable and a message that names
// the exit.
class VmmDriver {
 public:
  virtual ~VmmDriver() = default;

  virtual pid_t pid() const = 0;
  // A pidfd: readable once the process has ended.
  virtual int exit_fd() const = 0;
  // "QEMU emulator version 7.2.22".
  virtual std::string version() const = 0;
  virtual absl::StatusOr<bool> IsRunning(Deadline deadline) = 0;

  // --- source ---
  // Asked before a migration starts: what the VMM itself says against it, and what it does with guest memory
  // that no dirty source sees.
  virtual absl::StatusOr<std::vector<Obstacle>> Obstacles(Deadline) { return std::vector<Obstacle>(); }
  // Freezes the guest for the migration: vCPUs stop, the VMM stops its vhost-user devices (requests that
  // arrive at the mediators meanwhile), and the VMM is ready to give its state. Returns a descriptor from
  // which the state can be read. Bytes that are readable before ContinueState() belong to VmmState stage
  // SETUP.
  virtual absl::StatusOr<UniqueFd> Freeze(Deadline deadline) = 0;
  // CLOCK_MONOTONIC, nanoseconds, when the vCPUs stopped in the last Freeze(), as exactly as the VMM tells; 0
  // if it does not.
  virtual int64_t frozen_at_ns() const { return 0; }
  // The VMM writes the rest of its state to the descriptor and closes it (EOF).
  virtual absl::Status ContinueState(Deadline deadline) = 0;
  // After the end of the state: whether the VMM holds it for whole, too, and keeps the guest stopped. A VMM
  // that gave up closes its end as well, and QEMU then runs the guest on by itself
  // (migration_iteration_finish): such a state must not be loaded anywhere, however complete it looks.
  virtual absl::Status ConfirmState(Deadline) { return absl::OkStatus(); }
  // The guest runs again at this side: after Freeze failed half-way, or after the state was given, whatever
  // was done so far is undone. Idempotent.
  virtual absl::Status Resume(Deadline deadline) = 0;

  // --- destination ---
  // The VMM (started waiting) begins to load; the caller writes the state to the descriptor, then closes it.
  virtual absl::StatusOr<UniqueFd> BeginLoad(Deadline deadline) = 0;
  // Everything was loaded and the guest is ready to run, stopped.
  virtual absl::Status FinishLoad(Deadline deadline) = 0;
  // First guest instruction. Only after the journal holds OWNER.
  virtual absl::Status Start(Deadline deadline) = 0;

  // --- both ---
  // Guest-visible announcement after a move (NICs), where the VMM can.
  virtual absl::Status Announce(Deadline deadline) = 0;
  // Asks the guest to power off; the caller then waits on exit_fd().
  virtual absl::Status PowerDown(Deadline deadline) = 0;
  // Ends the process now. Never fails: SIGKILL, then reaps or waits for the pidfd.
  virtual void Kill() = 0;
};

}  // namespace baton::vmm
