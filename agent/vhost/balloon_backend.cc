#include "agent/vhost/balloon_backend.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <mutex>

#include "agent/vhost/device_server.h"
#include "agent/virtio/balloon.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

constexpr uint64_t kBalloonOffer = virtio::kBalloonFFreePageHint | virtio::kBalloonFPagePoison |
                                   virtio::kBalloonFReporting | virtio::kFVersion1 | virtio::kFIndirectDesc |
                                   virtio::kFEventIdx;
// Chains taken before their buffers are returned: enough for a batch, and the queue never fills up with what
// was handled.
constexpr int kBalloonBatch = 32;

v1::BalloonState ToProto(const virtio::BalloonState& state) {
  v1::BalloonState out;
  out.set_num_pages(state.num_pages);
  out.set_actual(state.actual);
  out.set_cmd_id(state.cmd_id);
  out.set_poison_val(state.poison_val);
  out.set_last_id(state.last_id);
  for (uint32_t id : state.open_ids) out.add_open_ids(id);
  return out;
}

virtio::BalloonState FromProto(const v1::BalloonState& state) {
  virtio::BalloonState out;
  out.num_pages = state.num_pages();
  out.actual = state.actual();
  out.cmd_id = state.cmd_id();
  out.poison_val = state.poison_val();
  out.last_id = state.last_id();
  out.open_ids.assign(state.open_ids().begin(), state.open_ids().end());
  // A message without any field set: a balloon that nobody has used yet.
  if (out.last_id == 0 && out.cmd_id == virtio::kHintStop) out.cmd_id = virtio::kHintDone;
  return out;
}

}  // namespace

class BalloonBackend::Impl final : private DeviceModel, private virtio::BalloonSink {
 public:
  explicit Impl(BalloonBackendOptions options) : options_(std::move(options)) {}

  absl::Status Begin() {
    RETURN_IF_ERROR(device_.Restore(FromProto(options_.state)));
    // Nobody waits for what a process before this one asked: the guest may have its memory back, and is told
    // so in any case, because it may not have been when that process ended.
    EndSession();
    // Held until server_ is there: the model's calls wait for it.
    std::lock_guard lock(mutex_);
    ASSIGN_OR_RETURN(server_,
                     DeviceServer::Start({options_.name, options_.listen_path, options_.ram}, *this));
    return absl::OkStatus();
  }

  const std::string& name() const { return options_.name; }

  uint32_t poison() const {
    std::lock_guard lock(mutex_);
    return device_.poison();
  }

  absl::Status Publish(memory::HintListener& listener) {
    std::lock_guard lock(mutex_);
    if (listener_) return absl::FailedPreconditionError("hints are being asked for already");
    if (!running_)
      return Error(absl::StatusCode::kFailedPrecondition, "the guest has not started its balloon");
    ASSIGN_OR_RETURN(uint32_t id, device_.StartHinting());
    LOG_DEBUG("device {}: asking for hints with command id {:#x}", options_.name, id);
    listener_ = &listener;
    counts_.hinted = 0;
    ++counts_.sessions;
    SaveState();
    Notify();
    return absl::OkStatus();
  }

  void PublishStop() {
    std::lock_guard lock(mutex_);
    if (!listener_) return;
    device_.StopHinting();
    Notify();
  }

  void Finish() {
    std::lock_guard lock(mutex_);
    listener_ = nullptr;
    if (device_.hint_status() == virtio::BalloonDevice::HintStatus::kDone) return;
    EndSession();
    if (running_) Notify();
  }

  void AllowDiscard(bool allow) {
    std::lock_guard lock(mutex_);
    may_discard_ = allow;
  }

  v1::BalloonState state() const {
    std::lock_guard lock(mutex_);
    return ToProto(device_.state());
  }

  absl::Status Restore(const v1::BalloonState& state) {
    std::lock_guard lock(mutex_);
    RETURN_IF_ERROR(device_.Restore(FromProto(state)));
    if (device_.hint_status() != virtio::BalloonDevice::HintStatus::kDone) EndSession();
    SaveState();
    return absl::OkStatus();
  }

