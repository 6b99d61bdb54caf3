#include "tests/lab/vm/guest_device.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "agent/virtio/features.h"
#include "agent/virtio/packed_ring.h"
#include "agent/virtio/split_ring.h"
#include "common/log.h"

namespace baton::lab {
namespace {

using nlohmann::json;

constexpr uint64_t kNetMac = virtio::Bit(5), kNetStatus = virtio::Bit(16), kNetControl = virtio::Bit(17);
constexpr uint64_t kBlkMq = virtio::Bit(12), kBlkFlush = virtio::Bit(9), kBlkSize = virtio::Bit(6);
// Bounds a start or stop over a connection that is there.
constexpr Duration kReconnectTime = std::chrono::seconds(5);

}  // namespace

GuestDevice::GuestDevice(const DeviceOptions& options, const WorkloadOptions& workload, const Ram& ram,
                         uint32_t rings, DeviceCallbacks callbacks)
    : workload_(workload),
      ram_(ram),
      callbacks_(std::move(callbacks)),
      frontend_(options, ram, rings, workload.inflight),
      places_(rings),
      pending_(rings, false) {}

bool GuestDevice::packed() const { return (features_ & virtio::kFRingPacked) != 0; }

absl::Status GuestDevice::Realize(RamLayout& layout, Deadline deadline) {
  RETURN_IF_ERROR(frontend_.Connect(deadline));
  uint64_t ring = virtio::kFVersion1;
  if (workload_.packed || frontend_.options().packed) ring |= virtio::kFRingPacked;
  if (workload_.event_idx) ring |= virtio::kFEventIdx;
  if (workload_.indirect) ring |= virtio::kFIndirectDesc;
  if (workload_.in_order) ring |= virtio::kFInOrder;
  if (workload_.partial_order) ring |= virtio::kFPartialOrder;
  const uint64_t offered = frontend_.offered();
  if (workload_.packed && (offered & virtio::kFRingPacked) == 0) {
    return Error(absl::StatusCode::kFailedPrecondition, "device {} offers no packed rings", name());
  }
  if (workload_.in_order && (offered & virtio::kFInOrder) == 0) {
    return Error(absl::StatusCode::kFailedPrecondition, "device {} does not offer IN_ORDER", name());
  }
  // An experiment of disks: nobody else offers it.
  if (workload_.partial_order && frontend_.options().class_ == v1::BLK &&
      (offered & virtio::kFPartialOrder) == 0) {
    return Error(absl::StatusCode::kFailedPrecondition, "device {} does not offer PARTIAL_ORDER", name());
  }
  features_ = offered & (ring | Wanted(offered));
  const uint16_t size = static_cast<uint16_t>(frontend_.options().queue_size);
  for (RingPlace& place : places_) {
    place.size = size;
    ASSIGN_OR_RETURN(place.desc, layout.Take(virtio::SplitDescBytes(size), "a descriptor table"));
    ASSIGN_OR_RETURN(place.driver, layout.Take(virtio::SplitAvailBytes(size), "a driver area"));
    ASSIGN_OR_RETURN(place.device, layout.Take(virtio::SplitUsedBytes(size), "a device area"));
    ASSIGN_OR_RETURN(uint64_t indirect,
                     layout.Take(uint64_t{16} * kIndirectEntries * size, "indirect tables"));
    indirect_.push_back(indirect);
  }
  MakeRings();
  return PlaceWorkload(layout);
}

void GuestDevice::MakeRings() {
  queues_.clear();
  for (uint32_t i = 0; i < rings(); ++i)
    queues_.push_back(std::make_unique<Virtqueue>(ram_.memory(), places_[i], features_, indirect_[i]));
}

absl::Status GuestDevice::Boot(uint64_t run) {
  for (uint32_t i = 0; i < rings(); ++i) {
    RETURN_IF_ERROR(Annotate(queues_[i]->Reset(), fmt::format("device {} ring {}", name(), i)));
    places_[i].base = packed() ? virtio::kPackedBaseAfterReset : 0;
  }
  bases_known_ = true;
  BootWorkload(run);
  return absl::OkStatus();
}

uint32_t GuestDevice::FallbackBase(uint32_t ring) const {
  return queues_[ring]->UsedBase(places_[ring].base);
}

void GuestDevice::Start(Deadline deadline) {
  wanted_ = true;
  if (!frontend_.connected() || frontend_.started()) return;
  for (uint32_t i = 0; i < rings() && !bases_known_; ++i) places_[i].base = FallbackBase(i);
  absl::Status status = frontend_.Start(features_, places_, deadline);
  if (!status.ok()) LOG_WARN("{}", Message(status));
  bases_known_ = !status.ok() && bases_known_;
}

void GuestDevice::Stop(Deadline deadline) {
  wanted_ = false;
  if (bases_known_) return;  // never started
  auto bases = frontend_.Stop(deadline);
  // What QEMU does where the peer is gone: the rings go on from the used index, and the in-flight region
  // tells what is between.
  for (uint32_t i = 0; i < rings(); ++i) places_[i].base = bases[i] ? *bases[i] : FallbackBase(i);
  bases_known_ = true;
}

void GuestDevice::Attend(int64_t now_us) {
  if (frontend_.Attend()) return;
  LOG_INFO("device {}: the connection is gone", name());
  retry_us_ = now_us + frontend_.options().reconnect_ms * int64_t{1000};
}

int64_t GuestDevice::Maintain(int64_t now_us, bool running) {
  if (frontend_.connected()) return INT64_MAX;
  if (retry_us_ == INT64_MAX) retry_us_ = now_us;
  if (now_us < retry_us_) return retry_us_;
  retry_us_ = now_us + frontend_.options().reconnect_ms * int64_t{1000};
  const Deadline deadline = Deadline::After(kReconnectTime);
  absl::Status status = frontend_.Connect(deadline);
  if (status.ok() && running && wanted_) Start(deadline);
  if (!frontend_.connected()) {
    if (!status.ok()) LOG_DEBUG("device {}: {}", name(), Message(status));
    return retry_us_;
  }
  LOG_INFO("device {}: connected again", name());
  retry_us_ = INT64_MAX;
  return INT64_MAX;
}

void GuestDevice::Interrupt(uint32_t ring, int64_t now_us) {
  uint64_t count;
  (void)!::read(frontend_.call_fd(ring), &count, sizeof count);
  pending_[ring] = false;
  absl::Status status = queues_[ring]->Reap([&](uint32_t tag, uint32_t written) {
    Completed(ring, tag, written, now_us);
    callbacks_.on_progress(now_us);
  });
  if (!status.ok()) callbacks_.on_error(fmt::format("device {} ring {}: {}", name(), ring, Message(status)));
  // The driver's part in the agreement on order may need one (docs/partial-order.md).
  if ((features_ & virtio::kFPartialOrder) != 0) Kick(ring);
}

void GuestDevice::TakePending(int64_t now_us) {
  for (uint32_t i = 0; i < rings(); ++i) {
    if (pending_[i]) Interrupt(i, now_us);
  }
}

bool GuestDevice::Submit(uint32_t queue, uint32_t tag, std::span<const Piece> pieces) {
  return queues_[queue]->Submit(tag, pieces);
}

void GuestDevice::Kick(uint32_t queue) {
  if (queues_[queue]->NeedsKick()) frontend_.Kick(queue);
}

json GuestDevice::Save() {
  json rings_state = json::array();
  for (uint32_t i = 0; i < rings(); ++i) {
    // An interrupt that was raised and not taken is state of the interrupt controller.
    uint64_t count = 0;
    if (::read(frontend_.call_fd(i), &count, sizeof count) == sizeof count) pending_[i] = true;
    const RingPlace& place = places_[i];
    rings_state.push_back({{"size", place.size},
                           {"desc", place.desc},
                           {"driver", place.driver},
                           {"device", place.device},
                           {"base", place.base},
                           {"pending", static_cast<bool>(pending_[i])},
                           {"queue", queues_[i]->Save()}});
  }
  return {{"name", name()},
          {"class", static_cast<int>(frontend_.options().class_)},
          {"features", features_},
          {"config", frontend_.config()},
          {"rings", rings_state}};
}

absl::Status GuestDevice::Load(const json& state) {
  if (state.at("name") != name() || state.at("class") != static_cast<int>(frontend_.options().class_) ||
      state.at("rings").size() != rings()) {
    return Error(absl::StatusCode::kFailedPrecondition, "the state is of another device than {}", name());
  }
  const uint64_t features = state.at("features").get<uint64_t>();
  if ((features & ~frontend_.offered()) != 0) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "device {}: the guest uses {:#x}, which is not offered here", name(),
                 features & ~frontend_.offered());
  }
  // capacity, the first field of virtio_blk_config, must not change under a guest.
  const auto config = state.at("config").get<std::vector<uint8_t>>();
  if (frontend_.options().class_ == v1::BLK && config.size() >= 8 &&
      (frontend_.config().size() < 8 ||
       !std::equal(config.begin(), config.begin() + 8, frontend_.config().begin()))) {
    return Error(absl::StatusCode::kFailedPrecondition, "device {}: its capacity differs here", name());
  }
  features_ = features;
  bases_known_ = true;
  for (uint32_t i = 0; i < rings(); ++i) {
    const json& ring = state.at("rings").at(i);
    RingPlace& place = places_[i];
    if (ring.at("size") != place.size || ring.at("desc") != place.desc || ring.at("driver") != place.driver ||
        ring.at("device") != place.device) {
      return Error(absl::StatusCode::kFailedPrecondition, "device {} ring {} is at another place", name(), i);
    }
    place.base = ring.at("base").get<uint32_t>();
    pending_[i] = ring.at("pending").get<bool>();
  }
  MakeRings();
  for (uint32_t i = 0; i < rings(); ++i) {
    absl::Status loaded = queues_[i]->Load(state.at("rings").at(i).at("queue"));
    if (!loaded.ok()) return Annotate(loaded, fmt::format("device {} ring {}", name(), i));
  }
  return Check();
}

