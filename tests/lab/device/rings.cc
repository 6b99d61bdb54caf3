// The lab device's rings: start with recovery, fetching, completion, stop.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "common/log.h"
#include "tests/lab/device/lab_device.h"

namespace baton::lab {
namespace {

std::span<const virtio::PackedDesc> AsPacked(std::span<const virtio::InflightDesc> descs) {
  static_assert(sizeof(virtio::InflightDesc) == sizeof(virtio::PackedDesc));
  return {reinterpret_cast<const virtio::PackedDesc*>(descs.data()), descs.size()};
}

// The base that a ring without requests in flight and with `queue`'s positions has in `convention`.
uint32_t Encode(const virtio::DeviceQueue& queue, virtio::BaseConvention convention) {
  uint32_t base = queue.base();
  if (convention != virtio::BaseConvention::kUsed) return base;
  if (const virtio::SplitDevice* split = queue.split()) return split->used_index();
  virtio::PackedBase both = virtio::DecodePackedBase(base);
  both.avail = both.used;
  return virtio::EncodePackedBase(both);
}

}  // namespace

void LabDevice::TrackerCrash::operator()(virtio::TrackerStep step) const {
  switch (step) {
    case virtio::TrackerStep::kCounter:
      return device->CrashPoint("fetch_counter");
    case virtio::TrackerStep::kInflight:
      return device->CrashPoint("fetch_flag");
    case virtio::TrackerStep::kFreeHead:
      return device->CrashPoint("fetch_entry");
    case virtio::TrackerStep::kLinked:
      return device->CrashPoint("link_entry");
    case virtio::TrackerStep::kBatchHead:
      return device->CrashPoint("link_head");
    case virtio::TrackerStep::kUsedPosition:
      return device->CrashPoint("link_position");
    case virtio::TrackerStep::kCleared:
      return device->CrashPoint("clear_flag");
    case virtio::TrackerStep::kRecovering:
      return device->CrashPoint("recover");
    default:
      return;
  }
}

void LabDevice::Vring::Wrote(uint64_t gpa, uint64_t bytes) {
  if (!addr || !(addr->flags & vhost::kVringFLog)) return;
  // A split ring's log address is that of the used ring. A packed ring writes its descriptors, too, and
  // front-ends do not agree which of its areas the log address means: what was really written is logged.
  if (queue && queue->packed()) {
    device->log_.Mark(gpa, bytes);
  } else {
    device->log_.Mark(addr->log_guest_addr + (gpa - device_area), bytes);
  }
}

LabDevice::Vring& LabDevice::RingAt(uint32_t index) {
  auto [it, fresh] = rings_.try_emplace(index);
  if (fresh) {
    it->second.device = this;
    it->second.index = index;
    it->second.enabled = (features_ & virtio::kVhostUserFProtocolFeatures) == 0;
  }
  return it->second;
}

virtio::BaseConvention LabDevice::StopBase() const {
  return options_.base.value_or(virtio::TraitsOf(options_.kind).stop_base);
}
virtio::BaseConvention LabDevice::StartBase() const {
  return options_.base.value_or(virtio::TraitsOf(options_.kind).start_base);
}

absl::StatusOr<uint32_t> LabDevice::RecoverRing(Vring& ring, const virtio::QueueLayout& layout,
                                                virtio::InflightSet* set) {
  if (!inflight_geometry_ || ring.index >= inflight_geometry_->num_queues) return ring.base;
  ASSIGN_OR_RETURN(auto part, virtio::InflightPart(*inflight_geometry_, {inflight_.data(), inflight_.size()},
                                                   static_cast<uint16_t>(ring.index)));
  ring.tracker.emplace(TrackerCrash{this});
  RETURN_IF_ERROR(
      ring.tracker->Attach(Format(), part, ring.size, virtio::TraitsOf(options_.kind).single_completions));
  if (Format() == virtio::RingFormat::kSplit) {
    ASSIGN_OR_RETURN(const uint16_t used, memory_.memory().ReadU16(layout.device + 2));
    ASSIGN_OR_RETURN(*set, ring.tracker->RecoverSplit(used));
  } else {
    const virtio::PackedRing packed{layout.size, layout.desc, layout.driver, layout.device};
    ASSIGN_OR_RETURN(*set, ring.tracker->RecoverPacked(memory_.memory(), packed,
                                                       virtio::DecodePackedBase(ring.base).used));
  }
  uint32_t fetched = set->avail.idx, used = set->used.idx;
  if (Format() == virtio::RingFormat::kPacked) {
    fetched = virtio::EncodePackedBase({set->avail, set->used});
    used = virtio::EncodePackedBase({set->used, set->used});
  }
  const virtio::BaseConvention convention = StartBase();
  if (convention == virtio::BaseConvention::kIgnored) return fetched;
  const uint32_t expected = convention == virtio::BaseConvention::kUsed ? used : fetched;
  if (ring.base != expected) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "ring {}: base {:#x} with {} requests in the in-flight region; this back-end's is {:#x}",
                 ring.index, ring.base, set->size(), expected);
  }
  return fetched;
}

