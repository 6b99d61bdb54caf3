// What the VMM asks of a device. Every request has been validated by itself (ValidateRequest) before it comes
// here; here it is judged against the device, recorded, and forwarded when the back-end can be spoken to.
// When it cannot, the record alone answers, and the back-end learns of it when it is built again.
#include <algorithm>
#include <cerrno>
#include <utility>

#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

// A front-end writes a message with one call; one that stops half-way is broken.
constexpr auto kMessageTime = std::chrono::seconds(2);
// How long a transmit queue waits for receive queues that the VMM has not started yet; a VMM starts all its
// rings in a few milliseconds.
constexpr auto kHoldTx = std::chrono::milliseconds(500);
// Writes to the configuration space that are kept for a rebuild; more than a driver ever makes.
constexpr size_t kMaxConfigWrites = 64;

// What we can do for a VMM when the back-end can, besides what we do ourselves. Not INFLIGHT_SHMFD: the
// region must be where a new shim, a new back-end or another host can be given it, and no VMM does more with
// it than keep it.
constexpr uint64_t kRelayed = pf::kMq | pf::kLogShmfd | pf::kRarp | pf::kNetMtu | pf::kBackendReq |
                              pf::kConfig | pf::kResetDevice | pf::kConfigureMemSlots | pf::kStatus;

template <typename... Args>
absl::Status Refuse(fmt::format_string<Args...> format, Args&&... args) {
  return Error(absl::StatusCode::kInvalidArgument, format, std::forward<Args>(args)...);
}

}  // namespace

void Mediator::Impl::AcceptVmm() {
  auto fd = listen_.Accept();
  if (!fd.ok() || !fd->valid()) return;
  vmm_ = Connection(std::move(*fd));
  vmm_.SetPatience(kVmmPause);
  vmm_heard_ = vmm_assumed_ = false;
  LOG_INFO("device {}: VMM connected", name());
}

void Mediator::Impl::ServeVmm() {
  ServeRequest(vmm_.Receive(/*reply=*/false, Deadline::After(kMessageTime)));
  // A VMM stops its rings one after the other, and the guest stands still meanwhile. The next request is
  // waited for where it is received, without a look at everything else: that is half of the system calls.
  while (vmm_.valid() && Ready() && StopUnderWay() && !WorkWaits()) {
    auto next = vmm_.ReceiveNext(Deadline::After(kMessageTime));
    if (absl::IsDeadlineExceeded(next.status())) return;
    ServeRequest(std::move(next));
  }
}

void Mediator::Impl::ServeRequest(absl::StatusOr<WireMessage> message) {
  absl::Status status = message.status();
  if (message.ok()) {
    if (!std::exchange(vmm_heard_, true) && options_.vmm_returns &&
        message->request() != Request::kGetFeatures && message->request() != Request::kSetOwner) {
      LOG_INFO("device {}: the VMM goes on with what it had agreed on before", name());
      record_.protocol_features = ProtocolFeaturesForVmm() & ~pf::kStatus;
      vmm_assumed_ = true;
    }
    if (vmm_assumed_) AssumeStatus(message->request());
    status = ValidateRequest(*message, record_.protocol_features);
    if (status.ok()) status = Dispatch(*message);
  } else if (absl::IsUnavailable(status)) {
    LOG_INFO("device {}: VMM disconnected", name());
    EndVmmSession();
    return;
  }
  if (!status.ok()) {
    LOG_ERROR("device {}: VMM connection closed: {}", name(), Message(status));
    EndVmmSession();
  }
}

void Mediator::Impl::EndVmmSession() {
  vmm_.Close();
  if (options_.vmm_moves_memory) {
    logging_ = false;
    std::lock_guard lock(log_mutex_);
    log_.reset();
    log_incomplete_ = false;
  }
  const bool used = record_.features.has_value() || !record_.memory.empty();
  record_ = DeviceRecord();
  status_reset_due_ = false;
  held_rings_.clear();
  announce_mac_.reset();
  expected_seen_.clear();
  if (!used) return;
  ForgetErrors();
  // Some of a connection's state cannot be taken back (SET_OWNER once, protocol features), and rings may
  // still run: the next session gets a connection of its own, and this one's end stops the rings.
  link_ = Link();
  rebuild_counts_ = false;
  message_.clear();
  backoff_ = {};
  TryConnect(/*appeared=*/false);
}

