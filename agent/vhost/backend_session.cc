// The mediator's side towards the back-end: connecting, building the device from the record, losing it and
// coming back.
#include <sys/inotify.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

constexpr Duration kAppearedRetry = std::chrono::milliseconds(10);
// Of a ring that is to be stopped, asked of a back-end that was late before.
constexpr Duration kStopPatience = std::chrono::milliseconds(10);
constexpr Duration kLastRetry = std::chrono::seconds(2);

// What we always want of a back-end that has it. STATUS is left to the VMM: a back-end that negotiated it may
// wait for DRIVER_OK.
constexpr uint64_t kWanted = pf::kMq | pf::kLogShmfd | pf::kRarp | pf::kReplyAck | pf::kNetMtu |
                             pf::kBackendReq | pf::kConfig | pf::kInflightShmfd | pf::kResetDevice |
                             pf::kConfigureMemSlots | pf::kDeviceState;

}  // namespace

uint32_t Mediator::Impl::ConfigSize() const {
  // The part of struct virtio_blk_config up to write_zeroes and of struct virtio_net_config up to mtu: every
  // back-end has them, and some refuse to read beyond what they know.
  if (options_.spec.class_() == v1::BLK) return 60;
  if (options_.spec.class_() == v1::NET) return 12;
  if (options_.spec.class_() == v1::BALLOON) return 16;
  return 0;
}

absl::Status Mediator::Impl::Dial() {
  link_ = Link();
  ASSIGN_OR_RETURN(Connection connection,
                   Connection::Dial(options_.backend.socket(), Deadline::After(Duration(0))));
  link_.frontend = std::make_unique<Frontend>(std::move(connection));
  link_.frontend->set_on_config_change([this] { config_changed_ = true; });
  link_.frontend->set_on_vring_error([this](uint32_t index) {
    if (!ErrorsMuted()) OnDeviceError(index);
  });
  RETURN_IF_ERROR(link_.frontend->SendGetFeatures(RequestDeadline()));
  link_.state = LinkState::kHello;
  link_.hello_until = Clock::now() + options_.request_timeout;
  return absl::OkStatus();
}

Mediator::Impl::Appearance Mediator::Impl::ReadAppearance() {
  const std::string wanted = std::filesystem::path(options_.backend.socket()).filename();
  Appearance out;
  alignas(inotify_event) char events[4096];
  for (ssize_t n; (n = ::read(inotify_.get(), events, sizeof events)) > 0;) {
    out.anything = true;
    for (ssize_t at = 0; at < n;) {
      const auto* event = reinterpret_cast<const inotify_event*>(events + at);
      out.socket |= event->len > 0 && wanted == event->name;
      at += static_cast<ssize_t>(sizeof *event + event->len);
    }
  }
  return out;
}

void Mediator::Impl::TryConnect(bool appeared) {
  absl::Status dialled = Dial();
  if (dialled.ok()) return;
  link_ = Link();
  ScheduleRetry(/*fresh=*/false);
  if (!appeared) return;
  // The path is made by bind(2), and connections are refused until listen(2), of which nothing tells.
  backoff_ = kAppearedRetry;
  retry_at_ = Clock::now() + backoff_;
}

void Mediator::Impl::ScheduleRetry(bool fresh) {
  if (fresh || backoff_ == Duration{}) {
    backoff_ = options_.first_retry;
    std::string directory = std::filesystem::path(options_.backend.socket()).parent_path();
    if (inotify_ && ::inotify_add_watch(inotify_.get(), directory.empty() ? "." : directory.c_str(),
                                        IN_CREATE | IN_MOVED_TO | IN_ATTRIB) < 0) {
      LOG_DEBUG("device {}: {} cannot be watched: {}", name(), directory, errno);
    }
  } else {
    backoff_ = std::max(backoff_, std::min(2 * backoff_, kLastRetry));
  }
  retry_at_ = Clock::now() + backoff_;
}

