// DomainOutgoing: what it is connected to. The tunnel and the destination's libvirt behind it, and the link
// of the devices.
#include <libvirt/libvirt.h>

#include <chrono>

#include "agent/shim/domain_outgoing.h"
#include "agent/stream/preamble.h"
#include "common/durable_file.h"
#include "common/log.h"

namespace baton::shim {
namespace {

// For connections that are just ending to do so in good order.
constexpr Duration kDrainTimeout = std::chrono::seconds(2);
// After libvirt's call began, if nothing is heard of it until then.
constexpr Duration kRemoteIn = std::chrono::milliseconds(900);
// For this host's libvirt to say how the domain is.
constexpr Duration kLookHere = std::chrono::seconds(2);

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
  return absl::OkStatus();
}

void DomainOutgoing::OpenRemote() {
  vmm::LibvirtOptions remote;
  remote.uri = vmm::TunnelUri(command_.domain());
  remote.events = vmm::LibvirtOptions::Events::kLifecycle;
  vmm::LibvirtCallbacks callbacks;
  callbacks.on_state = [mail = mail_, losses = losses_](bool up, const std::string&) {
    if (!up) ++*losses;
    mail->Wake();
  };
  callbacks.on_event = [mail = mail_, uuid = uuid_](const vmm::DomainEvent& event) {
    if (event.uuid == uuid && event.kind == vmm::DomainEvent::Kind::kLifecycle) mail->Wake();
  };
  remote_ = vmm::LibvirtConnection::Start(std::move(remote), std::move(callbacks));
}

void DomainOutgoing::WatchRemote() {
  if (watched_since_ || suspended_) return;
  // QEMU is at its first pass, or libvirt takes long over what comes before.
  const bool begun = iteration_begun_ > 0 || iteration_ > 0 || Clock::now() - call_began_ > kRemoteIn;
  if (!remote_ && begun) OpenRemote();
  if (!remote_ || !remote_->connected()) return;
  const int losses = losses_->load();
  // That it is connected was asked before, and whether the guest is still here is asked after. Of libvirt
  // alone: QEMU would answer on the thread that may just have to switch over.
  auto runs = vmm::CallFor<bool>(
      p_.local, "asking for the state",
      [uuid = uuid_](virConnectPtr c) -> absl::StatusOr<bool> {
        vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
        int state = 0;
        if (!domain || virDomainGetState(domain.get(), &state, nullptr, 0) != 0)
          return vmm::LibvirtError("state");
        return state == VIR_DOMAIN_RUNNING || state == VIR_DOMAIN_BLOCKED;
      },
      Deadline::After(kLookHere));
  if (runs.ok() && *runs) watched_since_ = losses;
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
    if (deadline.Expired())
      return Error(v1::SOURCE_VMM_FAILED, absl::StatusCode::kUnavailable, "{}", connection.trouble());
    (void)mail_->Wait(deadline);
  }
  return absl::OkStatus();
}

}  // namespace baton::shim
