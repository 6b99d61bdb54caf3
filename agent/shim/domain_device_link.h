// What the mediators of a libvirt domain say to each other across hosts while libvirt moves it.
//
// QEMU stops its vhost-user devices after the guest and before it sends their state, and it waits for the
// answer to each stop. So what the source's mediators tell the destination's before they answer
// (MediatorCallbacks::on_stopped) is there before the destination's QEMU can start a device: how each queue
// stands, and what it has in flight and is to be submitted again there.
//
//   source                                           destination
//   PeerHello                        ──────────────→
//                                    ←──────────────  PeerWelcome (which devices take requests in flight),
//                                                     or Verdict: of another migration, epoch or version
//   QEMU stops a device:
//   DeviceStates (that one)          ──────────────→  ExpectState
//   its last ring is answered        ←──────────────  Verdict (NONE, or why it cannot be)
//
// Channel 0 of the migration. A state that hands something over and was not confirmed may have arrived: the
// source must not complete these requests itself and let the migration go on as well. It ends the migration
// then, by taking QEMU's connection away before QEMU is answered; the guest goes on at the source.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "agent/shim/domain_devices.h"
#include "agent/stream/dial.h"
#include "agent/stream/message_channel.h"
#include "baton/v1/peer.pb.h"
#include "baton/v1/types.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::shim {

// The source's end, of one migration. Thread-safe.
class DomainDeviceSender {
 public:
  struct Options {
    std::string migration_id, vm;
    uint64_t epoch = 0;
    v1::MigrationParams params;
    // Ends the migration: QEMU's stream is broken off when this returns. From a mediator's thread.
    std::function<void(v1::Reason reason, const std::string& message)> cut;
  };
  DomainDeviceSender(DomainDevices& devices, Options options);
  // Stops are ordinary ones again.
  ~DomainDeviceSender();
  DomainDeviceSender(const DomainDeviceSender&) = delete;
  DomainDeviceSender& operator=(const DomainDeviceSender&) = delete;

  // Asks the destination what it can be given, and arms the devices' stop. A destination that cannot be asked
  // leaves them armed to drain, and is an error; with reason STATE_MISMATCH if it was prepared for the domain
  // at another epoch.
  absl::Status Begin(const stream::DialOptions& dial, Deadline deadline);
  // How the devices have stopped.
  void FillProgress(v1::Progress* progress) const;

 private:
  absl::StatusOr<v1::PeerWelcome> Greet(const stream::DialOptions& dial, Deadline deadline);
  void OnStopped(const std::string& device, const absl::StatusOr<v1::DeviceState>& state);
  // OK: it is there, and the destination's back-end has taken it.
  absl::Status Tell(const v1::DeviceState& state, Deadline deadline);

  DomainDevices& devices_;
  const Options options_;
  const Duration drain_bound_;
  std::mutex mutex_;
  std::shared_ptr<stream::MessageChannel> channel_;  // guarded by mutex_
};

// The destination's end. Thread-safe.
class DomainDeviceReceiver {
 public:
  struct Options {
    std::string migration_id, run_dir;
    uint64_t epoch = 0;  // of the source
    // From the connection to the hello; a peer that says nothing is let go of after that.
    Duration greeting = std::chrono::seconds(10);
  };
  // `devices` may be null: the domain has no mediated ones.
  DomainDeviceReceiver(DomainDevices* devices, Options options);
  ~DomainDeviceReceiver();
  DomainDeviceReceiver(const DomainDeviceReceiver&) = delete;
  DomainDeviceReceiver& operator=(const DomainDeviceReceiver&) = delete;

  // Serves a connection until it ends or Stop(); on a thread of its own, one at a time: FailedPrecondition
  // while there is one that has said its hello; one that has not is ended instead. States are taken only
  // after a hello of this migration, epoch and version.
  absl::Status Accept(UniqueFd socket, std::shared_ptr<const stream::TlsContext> tls);
  void Stop();

 private:
  struct Session;
  void Serve(const std::shared_ptr<Session>& session, UniqueFd socket,
             const std::shared_ptr<const stream::TlsContext>& tls);
  absl::Status CheckHello(const v1::PeerMessage& message) const;
  absl::Status Welcome(stream::MessageChannel& channel);
  absl::Status TakeStates(stream::MessageChannel& channel, const v1::PeerMessage& message);
  absl::Status SendVerdict(stream::MessageChannel& channel, const absl::Status& status);

  DomainDevices* const devices_;
  const Options options_;
  std::mutex mutex_;
  std::shared_ptr<Session> session_;  // guarded by mutex_
};

}  // namespace baton::shim