void Mediator::Impl::LoseBackend(const absl::Status& why) {
  ForgetErrors();
  if (link_.state == LinkState::kDown && !link_.frontend && !message_.empty()) {
    ScheduleRetry(false);
    return;
  }
  const bool first =
      link_.state == LinkState::kReady || link_.state == LinkState::kOverdue || message_.empty();
  for (auto& [index, applied] : link_.vrings) {
    if (applied.running) record_.vrings[index].lost = true;
  }
  if (link_.state == LinkState::kReady || link_.state == LinkState::kOverdue) {
    rebuild_counts_ |= record_.any_started();
    if (logging_) {
      // It may have written to memory without coming to the bit of that page.
      {
        std::lock_guard lock(log_mutex_);
        log_incomplete_ = true;
      }
      if (options_.vmm_moves_memory) MarkAllDirty();
    }
  }
  link_ = Link();
  std::string text = fmt::format("back-end {} lost: {}", options_.backend.socket(), Message(why));
  if (first || text != message_) LOG_WARN("device {}: {}; reconnecting", name(), text);
  message_ = text;
  ScheduleRetry(first);
}

void Mediator::Impl::Hold(const absl::Status& why) {
  link_.state = LinkState::kHeld;
  message_ = fmt::format("held: {}", Message(why));
  LOG_ERROR("device {}: back-end {} is back, but the device stays stopped: {}", name(),
            options_.backend.socket(), Message(why));
}

void Mediator::Impl::FinishHello() {
  auto features = link_.frontend->FinishGetFeatures(RequestDeadline());
  absl::Status status = features.ok() ? Negotiate(*features) : features.status();
  if (status.ok()) {
    link_.state = LinkState::kReady;
    status = Build();
  }
  if (absl::IsFailedPrecondition(status)) {
    Hold(status);
    return;
  }
  if (!status.ok()) {
    LoseBackend(status);
    return;
  }
  if (listen_.fd() < 0) {
    if (absl::Status listening = Listen(); !listening.ok()) {
      message_ = Message(listening);
      LOG_ERROR("device {}: {}", name(), message_);
      return;
    }
  }
  if (rebuild_counts_) {
    ++reconnects_;
    LOG_INFO("device {}: back-end {} reconnected, the device goes on", name(), options_.backend.socket());
  }
  rebuild_counts_ = false;
  message_.clear();
  backoff_ = {};
}

absl::Status Mediator::Impl::Negotiate(uint64_t features) {
  Frontend& fe = *link_.frontend;
  const Deadline deadline = RequestDeadline();
  Offer offer;
  offer.features = features;
  if (features & virtio::kVhostUserFProtocolFeatures) {
    ASSIGN_OR_RETURN(offer.protocol_features, fe.GetU64(Request::kGetProtocolFeatures, deadline));
  }
  if (record_.features) {
    uint64_t missing = *record_.features & ~virtio::kVhostOnly & ~features;
    if (missing) {
      return Error(absl::StatusCode::kFailedPrecondition,
                   "it does not offer {} any more, which the guest uses",
                   virtio::FeatureNames(missing, options_.spec.class_()));
    }
  }
  if (uint64_t missing = record_.protocol_features & ~kOwnProtocolFeatures & ~offer.protocol_features;
      missing) {
    return Error(absl::StatusCode::kFailedPrecondition, "it does not offer {} any more, which the VMM uses",
                 virtio::ProtocolFeatureNames(missing));
  }
  offer_.features = offer.features;
  offer_.protocol_features = offer.protocol_features;
  if (offer.protocol_features) RETURN_IF_ERROR(fe.SetProtocolFeatures(EffectiveProtocolFeatures(), deadline));
  if (offer.protocol_features & pf::kMq) {
    ASSIGN_OR_RETURN(offer.queues, fe.GetU64(Request::kGetQueueNum, deadline));
    if (offer.queues == 0 || offer.queues > kMaxVrings) {
      return Error(absl::StatusCode::kInvalidArgument, "GET_QUEUE_NUM: {} queues", offer.queues);
    }
  }
  if (offer.protocol_features & pf::kConfigureMemSlots) {
    ASSIGN_OR_RETURN(offer.memory_slots, fe.GetU64(Request::kGetMaxMemSlots, deadline));
    if (offer.memory_slots == 0) return absl::InvalidArgumentError("GET_MAX_MEM_SLOTS: none");
  }
  if (offer.protocol_features & pf::kBackendReq) RETURN_IF_ERROR(fe.OpenChannel(deadline));
  RETURN_IF_ERROR(fe.Set(Request::kSetOwner, {}, {}, deadline));
  offer_ = offer;
  offer_known_ = true;
  RefreshConfig();
  // RefreshConfig loses the link when the back-end goes away meanwhile.
  return link_.frontend ? absl::OkStatus() : absl::UnavailableError("the back-end hung up");
}

