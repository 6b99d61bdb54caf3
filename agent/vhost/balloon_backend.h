// Baton's own virtio-balloon device, served by the shim as a vhost-user back-end: free page hints for a
// migration that starts here, and free page reporting otherwise (what the guest reports becomes a hole in its
// memory file, which migrations skip as well).
//
// Everything the guest asks is done at once, so the rings are always drained and nothing is in flight at a
// stop. Statistics are not offered: nobody here reads them, and their buffer would stay in flight.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "agent/memory/guest_ram.h"
#include "agent/memory/hint_source.h"
#include "baton/v1/peer.pb.h"
#include "common/status.h"

namespace baton::vhost {

struct BalloonBackendOptions {
  std::string name = "balloon";
  // Where the mediator connects.
  std::string listen_path;
  // Guest memory, whose layout follows what the VMM hands over. Must outlive the back-end.
  const memory::GuestRam* ram = nullptr;
  // What a process before this one left, or a default value.
  v1::BalloonState state;
  // The state changed, before the driver can act on it: for the next process. On the back-end's thread or
  // that of the caller of Publish; must not call this object.
  std::function<void(const v1::BalloonState&)> on_state;
};

struct BalloonCounts {
  uint64_t reported = 0;   // bytes, by free page reporting or inflation
  uint64_t discarded = 0;  // of these, given back to the host
  uint64_t hinted = 0;     // bytes, in the current or last session
  uint64_t sessions = 0;
};

class BalloonBackend final : public memory::HintSource {
 public:
  // Queues of the device with all that it offers, their size, and its configuration space.
  static constexpr uint32_t kQueues = 4;
  static constexpr uint32_t kQueueSize = 128;

  // Listens. InvalidArgument: a state that no balloon can have.
  static absl::StatusOr<std::unique_ptr<BalloonBackend>> Start(BalloonBackendOptions options);
  ~BalloonBackend() override;
  BalloonBackend(const BalloonBackend&) = delete;
  BalloonBackend& operator=(const BalloonBackend&) = delete;

  const std::string& name() const;
  // Any thread, like all below.
  uint32_t poison() const override;
  absl::Status Publish(memory::HintListener& listener) override;
  void PublishStop() override;
  void Finish() override;
  void AllowDiscard(bool allow) override;

  // What moves to another host beside the rings, and its counterpart there, before the VMM starts the device.
  v1::BalloonState state() const;
  absl::Status Restore(const v1::BalloonState& state);
  BalloonCounts counts() const;

 private:
  class Impl;
  explicit BalloonBackend(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace baton::vhost