absl::Status Mediator::Impl::Reply(const WireMessage& m, std::span<const uint8_t> payload,
                                   std::span<const int> fds) {
  return vmm_.Send(m.header.request, kReplyFlags, payload, fds, Deadline::After(kMessageTime));
}

// A status is assumed only once the VMM speaks of one: a back-end that is told of the feature may wait for
// DRIVER_OK, which a VMM without it never sends.
void Mediator::Impl::AssumeStatus(Request request) {
  if (request != Request::kGetStatus && request != Request::kSetStatus) return;
  if ((record_.protocol_features | ~offer_.protocol_features) & pf::kStatus) return;
  record_.protocol_features |= pf::kStatus;
  if (!Ready()) return;
  absl::Status told = link_.frontend->SetProtocolFeatures(EffectiveProtocolFeatures(), RequestDeadline());
  if (!told.ok()) LoseBackend(told);
}

uint64_t Mediator::Impl::FeaturesForVmm() const {
  // ACCESS_PLATFORM would need IOTLB messages, which are not relayed.
  // SUSPEND is the mediator's own, for the stop of a migration.
  return (offer_.features & ~(virtio::kFAccessPlatform | virtio::kFSuspend)) |
         virtio::kVhostUserFProtocolFeatures;
}

uint64_t Mediator::Impl::ProtocolFeaturesForVmm() const {
  uint64_t features = (offer_.protocol_features & kRelayed) | kOwnProtocolFeatures;
  if (options_.whole_memory_tables) features &= ~pf::kConfigureMemSlots;
  return features;
}

absl::Status Mediator::Impl::CheckIndex(const WireMessage& m, uint64_t index) const {
  // vhost-user-net counts queue pairs plus a control queue differently from one back-end to the next;
  // GET_QUEUE_NUM is a bound only where a back-end has MQ.
  uint64_t limit = offer_.protocol_features & pf::kMq ? std::max<uint64_t>(2 * offer_.queues + 1, 3) : 8;
  if (index >= std::min<uint64_t>(limit, kMaxVrings)) {
    return Refuse("{}: ring {}, but the back-end has {} queues", RequestName(m.header.request), index,
                  offer_.queues);
  }
  return absl::OkStatus();
}

