#include "tests/lab/vm/frontend.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>

#include "agent/virtio/balloon.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::lab {
namespace {

using vhost::Request;
namespace pf = vhost::pf;

// What QEMU asks for, of what it is offered.
constexpr uint64_t kProtocol = pf::kMq | pf::kReplyAck | pf::kBackendReq | pf::kConfig | pf::kInflightShmfd |
                               pf::kConfigureMemSlots | pf::kRarp | pf::kNetMtu;
// The region's address in "our" address space; opaque to everybody else.
constexpr uint64_t kUserBase = 0x7f4000000000;
// struct virtio_blk_config up to and with num_queues, and what every back-end has of it.
constexpr uint32_t kBlkConfig = 60;

uint32_t ConfigSize(v1::DeviceClass device_class) {
  return device_class == v1::BLK ? kBlkConfig : device_class == v1::BALLOON ? virtio::kBalloonConfigSize : 0;
}

}  // namespace

DeviceFrontend::DeviceFrontend(const DeviceOptions& options, const Ram& ram, uint32_t rings,
                               bool ask_inflight)
    : options_(options), ram_(ram), ask_inflight_(ask_inflight && options.class_ == v1::BLK) {
  for (uint32_t i = 0; i < rings; ++i) {
    notifiers_.push_back({UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
                          UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))});
  }
}

absl::Status DeviceFrontend::Connect(Deadline deadline) {
  auto connection = vhost::Connection::Dial(options_.socket, deadline);
  if (!connection.ok()) return connection.status();
  frontend_.emplace(*std::move(connection));
  frontend_->set_on_config_change([this] { config_changed_ = true; });
  started_ = memory_given_ = false;
  absl::Status status = Hello(deadline);
  if (!status.ok()) {
    Disconnect();
    return Annotate(status, "device " + options_.name);
  }
  ++connections_;
  return absl::OkStatus();
}

absl::Status DeviceFrontend::Hello(Deadline deadline) {
  ASSIGN_OR_RETURN(uint64_t offered, frontend_->GetU64(Request::kGetFeatures, deadline));
  if (offered_ != 0 && (offered_ & ~offered) != 0) {
    return Error(absl::StatusCode::kFailedPrecondition, "does not offer {:#x} any more", offered_ & ~offered);
  }
  if (offered_ == 0) offered_ = offered;
  if ((offered & virtio::kVhostUserFProtocolFeatures) == 0)
    return absl::FailedPreconditionError("offers no protocol features");
  ASSIGN_OR_RETURN(uint64_t protocol, frontend_->GetU64(Request::kGetProtocolFeatures, deadline));
  RETURN_IF_ERROR(frontend_->SetProtocolFeatures(protocol & kProtocol, deadline));
  if ((protocol & pf::kMq) != 0) {
    ASSIGN_OR_RETURN(uint64_t queues, frontend_->GetU64(Request::kGetQueueNum, deadline));
    if (queues < options_.queues)
      return Error(absl::StatusCode::kFailedPrecondition, "has {} queues, not {}", queues, options_.queues);
  } else if (options_.queues > 1) {
    return Error(absl::StatusCode::kFailedPrecondition, "has one queue, not {}", options_.queues);
  }
  if ((protocol & pf::kBackendReq) != 0) RETURN_IF_ERROR(frontend_->OpenChannel(deadline));
  if ((protocol & pf::kConfigureMemSlots) != 0)
    RETURN_IF_ERROR(frontend_->GetU64(Request::kGetMaxMemSlots, deadline).status());
  RETURN_IF_ERROR(frontend_->Set(Request::kSetOwner, {}, {}, deadline));
  return (protocol & pf::kConfig) != 0 ? ReadConfig(deadline) : absl::OkStatus();
}

absl::Status DeviceFrontend::ReadConfig(Deadline deadline) {
  if (!frontend_) return Error(absl::StatusCode::kUnavailable, "device {} is not connected", options_.name);
  const uint32_t size = ConfigSize(options_.class_);
  if (size == 0) return absl::OkStatus();
  auto config = frontend_->GetConfig(0, size, deadline);
  if (!config.ok()) return config.status();
  config_ = *std::move(config);
  return absl::OkStatus();
}

absl::Status DeviceFrontend::HandOverInflight(uint16_t size, Deadline deadline) {
  if (!ask_inflight_ || (frontend_->protocol_features() & pf::kInflightShmfd) == 0) return absl::OkStatus();
  if (!inflight_) {
    auto region = frontend_->GetInflight(static_cast<uint16_t>(notifiers_.size()), size, deadline);
    if (!region.ok()) return region.status();
    inflight_.emplace(Inflight{region->first, std::move(region->second)});
  }
  int fd = inflight_->fd.get();
  return frontend_->Set(Request::kSetInflightFd, vhost::Bytes(inflight_->description), {&fd, 1}, deadline);
}

