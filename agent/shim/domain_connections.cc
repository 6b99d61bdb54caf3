// DomainOutgoing: what it is connected to. The tunnel and the destination's libvirt behind it, the call's own
// connection to this host's, and the link of the devices.
#include <chrono>

#include "agent/shim/domain_outgoing.h"
#include "agent/stream/preamble.h"
#include "common/durable_file.h"
#include "common/log.h"

namespace baton::shim {
namespace {

// For connections that are just ending to do so in good order.
constexpr Duration kDrainTimeout = std::chrono::seconds(2);

}  // namespace

absl::Status DomainOutgoing::OpenTunnel() {
  const v1::ShimConfig config = p_.config.Get();
  const v1::DomainHost& host = config.domain_host();
  const std::string& dir = command_.domain().tunnel_dir();
  remote_.reset();
  SetEntrance(nullptr);
  dial_.address = command_.peer_address();
  dial_.migration_id = command_.migration_id();
  ASSIGN_OR_RETURN(dial_.token, stream::MakeToken(command_.token()));
  ASSIGN_OR_RETURN(dial_.tls, LoadPeerTls(config, command_.params().tls()));
  RETURN_IF_ERROR(MakeTunnelDirectory(dir, host));
  stream::TunnelEntranceOptions options;
  for (stream::TunnelService service : stream::kTunnelServices) {
    stream::TunnelListen listen;
    listen.service = service;
    listen.path = dir + "/" + stream::NameOf(service);
    listen.uid = host.qemu_uid();
    listen.gid = host.qemu_gid();
    options.listen.push_back(std::move(listen));
  }
  options.dial = dial_;
  options.callbacks.on_broken = [this](stream::TunnelService service, const absl::Status& why) {
    LOG_WARN("migration {}: the {} connection: {}", id(), stream::NameOf(service), Message(why));
    std::lock_guard lock(mutex_);
    broken_ = fmt::format("{}: {}", stream::NameOf(service), Message(why));
  };
  auto entrance = stream::TunnelEntrance::Start(std::move(options));
  if (!entrance.ok()) return Annotate(entrance.status(), "tunnel");
  SetEntrance(*std::move(entrance));
  vmm::LibvirtOptions remote;
  remote.uri = vmm::TunnelUri(command_.domain());
  remote.events = vmm::LibvirtOptions::Events::kLifecycle;
  vmm::LibvirtCallbacks callbacks;
  auto was_up = std::make_shared<bool>(false);
  callbacks.on_state = [mail = mail_, watched = watched_, was_up](bool up, const std::string&) {
    if (!up && *was_up) watched->store(false);
    *was_up |= up;
    mail->Wake();
  };
  callbacks.on_event = [mail = mail_, uuid = uuid_](const vmm::DomainEvent& event) {
    if (event.uuid == uuid && event.kind == vmm::DomainEvent::Kind::kLifecycle) mail->Wake();
  };
  remote_ = vmm::LibvirtConnection::Start(std::move(remote), std::move(callbacks));
  return absl::OkStatus();
}

void DomainOutgoing::CloseTunnel() {
  remote_.reset();
  const bool had = entrance_ != nullptr;
  // A connection that is cut makes the destination wait for another one.
  if (had && !mail_->stopped()) entrance_->Drain(Deadline::After(kDrainTimeout));
  if (had) entrance_->Stop();
  SetEntrance(nullptr);
  if (!had) return;
  if (absl::Status removed = RemoveTree(command_.domain().tunnel_dir()); !removed.ok())
    LOG_WARN("migration {}: {}", id(), Message(removed));
}

void DomainOutgoing::SetEntrance(std::shared_ptr<stream::TunnelEntrance> entrance) {
  std::lock_guard lock(mutex_);
  entrance_.swap(entrance);
}

void DomainOutgoing::CutVmm(v1::Reason reason, const std::string& message) {
  std::shared_ptr<stream::TunnelEntrance> entrance;
  {
    std::lock_guard lock(mutex_);
    if (!end_) end_ = Wish{reason, message};
    cut_ = true;
    entrance = entrance_;
  }
  LOG_WARN("migration {}: {}; its connections are cut", id(), message);
  if (entrance) entrance->Stop();
  mail_->Wake();
}

void DomainOutgoing::ArmDevices(Deadline deadline) {
  if (p_.devices == nullptr) return;
  DomainDeviceSender::Options options;
  options.migration_id = id();
  options.vm = command_.vm();
  options.epoch = command_.epoch();
  options.params = command_.params();
  options.cut = [this](v1::Reason reason, const std::string& message) { CutVmm(reason, message); };
  device_link_ = std::make_unique<DomainDeviceSender>(*p_.devices, std::move(options));
  absl::Status begun = device_link_->Begin(dial_, deadline);
  if (begun.ok()) return;
  LOG_WARN("migration {}: {}", id(), Message(begun));
  // One of the two is not of this move of the domain.
  if (ReasonOf(begun) == v1::STATE_MISMATCH) EndEarly(v1::STATE_MISMATCH, Message(begun));
}

void DomainOutgoing::ReleaseDevices() {
  if (!device_link_) return;
  reporter_.Update([&](v1::SideReport& r) { device_link_->FillProgress(r.mutable_progress()); });
  device_link_.reset();
}

absl::Status DomainOutgoing::AwaitConnection(const vmm::LibvirtConnection& connection, Deadline deadline) {
  while (!connection.connected()) {
    if (mail_->stopped()) return absl::CancelledError("stopped");
    {
      std::lock_guard lock(mutex_);
      if (end_ && !yielded_) return Error(end_->reason, absl::StatusCode::kAborted, "{}", end_->message);
    }
    if (deadline.Expired()) return absl::UnavailableError(connection.trouble());
    (void)mail_->Wait(deadline);
  }
  return absl::OkStatus();
}

absl::Status DomainOutgoing::AwaitLocal(Deadline deadline) {
  absl::Status there = AwaitConnection(p_.local, deadline);
  return absl::IsUnavailable(there) ? WithReason(there, v1::SOURCE_VMM_FAILED) : there;
}

absl::Status DomainOutgoing::AwaitRemote(Deadline deadline) {
  absl::Status there = AwaitConnection(*remote_, deadline);
  if (!absl::IsUnavailable(there)) return there;
  std::lock_guard lock(mutex_);
  return Error(v1::PEER_CONNECTION_FAILED, absl::StatusCode::kUnavailable,
               "the destination's libvirt cannot be reached through {}: {}{}", command_.peer_address(),
               Message(there), broken_.empty() ? "" : " (" + broken_ + ")");
}

void DomainOutgoing::OpenCaller() {
  if (caller_) return;
  vmm::LibvirtOptions options;
  options.uri = p_.local.uri();
  options.events = vmm::LibvirtOptions::Events::kNone;
  vmm::LibvirtCallbacks callbacks;
  callbacks.on_state = [mail = mail_](bool, const std::string&) { mail->Wake(); };
  caller_ = vmm::LibvirtConnection::Start(std::move(options), std::move(callbacks));
}

}  // namespace baton::shim