absl::Status Mediator::Impl::Dispatch(WireMessage& m) {
  LOG_DEBUG("device {}: {}", name(), RequestName(m.header.request));
  absl::Status refused;  // by the back-end
  switch (m.request()) {
    case Request::kGetFeatures:
      return ReplyU64(m, FeaturesForVmm());
    case Request::kGetProtocolFeatures:
      return ReplyU64(m, ProtocolFeaturesForVmm());
    case Request::kGetQueueNum:
      return ReplyU64(m, offer_.queues);
    case Request::kGetMaxMemSlots:
      return ReplyU64(m, std::min<uint64_t>(offer_.memory_slots, kMaxMemSlots));
    case Request::kGetStatus: {
      uint64_t status = record_.status.value_or(0);
      if (Ready() && record_.status) {
        auto answer = link_.frontend->GetU64(Request::kGetStatus, RequestDeadline());
        if (answer.ok()) {
          status = *answer;
        } else {
          LoseBackend(answer.status());
        }
      }
      return ReplyU64(m, status);
    }
    case Request::kSetLogBase:
      // Where guest memory is ours to move, the VMM's log stays empty, and our own sees the back-end's
      // writes.
      if (options_.vmm_moves_memory) RETURN_IF_ERROR(OnLogBase(m, &refused));
      return ReplyU64(m, refused.ok() ? 0 : 1);
    case Request::kGetVringBase:
      return OnGetVringBase(m);
    case Request::kGetConfig:
      return OnGetConfig(m);
    case Request::kSetFeatures:
      RETURN_IF_ERROR(OnSetFeatures(m, &refused));
      break;
    case Request::kSetProtocolFeatures:
      RETURN_IF_ERROR(OnSetProtocolFeatures(m, &refused));
      break;
    case Request::kSetMemTable:
    case Request::kAddMemReg:
    case Request::kRemMemReg:
      RETURN_IF_ERROR(OnMemory(m, &refused));
      break;
    case Request::kSetVringNum:
      RETURN_IF_ERROR(OnVringNum(m));
      break;
    case Request::kSetVringAddr:
      RETURN_IF_ERROR(OnVringAddr(m, &refused));
      break;
    case Request::kSetVringBase:
      RETURN_IF_ERROR(OnVringBase(m));
      break;
    case Request::kSetVringKick:
    case Request::kSetVringCall:
    case Request::kSetVringErr:
      RETURN_IF_ERROR(OnNotifier(m, &refused));
      break;
    case Request::kSetVringEnable:
      RETURN_IF_ERROR(OnVringEnable(m, &refused));
      break;
    case Request::kSetConfig:
      RETURN_IF_ERROR(OnSetConfig(m, &refused));
      break;
    case Request::kSetStatus:
      RETURN_IF_ERROR(OnStatus(m, &refused));
      break;
    case Request::kResetDevice:
      RETURN_IF_ERROR(OnResetDevice(&refused));
      break;
    case Request::kNetSetMtu:
      record_.mtu = m.As<uint64_t>();
      if (Ready()) {
        RETURN_IF_ERROR(
            Forward(link_.frontend->SetU64(Request::kNetSetMtu, *record_.mtu, RequestDeadline()), &refused));
      }
      break;
    case Request::kSendRarp:
      if (Ready()) {
        RETURN_IF_ERROR(Forward(
            link_.frontend->SetU64(Request::kSendRarp, m.As<uint64_t>(), RequestDeadline()), &refused));
      }
      break;
    case Request::kSetBackendReqFd:
      record_.channel = Connection(std::move(m.fds[0]));
      break;
    case Request::kSetOwner:    // said to the back-end once a connection, in the handshake
    case Request::kResetOwner:  // deprecated; "ignore" is what the specification recommends
    case Request::kSetLogFd:    // belongs to the VMM's log
      break;
    default:
      return Error(absl::StatusCode::kUnimplemented, "{} is not supported", RequestName(m.header.request));
  }
  if (!refused.ok()) LOG_WARN("device {}: {}", name(), Message(refused));
  return m.need_reply() ? ReplyU64(m, refused.ok() ? 0 : 1) : absl::OkStatus();
}

absl::Status Mediator::Impl::OnSetFeatures(const WireMessage& m, absl::Status* refused) {
  uint64_t features = m.As<uint64_t>();
  if (uint64_t extra = features & ~FeaturesForVmm(); extra) {
    return Refuse("SET_FEATURES: {} were not offered", virtio::FeatureNames(extra, options_.spec.class_()));
  }
  // LOG_ALL of the VMM is about a log of its own.
  record_.features = features & ~virtio::kVhostFLogAll;
  if (options_.vmm_moves_memory) {
    RETURN_IF_ERROR(LogForVmm((features & virtio::kVhostFLogAll) != 0, refused));
    if (!refused->ok()) return absl::OkStatus();
  }
  if (!Ready()) return absl::OkStatus();
  if (EffectiveProtocolFeatures() != link_.frontend->protocol_features()) {
    RETURN_IF_ERROR(Forward(
        link_.frontend->SetProtocolFeatures(EffectiveProtocolFeatures(), RequestDeadline()), refused));
  }
  return Ready() ? Forward(SendFeatures(), refused) : absl::OkStatus();
}

absl::Status Mediator::Impl::OnSetProtocolFeatures(const WireMessage& m, absl::Status* refused) {
  uint64_t features = m.As<uint64_t>();
  if (uint64_t extra = features & ~ProtocolFeaturesForVmm(); extra) {
    return Refuse("SET_PROTOCOL_FEATURES: {} were not offered", virtio::ProtocolFeatureNames(extra));
  }
  record_.protocol_features = features;
  if (Ready() && EffectiveProtocolFeatures() != link_.frontend->protocol_features()) {
    return Forward(link_.frontend->SetProtocolFeatures(EffectiveProtocolFeatures(), RequestDeadline()),
                   refused);
  }
  return absl::OkStatus();
}