  BalloonCounts counts() const {
    std::lock_guard lock(mutex_);
    return counts_;
  }

 private:
  // --- DeviceModel, on the server's thread ---
  uint64_t features() const override { return kBalloonOffer; }
  uint32_t queues() const override { return kQueues; }
  uint32_t config_size() const override { return virtio::kBalloonConfigSize; }
  void ReadConfig(uint32_t offset, std::span<uint8_t> out) const override {
    std::lock_guard lock(mutex_);
    device_.ReadConfig(offset, out);
  }
  absl::Status WriteConfig(uint32_t offset, std::span<const uint8_t> data, bool front_end) override {
    std::lock_guard lock(mutex_);
    const uint32_t poison = device_.poison();
    RETURN_IF_ERROR(device_.WriteConfig(offset, data, front_end));
    if (device_.poison() != poison) Lose("the guest's poison value changed");
    SaveState();
    return absl::OkStatus();
  }
  void SetFeatures(uint64_t acked) override {
    std::lock_guard lock(mutex_);
    if (acked != device_.features()) Lose("the guest negotiated anew");
    device_.SetFeatures(acked);
  }
  absl::Status Serve(uint32_t index, virtio::DeviceQueue& queue, const virtio::GuestMemory& memory) override;
  void BeforeStop(uint32_t index, virtio::DeviceQueue&) override {
    std::lock_guard lock(mutex_);
    if (index == virtio::BalloonQueueIndex(device_.features(), virtio::BalloonQueue::kFreePage)) {
      running_ = false;
      Lose("the guest's balloon was stopped");
    }
  }
  void OnConnection(bool connected) override {
    if (connected) return;
    std::lock_guard lock(mutex_);
    running_ = false;
    Lose("the VMM disconnected");
    device_.SetFeatures(0);
  }

  // --- BalloonSink, within Serve ---
  void OnInflate(uint64_t gpa, uint64_t size) override { Discard(gpa, size); }
  void OnDeflate(uint64_t, uint64_t) override {}
  void OnReported(uint64_t gpa, uint64_t size) override { Discard(gpa, size); }
  void OnHintStart() override {
    if (listener_) listener_->OnStart();
  }
  void OnHint(uint64_t gpa, uint64_t size) override;
  void OnHintStop() override {
    if (listener_) listener_->OnStop();
  }

  void Discard(uint64_t gpa, uint64_t size);
  // All below with mutex_ held.
  void Lose(const char* why) {
    if (listener_) listener_->OnLost(why);
    listener_ = nullptr;
    if (device_.hint_status() != virtio::BalloonDevice::HintStatus::kDone) EndSession();
  }
  // DONE in the configuration space; the guest hears of it at once, or as soon as its balloon runs.
  void EndSession() {
    device_.FinishHinting();
    if (!running_) notify_at_start_ = true;
  }
  void Notify() {
    server_->Post([this] { server_->ConfigChanged(); });
  }
  void SaveState() {
    if (options_.on_state) options_.on_state(ToProto(device_.state()));
  }

  const BalloonBackendOptions options_;
  mutable std::mutex mutex_;
  virtio::BalloonDevice device_;              // guarded by mutex_, as the rest of this block
  memory::HintListener* listener_ = nullptr;  // of the session under way
  bool may_discard_ = true;
  bool running_ = false;  // the queue of hints is
  bool notify_at_start_ = false;
  BalloonCounts counts_;
  // Of the server's thread.
  virtio::Chain chain_;
  std::vector<virtio::BalloonBuffer> buffers_;

  // The last member, and not reset by hand: its thread is in the model's calls, or in what was posted, until
  // its destructor ends, and these use the pointer. reset() makes it null before that, the pointer's own
  // destructor does not.
  std::unique_ptr<DeviceServer> server_;
};

