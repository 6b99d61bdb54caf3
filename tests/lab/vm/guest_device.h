// A device of the lab guest: its vhost-user front-end, the driver's rings, and what the driver does with
// them.
#pragma once

#include <climits>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/status.h"
#include "tests/lab/vm/block_workload.h"
#include "tests/lab/vm/frontend.h"
#include "tests/lab/vm/net_workload.h"
#include "tests/lab/vm/ram.h"
#include "tests/lab/vm/virtqueue.h"

namespace baton::lab {

// What devices tell the guest.
struct DeviceCallbacks {
  std::function<void(const std::string&)> on_error;
  // A request was completed.
  std::function<void(int64_t now_us)> on_progress;
};

// All of it on the guest's thread.
class GuestDevice : public QueuePort {
 public:
  ~GuestDevice() override = default;

  const std::string& name() const { return frontend_.options().name; }
  DeviceFrontend& frontend() { return frontend_; }
  const DeviceFrontend& frontend() const { return frontend_; }
  uint32_t rings() const { return static_cast<uint32_t>(places_.size()); }

  // --- the VMM's part ---
  // The first connection: features are agreed on, and the rings' places chosen in `layout`.
  absl::Status Realize(RamLayout& layout, Deadline deadline);
  // Starts the rings where they stopped. Without a connection, or if it ends here: when it comes back (see
  // Maintain).
  void Start(Deadline deadline);
  void Stop(Deadline deadline);
  // While the guest runs or not: reconnects when it is time. Returns when to be called again, in
  // microseconds.
  int64_t Maintain(int64_t now_us, bool running);
  // The peer said something or went away.
  void Attend(int64_t now_us);
  // Interrupts that arrived and were not taken yet. For the state: they move with the guest.
  nlohmann::json Save();
  absl::Status Load(const nlohmann::json& state);

  // --- the driver's part ---
  // A new guest.
  absl::Status Boot(uint64_t run);
  // The call descriptor of `ring` is readable.
  void Interrupt(uint32_t ring, int64_t now_us);
  void TakePending(int64_t now_us);
  virtual void Issue(int64_t now_us) = 0;
  virtual int64_t NextDue() const = 0;
  virtual void Resumed(int64_t now_us) = 0;
  virtual void BeginVerify() = 0;
  virtual bool Verified() const = 0;
  virtual void GoOn() = 0;
  virtual void FindLost(int64_t now_us, int64_t limit_us) = 0;
  virtual uint64_t Digest() const = 0;
  virtual uint32_t outstanding() const = 0;
  virtual absl::Status Check() const = 0;

  bool Submit(uint32_t queue, uint32_t tag, std::span<const Piece> pieces) override;
  void Kick(uint32_t queue) override;

 protected:
  GuestDevice(const DeviceOptions& options, const WorkloadOptions& workload, const Ram& ram, uint32_t rings,
              DeviceCallbacks callbacks);
  // Features that the driver wants of `offered`, beside those of the ring.
  virtual uint64_t Wanted(uint64_t offered) const = 0;
  virtual absl::Status PlaceWorkload(RamLayout& layout) = 0;
  virtual void BootWorkload(uint64_t run) = 0;
  virtual void Completed(uint32_t ring, uint32_t tag, uint32_t written, int64_t now_us) = 0;

  const WorkloadOptions workload_;
  const Ram& ram_;
  const DeviceCallbacks callbacks_;
  uint64_t features_ = 0;

 private:
  bool packed() const;
  void MakeRings();
  // Where a ring goes on whose peer did not tell: what QEMU does.
  uint32_t FallbackBase(uint32_t ring) const;

  DeviceFrontend frontend_;
  std::vector<RingPlace> places_;
  std::vector<uint64_t> indirect_;  // of each ring, its tables
  std::vector<std::unique_ptr<Virtqueue>> queues_;
  std::vector<bool> pending_;  // interrupts not taken
  bool wanted_ = false;        // the guest has the device running
  bool bases_known_ = false;   // places_ say where the rings go on: they have not run since
  int64_t retry_us_ = INT64_MAX;
};

// A disk with a BlockWorkload.
class GuestDisk final : public GuestDevice {
 public:
  GuestDisk(const DeviceOptions& options, const WorkloadOptions& workload, const Ram& ram, uint32_t number,
            DeviceCallbacks callbacks);
  BlockWorkload& workload() { return *work_; }
  const BlockWorkload& workload() const { return *work_; }

  void Issue(int64_t now_us) override { work_->Issue(now_us); }
  int64_t NextDue() const override { return work_->NextDue(); }
  void Resumed(int64_t now_us) override { work_->Resumed(now_us); }
  void BeginVerify() override { work_->BeginVerify(); }
  bool Verified() const override { return work_->Verified(); }
  void GoOn() override { work_->GoOn(); }
  void FindLost(int64_t now_us, int64_t limit_us) override { work_->FindLost(now_us, limit_us); }
  uint64_t Digest() const override { return work_->Digest(); }
  uint32_t outstanding() const override { return work_->outstanding(); }
  absl::Status Check() const override { return work_->Check(); }

 private:
  uint64_t Wanted(uint64_t offered) const override;
  absl::Status PlaceWorkload(RamLayout& layout) override;
  void BootWorkload(uint64_t run) override { work_->Boot(run); }
  void Completed(uint32_t ring, uint32_t tag, uint32_t written, int64_t now_us) override;

  const uint32_t number_;
  std::unique_ptr<BlockWorkload> work_;
};

// A NIC with a NetWorkload.
class GuestNic final : public GuestDevice {
 public:
  // InvalidArgument: the MAC address.
  static absl::StatusOr<std::unique_ptr<GuestNic>> Create(const DeviceOptions& options,
                                                          const WorkloadOptions& workload, const Ram& ram,
                                                          uint32_t number, DeviceCallbacks callbacks);
  const NetWorkload& workload() const { return *work_; }

  void Issue(int64_t now_us) override { work_->Issue(now_us); }
  int64_t NextDue() const override { return work_->NextDue(); }
  void Resumed(int64_t now_us) override { work_->Resumed(now_us); }
  void BeginVerify() override { work_->Silence(true); }
  bool Verified() const override { return work_->Quiet(); }
  void GoOn() override { work_->Silence(false); }
  void FindLost(int64_t now_us, int64_t limit_us) override { work_->FindLost(now_us, limit_us); }
  uint64_t Digest() const override { return work_->Digest(); }
  uint32_t outstanding() const override { return work_->outstanding(); }
  absl::Status Check() const override { return work_->Check(); }

 private:
  GuestNic(const DeviceOptions& options, const WorkloadOptions& workload, const Ram& ram,
           NetWorkload::Setup setup, DeviceCallbacks callbacks);
  uint64_t Wanted(uint64_t offered) const override;
  absl::Status PlaceWorkload(RamLayout& layout) override;
  void BootWorkload(uint64_t run) override { work_->Boot(run); }
  void Completed(uint32_t ring, uint32_t tag, uint32_t written, int64_t now_us) override {
    work_->Complete(ring, tag, written, now_us);
  }

  NetWorkload::Setup setup_;
  std::unique_ptr<NetWorkload> work_;
};

}  // namespace baton::lab