absl::Status Mediator::Impl::OnMemory(WireMessage& m, absl::Status* refused) {
  const Request request = m.request();
  if (request == Request::kSetMemTable) {
    auto header = m.As<MemTableHeader>();
    std::vector<MemRegion> regions(header.nregions);
    if (!regions.empty()) {
      std::memcpy(regions.data(), m.payload.data() + sizeof header, regions.size() * sizeof regions[0]);
    }
    RETURN_IF_ERROR(Annotate(record_.memory.Replace(std::move(regions), std::move(m.fds)), "SET_MEM_TABLE"));
  } else if (request == Request::kAddMemReg) {
    if (record_.memory.regions().size() >= offer_.memory_slots) {
      return Refuse("ADD_MEM_REG: the back-end has only {} slots", offer_.memory_slots);
    }
    RETURN_IF_ERROR(Annotate(record_.memory.Add(m.As<MemReg>().region, std::move(m.fds[0])), "ADD_MEM_REG"));
  } else {
    RETURN_IF_ERROR(Annotate(record_.memory.Remove(m.As<MemReg>().region), "REM_MEM_REG"));
  }
  if (callbacks_.on_memory) callbacks_.on_memory(record_.memory.Describe());
  if (record_.any_started()) MemorizeAll();
  if (!Ready()) {
    link_.memory_stale = true;
    return absl::OkStatus();
  }
  if (logging_) RETURN_IF_ERROR(Forward(EnsureLog(), refused));
  if (!Ready()) return absl::OkStatus();
  if (request == Request::kSetMemTable) return Forward(SendMemory(), refused);
  link_.memory_sent = true;
  const auto payload = m.As<MemReg>();
  if (request == Request::kRemMemReg) {
    return Forward(link_.frontend->Set(request, Bytes(payload), {}, RequestDeadline(), true), refused);
  }
  int fd = record_.memory.regions().back().fd.get();
  return Forward(link_.frontend->Set(request, Bytes(payload), {&fd, 1}, RequestDeadline(), true), refused);
}

absl::Status Mediator::Impl::OnVringNum(const WireMessage& m) {
  auto state = m.As<VringState>();
  RETURN_IF_ERROR(CheckIndex(m, state.index));
  VringRecord& vring = record_.vrings[state.index];
  if (vring.started && vring.num != state.num)
    return Refuse("SET_VRING_NUM: ring {} is running", state.index);
  vring.num = state.num;
  return absl::OkStatus();
}

absl::Status Mediator::Impl::OnVringAddr(const WireMessage& m, absl::Status* refused) {
  auto addr = m.As<VringAddr>();
  RETURN_IF_ERROR(CheckIndex(m, addr.index));
  VringRecord& vring = record_.vrings[addr.index];
  addr.flags = 0;
  addr.log_guest_addr = 0;
  const bool same = vring.addr && std::memcmp(&*vring.addr, &addr, sizeof addr) == 0;
  if (!same) vring.told.reset();
  const auto before = vring.addr;
  vring.addr = addr;
  absl::Status placed =
      record_.packed() ? record_.Packed(addr.index).status() : record_.Split(addr.index).status();
  if (!placed.ok()) {
    vring.addr = before;
    return Annotate(placed, "SET_VRING_ADDR");
  }
  // New addresses are a new ring; what an earlier back-end took from the old one is of no interest any more.
  if (!same) vring.lost = false;
  // While the ring runs only its log flag may change, and that concerns the VMM's log.
  if (same || !vring.started || !Ready()) return absl::OkStatus();
  return Forward(SendVringAddr(addr.index), refused);
}

absl::Status Mediator::Impl::OnVringBase(const WireMessage& m) {
  auto state = m.As<VringState>();
  RETURN_IF_ERROR(CheckIndex(m, state.index));
  if (!record_.packed() && state.num > 0xffff)
    return Refuse("SET_VRING_BASE: ring {}: {:#x} is no index", state.index, state.num);
  VringRecord& vring = record_.vrings[state.index];
  if (vring.started) return Refuse("SET_VRING_BASE: ring {} is running", state.index);
  vring.base = state.num;
  if (!vring.told || *vring.told != state.num) vring.lost = false;
  return absl::OkStatus();
}

