// The balloon of a lab guest: a driver that answers requests for free page hints as Linux does, with the
// memory that the guest has freed (lab.freed), in blocks of 4 MiB.
#pragma once

#include <cstdint>
#include <functional>

#include "tests/lab/vm/guest_device.h"

namespace baton::lab {

// On the guest's thread, like every device. What the driver remembers lies in guest memory and moves.
class GuestBalloon final : public GuestDevice {
 public:
  GuestBalloon(const DeviceOptions& options, const WorkloadOptions& workload, const Ram& ram,
               DeviceCallbacks callbacks);
  // The memory that is free: where, and how much of it at the moment. Before the guest runs.
  void SetFreed(uint64_t gpa, std::function<uint64_t()> bytes);
  // Blocks named so far, in all sessions.
  uint64_t blocks_named() const;

  void Issue(int64_t now_us) override;
  int64_t NextDue() const override { return INT64_MAX; }
  void Resumed(int64_t now_us) override;
  void BeginVerify() override {}
  bool Verified() const override { return true; }
  void GoOn() override {}
  void FindLost(int64_t, int64_t) override {}
  uint64_t Digest() const override;
  uint32_t outstanding() const override { return 0; }
  absl::Status Check() const override { return absl::OkStatus(); }

 private:
  enum class Stage : uint32_t { kIdle, kEcho, kBlocks, kStop };
  struct State;
  State& state() const { return *ram_.At<State>(gpa_); }
  uint64_t Wanted(uint64_t offered) const override;
  absl::Status PlaceWorkload(RamLayout& layout) override;
  void BootWorkload(uint64_t run) override;
  void Completed(uint32_t ring, uint32_t tag, uint32_t written, int64_t now_us) override;
  bool Say(uint32_t word);
  void Pump();

  uint64_t gpa_ = 0;
  uint64_t freed_gpa_ = 0;
  std::function<uint64_t()> freed_bytes_;
  bool look_ = true;  // at the configuration space
};

}  // namespace baton::lab
