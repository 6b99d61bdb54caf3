#include "agent/vhost/mediator.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <future>

#include "agent/vhost/inflight_answer.h"
#include "agent/vhost/mediator_impl.h"
#include "agent/vhost/notify.h"
#include "agent/virtio/features.h"
#include "common/log.h"

namespace baton::vhost {

namespace {
// `timeout` of a poll (-1: none), or the time until `when` if that is sooner.
int Sooner(int timeout, Clock::time_point when) {
  const int until = Deadline::At(when).PollTimeoutMs();
  return timeout < 0 ? until : std::min(timeout, until);
}
}  // namespace

absl::StatusOr<std::vector<memory::GpaRange>> LayoutFor(const std::vector<MemoryRegionInfo>& regions,
                                                        const memory::GuestRam& ram) {
  std::vector<memory::GpaRange> layout;
  for (const MemoryRegionInfo& region : regions) {
    auto it = std::find_if(ram.blocks().begin(), ram.blocks().end(), [&](const memory::RamBlock& block) {
      return block.device() == region.device && block.inode() == region.inode;
    });
    if (it == ram.blocks().end()) {
      return Error(absl::StatusCode::kFailedPrecondition,
                   "guest memory at {:#x} is in a file that is none of the VM's RAM blocks", region.gpa);
    }
    layout.push_back(
        {region.gpa, region.size, static_cast<uint32_t>(it - ram.blocks().begin()), region.mmap_offset});
  }
  return layout;
}

Mediator::Impl::Impl(MediatorOptions options, MediatorCallbacks callbacks)
    : options_(std::move(options)),
      callbacks_(std::move(callbacks)),
      quirks_(QuirksOf(options_.backend.kind())),
      // An earlier mediator may have died with it up.
      fenced_(options_.vmm_returns && HasFence()) {}

Mediator::Impl::~Impl() {
  quit_ = true;
  uint64_t one = 1;
  if (wake_ && ::write(wake_.get(), &one, sizeof one) < 0) LOG_WARN("device {}: wake-up failed", name());
  if (thread_.joinable()) thread_.join();
}

absl::Status Mediator::Impl::StartUp() {
  wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_) return ErrnoError(errno, "eventfd");
  errors_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!errors_) return ErrnoError(errno, "epoll");
  // Says when a back-end puts its socket back. Without it (no such directory yet) the retries alone find it.
  inotify_.reset(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));

  ASSIGN_OR_RETURN(memo_, DeviceMemo::Open(options_.memo_dir, name(), /*fresh=*/!options_.vmm_returns));
  RecallTakenOver();

  Deadline deadline = Deadline::After(options_.connect_timeout);
  absl::Status dialled = Dial();
  if (dialled.ok()) {
    pollfd p{link_.frontend->fd(), POLLIN, 0};
    if (::poll(&p, 1, deadline.PollTimeoutMs()) == 0) {
      dialled = Error(absl::StatusCode::kDeadlineExceeded,
                      "accepts the connection but does not answer (stopped, or busy with another front-end)");
    } else {
      auto features = link_.frontend->FinishGetFeatures(deadline);
      dialled = features.ok() ? Negotiate(*features) : features.status();
    }
  }
  if (dialled.ok()) {
    link_.state = LinkState::kReady;
  } else {
    absl::Status status =
        Annotate(dialled, fmt::format("device {}: back-end {}", name(), options_.backend.socket()));
    if (options_.backend_required) return status;
    LoseBackend(dialled);
  }
  if (offer_known_) RETURN_IF_ERROR(Listen());
  Publish();
  thread_ = std::thread([this] { Loop(); });
  return absl::OkStatus();
}

absl::Status Mediator::Impl::Listen() {
  auto listening = UnixListener::Listen(options_.listen_path);
  if (!listening.ok()) return Annotate(listening.status(), fmt::format("device {}", name()));
  listen_ = std::move(*listening);
  return absl::OkStatus();
}