absl::Status Mediator::Impl::OnGetVringBase(const WireMessage& m) {
  auto state = m.As<VringState>();
  RETURN_IF_ERROR(CheckIndex(m, state.index));
  VringRecord& vring = record_.vrings[state.index];
  uint32_t told = vring.told.value_or(vring.base.value_or(0));
  if (vring.started) {
    if (Armed() && !std::exchange(stop_.begun, true)) StopAllRings();
    vring.started = false;
    std::erase(held_rings_, state.index);
    told = StopVring(state.index);
    vring.told = told;
    stop_ended_ = Clock::now();
    Memorize(state.index);
    if (!record_.any_started()) TellStopped();
    if (status_reset_due_ && Ready() && !AnyRuns()) {
      status_reset_due_ = false;
      absl::Status refused;
      RETURN_IF_ERROR(Forward(link_.frontend->SetU64(Request::kSetStatus, 0, RequestDeadline()), &refused));
    }
  }
  vring.kick = {};
  VringState answer{state.index, told};
  return Reply(m, Bytes(answer));
}

absl::Status Mediator::Impl::OnNotifier(WireMessage& m, absl::Status* refused) {
  uint64_t value = m.As<uint64_t>();
  uint32_t index = static_cast<uint32_t>(value & kVringIndexMask);
  RETURN_IF_ERROR(CheckIndex(m, index));
  VringRecord& vring = record_.vrings[index];
  Notifier fresh{true, m.fds.empty() ? UniqueFd() : std::move(m.fds[0])};
  if (m.request() == Request::kSetVringKick) {
    vring.kick = std::move(fresh);
    if (vring.started) {
      if (std::count(held_rings_.begin(), held_rings_.end(), index))
        return absl::OkStatus();  // sent with its start
      return Ready() ? Forward(SendNotifier(Request::kSetVringKick, index, vring.kick), refused)
                     : absl::OkStatus();
    }
    if (!record_.features) return Refuse("SET_VRING_KICK: ring {} before SET_FEATURES", index);
    RETURN_IF_ERROR(Annotate(
        record_.packed() ? record_.Packed(index).status() : record_.Split(index).status(), "SET_VRING_KICK"));
    vring.started = true;
    RenewStop();
    if (Ready() && MustHold(index)) {
      // The VMM is answered at once: it has still to start the receive queues that this one waits for.
      if (held_rings_.empty()) held_until_ = Clock::now() + kHoldTx;
      held_rings_.push_back(index);
      return absl::OkStatus();
    }
    if (Ready()) {
      // What the back-end refuses here leaves the ring stopped, like a SET_VRING_KICK that it refused
      // directly.
      absl::Status started = StartVring(index);
      if (started.ok()) started = ReleaseHeldRings(false);
      if (absl::IsFailedPrecondition(started) && (ReasonOf(started) == v1::INFLIGHT_UNKNOWN || fenced_)) {
        Hold(started);
        return absl::OkStatus();
      }
      return Forward(started, refused);
    }
    if (link_.state == LinkState::kHeld) {
      // The guest may have set the device up anew; then nothing stands in the way.
      LoseBackend(absl::UnavailableError("trying again: the VMM started a ring"));
      retry_at_ = Clock::now();
    }
    return absl::OkStatus();
  }
  const bool call = m.request() == Request::kSetVringCall;
  Notifier& kept = call ? vring.call : vring.err;
  kept = std::move(fresh);
  // The back-end has an error descriptor of ours (device_events.cc).
  if (!call) return absl::OkStatus();
  if (!vring.started) return absl::OkStatus();  // sent when the ring starts
  if (!Ready()) {
    link_.vrings[index].call_stale = true;
    return absl::OkStatus();
  }
  absl::Status sent = Forward(SendNotifier(m.request(), index, kept), refused);
  // QEMU starts a ring before it says how to be called. What was completed in between called nobody, unless
  // the back-end makes up for it (libvhost-user does, "in case of I/O hang after reconnecting").
  if (call) Inject(kept);
  return sent;
}

absl::Status Mediator::Impl::OnVringEnable(const WireMessage& m, absl::Status* refused) {
  auto state = m.As<VringState>();
  RETURN_IF_ERROR(CheckIndex(m, state.index));
  record_.vrings[state.index].enabled = state.num != 0;
  if (!Ready()) return absl::OkStatus();
  // QEMU disables its rings just before it stops them. With handoff nothing is waited for, and rings that
  // must drain after all have to be enabled for it.
  if (state.num == 0 && HandoffWanted()) return absl::OkStatus();
  auto applied = link_.vrings.find(state.index);
  if (state.num == 0 && applied != link_.vrings.end() && applied->second.running && RunsEmpty() &&
      !record_.packed()) {
    // A front-end disables its rings just before it stops them, and a disabled ring need not be served: it
    // must run empty first. One that does not stays enabled, as StopVring will leave it running.
    if (!AwaitAllUsed(state.index, StopDeadline(/*begin=*/true))) return absl::OkStatus();
  }
  absl::Status sent = link_.frontend->Set(Request::kSetVringEnable, Bytes(state), {}, RequestDeadline());
  if (sent.ok()) link_.enabled[state.index] = state.num != 0;
  return Forward(sent, refused);
}

