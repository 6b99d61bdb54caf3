// The lab device's vhost-user side: messages of the front-end, and the back-end's own channel.
//
// Security model: a hostile front-end can end its own connection, and can make the device read and write the
// memory that it handed out itself; nothing else. Messages are checked by agent/vhost/wire before they are
// looked at; a file that shrinks after it was mapped ends the process (SIGBUS), which a test of that wants to
// see.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "common/log.h"
#include "tests/lab/device/lab_device.h"

namespace baton::lab {
namespace {

using vhost::Request;
namespace pf = vhost::pf;

constexpr Duration kMessageTime = std::chrono::seconds(1);
// More than any model's state.
constexpr size_t kMaxState = 16u << 20;
constexpr uint32_t kMemSlots = 64;
constexpr uint64_t kTransferFailed = 1, kTransferNoFd = 1u << 8;
// VIRTIO 1.4, 2.1: status bits.
constexpr uint8_t kDriverOk = 4, kSuspend = 16;
constexpr uint64_t kFSuspend = virtio::Bit(43);

bool IsStop(uint32_t id) {
  return id == static_cast<uint32_t>(Request::kGetVringBase) || id == kMsgGetBaseSkipDrain;
}

struct TransferState {
  uint32_t direction;
  uint32_t phase;
};

}  // namespace

uint64_t LabDevice::OfferedFeatures() const {
  const uint64_t rings = virtio::kFVersion1 | virtio::kFIndirectDesc | virtio::kFEventIdx |
                         virtio::kFRingPacked | virtio::kFInOrder | virtio::kVhostFLogAll |
                         virtio::kVhostUserFProtocolFeatures;
  const uint64_t extra = options_.extra_features & (virtio::kFPartialOrder | kFSuspend);
  return (rings | extra | model_->Features()) & ~options_.without_features;
}

uint64_t LabDevice::OfferedProtocol() const {
  uint64_t offered = pf::kMq | pf::kLogShmfd | pf::kReplyAck | pf::kConfig | pf::kConfigureMemSlots |
                     pf::kBackendReq | pf::kResetDevice | pf::kStatus | model_->ProtocolFeatures();
  if (options_.inflight) offered |= pf::kInflightShmfd | kPfGetBaseInflight | kPfGetBaseSkipDrain;
  return offered & ~options_.without_protocol;
}

void LabDevice::AcceptFrontend() {
  auto fd = listener_.Accept();
  if (!fd.ok() || !*fd) return;
  // One front-end at a time: the next is taken when this one is gone.
  loop_->Unwatch(listener_.fd());
  connection_ = vhost::Connection(*std::move(fd));
  ++counters_["connections"];
  counters_["connected"] = 1;
  absl::Status watched = loop_->Watch(connection_.fd(), [this] { ReceiveMessages(); });
  if (!watched.ok()) CloseFrontend(Message(watched));
}

void LabDevice::CloseFrontend(const std::string& why) {
  if (!connection_.valid()) return;
  LOG_DEBUG("connection closed: {}", why);
  // Nobody may find the connection closed while something of it still goes on.
  ResetDevice();
  loop_->Unwatch(connection_.fd());
  connection_.Close();
  channel_.Close();
  if (transfer_) {
    if (transfer_->fd) loop_->Unwatch(transfer_->fd.get());
    transfer_.reset();
  }
  checking_state_ = suspend_answer_ = false;
  bases_.clear();
  stashed_.reset();
  for (auto& [index, ring] : rings_) {
    if (ring.kick) loop_->Unwatch(ring.kick.get());
  }
  rings_.clear();
  memory_.Clear();
  memory_.ReleaseOld();
  log_.Clear();
  inflight_ = {};
  inflight_geometry_.reset();
  features_ = protocol_ = 0;
  counters_["connected"] = 0;
  (void)loop_->Watch(listener_.fd(), [this] { AcceptFrontend(); });
}

// Front-ends may send further requests to stop before the first is answered; everything else that they send
// waits in the socket.
void LabDevice::ReceiveMessages() {
  auto message = connection_.Receive(/*reply=*/false, Deadline::After(kMessageTime));
  if (!message.ok()) {
    CloseFrontend(Message(message.status()));
    return;
  }
  if (Busy() && !IsStop(message->header.request)) {
    stashed_ = *std::move(message);
    loop_->Unwatch(connection_.fd());
    return;
  }
  if (absl::Status served = Serve(*message); !served.ok()) {
    LOG_WARN("{}: {}", vhost::RequestName(message->header.request), Message(served));
    counters_["refused"]++;
    CloseFrontend(Message(served));
  }
}

void LabDevice::ServeStashed() {
  if (!stashed_ || Busy()) return;
  vhost::WireMessage message = *std::exchange(stashed_, std::nullopt);
  absl::Status served = loop_->Watch(connection_.fd(), [this] { ReceiveMessages(); });
  if (served.ok()) served = Serve(message);
  if (!served.ok()) CloseFrontend(Message(served));
}

absl::Status LabDevice::CheckMessage(const vhost::WireMessage& m) const {
  const uint32_t id = m.header.request;
  struct Own {
    uint32_t id, size;
    size_t fds;
    uint64_t feature;
  };
  for (const Own& own :
       {Own{kMsgGetBaseSkipDrain, 8, 0, kPfGetBaseSkipDrain}, Own{kMsgSetDeviceStateFd, 8, 1, kPfDeviceState},
        Own{kMsgCheckDeviceState, 0, 0, kPfDeviceState}}) {
    if (own.id != id) continue;
    if (!(protocol_ & own.feature)) {
      return Error(absl::StatusCode::kUnimplemented, "message {} was not negotiated", id);
    }
    if (m.payload.size() != own.size || m.fds.size() != own.fds) {
      return Error(absl::StatusCode::kInvalidArgument, "message {} of {} bytes with {} descriptors", id,
                   m.payload.size(), m.fds.size());
    }
    if (id == kMsgGetBaseSkipDrain && m.As<vhost::VringState>().index >= vhost::kMaxVrings) {
      return Error(absl::StatusCode::kInvalidArgument, "ring {}", m.As<vhost::VringState>().index);
    }
    return absl::OkStatus();
  }
  return vhost::ValidateRequest(m, protocol_);
}

absl::Status LabDevice::Serve(vhost::WireMessage& m) {
  const uint32_t id = m.header.request;
  const LabFaults& faults = options_.faults;
  ++counters_["messages"];
  ++counters_["msg." + vhost::RequestName(id)];
  // No message has the number 0, which stands for no fault.
  if (id == 0) return absl::InvalidArgumentError("no such message");
  if (id == faults.disconnect_at) return absl::AbortedError("asked to disconnect here");
  if (id == faults.silent_at) return absl::OkStatus();
  if (id == faults.garble_at) {
    const uint8_t junk[3] = {1, 2, 3};
    return connection_.Send(id + 1, vhost::kReplyFlags, junk, {}, Deadline::After(kMessageTime));
  }
  if (id == faults.refuse_at) {
    if (!m.need_reply()) return absl::AbortedError("asked to refuse this");
    return RespondU64(id, 1);
  }
  absl::Status checked = CheckMessage(m);
  if (absl::IsUnimplemented(checked) && m.need_reply()) return RespondU64(id, 1);
  RETURN_IF_ERROR(checked);
  const vhost::RequestInfo* info = vhost::FindRequest(id);
  const bool acknowledges = info && info->reply == vhost::ReplyRule::kAck && m.need_reply();
  absl::Status handled = Handle(m);
  // By what is agreed on now: User-Mode Linux (vhost_user_init in arch/um/drivers/virtio_uml.c) waits for an
  // answer to the very message that agrees on REPLY_ACK, and libvhost-user gives one.
  if (!acknowledges || !(protocol_ & pf::kReplyAck)) return handled;
  if (!handled.ok()) LOG_WARN("{}: {}", vhost::RequestName(id), Message(handled));
  if (suspending_ && id == static_cast<uint32_t>(Request::kSetStatus)) {
    suspend_answer_ = true;  // comes when nothing is in flight any more
    return absl::OkStatus();
  }
  return RespondU64(id, handled.ok() ? 0 : 1);
}

absl::Status LabDevice::Respond(uint32_t id, std::span<const uint8_t> payload, std::span<const int> fds) {
  if (id == options_.faults.lose_reply_at) {
    ++counters_["replies_lost"];
    return absl::OkStatus();
  }
  return connection_.Send(id, vhost::kReplyFlags, payload, fds, Deadline::After(kMessageTime));
}

absl::Status LabDevice::Handle(vhost::WireMessage& m) {
  const uint32_t id = m.header.request;
  if (id == kMsgSetDeviceStateFd) return StartTransfer(m);
  if (id == kMsgCheckDeviceState) {
    checking_state_ = true;
    return absl::OkStatus();
  }
  if (IsStop(id)) {
    Vring& ring = RingAt(m.As<vhost::VringState>().index);
    const bool may_keep = ring.tracker.has_value();
    const bool keep = id == kMsgGetBaseSkipDrain || (protocol_ & kPfGetBaseInflight);
    if (options_.drains || keep) {
      StopRing(ring, may_keep && keep ? StopMode::kSuspend : StopMode::kDrain);
    }
    bases_.push_back({id, ring.index});
    return absl::OkStatus();
  }
  switch (m.request()) {
    case Request::kGetFeatures:
      return RespondU64(id, OfferedFeatures());
    case Request::kGetProtocolFeatures:
      return RespondU64(id, OfferedProtocol());
    case Request::kGetQueueNum:
      return RespondU64(id, model_->QueueNum());
    case Request::kGetMaxMemSlots:
      return RespondU64(id, kMemSlots);
    case Request::kGetStatus:
      return RespondU64(id, status_);
    case Request::kGetConfig:
      return GetConfig(m);
    case Request::kSetConfig:
      return SetConfig(m);
    case Request::kGetInflightFd:
      return MakeInflight(m);
    case Request::kSetInflightFd:
      return TakeInflight(m, m.fds[0].get());
    case Request::kSetLogBase:
      RETURN_IF_ERROR(log_.Set(m.As<vhost::LogDescription>(), m.fds[0].get()));
      return Respond(id, {});  // as DPDK does
    case Request::kSetFeatures: {
      const uint64_t features = m.As<uint64_t>();
      if (features & ~OfferedFeatures()) {
        return Error(absl::StatusCode::kInvalidArgument, "features {:#x} were not offered",
                     features & ~OfferedFeatures());
      }
      if ((features & virtio::kFInOrder) && (features & virtio::kFPartialOrder)) {
        return absl::InvalidArgumentError("IN_ORDER and PARTIAL_ORDER exclude each other");
      }
      features_ = features;
      model_->FeaturesAccepted(features);
      if (!(features & virtio::kVhostUserFProtocolFeatures)) {
        for (auto& [index, ring] : rings_) ring.enabled = true;
      }
      return absl::OkStatus();
    }
    case Request::kSetProtocolFeatures:
      if (m.As<uint64_t>() & ~OfferedProtocol()) {
        return Error(absl::StatusCode::kInvalidArgument, "protocol features {:#x} were not offered",
                     m.As<uint64_t>() & ~OfferedProtocol());
      }
      protocol_ = m.As<uint64_t>();
      return absl::OkStatus();
    case Request::kSetMemTable: {
      memory_.Clear();
      const auto header = m.As<vhost::MemTableHeader>();
      for (uint32_t i = 0; i < header.nregions; ++i) {
        vhost::MemRegion region;
        std::memcpy(&region, m.payload.data() + sizeof header + i * sizeof region, sizeof region);
        RETURN_IF_ERROR(memory_.Add(region, m.fds[i].get()));
      }
      return RemapRings();
    }
    case Request::kAddMemReg:
      RETURN_IF_ERROR(memory_.Add(m.As<vhost::MemReg>().region, m.fds[0].get()));
      return RemapRings();
    case Request::kRemMemReg:
      RETURN_IF_ERROR(memory_.Remove(m.As<vhost::MemReg>().region));
      return RemapRings();
    case Request::kSetVringNum: {
      const auto state = m.As<vhost::VringState>();
      Vring& ring = RingAt(state.index);
      if (ring.started) return absl::FailedPreconditionError("the ring is running");
      if (state.num == 0 || state.num > virtio::kMaxRingSize) {
        return Error(absl::StatusCode::kInvalidArgument, "a ring of {}", state.num);
      }
      ring.size = static_cast<uint16_t>(state.num);
      return absl::OkStatus();
    }
    case Request::kSetVringBase:
      if (RingAt(m.As<vhost::VringState>().index).started) {
        return absl::FailedPreconditionError("the ring is running");
      }
      RingAt(m.As<vhost::VringState>().index).base = m.As<vhost::VringState>().num;
      return absl::OkStatus();
    case Request::kSetVringAddr: {
      const auto addr = m.As<vhost::VringAddr>();
      Vring& ring = RingAt(addr.index);
      if (ring.started &&
          (addr.desc != ring.addr->desc || addr.avail != ring.addr->avail || addr.used != ring.addr->used)) {
        return absl::FailedPreconditionError("the ring is running");
      }
      ring.addr = addr;  // of a running ring: logging on or off
      return absl::OkStatus();
    }
    case Request::kSetVringCall:
    case Request::kSetVringErr: {
      Vring& ring = RingAt(static_cast<uint32_t>(m.As<uint64_t>() & vhost::kVringIndexMask));
      UniqueFd& fd = m.request() == Request::kSetVringCall ? ring.call : ring.err;
      fd = m.fds.empty() ? UniqueFd() : std::move(m.fds[0]);
      if (fd) ::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) | O_NONBLOCK);
      return absl::OkStatus();
    }
    case Request::kSetVringKick: {
      Vring& ring = RingAt(static_cast<uint32_t>(m.As<uint64_t>() & vhost::kVringIndexMask));
      if (m.fds.empty()) return absl::UnimplementedError("rings that are polled are not supported");
      if (ring.index >= model_->Queues()) {
        return Error(absl::StatusCode::kInvalidArgument, "ring {} of {}", ring.index, model_->Queues());
      }
      if (ring.kick) loop_->Unwatch(ring.kick.get());
      ring.kick = std::move(m.fds[0]);
      ::fcntl(ring.kick.get(), F_SETFL, ::fcntl(ring.kick.get(), F_GETFL) | O_NONBLOCK);
      if (ring.stopping) {
        // Its stop was answered before it was one (LabDeviceOptions::drains).
        Settle(ring);
        DropRing(ring);
      }
      if (ring.started) {
        UpdateRing(ring);
        return absl::OkStatus();
      }
      return StartRing(ring);
    }
    case Request::kSetVringEnable: {
      const auto state = m.As<vhost::VringState>();
      Vring& ring = RingAt(state.index);
      ring.enabled = state.num != 0;
      UpdateRing(ring);
      return absl::OkStatus();
    }
    case Request::kSetBackendReqFd:
      channel_ = vhost::Connection(std::move(m.fds[0]));
      return absl::OkStatus();
    case Request::kSetStatus:
      return SetStatus(m.As<uint64_t>());
    case Request::kResetDevice: {
      ResetDevice();
      for (auto& [index, ring] : rings_) {
        ring.base = 0;
        ring.enabled = false;
      }
      return absl::OkStatus();
    }
    case Request::kSendRarp: {
      uint8_t mac[6];
      std::memcpy(mac, m.payload.data(), sizeof mac);
      return model_->SendRarp(mac);
    }
    case Request::kNetSetMtu:
      return model_->SetMtu(m.As<uint64_t>());
    case Request::kSetOwner:
    case Request::kResetOwner:
    case Request::kSetLogFd:
      return absl::OkStatus();
    default:
      return Error(absl::StatusCode::kUnimplemented, "{} is not supported", vhost::RequestName(id));
  }
}