void Mediator::Impl::RefreshConfig() {
  const uint32_t size = std::max<uint32_t>(ConfigSize(), static_cast<uint32_t>(config_.size()));
  if (!(offer_.protocol_features & pf::kConfig) || size == 0) return;
  auto config = link_.frontend->GetConfig(0, size, RequestDeadline());
  if (config.ok()) {
    config_ = std::move(*config);
  } else if (!absl::IsFailedPrecondition(config.status())) {
    LoseBackend(config.status());
  }
}

uint64_t Mediator::Impl::EffectiveFeatures() const {
  uint64_t features = record_.features.value_or(0);
  if (logging_) features |= virtio::kVhostFLogAll;
  // Without a status in use there is nothing to suspend by. The VMM decides about that (see kWanted).
  if (record_.protocol_features & offer_.protocol_features & pf::kStatus)
    features |= offer_.features & virtio::kFSuspend;
  return features;
}

uint64_t Mediator::Impl::EffectiveProtocolFeatures() const {
  uint64_t features = offer_.protocol_features & kWanted;
  features |= record_.protocol_features & offer_.protocol_features & pf::kStatus;
  // For GET_VRING_BASE_SKIP_DRAIN, which is asked for only where it is known what the answers mean.
  if ((features & pf::kInflightShmfd) && quirks_.inflight != virtio::InflightKind::kUnknown)
    features |= offer_.protocol_features & pf::kSkipDrain;
  return features;
}

absl::Status Mediator::Impl::SendFeatures() {
  const uint64_t features = EffectiveFeatures();
  if (link_.features_sent == features) return absl::OkStatus();
  RETURN_IF_ERROR(link_.frontend->SetU64(Request::kSetFeatures, features, RequestDeadline(), /*fence=*/true));
  link_.features_sent = features;
  return absl::OkStatus();
}

absl::Status Mediator::Impl::SendMemory() {
  link_.memory_sent = true;
  const auto& regions = record_.memory.regions();
  if (regions.size() <= kMaxTableRegions) {
    MemTableHeader header{static_cast<uint32_t>(regions.size()), 0};
    std::vector<uint8_t> payload(sizeof header + regions.size() * sizeof(MemRegion));
    std::memcpy(payload.data(), &header, sizeof header);
    std::vector<int> fds;
    for (size_t i = 0; i < regions.size(); ++i) {
      std::memcpy(payload.data() + sizeof header + i * sizeof(MemRegion), &regions[i].wire,
                  sizeof(MemRegion));
      fds.push_back(regions[i].fd.get());
    }
    return link_.frontend->Set(Request::kSetMemTable, payload, fds, RequestDeadline(), /*fence=*/true);
  }
  if (!(offer_.protocol_features & pf::kConfigureMemSlots)) {
    return absl::FailedPreconditionError(
        "more memory regions than a back-end without CONFIGURE_MEM_SLOTS can hold");
  }
  for (const auto& region : regions) {
    MemReg payload{0, region.wire};
    int fd = region.fd.get();
    RETURN_IF_ERROR(
        link_.frontend->Set(Request::kAddMemReg, Bytes(payload), {&fd, 1}, RequestDeadline(), true));
  }
  return absl::OkStatus();
}