GuestDisk::GuestDisk(const DeviceOptions& options, const WorkloadOptions& workload, const Ram& ram,
                     uint32_t number, DeviceCallbacks callbacks)
    : GuestDevice(options, workload, ram, options.queues, std::move(callbacks)), number_(number) {}

uint64_t GuestDisk::Wanted(uint64_t) const { return kBlkMq | kBlkFlush | kBlkSize; }

absl::Status GuestDisk::PlaceWorkload(RamLayout& layout) {
  const auto& config = frontend().config();
  uint64_t sectors = 0;
  if (config.size() >= sizeof sectors) std::memcpy(&sectors, config.data(), sizeof sectors);
  if (sectors < workload_.blocks * (kBlockSize / 512)) {
    return Error(absl::StatusCode::kFailedPrecondition, "device {} has {} sectors, too few for lab.blocks={}",
                 name(), sectors, workload_.blocks);
  }
  ASSIGN_OR_RETURN(uint64_t gpa, layout.Take(BlockWorkload::Bytes(workload_), "the workload of " + name()));
  BlockWorkload::Setup setup;
  setup.disk = number_;
  setup.queues = rings();
  setup.options = workload_;
  work_ = std::make_unique<BlockWorkload>(ram_, gpa, setup, *this, callbacks_.on_error);
  return absl::OkStatus();
}