absl::Status LabDevice::RemapRings() {
  for (auto& [index, ring] : rings_) {
    if (!ring.queue) continue;
    // A ring that is not there any more stays where it was mapped until it is stopped.
    absl::Status remapped = ring.queue->Remap(memory_.memory());
    if (!remapped.ok()) LOG_DEBUG("ring {}: {}", index, Message(remapped));
  }
  return absl::OkStatus();
}

absl::Status LabDevice::GetConfig(const vhost::WireMessage& m) {
  const auto header = m.As<vhost::ConfigHeader>();
  const std::span<const uint8_t> config = model_->Config();
  const uint32_t id = m.header.request;
  if (header.offset > config.size() || header.size > config.size() - header.offset) return Respond(id, {});
  std::vector<uint8_t> payload(sizeof header + header.size);
  std::memcpy(payload.data(), &header, sizeof header);
  std::memcpy(payload.data() + sizeof header, config.data() + header.offset, header.size);
  return Respond(id, payload);
}

absl::Status LabDevice::SetConfig(const vhost::WireMessage& m) {
  const auto header = m.As<vhost::ConfigHeader>();
  if (suspended_) return absl::OkStatus();  // VIRTIO 1.4: ignored while suspended
  if (m.payload.size() < sizeof header + header.size)
    return absl::InvalidArgumentError("shorter than it says");
  return model_->WriteConfig(header.offset,
                             std::span<const uint8_t>(m.payload).subspan(sizeof header, header.size),
                             /*migration=*/(header.flags & 1) != 0);
}