absl::Status Mediator::Impl::OnGetConfig(const WireMessage& m) {
  auto wanted = m.As<ConfigHeader>();
  const size_t end = size_t{wanted.offset} + wanted.size;
  if (Ready()) {
    auto config = link_.frontend->GetConfig(wanted.offset, wanted.size, RequestDeadline());
    if (config.ok()) {
      if (config_.size() < end) config_.resize(end, 0);
      std::copy(config->begin(), config->end(), config_.begin() + wanted.offset);
    } else if (absl::IsFailedPrecondition(config.status())) {
      LOG_WARN("device {}: {}", name(), Message(config.status()));
      return Reply(m, {});
    } else {
      LoseBackend(config.status());
    }
  }
  // Size 0 says "error" (vhost-user.rst, VHOST_USER_GET_CONFIG).
  if (config_.size() < end) return Reply(m, {});
  std::vector<uint8_t> payload(sizeof wanted + wanted.size);
  std::memcpy(payload.data(), &wanted, sizeof wanted);
  std::copy_n(config_.begin() + wanted.offset, wanted.size, payload.begin() + sizeof wanted);
  return Reply(m, payload);
}

absl::Status Mediator::Impl::OnSetConfig(const WireMessage& m, absl::Status* refused) {
  auto header = m.As<ConfigHeader>();
  ConfigWrite write{header.offset, header.flags, {m.payload.begin() + sizeof header, m.payload.end()}};
  // A later write to the same place replaces an earlier one.
  std::erase_if(record_.config_writes, [&](const ConfigWrite& w) {
    return w.offset == write.offset && w.data.size() == write.data.size();
  });
  if (record_.config_writes.size() >= kMaxConfigWrites)
    record_.config_writes.erase(record_.config_writes.begin());
  record_.config_writes.push_back(write);
  if (!Ready()) return absl::OkStatus();
  RETURN_IF_ERROR(
      Forward(link_.frontend->Set(Request::kSetConfig, m.payload, {}, RequestDeadline()), refused));
  config_changed_ = true;
  return absl::OkStatus();
}

bool Mediator::Impl::AnyRuns() const {
  return std::any_of(link_.vrings.begin(), link_.vrings.end(),
                     [](const auto& entry) { return entry.second.running; });
}

absl::Status Mediator::Impl::OnStatus(const WireMessage& m, absl::Status* refused) {
  record_.status = m.As<uint64_t>();
  if (!Ready()) return absl::OkStatus();
  // QEMU resets the status with each of its stops, up to 7.2 before it has stopped the rings: what is in
  // flight then, and the state of its own that a back-end is asked for in a migration, would be lost with it.
  // So a reset waits until no ring runs; one of a migration's stop is none, and neither is one that left a
  // ring running, to go on in place (StopVring).
  status_reset_due_ = *record_.status == 0 && !Armed() && AnyRuns();
  if (*record_.status == 0 && (Armed() || AnyRuns())) return absl::OkStatus();
  return Forward(link_.frontend->SetU64(Request::kSetStatus, *record_.status, RequestDeadline()), refused);
}

absl::Status Mediator::Impl::OnResetDevice(absl::Status* refused) {
  held_rings_.clear();
  for (auto& [index, vring] : record_.vrings) {
    vring.started = false;
    vring.enabled.reset();
    vring.told.reset();
    vring.lost = false;
  }
  record_.status.reset();
  memo_->ForgetRings();
  taken_over_.clear();
  if (!Ready()) {
    for (auto& [index, applied] : link_.vrings) applied.must_stop = applied.running;
    return absl::OkStatus();
  }
  link_.vrings.clear();
  link_.enabled.clear();
  return Forward(link_.frontend->Set(Request::kResetDevice, {}, {}, RequestDeadline(), true), refused);
}

}  // namespace baton::vhost
