#include "agent/vhost/probe.h"

#include <algorithm>
#include <cstring>

#include "agent/vhost/frontend.h"
#include "agent/vhost/inflight_answer.h"
#include "agent/vhost/quirks.h"
#include "agent/virtio/features.h"
#include "agent/virtio/net_protocol.h"
#include "common/finding.h"

namespace baton::vhost {
namespace {

uint64_t Field(const std::string& config, size_t offset, size_t size) {
  uint64_t value = 0;
  if (offset + size <= config.size()) std::memcpy(&value, config.data() + offset, size);
  return value;
}

bool Has(const std::string& config, size_t offset, size_t size) { return offset + size <= config.size(); }

}  // namespace

absl::StatusOr<v1::Device> ProbeBackend(const v1::DeviceSpec& spec, const v1::Backend& backend,
                                        Deadline deadline) {
  const std::string where = "back-end " + backend.socket();
  auto connection = Connection::Dial(backend.socket(), deadline);
  if (!connection.ok()) return Annotate(connection.status(), "back-end");
  Frontend fe(std::move(*connection));
  auto probe = [&]() -> absl::StatusOr<v1::Device> {
    v1::Device d;
    d.set_name(spec.name());
    d.set_class_(spec.class_());
    d.set_state(v1::Device::IDLE_DEVICE);
    *d.mutable_backend() = backend;
    d.set_max_queues(1);
    d.set_max_memory_slots(kMaxTableRegions);
    ASSIGN_OR_RETURN(uint64_t features, fe.GetU64(Request::kGetFeatures, deadline));
    d.set_offered_features(features);
    auto judge = [&](uint64_t offered) {
      const HandoffObstacles obstacles =
          ObstaclesOf(spec.class_(), backend.kind(), offered, /*fenced=*/false);
      d.set_no_handoff(obstacles.handoff);
      d.set_no_handoff_of_writes(obstacles.writes);
      d.set_no_takeover(obstacles.takeover);
    };
    judge(0);
    if (!(features & virtio::kVhostUserFProtocolFeatures)) return d;
    ASSIGN_OR_RETURN(uint64_t protocol, fe.GetU64(Request::kGetProtocolFeatures, deadline));
    d.set_offered_protocol_features(protocol);
    judge(protocol);
    RETURN_IF_ERROR(fe.SetProtocolFeatures(
        protocol & (pf::kMq | pf::kConfig | pf::kConfigureMemSlots | pf::kReplyAck), deadline));
    if (protocol & pf::kMq) {
      ASSIGN_OR_RETURN(uint64_t queues, fe.GetU64(Request::kGetQueueNum, deadline));
      d.set_max_queues(static_cast<uint32_t>(queues));
    }
    if (protocol & pf::kConfigureMemSlots) {
      ASSIGN_OR_RETURN(uint64_t slots, fe.GetU64(Request::kGetMaxMemSlots, deadline));
      d.set_max_memory_slots(static_cast<uint32_t>(slots));
    }
    const uint32_t size = spec.class_() == v1::BLK ? 60 : spec.class_() == v1::NET ? 12 : 0;
    if ((protocol & pf::kConfig) && size > 0) {
      auto config = fe.GetConfig(0, size, deadline);
      if (config.ok()) {
        d.set_config(std::string(config->begin(), config->end()));
      } else if (!absl::IsFailedPrecondition(config.status())) {
        return config.status();
      }
    }
    return d;
  };
  auto device = probe();
  if (device.ok()) return device;
  absl::Status status = device.status();
  if (absl::IsDeadlineExceeded(status)) {
    return Error(
        absl::StatusCode::kDeadlineExceeded,
        "{}: accepts the connection but does not answer (stopped, or busy with another front-end): {}", where,
        Message(status));
  }
  if (absl::IsInvalidArgument(status)) status = absl::FailedPreconditionError(Message(status));
  return Annotate(status, where);
}

namespace {

// What the two purposes of a comparison call the other side.
struct Sides {
  bool migration;
  const char* other;  // "the destination's back-end"
  const char* here;   // "at the source"
  const char* there;  // "at the destination"
};

std::vector<v1::Finding> Compare(const v1::Device& source, const v1::Device& destination, const Sides& sides,
                                 const v1::MigrationParams& params) {
  std::vector<v1::Finding> out;
  auto add = [&](v1::Severity severity, const char* code, const std::string& message,
                 const std::string& remedy) {
    out.push_back(MakeFinding(severity, code, "device " + source.name(), message, remedy));
  };
  const bool blk = source.class_() == v1::BLK, net = source.class_() == v1::NET;
  const uint64_t acked = source.acked_features() & ~virtio::kVhostOnly;
  if (uint64_t missing = acked & ~destination.offered_features(); missing) {
    add(v1::BLOCKER, "FEATURES_MISSING",
        fmt::format("the guest uses {}, which {} does not offer",
                    virtio::FeatureNames(missing, source.class_()), sides.other),
        fmt::format("use a back-end of the same version and configuration {}", sides.there));
  }
  if (sides.migration && (source.state() == v1::Device::BACKEND_LOST || source.state() == v1::Device::HELD)) {
    add(v1::BLOCKER, "SOURCE_BACKEND_LOST",
        fmt::format("the device does not work at the source: {}", source.message()),
        "repair the source's back-end first");
  }
  const uint64_t missing_protocol =
      source.protocol_features() &
      (pf::kMq | pf::kConfig | pf::kStatus | (sides.migration ? pf::kBackendReq : 0)) &
      ~destination.offered_protocol_features();
  if (missing_protocol) {
    add(v1::BLOCKER, "PROTOCOL_FEATURES_MISSING",
        fmt::format("{} are in use and not offered by {}", virtio::ProtocolFeatureNames(missing_protocol),
                    sides.other),
        fmt::format("use a back-end of the same version {}", sides.there));
  }
  if (sides.migration && (!(source.offered_features() & virtio::kVhostFLogAll) ||
                          !(source.offered_protocol_features() & pf::kLogShmfd))) {
    add(v1::BLOCKER, "NO_DIRTY_LOG",
        "the source's back-end cannot log what it writes to guest memory (LOG_ALL with LOG_SHMFD)",
        "use a back-end that supports vhost-user dirty logging");
  }
  if (!(destination.offered_features() & virtio::kVhostFLogAll) ||
      !(destination.offered_protocol_features() & pf::kLogShmfd)) {
    add(v1::WARNING, "NO_WAY_BACK",
        fmt::format("{} cannot log what it writes: the VM cannot move on from there", sides.other),
        "use a back-end that supports vhost-user dirty logging");
  }
  if ((source.protocol_features() & pf::kInflightShmfd) &&
      !(destination.offered_protocol_features() & pf::kInflightShmfd)) {
    add(v1::WARNING, "NO_INFLIGHT_REGION",
        fmt::format("{} keeps no in-flight region: its crash may stop the device", sides.other),
        fmt::format("use a back-end with INFLIGHT_SHMFD {}", sides.there));
  }
  if (AnswerFor(params, source.name(), source.class_()) == v1::HANDOFF) {
    // A network device has nothing to hand over but empty buffers: only who names it wants to know.
    const bool named =
        blk || std::any_of(params.inflight_rules().begin(), params.inflight_rules().end(),
                           [&](const v1::InflightRule& rule) {
                             return rule.device() == source.name() || rule.class_() == source.class_();
                           });
    const virtio::InflightTraits& traits = virtio::TraitsOf(QuirksOf(destination.backend().kind()).inflight);
    std::string why;
    if (!source.no_handoff().empty()) {
      why = "at the source " + source.no_handoff();
    } else if (!destination.no_takeover().empty()) {
      why = "at the destination " + destination.no_takeover();
    } else if ((acked & virtio::kFRingPacked) ? !traits.packed : !traits.split) {
      why = "the destination's back-end keeps no in-flight region for such rings";
    } else if (!source.no_handoff_of_writes().empty()) {
      why = source.no_handoff_of_writes();
    }
    if (!why.empty() && named) {
      add(v1::WARNING, "HANDOFF_IMPOSSIBLE",
          fmt::format("requests in flight are not handed over, the device drains instead: {}", why),
          "the blackout then lasts as long as the slowest request, up to drain_timeout; use back-ends that "
          "can "
          "hand over (docs/backends.md), or configure their kind and a fence");
    }
  }
  if (source.protocol_features() & ~destination.offered_protocol_features() & pf::kDeviceState) {
    add(v1::BLOCKER, "NO_DEVICE_STATE",
        "the source's back-end has a state of its own (DEVICE_STATE) that the destination's cannot load",
        "use a back-end of the same kind and version at the destination");
  }
  if (net && !(acked & virtio::kNetFGuestAnnounce) &&
      !(destination.offered_protocol_features() & pf::kRarp)) {
    add(v1::WARNING, "NO_ANNOUNCEMENT",
        "the guest does not announce itself (GUEST_ANNOUNCE) and the destination's back-end sends no RARP: "
        "the "
        "network learns where the VM is only when it transmits",
        "use a back-end with RARP at the destination, or a guest driver with GUEST_ANNOUNCE");
  }
  uint32_t queues = 0;
  for (const v1::Queue& q : source.queues()) {
    if (q.started() || q.enabled()) queues = std::max(queues, q.index() + 1);
  }
  const uint32_t available = net ? 2 * destination.max_queues() + 1 : destination.max_queues();
  if (queues > available) {
    add(v1::BLOCKER, "TOO_FEW_QUEUES",
        fmt::format("{} queues are in use, {} has {}", queues, sides.other, available),
        fmt::format("configure as many queues {}", sides.there));
  }
  if (source.memory_regions() > destination.max_memory_slots()) {
    add(v1::BLOCKER, "TOO_FEW_MEMORY_SLOTS",
        fmt::format("the VM has {} memory regions, {} holds {}", source.memory_regions(), sides.other,
                    destination.max_memory_slots()),
        "use a back-end with CONFIGURE_MEM_SLOTS");
  }
  auto compare = [&](const char* code, const char* what, size_t offset, size_t size, v1::Severity severity) {
    if (!Has(source.config(), offset, size)) return;
    if (!Has(destination.config(), offset, size)) {
      add(v1::BLOCKER, "NO_CONFIG", fmt::format("{} does not tell its configuration space", sides.other),
          "use a back-end with the protocol feature CONFIG");
      return;
    }
    uint64_t a = Field(source.config(), offset, size), b = Field(destination.config(), offset, size);
    if (a != b) {
      add(severity, code, fmt::format("{} is {} {} and {} {}", what, a, sides.here, b, sides.there),
          "give both back-ends the same configuration");
    }
  };
  // struct virtio_blk_config: capacity 0 (8), seg_max 12 (4), blk_size 20 (4), num_queues 34 (2).
  // struct virtio_net_config: mac 0 (6), max_virtqueue_pairs 8 (2), mtu 10 (2).
  if (blk) {
    compare("CAPACITY_DIFFERS", "the capacity in sectors", 0, 8, v1::BLOCKER);
    if (acked & virtio::Bit(2)) compare("SEG_MAX_DIFFERS", "seg_max", 12, 4, v1::BLOCKER);
    if (acked & virtio::Bit(6)) compare("BLK_SIZE_DIFFERS", "the block size", 20, 4, v1::BLOCKER);
    if (acked & virtio::Bit(12)) compare("NUM_QUEUES_DIFFERS", "num_queues", 34, 2, v1::WARNING);
  } else if (net) {
    if (acked & virtio::kNetFMtu) compare("MTU_DIFFERS", "the MTU", 10, 2, v1::BLOCKER);
    if (acked & virtio::kNetFMq) compare("QUEUE_PAIRS_DIFFER", "max_virtqueue_pairs", 8, 2, v1::WARNING);
  }
  return out;
}

}  // namespace

std::vector<v1::Finding> CompareForMigration(const v1::Device& source, const v1::Device& destination,
                                             const v1::MigrationParams& params) {
  return Compare(source, destination,
                 {true, "the destination's back-end", "at the source", "at the destination"}, params);
}

std::vector<v1::Finding> CompareForSwap(const v1::Device& device, const v1::Device& candidate) {
  return Compare(device, candidate, {false, "the new back-end", "now", "at the new back-end"}, {});
}

}  // namespace baton::vhost