absl::Status LabDevice::MakeInflight(const vhost::WireMessage& m) {
  auto description = m.As<vhost::InflightDescription>();
  ASSIGN_OR_RETURN(
      auto geometry,
      virtio::MakeInflightGeometry(options_.kind, Format(), description.num_queues, description.queue_size));
  UniqueFd fd(::memfd_create("baton-lab-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(geometry.mmap_size)) != 0) {
    return ErrnoError(errno, "in-flight region");
  }
  ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
  description.mmap_size = geometry.mmap_size;
  description.mmap_offset = 0;
  const int raw = fd.get();
  return Respond(m.header.request, vhost::Bytes(description), {&raw, 1});
}

absl::Status LabDevice::TakeInflight(const vhost::WireMessage& m, int fd) {
  const auto d = m.As<vhost::InflightDescription>();
  for (const auto& [index, ring] : rings_) {
    if (ring.started) return absl::FailedPreconditionError("a ring is running");
  }
  ASSIGN_OR_RETURN(SharedMapping mapping, SharedMapping::Map(fd, d.mmap_offset, d.mmap_size));
  virtio::InflightGeometry geometry{.format = Format(),
                                    .mmap_size = d.mmap_size,
                                    .mmap_offset = d.mmap_offset,
                                    .num_queues = d.num_queues,
                                    .queue_size = d.queue_size,
                                    .stride = virtio::InflightStride(options_.kind, Format(), d.queue_size)};
  // Of its own kind only, as with real back-ends.
  if (geometry.stride == 0 || d.num_queues == 0 || geometry.stride * d.num_queues > d.mmap_size) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "an in-flight region of {} bytes for {} queues of {}: this back-end's has {} each",
                 d.mmap_size, d.num_queues, d.queue_size, geometry.stride);
  }
  inflight_ = std::move(mapping);
  // The mapping begins at the region.
  geometry.mmap_offset = 0;
  inflight_geometry_ = geometry;
  return absl::OkStatus();
}