absl::Status BalloonBackend::Impl::Serve(uint32_t index, virtio::DeviceQueue& queue,
                                         const virtio::GuestMemory& memory) {
  std::lock_guard lock(mutex_);
  const auto kind = virtio::BalloonQueueAt(device_.features(), index);
  if (!kind) return absl::InvalidArgumentError("no queue of what was negotiated");
  if (*kind == virtio::BalloonQueue::kFreePage && !running_) {
    running_ = true;
    if (std::exchange(notify_at_start_, false)) Notify();
  }
  for (bool more = true; more;) {
    int taken = 0;
    for (; taken < kBalloonBatch; ++taken) {
      ASSIGN_OR_RETURN(bool popped, queue.Pop(&chain_));
      if (!popped) break;
      buffers_.clear();
      for (const virtio::Segment& segment : chain_.Readable())
        buffers_.push_back({segment.gpa, segment.len, false});
      for (const virtio::Segment& segment : chain_.Writable())
        buffers_.push_back({segment.gpa, segment.len, true});
      device_.HandleChain(*kind, chain_.id, buffers_, memory, *this);
      RETURN_IF_ERROR(queue.Stage(chain_.id, 0));
    }
    queue.Publish();
    if (taken == kBalloonBatch) continue;
    ASSIGN_OR_RETURN(more, queue.EnableKicks());
  }
  return absl::OkStatus();
}

void BalloonBackend::Impl::OnHint(uint64_t gpa, uint64_t size) {
  if (!listener_) return;
  // Whole pages only: of one that is hinted in part, the rest may be in use.
  const uint64_t end = (gpa + size) & ~(memory::kPageSize - 1);
  gpa = (gpa + memory::kPageSize - 1) & ~(memory::kPageSize - 1);
  while (gpa < end) {
    const auto place = options_.ram->Find(gpa);
    if (!place) return;  // not memory
    const uint64_t here = std::min(end - gpa, place->contiguous);
    listener_->OnHint(place->block, place->offset >> memory::kPageShift, here >> memory::kPageShift);
    counts_.hinted += here;
    gpa += here;
  }
}

void BalloonBackend::Impl::Discard(uint64_t gpa, uint64_t size) {
  const uint64_t end = (gpa + size) & ~(memory::kPageSize - 1);
  gpa = (gpa + memory::kPageSize - 1) & ~(memory::kPageSize - 1);
  while (gpa < end) {
    const auto place = options_.ram->Find(gpa);
    if (!place) return;
    const uint64_t here = std::min(end - gpa, place->contiguous);
    counts_.reported += here;
    // During a migration the file's holes and the dirty sources must agree on what was there.
    if (may_discard_ && device_.poison() == 0) {
      if (::fallocate(options_.ram->blocks()[place->block].fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      static_cast<off_t>(place->offset), static_cast<off_t>(here)) == 0) {
        counts_.discarded += here;
      } else {
        LOG_WARN("device {}: giving {} free bytes back to the host: errno {}", options_.name, here, errno);
      }
    }
    gpa += here;
  }
}

BalloonBackend::BalloonBackend(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
BalloonBackend::~BalloonBackend() = default;

absl::StatusOr<std::unique_ptr<BalloonBackend>> BalloonBackend::Start(BalloonBackendOptions options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  RETURN_IF_ERROR(impl->Begin());
  return std::unique_ptr<BalloonBackend>(new BalloonBackend(std::move(impl)));
}

const std::string& BalloonBackend::name() const { return impl_->name(); }
uint32_t BalloonBackend::poison() const { return impl_->poison(); }
absl::Status BalloonBackend::Publish(memory::HintListener& listener) { return impl_->Publish(listener); }
void BalloonBackend::PublishStop() { impl_->PublishStop(); }
void BalloonBackend::Finish() { impl_->Finish(); }
void BalloonBackend::AllowDiscard(bool allow) { impl_->AllowDiscard(allow); }
v1::BalloonState BalloonBackend::state() const { return impl_->state(); }
absl::Status BalloonBackend::Restore(const v1::BalloonState& state) { return impl_->Restore(state); }
BalloonCounts BalloonBackend::counts() const { return impl_->counts(); }

}  // namespace baton::vhost