absl::Status Mediator::Impl::SendVringAddr(uint32_t index) {
  VringAddr addr = *record_.vrings[index].addr;
  addr.index = index;
  if (logging_) {
    addr.flags = kVringFLog;
    // Split: the used ring. Packed: DPDK logs used descriptors at this address plus 16 bytes each, so it must
    // be that of the descriptor ring.
    if (record_.packed()) {
      ASSIGN_OR_RETURN(virtio::PackedRing ring, record_.Packed(index));
      addr.log_guest_addr = ring.desc;
    } else {
      ASSIGN_OR_RETURN(virtio::SplitRing ring, record_.Split(index));
      addr.log_guest_addr = ring.used;
    }
  }
  return link_.frontend->Set(Request::kSetVringAddr, Bytes(addr), {}, RequestDeadline(), logging_);
}

absl::Status Mediator::Impl::SendNotifier(Request request, uint32_t index, const Notifier& notifier) {
  uint64_t value = index | (notifier.fd ? 0 : kVringNoFd);
  int fd = notifier.fd.get();
  return link_.frontend->Set(request, Bytes(value),
                             notifier.fd ? std::span<const int>(&fd, 1) : std::span<const int>(),
                             RequestDeadline());
}

absl::Status Mediator::Impl::Forward(const absl::Status& status, absl::Status* refused) {
  if (status.ok()) return absl::OkStatus();
  if (absl::IsFailedPrecondition(status)) {
    *refused = status;
  } else if (link_.frontend && link_.frontend->overdue() && Armed()) {
    AwaitOverdue(status);
  } else if (link_.frontend) {
    LoseBackend(status);
  }
  return absl::OkStatus();
}

void Mediator::Impl::AwaitOverdue(const absl::Status& why) {
  link_.state = LinkState::kOverdue;
  message_ = fmt::format("back-end {}: {}; waiting for it", options_.backend.socket(), Message(why));
  LOG_WARN("device {}: {}", name(), message_);
}

absl::Status Mediator::Impl::Build() {
  RETURN_IF_ERROR(BuildDevice());
  return BuildRings();
}

absl::Status Mediator::Impl::BuildDevice() {
  if (!record_.features) return absl::OkStatus();  // the VMM has not got that far
  Frontend& fe = *link_.frontend;
  RETURN_IF_ERROR(SendFeatures());
  if (record_.mtu) RETURN_IF_ERROR(fe.SetU64(Request::kNetSetMtu, *record_.mtu, RequestDeadline()));
  for (const ConfigWrite& write : record_.config_writes) {
    ConfigHeader header{write.offset, static_cast<uint32_t>(write.data.size()), write.flags};
    std::vector<uint8_t> payload(sizeof header + write.data.size());
    std::memcpy(payload.data(), &header, sizeof header);
    std::copy(write.data.begin(), write.data.end(), payload.begin() + sizeof header);
    RETURN_IF_ERROR(fe.Set(Request::kSetConfig, payload, {}, RequestDeadline()));
  }
  if (!record_.memory.empty()) {
    RETURN_IF_ERROR(SendMemory());
    if (logging_) RETURN_IF_ERROR(EnsureLog());
  }
  return absl::OkStatus();
}

absl::Status Mediator::Impl::BuildRings() {
  RETURN_IF_ERROR(EnsureStateLoaded(RequestDeadline()));
  if (!record_.features) return absl::OkStatus();
  held_rings_.clear();
  for (uint32_t index : StartOrder()) {
    if (record_.vrings[index].started) RETURN_IF_ERROR(StartVring(index));
  }
  return EnableRings();
}

absl::Status Mediator::Impl::EnableRings() {
  for (uint32_t index : StartOrder()) RETURN_IF_ERROR(SendEnable(index));
  Frontend& fe = *link_.frontend;
  if (record_.status.value_or(0) != 0 && (fe.protocol_features() & pf::kStatus)) {
    RETURN_IF_ERROR(fe.SetU64(Request::kSetStatus, *record_.status, RequestDeadline()));
  }
  return absl::OkStatus();
}