void Mediator::Impl::Loop() {
  BlockSignals();
  while (!quit_) {
    int timeout = -1;
    if (link_.state == LinkState::kDown) timeout = Deadline::At(retry_at_).PollTimeoutMs();
    if (link_.state == LinkState::kHello) timeout = Deadline::At(link_.hello_until).PollTimeoutMs();
    if (ErrorsMuted()) {
      const int unmute = Deadline::At(errors_muted_until_).PollTimeoutMs();
      timeout = timeout < 0 ? unmute : std::min(timeout, unmute);
    }
    if (!held_rings_.empty()) timeout = Sooner(timeout, held_until_);
    if (announce_mac_) timeout = Sooner(timeout, announce_at_);
    if (untold_) timeout = Sooner(timeout, Clock::now() + kVmmPause);
    const bool active = HandleEvents(timeout);
    if (!held_rings_.empty() && Ready()) {
      if (absl::Status released = ReleaseHeldRings(false); !released.ok()) LoseBackend(released);
    }
    if (announce_mac_ && Clock::now() >= announce_at_) AnnounceNow();
    // Nobody waits for anything but the last ring of a stop, and what is told grows with the rings: in
    // between it is told only when the VMM pauses.
    untold_ = active && StopUnderWay();
    if (!untold_) Publish();
  }
}

bool Mediator::Impl::HandleEvents(int timeout_ms) {
  enum { kWake, kListen, kVmm, kBackend, kChannel, kInotify, kErrors, kCount };
  const bool down = link_.state == LinkState::kDown;
  pollfd p[kCount] = {
      {wake_.get(), POLLIN, 0},
      {vmm_.valid() ? -1 : listen_.fd(), POLLIN, 0},
      {vmm_.fd(), POLLIN, 0},
      {link_.frontend ? link_.frontend->fd() : -1, POLLIN, 0},
      {link_.frontend ? link_.frontend->channel_fd() : -1, POLLIN, 0},
      {down ? inotify_.get() : -1, POLLIN, 0},
      {ErrorsMuted() ? -1 : errors_.get(), POLLIN, 0},
  };
  int n = ::poll(p, kCount, timeout_ms);
  wakeups_.fetch_add(1, std::memory_order_relaxed);
  if (n < 0) return false;
  if (p[kWake].revents) {
    uint64_t count;
    if (::read(wake_.get(), &count, sizeof count) < 0) LOG_DEBUG("device {}: spurious wake-up", name());
    RunPosted();
    TellOfConfigChange();  // Announce makes one
    return true;           // descriptors may have changed
  }
  if (p[kErrors].revents) OnErrors();
  if (p[kChannel].revents) link_.frontend->ServeChannel();
  if (p[kBackend].revents) {
    switch (link_.state) {
      case LinkState::kHello:
        FinishHello();
        break;
      case LinkState::kOverdue:
        FinishOverdue();
        break;
      default:
        if (absl::Status unasked = link_.frontend->Unasked(); !unasked.ok()) LoseBackend(unasked);
    }
  } else if (link_.state == LinkState::kHello && Deadline::At(link_.hello_until).Expired()) {
    LoseBackend(absl::DeadlineExceededError("the back-end accepts the connection but does not answer"));
  }
  if (link_.state == LinkState::kDown) {
    const Appearance appearance = p[kInotify].revents ? ReadAppearance() : Appearance();
    if (appearance.anything || Deadline::At(retry_at_).Expired()) TryConnect(appearance.socket);
  }
  TellOfConfigChange();
  if (p[kListen].revents) AcceptVmm();
  if (p[kVmm].revents && vmm_.valid()) ServeVmm();
  return n > 0;
}

void Mediator::Impl::TellOfConfigChange() {
  if (!config_changed_ || !Ready()) return;
  config_changed_ = false;
  RefreshConfig();
  if (!record_.channel.valid()) return;
  absl::Status sent = record_.channel.Send(static_cast<uint32_t>(BackendRequest::kConfigChange), kVersion, {},
                                           {}, Deadline::After(std::chrono::milliseconds(100)));
  if (!sent.ok())
    LOG_WARN("device {}: the VMM was not told of a configuration change: {}", name(), Message(sent));
}

bool Mediator::Impl::WorkWaits() const {
  std::lock_guard lock(mutex_);
  return quit_ || !posted_.empty();
}

void Mediator::Impl::RunPosted() {
  std::deque<std::function<void()>> work;
  {
    std::lock_guard lock(mutex_);
    work.swap(posted_);
  }
  for (auto& item : work) item();
}

