// The lab guest in this process, behind the interface that VMM drivers implement: what a test of a whole
// migration needs without a process, a monitor and a second of its own.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "agent/vmm/driver.h"
#include "tests/lab/vm/guest.h"

namespace baton::lab {

// Thread rules as in VmmDriver.
class LabGuestDriver final : public vmm::VmmDriver {
 public:
  static absl::StatusOr<std::unique_ptr<LabGuestDriver>> Launch(GuestConfig config, GuestCallbacks callbacks,
                                                                Deadline deadline);
  ~LabGuestDriver() override;

  // For what the interface has no word for: figures, verification.
  LabGuest& guest() { return *guest_; }

  // This process.
  pid_t pid() const override;
  int exit_fd() const override { return exit_.get(); }
  std::string version() const override { return "lab guest"; }
  absl::StatusOr<bool> IsRunning(Deadline deadline) override;
  absl::StatusOr<UniqueFd> Freeze(Deadline deadline) override;
  int64_t frozen_at_ns() const override { return guest_ ? guest_->paused_at_ns() : 0; }
  absl::Status ContinueState(Deadline deadline) override;
  absl::Status Resume(Deadline deadline) override;
  absl::StatusOr<UniqueFd> BeginLoad(Deadline deadline) override;
  absl::Status FinishLoad(Deadline deadline) override;
  absl::Status Start(Deadline deadline) override;
  absl::Status Announce(Deadline deadline) override;
  absl::Status PowerDown(Deadline deadline) override;
  // Takes the guest away as the end of a process would: its connections close.
  void Kill() override;

 private:
  explicit LabGuestDriver(std::unique_ptr<LabGuest> guest);
  absl::Status Gone() const { return absl::UnavailableError("the lab guest was killed"); }

  std::unique_ptr<LabGuest> guest_;  // null: killed
  UniqueFd exit_;                    // eventfd
  UniqueFd out_, in_;                // our ends of the state's sockets
  std::thread mover_;                // writes or reads the state
  absl::StatusOr<std::string> loaded_ = absl::UnavailableError("no state came");
};

}  // namespace baton::lab