absl::Status Mediator::Impl::SendEnable(uint32_t index) {
  const std::optional<bool> enabled = record_.vrings[index].enabled;
  if (!enabled) return absl::OkStatus();
  if (auto told = link_.enabled.find(index); told != link_.enabled.end() && told->second == *enabled)
    return absl::OkStatus();
  VringState state{index, *enabled ? 1u : 0u};
  RETURN_IF_ERROR(link_.frontend->Set(Request::kSetVringEnable, Bytes(state), {}, RequestDeadline()));
  link_.enabled[index] = *enabled;
  return absl::OkStatus();
}

void Mediator::Impl::FinishOverdue() {
  auto reply = link_.frontend->FinishOverdue(RequestDeadline());
  if (!reply.ok()) {
    LoseBackend(reply.status());
    return;
  }
  LOG_INFO("device {}: the back-end answered {}", name(), RequestName(reply->header.request));
  if (reply->request() == Request::kGetVringBase) {
    auto state = reply->As<VringState>();
    auto it = link_.vrings.find(state.index);
    if (it == link_.vrings.end() || !it->second.must_stop) {
      LoseBackend(
          Error(absl::StatusCode::kInvalidArgument, "reply to GET_VRING_BASE is about ring {}", state.index));
      return;
    }
    it->second = AppliedVring{.running = false, .call_stale = false, .must_stop = false, .base = state.num};
    if (VringRecord& vring = record_.vrings[state.index]; vring.started) {
      // Stopped for a swap that did not come about, or stopped and started again by the VMM meanwhile: it
      // goes on where it was.
      vring.base = vring.told = state.num;
    }
    MarkRingDirty(state.index);
    Memorize(state.index);
  }
  Reconcile();
}

void Mediator::Impl::Reconcile() {
  Frontend& fe = *link_.frontend;
  // Rings that the VMM stopped meanwhile are stopped now, each with as much patience as the first. One that
  // is not empty stays as it is (see StopVring).
  for (auto& [index, applied] : link_.vrings) {
    if (!applied.must_stop || ResumesInPlace(index)) continue;
    if (RunsEmpty() && !record_.packed() && record_.vrings[index].addr &&
        AvailIndex(index) != UsedIndex(index))
      continue;
    auto base = fe.GetVringBase(index, Deadline::After(kStopPatience));
    if (!base.ok()) {
      if (fe.overdue()) {
        AwaitOverdue(base.status());
      } else {
        LoseBackend(base.status());
      }
      return;
    }
    applied = AppliedVring{.running = false, .call_stale = false, .must_stop = false, .base = *base};
    MarkRingDirty(index);
    Memorize(index);
  }
  link_.state = LinkState::kReady;
  message_.clear();
  auto apply = [&]() -> absl::Status {
    if (record_.features) RETURN_IF_ERROR(SendFeatures());
    if (std::exchange(link_.memory_stale, false)) {
      // Slot by slot there is no "replace": such a table is told to a fresh connection.
      if (record_.memory.regions().size() > kMaxTableRegions)
        return absl::UnavailableError("the memory table changed");
      RETURN_IF_ERROR(SendMemory());
    }
    held_rings_.clear();
    for (uint32_t index : StartOrder()) {
      VringRecord& vring = record_.vrings[index];
      AppliedVring& applied = link_.vrings[index];
      if (vring.started && (!applied.running || applied.must_stop)) {
        RETURN_IF_ERROR(StartVring(index));
      } else if (vring.started && applied.kick_stale) {
        RETURN_IF_ERROR(RestoreKick(index));
      } else if (vring.started && std::exchange(applied.call_stale, false)) {
        RETURN_IF_ERROR(SendNotifier(Request::kSetVringCall, index, vring.call));
        Inject(vring.call);
      }
    }
    return EnableRings();
  };
  absl::Status applied = apply();
  if (absl::IsFailedPrecondition(applied)) {
    Hold(applied);
  } else if (!applied.ok()) {
    LoseBackend(applied);
  }
}

}  // namespace baton::vhost