absl::Status DeviceFrontend::Start(uint64_t features, const std::vector<RingPlace>& rings,
                                   Deadline deadline) {
  if (!frontend_) return Error(absl::StatusCode::kUnavailable, "device {} is not connected", options_.name);
  absl::Status status = StartRings(features, rings, deadline);
  if (!status.ok()) {
    Disconnect();
    return Annotate(status, "device " + options_.name);
  }
  started_ = true;
  return absl::OkStatus();
}

absl::Status DeviceFrontend::StartRings(uint64_t features, const std::vector<RingPlace>& rings,
                                        Deadline deadline) {
  vhost::Frontend& peer = *frontend_;
  features |= virtio::kVhostUserFProtocolFeatures;
  // The region's format depends on the features, so they come first (QEMU: vhost_dev_prepare_inflight).
  RETURN_IF_ERROR(peer.SetU64(Request::kSetFeatures, features, deadline));
  RETURN_IF_ERROR(HandOverInflight(rings[0].size, deadline));
  const vhost::MemRegion region{0, ram_.size(), kUserBase, 0};
  int fd = ram_.fd();
  if ((peer.protocol_features() & pf::kConfigureMemSlots) != 0) {
    // Regions that the peer has are not named again.
    const vhost::MemReg add{0, region};
    if (!memory_given_) RETURN_IF_ERROR(peer.Set(Request::kAddMemReg, vhost::Bytes(add), {&fd, 1}, deadline));
    memory_given_ = true;
  } else {
    struct {
      vhost::MemTableHeader header;
      vhost::MemRegion region;
    } table{{1, 0}, region};
    RETURN_IF_ERROR(peer.Set(Request::kSetMemTable, vhost::Bytes(table), {&fd, 1}, deadline));
  }
  for (uint32_t i = 0; i < rings.size(); ++i) {
    const RingPlace& ring = rings[i];
    const vhost::VringState num{i, ring.size}, base{i, ring.base};
    const vhost::VringAddr addr{i, 0, kUserBase + ring.desc, kUserBase + ring.device, kUserBase + ring.driver,
                                0};
    const uint64_t index = i;
    int kick = kick_fd(i), call = call_fd(i);
    RETURN_IF_ERROR(peer.Set(Request::kSetVringNum, vhost::Bytes(num), {}, deadline));
    RETURN_IF_ERROR(peer.Set(Request::kSetVringBase, vhost::Bytes(base), {}, deadline));
    RETURN_IF_ERROR(peer.Set(Request::kSetVringAddr, vhost::Bytes(addr), {}, deadline));
    RETURN_IF_ERROR(peer.Set(Request::kSetVringKick, vhost::Bytes(index), {&kick, 1}, deadline));
    RETURN_IF_ERROR(peer.Set(Request::kSetVringCall, vhost::Bytes(index), {&call, 1}, deadline));
  }
  for (uint32_t i = 0; i < rings.size(); ++i) {
    const vhost::VringState enable{i, 1};
    RETURN_IF_ERROR(peer.Set(Request::kSetVringEnable, vhost::Bytes(enable), {}, deadline));
    // QEMU's virtio_device_start_ioeventfd: "kick right away to begin processing requests already in vring".
    Kick(i);
  }
  return absl::OkStatus();
}

std::vector<std::optional<uint32_t>> DeviceFrontend::Stop(Deadline deadline) {
  std::vector<std::optional<uint32_t>> bases(notifiers_.size());
  if (!frontend_ || !started_) return bases;
  started_ = false;
  for (uint32_t i = 0; i < bases.size(); ++i) {
    const vhost::VringState disable{i, 0};
    absl::Status status = frontend_->Set(Request::kSetVringEnable, vhost::Bytes(disable), {}, deadline);
    if (!status.ok() && !absl::IsFailedPrecondition(status)) {
      LOG_WARN("device {}: {}", options_.name, Message(status));
      Disconnect();
      return bases;
    }
  }
  for (uint32_t i = 0; i < bases.size(); ++i) {
    auto base = frontend_->GetVringBase(i, deadline);
    if (!base.ok()) {
      LOG_WARN("device {}: {}", options_.name, Message(base.status()));
      Disconnect();
      return bases;
    }
    bases[i] = *base;
  }
  return bases;
}

bool DeviceFrontend::Attend() {
  if (!frontend_) return false;
  pollfd items[2] = {{frontend_->fd(), POLLIN, 0}, {frontend_->channel_fd(), POLLIN, 0}};
  ::poll(items, 2, 0);
  if (items[1].revents != 0) frontend_->ServeChannel();
  // Outside of a request nothing but the end can come here.
  if (items[0].revents != 0) Disconnect();
  return connected();
}

void DeviceFrontend::Disconnect() {
  frontend_.reset();
  started_ = false;
}

void DeviceFrontend::Kick(uint32_t ring) const {
  const uint64_t one = 1;
  (void)!::write(kick_fd(ring), &one, sizeof one);
}

}  // namespace baton::lab