absl::Status LabDevice::SetStatus(uint64_t status) {
  if (status > 0xff) return absl::InvalidArgumentError("a status has 8 bits");
  const auto next = static_cast<uint8_t>(status);
  if (next == 0) {
    // QEMU 7.2 resets the status at a stop before it asks where the rings are: those go on until then.
    suspended_ = suspending_ = false;
    status_ = 0;
    if (rings_running_ == 0) model_->Reset();
    for (auto& [index, ring] : rings_) UpdateRing(ring);
    return absl::OkStatus();
  }
  if ((next & kSuspend) && (features_ & kFSuspend) && !suspended_) {
    // What is being processed is completed; nothing new is taken (VIRTIO 1.4, 2.1.2).
    status_ = next & ~kSuspend;
    suspending_ = true;
    for (auto& [index, ring] : rings_) UpdateRing(ring);
    return absl::OkStatus();
  }
  if (suspended_ && (next & kDriverOk) && !(next & kSuspend)) {
    suspended_ = false;
    status_ = next;
    for (auto& [index, ring] : rings_) UpdateRing(ring);
    return absl::OkStatus();
  }
  status_ = next;
  return absl::OkStatus();
}

// Answers what has waited for rings to come to rest.
absl::Status LabDevice::AnswerBases() {
  while (!bases_.empty()) {
    const Reply due = bases_.front();
    Vring& ring = RingAt(due.queue);
    if (ring.stopping && ring.outstanding > 0) break;
    ASSIGN_OR_RETURN(uint32_t base, BaseOf(ring));
    if (due.request == kMsgGetBaseSkipDrain || (protocol_ & kPfGetBaseInflight)) {
      base += static_cast<uint32_t>(options_.faults.base_offset);
    }
    bases_.pop_front();
    if (ring.started && !ring.stopping) StopRing(ring, StopMode::kSuspend);  // it does not drain
    ring.base = base;
    if (ring.outstanding == 0) {
      DropRing(ring);
      // As libvhost-user and DPDK do: who starts the ring again sends them again.
      ring.kick.reset();
      ring.call.reset();
    }
    RETURN_IF_ERROR(Respond(due.request, vhost::Bytes(vhost::VringState{due.queue, base})));
  }
  if (suspending_) {
    uint32_t outstanding = 0;
    for (const auto& [index, ring] : rings_) outstanding += ring.outstanding;
    if (outstanding == 0) {
      suspending_ = false;
      suspended_ = true;
      status_ = static_cast<uint8_t>((status_ & ~kDriverOk) | kSuspend);
      ++counters_["suspended"];
      if (suspend_answer_) {
        suspend_answer_ = false;
        RETURN_IF_ERROR(RespondU64(static_cast<uint32_t>(Request::kSetStatus), 0));
      }
    }
  }
  if (checking_state_ && (!transfer_ || transfer_->finished)) {
    checking_state_ = false;
    const bool good = transfer_ && transfer_->result.ok();
    if (transfer_ && !good) LOG_WARN("device state: {}", Message(transfer_->result));
    transfer_.reset();
    RETURN_IF_ERROR(RespondU64(kMsgCheckDeviceState, good ? 0 : 1));
  }
  return absl::OkStatus();
}