absl::Status LabDevice::StartRing(Vring& ring) {
  if (ring.started) return absl::OkStatus();
  if (!ring.addr || ring.size == 0) {
    return Error(absl::StatusCode::kFailedPrecondition, "ring {} has no size or no address", ring.index);
  }
  virtio::QueueLayout layout{.size = ring.size, .desc = 0, .driver = 0, .device = 0};
  for (auto [user, gpa] :
       {std::pair(ring.addr->desc, &layout.desc), std::pair(ring.addr->avail, &layout.driver),
        std::pair(ring.addr->used, &layout.device)}) {
    const auto at = memory_.FromUser(user);
    if (!at) return Error(absl::StatusCode::kOutOfRange, "ring {}: {:#x} is not mapped", ring.index, user);
    *gpa = *at;
  }
  ring.device_area = layout.device;
  virtio::InflightSet set;
  ASSIGN_OR_RETURN(const uint32_t base, RecoverRing(ring, layout, &set));
  const virtio::QueueOptions queue_options{.features = features_, .log = &ring};
  auto queue = virtio::DeviceQueue::Create(memory_.memory(), layout, queue_options, base);
  if (!queue.ok()) return Annotate(queue.status(), fmt::format("ring {}", ring.index));
  ring.queue.emplace(*std::move(queue));
  ring.next_counter = 1;
  ring.broken = ring.stopping = false;
  ring.slots.clear();
  ring.free_slots.clear();
  ring.outstanding = 0;
  ring.started = true;
  ++rings_running_;
  if (!options_.in_order) ring.queue->SetOrdering(virtio::Ordering::kAsCompleted);
  model_->Started(ring.index);
  // All are taken over before the first acts: a ring that is broken is found before.
  std::vector<IoRequest*> again;
  for (const virtio::InflightRequest& request : set.requests) {
    Slot* slot = nullptr;
    IoRequest* io = TakeSlot(ring, &slot);
    absl::Status taken = ring.queue->Resubmit(request.id, AsPacked(set.DescsOf(request)), &slot->chain);
    if (taken.ok()) taken = FillRequest(ring, *slot, request.counter, /*replayed=*/true);
    if (!taken.ok()) {
      DropRing(ring);
      return taken;
    }
    ring.next_counter = request.counter + 1;
    again.push_back(io);
  }
  ring.outstanding = static_cast<uint32_t>(again.size());
  in_flight_ += static_cast<int64_t>(again.size());
  resubmitted_ += static_cast<int64_t>(again.size());
  for (IoRequest* io : again) model_->Replay(io);
  ++counters_["rings_started"];
  // Kicks and calls of the time before may be lost.
  MarkForPublishing(ring);
  UpdateRing(ring);
  return absl::OkStatus();
}

// Watches the kick of a ring that is served, and looks into it.
void LabDevice::UpdateRing(Vring& ring) {
  if (!ring.kick) return;
  if (!Serving(ring) || suspended_ || suspending_) {
    loop_->Unwatch(ring.kick.get());
    return;
  }
  const uint32_t index = ring.index;
  absl::Status watched = loop_->Watch(ring.kick.get(), [this, index] {
    Vring& kicked = RingAt(index);
    uint64_t count;
    if (::read(kicked.kick.get(), &count, sizeof count) < 0 && errno != EAGAIN) {
      loop_->Unwatch(kicked.kick.get());
      return;
    }
    ++kicks_;
    Fetch(kicked);
  });
  if (!watched.ok()) LOG_WARN("ring {}: {}", index, Message(watched));
  Fetch(ring);
}

void LabDevice::Fetch(Vring& ring) {
  if (!Serving(ring) || suspended_ || suspending_) return;
  for (;;) {
    ring.emptied = false;
    ring.fetching = true;
    model_->Available(ring.index);
    ring.fetching = false;
    if (!Serving(ring)) return;
    auto more = ring.queue->EnableKicks();
    if (!more.ok()) return BreakRing(ring, more.status());
    // A model that did not take the last one does not want more now.
    if (!*more || !ring.emptied) break;
  }
  MarkForPublishing(ring);
}

void LabDevice::BreakRing(Vring& ring, const absl::Status& why) {
  if (ring.broken) return;
  LOG_WARN("ring {}: {}", ring.index, Message(why));
  ring.broken = true;
  ++counters_["rings_broken"];
  if (ring.kick) loop_->Unwatch(ring.kick.get());
  QueueError(ring.index);
}