absl::Status Mediator::Impl::Run(std::function<absl::Status()> work, Deadline deadline, bool changes) {
  auto promise = std::make_shared<std::promise<absl::Status>>();
  auto future = promise->get_future();
  {
    std::lock_guard lock(mutex_);
    posted_.push_back([this, promise, changes, work = std::move(work)] {
      absl::Status result = work();
      if (changes) Publish();  // the caller sees what it caused
      promise->set_value(result);
    });
  }
  uint64_t one = 1;
  if (::write(wake_.get(), &one, sizeof one) < 0) return ErrnoError(errno, "waking the mediator");
  if (future.wait_until(deadline.when()) == std::future_status::timeout) {
    return Error(absl::StatusCode::kDeadlineExceeded,
                 "device {}: its mediator is busy waiting for the back-end", name());
  }
  return future.get();
}

v1::Device Mediator::Impl::BuildDescription() const {
  v1::Device d;
  DescribeIn(&d);
  return d;
}

void Mediator::Impl::DescribeIn(v1::Device* device) const {
  v1::Device& d = *device;
  d.Clear();
  d.set_name(name());
  d.set_class_(options_.spec.class_());
  *d.mutable_backend() = options_.backend;
  bool stopped = false;
  for (const auto& [index, vring] : record_.vrings) {
    if (vring.num == 0) continue;
    v1::Queue* q = d.add_queues();
    q->set_index(index);
    q->set_size(vring.num);
    q->set_started(vring.started);
    q->set_enabled(vring.enabled.value_or(vring.started));
    q->set_last_avail(vring.told.value_or(0));
    stopped |= vring.told.has_value();
  }
  if (link_.state == LinkState::kHeld) {
    d.set_state(v1::Device::HELD);
  } else if (!Ready()) {
    d.set_state(v1::Device::BACKEND_LOST);
  } else if (record_.any_started()) {
    d.set_state(v1::Device::ACTIVE);
  } else {
    d.set_state(stopped ? v1::Device::STOPPED_DEVICE : v1::Device::IDLE_DEVICE);
  }
  d.set_acked_features(record_.features.value_or(0) & ~virtio::kVhostOnly);
  d.set_offered_features(offer_.features);
  d.set_protocol_features(link_.frontend ? link_.frontend->protocol_features() : 0);
  d.set_offered_protocol_features(offer_.protocol_features);
  d.set_config(std::string(config_.begin(), config_.end()));
  d.set_message(message_);
  d.set_reconnects(reconnects_);
  d.set_swaps(swaps_);
  if (const MemoDevice memo = memo_->device(); memo.events > 0) {
    d.set_events(memo.events);
    v1::DeviceEvent& event = *d.mutable_last_event();
    event.set_kind(static_cast<v1::DeviceEvent::Kind>(memo.event_kind));
    event.set_queue(memo.event_queue);
    event.set_held(memo.event_held);
    event.mutable_time()->set_seconds(memo.event_time_ns / 1'000'000'000);
    event.mutable_time()->set_nanos(static_cast<int32_t>(memo.event_time_ns % 1'000'000'000));
    event.set_sequence(memo.events);
  }
  d.set_max_queues(static_cast<uint32_t>(offer_.queues));
  d.set_max_memory_slots(static_cast<uint32_t>(offer_.memory_slots));
  d.set_memory_regions(static_cast<uint32_t>(record_.memory.regions().size()));
  const HandoffObstacles obstacles =
      ObstaclesOf(options_.spec.class_(), options_.backend.kind(), offer_.protocol_features, HasFence());
  d.set_no_handoff(obstacles.handoff);
  d.set_no_handoff_of_writes(obstacles.writes);
  d.set_no_takeover(obstacles.takeover);
}

void Mediator::Impl::Publish() {
  v1::Device& d = description_;
  DescribeIn(&d);
  bool changed;
  {
    std::lock_guard lock(mutex_);
    std::string bytes = d.SerializeAsString();
    changed = bytes != published_bytes_;
    if (changed) {
      published_ = d;
      published_bytes_ = std::move(bytes);
    }
    published_expected_ = expected_result_;
    published_vmm_ = vmm_.valid();
    if (stop_began_ && stop_ended_) stop_duration_ = *stop_ended_ - *stop_began_;
    stop_told_.set_handed_off(stop_.requests());
    stop_told_.set_answer(stop_.handed_off.empty() ? v1::DRAIN : v1::HANDOFF);
    stop_told_.set_why(stop_.drain_reason);
    ++change_count_;
  }
  changed_.notify_all();
  if (changed && callbacks_.on_change) callbacks_.on_change(d);
}

v1::Device Mediator::Impl::Describe() const {
  std::lock_guard lock(mutex_);
  return published_;
}

bool Mediator::Impl::WaitForVmm(Deadline deadline) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline.when(), [&] { return published_vmm_; });
}

// --- the public face ---

void ForgetDevice(const std::string& memo_dir, const std::string& device) {
  DeviceMemo::Remove(memo_dir, device);
}

Mediator::Mediator(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Mediator::~Mediator() = default;

absl::StatusOr<std::unique_ptr<Mediator>> Mediator::Start(MediatorOptions options,
                                                          MediatorCallbacks callbacks) {
  auto impl = std::make_unique<Impl>(std::move(options), std::move(callbacks));
  RETURN_IF_ERROR(impl->StartUp());
  return std::unique_ptr<Mediator>(new Mediator(std::move(impl)));
}

const std::string& Mediator::name() const { return impl_->name(); }
bool Mediator::WaitForVmm(Deadline deadline) const { return impl_->WaitForVmm(deadline); }
v1::Device Mediator::Describe() const { return impl_->Describe(); }
bool Mediator::Active() const { return impl_->Describe().state() == v1::Device::ACTIVE; }
absl::Status Mediator::StartLogging(Deadline deadline) { return impl_->StartLogging(deadline); }
absl::Status Mediator::HarvestLog(memory::PageSets& out) { return impl_->HarvestLog(out); }
absl::Status Mediator::StopLogging(Deadline deadline) { return impl_->StopLogging(deadline); }
absl::Status Mediator::ArmStop(StopOrder order) { return impl_->ArmStop(std::move(order)); }
absl::StatusOr<v1::DeviceState> Mediator::CollectState(Deadline deadline) {
  return impl_->CollectState(deadline);
}
v1::DeviceStop Mediator::stop() const { return impl_->stop(); }
int64_t Mediator::stop_began_ns() const { return impl_->stop_began_ns(); }
bool Mediator::TakesInflight() const { return impl_->TakesInflight(); }
bool Mediator::OrdersInflight() const { return impl_->OrdersInflight(); }
absl::Status Mediator::DisarmStop() { return impl_->DisarmStop(); }
absl::Status Mediator::ExpectState(const v1::DeviceState& state) { return impl_->ExpectState(state); }
absl::Status Mediator::CheckExpected() const { return impl_->CheckExpected(); }
absl::StatusOr<SwapResult> Mediator::Swap(const SwapOptions& wanted, std::function<absl::Status()> record,
                                          Deadline deadline) {
  return impl_->Swap(wanted, std::move(record), deadline);
}
absl::Status Mediator::Announce(Deadline deadline) { return impl_->Announce(deadline); }
uint64_t Mediator::wakeups() const { return impl_->wakeups(); }

namespace {

class MediatorDirtySource : public memory::DirtySource {
 public:
  MediatorDirtySource(Mediator* mediator, Duration timeout) : mediator_(mediator), timeout_(timeout) {}
  ~MediatorDirtySource() override { Stop(); }
  std::string name() const override { return "vhost log of " + mediator_->name(); }
  absl::Status Start() override {
    started_ = true;
    return mediator_->StartLogging(Deadline::After(timeout_));
  }
  absl::Status Harvest(memory::PageSets& out) override { return mediator_->HarvestLog(out); }
  void Stop() override {
    if (!std::exchange(started_, false)) return;
    absl::Status stopped = mediator_->StopLogging(Deadline::After(timeout_));
    if (!stopped.ok()) LOG_WARN("{}: {}", name(), Message(stopped));
  }

 private:
  Mediator* const mediator_;
  const Duration timeout_;
  bool started_ = false;
};

}  // namespace

std::unique_ptr<memory::DirtySource> Mediator::MakeDirtySource() {
  return std::make_unique<MediatorDirtySource>(this, 2 * impl_->request_timeout());
}

}  // namespace baton::vhost