absl::Status LabDevice::StartTransfer(vhost::WireMessage& m) {
  const auto state = m.As<TransferState>();
  auto refuse = [&](const std::string& why) {
    LOG_WARN("device state: {}", why);
    return RespondU64(kMsgSetDeviceStateFd, kTransferFailed | kTransferNoFd);
  };
  if (state.direction > 1 || state.phase != 0) return refuse("unknown direction or phase");
  if (rings_running_ > 0) return refuse("rings are running");
  if (transfer_ && transfer_->fd) loop_->Unwatch(transfer_->fd.get());
  transfer_ = std::make_unique<Transfer>();
  transfer_->load = state.direction == 1;
  transfer_->fd = std::move(m.fds[0]);
  ::fcntl(transfer_->fd.get(), F_SETFL, ::fcntl(transfer_->fd.get(), F_GETFL) | O_NONBLOCK);
  if (!transfer_->load) {
    auto saved = model_->SaveState();
    if (!saved.ok()) {
      transfer_.reset();
      return refuse(Message(saved.status()));
    }
    transfer_->data = *std::move(saved);
  }
  RETURN_IF_ERROR(loop_->Watch(
      transfer_->fd.get(), [this] { ContinueTransfer(); }, /*writable=*/!transfer_->load));
  return RespondU64(kMsgSetDeviceStateFd, kTransferNoFd);
}