IoRequest* LabDevice::TakeSlot(Vring& ring, Slot** slot) {
  if (ring.free_slots.empty()) {
    ring.free_slots.push_back(static_cast<uint32_t>(ring.slots.size()));
    ring.slots.push_back(std::make_unique<Slot>());
  }
  const uint32_t at = ring.free_slots.back();
  ring.free_slots.pop_back();
  *slot = ring.slots[at].get();
  (*slot)->busy = true;
  (*slot)->io.queue = ring.index;
  (*slot)->io.slot = at;
  return &(*slot)->io;
}

absl::Status LabDevice::FillRequest(Vring& ring, Slot& slot, uint64_t counter, bool replayed) {
  IoRequest& io = slot.io;
  io.id = slot.chain.id;
  io.counter = counter;
  io.replayed = replayed;
  io.readable_bytes = slot.chain.readable_bytes;
  io.writable_bytes = slot.chain.writable_bytes;
  io.readable.clear();
  io.writable.clear();
  if (io.id >= ring.counter_of.size()) ring.counter_of.resize(size_t{io.id} + 1);
  ring.counter_of[io.id] = counter;
  auto resolve = [&](std::span<const virtio::Segment> segments, std::vector<IoSegment>* out) {
    for (const virtio::Segment& segment : segments) {
      uint64_t at = segment.gpa, left = segment.len;
      while (left > 0) {
        uint64_t piece = left;
        uint8_t* data = memory_.memory().Piece(at, &piece);
        if (!data) {
          return Error(absl::StatusCode::kOutOfRange, "ring {}: a buffer at {:#x} is not in guest memory",
                       ring.index, at);
        }
        out->push_back({data, static_cast<uint32_t>(piece), at});
        at += piece;
        left -= piece;
      }
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(resolve(slot.chain.Readable(), &io.readable));
  return resolve(slot.chain.Writable(), &io.writable);
}

IoRequest* LabDevice::Pop(uint32_t index) {
  Vring& ring = RingAt(index);
  if (!Serving(ring) || suspended_ || suspending_) return nullptr;
  Slot* slot = nullptr;
  IoRequest* io = TakeSlot(ring, &slot);
  auto give_back = [&](const absl::Status& why) -> IoRequest* {
    slot->busy = false;
    ring.free_slots.push_back(io->slot);
    if (!why.ok()) BreakRing(ring, why);
    return nullptr;
  };
  for (;;) {
    auto popped = ring.queue->Pop(&slot->chain);
    if (!popped.ok()) return give_back(popped.status());
    if (*popped) break;
    ring.emptied = true;
    if (ring.fetching) return give_back(absl::OkStatus());
    // A model that wants a buffer because something came for it: with an event index, the driver kicks only
    // when it passes the entry at which kicks were asked for last, and that one is long gone.
    auto more = ring.queue->EnableKicks();
    if (!more.ok()) return give_back(more.status());
    if (!*more) return give_back(absl::OkStatus());
  }
  CrashPoint("before_fetch");
  if (ring.tracker) {
    absl::Status tracked = ring.tracker->OnFetch(slot->chain);
    if (!tracked.ok()) return give_back(tracked);
  }
  CrashPoint("after_fetch");
  absl::Status filled = FillRequest(ring, *slot, ring.next_counter++, /*replayed=*/false);
  ++ring.outstanding;
  ++in_flight_;
  ++fetched_;
  if (!filled.ok()) {
    // The request cannot be served, and its status cannot be told: the ring ends here. It stays in flight.
    Release(io);
    BreakRing(ring, filled);
    return nullptr;
  }
  return io;
}

void LabDevice::Release(IoRequest* io) {
  Vring& ring = RingAt(io->queue);
  ring.slots[io->slot]->busy = false;
  ring.free_slots.push_back(io->slot);
  --ring.outstanding;
  --in_flight_;
}

void LabDevice::Complete(IoRequest* io, uint32_t written) {
  Vring& ring = RingAt(io->queue);
  if (features_ & virtio::kVhostFLogAll) {
    for (const IoSegment& s : io->writable) log_.Mark(s.gpa, s.len);
  }
  const uint16_t id = io->id;
  Release(io);
  ++done_;
  if (absl::Status staged = ring.queue->Stage(id, written); !staged.ok()) {
    LOG_ERROR("ring {}: {}", ring.index, Message(staged));
    return;
  }
  if (ring.tracker && virtio::TraitsOf(options_.kind).single_completions) {
    PublishBatch(ring);
  }
  MarkForPublishing(ring);
}

void LabDevice::Abandon(IoRequest* io) {
  Release(io);
  ++cancelled_;
}

void LabDevice::MarkForPublishing(Vring& ring) {
  if (ring.to_publish) return;
  ring.to_publish = true;
  publish_list_.push_back(ring.index);
}

void LabDevice::PublishAll() {
  // Publishing may let the model fetch more, which may complete at once.
  for (size_t i = 0; i < publish_list_.size(); ++i) Publish(RingAt(publish_list_[i]));
  publish_list_.clear();
}

void LabDevice::Publish(Vring& ring) {
  ring.to_publish = false;
  if (!ring.queue || !ring.started) return;
  PublishBatch(ring);
  if (ring.queue->NeedsCall()) Call(ring);
}

void LabDevice::PublishBatch(Vring& ring) {
  ids_.clear();
  for (const virtio::Completion& completion : ring.queue->staged()) ids_.push_back(completion.id);
  if (ids_.empty()) {
    // PARTIAL_ORDER's handshake may go on without a completion.
    ring.queue->Publish();
    return;
  }
  CrashPoint("before_link");
  if (ring.tracker) {
    if (absl::Status linked = ring.tracker->BeforePublish(ids_); !linked.ok()) {
      return BreakRing(ring, linked);
    }
  }
  CrashPoint("after_link");
  ring.queue->Publish();
  CrashPoint("after_publish");
  if (ring.tracker) ring.tracker->AfterPublish();
  CrashPoint("after_clear");
  published_ += static_cast<int64_t>(ids_.size());
  for (uint16_t id : ids_) model_->Published(ring.index, ring.counter_of[id]);
}

void LabDevice::Call(Vring& ring) {
  const uint64_t one = 1;
  ++calls_;
  // Only fails when the counter is full, which is as good.
  if (ring.call && ::write(ring.call.get(), &one, sizeof one) < 0) return;
}

void LabDevice::QueueError(uint32_t index) {
  Vring& ring = RingAt(index);
  ++counters_["errors_reported"];
  const uint64_t one = 1;
  if (ring.err && ::write(ring.err.get(), &one, sizeof one) < 0)
    LOG_DEBUG("ring {}: error eventfd full", index);
  SendOnChannel(kMsgBackendVringErr, vhost::Bytes(vhost::VringState{index, 0}));
}

void LabDevice::StopRing(Vring& ring, StopMode mode) {
  if (!ring.started || ring.stopping) return;
  ring.stopping = true;
  if (ring.kick) loop_->Unwatch(ring.kick.get());
  model_->Stop(ring.index, mode);
}

// After the stop: what the front-end is told.
absl::StatusOr<uint32_t> LabDevice::BaseOf(const Vring& ring) const {
  if (!ring.queue) return ring.base;
  return Encode(*ring.queue, StopBase());
}

void LabDevice::DropRing(Vring& ring) {
  if (ring.started) {
    --rings_running_;
    in_flight_ -= ring.outstanding;
  }
  ring.outstanding = 0;
  ring.started = ring.stopping = false;
  ring.queue.reset();
  ring.tracker.reset();
}

bool LabDevice::Running(uint32_t index) const {
  auto it = rings_.find(index);
  return it != rings_.end() && Serving(it->second) && !suspended_ && !suspending_;
}

void LabDevice::Settle(Vring& ring) {
  const bool connected = connection_.valid();
  if (connected) loop_->Unwatch(connection_.fd());
  // Only what the storage is doing right now is left, and it ends by itself.
  while (ring.outstanding > 0) {
    if (absl::Status polled = loop_->Poll(Deadline::After(std::chrono::seconds(1))); !polled.ok()) {
      LOG_ERROR("{}", Message(polled));
      break;
    }
  }
  if (connected) (void)loop_->Watch(connection_.fd(), [this] { ReceiveMessages(); });
}

// Cancels everything and waits for it: as after a reset, or when the front-end is gone. What was in flight
// stays in the in-flight region.
void LabDevice::ResetDevice() {
  for (auto& [index, ring] : rings_) {
    if (!ring.started) continue;
    // Also one that was to drain: it has nobody left to drain for.
    ring.stopping = false;
    StopRing(ring, StopMode::kSuspend);
  }
  for (auto& [index, ring] : rings_) Settle(ring);
  PublishAll();
  for (auto& [index, ring] : rings_) {
    // Who asks afterwards where it was is told.
    if (ring.queue) ring.base = Encode(*ring.queue, StopBase());
    DropRing(ring);
  }
  model_->Reset();
  suspended_ = suspending_ = false;
  status_ = 0;
  memory_.ReleaseOld();
}

}  // namespace baton::lab