void GuestDisk::Completed(uint32_t ring, uint32_t tag, uint32_t written, int64_t now_us) {
  work_->Complete(ring, tag, written, now_us);
}

absl::StatusOr<std::unique_ptr<GuestNic>> GuestNic::Create(const DeviceOptions& options,
                                                           const WorkloadOptions& workload, const Ram& ram,
                                                           uint32_t number, DeviceCallbacks callbacks) {
  NetWorkload::Setup setup;
  setup.nic = number;
  setup.pairs = options.queues;
  setup.buffers = std::min<uint32_t>(64, options.queue_size);
  setup.control = workload.control;
  setup.options = workload;
  unsigned bytes[6];
  if (std::sscanf(options.mac.c_str(), "%x:%x:%x:%x:%x:%x", &bytes[0], &bytes[1], &bytes[2], &bytes[3],
                  &bytes[4], &bytes[5]) != 6) {
    return Error(absl::StatusCode::kInvalidArgument, "device {}: '{}' is no MAC address", options.name,
                 options.mac);
  }
  for (size_t i = 0; i < 6; ++i) setup.mac[i] = static_cast<uint8_t>(bytes[i]);
  return std::unique_ptr<GuestNic>(new GuestNic(options, workload, ram, setup, std::move(callbacks)));
}

GuestNic::GuestNic(const DeviceOptions& options, const WorkloadOptions& workload, const Ram& ram,
                   NetWorkload::Setup setup, DeviceCallbacks callbacks)
    : GuestDevice(options, workload, ram, 2 * options.queues + (workload.control ? 1 : 0),
                  std::move(callbacks)),
      setup_(setup) {}

uint64_t GuestNic::Wanted(uint64_t) const {
  return kNetMac | kNetStatus | (setup_.pairs > 1 ? virtio::kNetFMq : 0) | (setup_.control ? kNetControl : 0);
}

absl::Status GuestNic::PlaceWorkload(RamLayout& layout) {
  if (setup_.control && (features_ & kNetControl) == 0)
    return Error(absl::StatusCode::kFailedPrecondition, "device {} offers no control queue", name());
  ASSIGN_OR_RETURN(uint64_t gpa, layout.Take(NetWorkload::Bytes(setup_.pairs, setup_.buffers),
                                             "the workload of " + name()));
  // Only MQ knows the command that is sent.
  setup_.control = setup_.control && (features_ & virtio::kNetFMq) != 0;
  work_ = std::make_unique<NetWorkload>(ram_, gpa, setup_, *this, callbacks_.on_error);
  return absl::OkStatus();
}

}  // namespace baton::lab