void LabDevice::ContinueTransfer() {
  Transfer& t = *transfer_;
  auto finish = [&](absl::Status result) {
    loop_->Unwatch(t.fd.get());
    t.fd.reset();
    t.finished = true;
    t.result = std::move(result);
  };
  if (!t.load) {
    while (t.sent < t.data.size()) {
      const ssize_t n = ::write(t.fd.get(), t.data.data() + t.sent, t.data.size() - t.sent);
      if (n < 0 && errno == EAGAIN) return;
      if (n < 0) return finish(ErrnoError(errno, "write"));
      t.sent += static_cast<size_t>(n);
    }
    return finish(absl::OkStatus());
  }
  char buffer[65536];
  for (;;) {
    const ssize_t n = ::read(t.fd.get(), buffer, sizeof buffer);
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) return finish(ErrnoError(errno, "read"));
    if (n == 0) return finish(model_->LoadState(t.data));
    if (t.data.size() + static_cast<size_t>(n) > kMaxState) {
      return finish(absl::ResourceExhaustedError("too much state"));
    }
    t.data.append(buffer, static_cast<size_t>(n));
  }
}

void LabDevice::SendOnChannel(uint32_t request, std::span<const uint8_t> payload) {
  if (!channel_.valid()) return;
  absl::Status sent = channel_.Send(request, vhost::kVersion, payload, {}, Deadline::After(kMessageTime));
  if (!sent.ok()) {
    LOG_WARN("back-end channel: {}", Message(sent));
    channel_.Close();
  }
}

void LabDevice::ConfigChanged() { SendOnChannel(kMsgBackendConfigChange, {}); }

}  // namespace baton::lab
