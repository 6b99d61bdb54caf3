#include "agent/vhost/wire.h"

#include <algorithm>
#include <array>

#include "agent/memory/page_set.h"
#include "agent/virtio/features.h"

namespace baton::vhost {
namespace {

// Sizes that are not fixed are those of SET_MEM_TABLE and GET/SET_CONFIG; their inner counts are checked
// below.
constexpr RequestInfo kRequests[] = {
    {Request::kGetFeatures, "GET_FEATURES", 0, 0, FdRule::kNone, ReplyRule::kNative, 0},
    {Request::kSetFeatures, "SET_FEATURES", 8, 8, FdRule::kNone, ReplyRule::kAck, 0},
    {Request::kSetOwner, "SET_OWNER", 0, 0, FdRule::kNone, ReplyRule::kAck, 0},
    {Request::kResetOwner, "RESET_OWNER", 0, 0, FdRule::kNone, ReplyRule::kAck, 0},
    {Request::kSetMemTable, "SET_MEM_TABLE", 8, 8 + 32 * kMaxTableRegions, FdRule::kRegions, ReplyRule::kAck,
     0},
    {Request::kSetLogBase, "SET_LOG_BASE", 16, 16, FdRule::kOne, ReplyRule::kNative, pf::kLogShmfd},
    {Request::kSetLogFd, "SET_LOG_FD", 0, 8, FdRule::kOne, ReplyRule::kAck, 0},
    {Request::kSetVringNum, "SET_VRING_NUM", 8, 8, FdRule::kNone, ReplyRule::kAck, 0},
    {Request::kSetVringAddr, "SET_VRING_ADDR", 40, 40, FdRule::kNone, ReplyRule::kAck, 0},
    {Request::kSetVringBase, "SET_VRING_BASE", 8, 8, FdRule::kNone, ReplyRule::kAck, 0},
    {Request::kGetVringBase, "GET_VRING_BASE", 8, 8, FdRule::kNone, ReplyRule::kNative, 0},
    {Request::kSetVringKick, "SET_VRING_KICK", 8, 8, FdRule::kVring, ReplyRule::kAck, 0},
    {Request::kSetVringCall, "SET_VRING_CALL", 8, 8, FdRule::kVring, ReplyRule::kAck, 0},
    {Request::kSetVringErr, "SET_VRING_ERR", 8, 8, FdRule::kVring, ReplyRule::kAck, 0},
    {Request::kGetProtocolFeatures, "GET_PROTOCOL_FEATURES", 0, 0, FdRule::kNone, ReplyRule::kNative, 0},
    {Request::kSetProtocolFeatures, "SET_PROTOCOL_FEATURES", 8, 8, FdRule::kNone, ReplyRule::kAck, 0},
    {Request::kGetQueueNum, "GET_QUEUE_NUM", 0, 0, FdRule::kNone, ReplyRule::kNative, pf::kMq},
    {Request::kSetVringEnable, "SET_VRING_ENABLE", 8, 8, FdRule::kNone, ReplyRule::kAck, 0},
    {Request::kSendRarp, "SEND_RARP", 8, 8, FdRule::kNone, ReplyRule::kAck, pf::kRarp},
    {Request::kNetSetMtu, "NET_SET_MTU", 8, 8, FdRule::kNone, ReplyRule::kAck, pf::kNetMtu},
    {Request::kSetBackendReqFd, "SET_BACKEND_REQ_FD", 0, 0, FdRule::kOne, ReplyRule::kAck, pf::kBackendReq},
    {Request::kGetConfig, "GET_CONFIG", 12, 12 + kMaxConfigSize, FdRule::kNone, ReplyRule::kNative,
     pf::kConfig},
    {Request::kSetConfig, "SET_CONFIG", 12, 12 + kMaxConfigSize, FdRule::kNone, ReplyRule::kAck, pf::kConfig},
    {Request::kGetInflightFd, "GET_INFLIGHT_FD", 24, 24, FdRule::kNone, ReplyRule::kNative,
     pf::kInflightShmfd},
    {Request::kSetInflightFd, "SET_INFLIGHT_FD", 24, 24, FdRule::kOne, ReplyRule::kAck, pf::kInflightShmfd},
    {Request::kResetDevice, "RESET_DEVICE", 0, 0, FdRule::kNone, ReplyRule::kAck, pf::kResetDevice},
    {Request::kGetMaxMemSlots, "GET_MAX_MEM_SLOTS", 0, 0, FdRule::kNone, ReplyRule::kNative,
     pf::kConfigureMemSlots},
    {Request::kAddMemReg, "ADD_MEM_REG", 40, 40, FdRule::kOne, ReplyRule::kAck, pf::kConfigureMemSlots},
    {Request::kRemMemReg, "REM_MEM_REG", 40, 40, FdRule::kTolerateOne, ReplyRule::kAck,
     pf::kConfigureMemSlots},
    {Request::kSetStatus, "SET_STATUS", 8, 8, FdRule::kNone, ReplyRule::kAck, pf::kStatus},
    {Request::kGetStatus, "GET_STATUS", 0, 0, FdRule::kNone, ReplyRule::kNative, pf::kStatus},
    {Request::kGetVringBaseSkipDrain, "GET_VRING_BASE_SKIP_DRAIN", 8, 8, FdRule::kNone, ReplyRule::kNative,
     pf::kSkipDrain},
};

// Names of requests that are refused, so that the log says what the peer wanted.
struct KnownName {
  uint32_t id;
  const char* name;
};
constexpr KnownName kRefused[] = {
    {22, "IOTLB_MSG"},
    {23, "SET_VRING_ENDIAN"},
    {26, "CREATE_CRYPTO_SESSION"},
    {27, "CLOSE_CRYPTO_SESSION"},
    {28, "POSTCOPY_ADVISE"},
    {29, "POSTCOPY_LISTEN"},
    {30, "POSTCOPY_END"},
    {33, "GPU_SET_SOCKET"},
    {35, "VRING_KICK"},
    {41, "GET_SHARED_OBJECT"},
    {42, "SET_DEVICE_STATE_FD"},
    {43, "CHECK_DEVICE_STATE"},
    {44, "GET_SHMEM_CONFIG"},
};

template <typename... Args>
absl::Status Malformed(const WireMessage& m, fmt::format_string<Args...> format, Args&&... args) {
  return Error(absl::StatusCode::kInvalidArgument, "{}: {}", RequestName(m.header.request),
               fmt::format(format, std::forward<Args>(args)...));
}

absl::Status CheckVringIndex(const WireMessage& m, uint64_t index) {
  if (index >= kMaxVrings) return Malformed(m, "ring index {} is above {}", index, kMaxVrings - 1);
  return absl::OkStatus();
}

absl::Status CheckRegion(const MemRegion& r) {
  auto invalid = [&](const std::string& what) {
    return Error(absl::StatusCode::kInvalidArgument, "memory region gpa {:#x} size {:#x}: {}", r.gpa, r.size,
                 what);
  };
  if (r.size == 0) return invalid("empty");
  uint64_t end;
  if (__builtin_add_overflow(r.gpa, r.size, &end)) return invalid("guest physical addresses overflow");
  if (__builtin_add_overflow(r.user_addr, r.size, &end)) {
    return invalid(fmt::format("user addresses from {:#x} overflow", r.user_addr));
  }
  if (__builtin_add_overflow(r.mmap_offset, r.size, &end) || end > static_cast<uint64_t>(INT64_MAX)) {
    return invalid(fmt::format("file offsets from {:#x} overflow", r.mmap_offset));
  }
  // Dirty pages are counted by guest page; a region that begins inside one cannot be translated to its file.
  if (r.gpa % memory::kPageSize || r.size % memory::kPageSize || r.mmap_offset % memory::kPageSize) {
    return invalid(fmt::format("gpa, size and file offset {:#x} must be multiples of {}", r.mmap_offset,
                               memory::kPageSize));
  }
  return absl::OkStatus();
}

bool Overlap(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size) {
  return a < b + b_size && b < a + a_size;
}

absl::Status CheckFds(const WireMessage& m, FdRule rule) {
  size_t want = 0;
  switch (rule) {
    case FdRule::kNone:
      break;
    case FdRule::kTolerateOne:
      want = m.fds.empty() ? 0 : 1;
      break;
    case FdRule::kOne:
      want = 1;
      break;
    case FdRule::kVring:
      want = m.As<uint64_t>() & kVringNoFd ? 0 : 1;
      break;
    case FdRule::kRegions:
      want = m.As<MemTableHeader>().nregions;
      break;
  }
  if (m.fds.size() != want)
    return Malformed(m, "{} descriptors came with it instead of {}", m.fds.size(), want);
  return absl::OkStatus();
}

absl::Status CheckMemTable(const WireMessage& m) {
  auto header = m.As<MemTableHeader>();
  if (header.nregions > kMaxTableRegions) {
    return Malformed(m, "{} regions, at most {} are possible", header.nregions, kMaxTableRegions);
  }
  // libvhost-user's front-ends always send the full union; others only what is used.
  uint64_t need = sizeof header + sizeof(MemRegion) * uint64_t{header.nregions};
  if (m.payload.size() < need)
    return Malformed(m, "{} bytes for {} regions", m.payload.size(), header.nregions);
  std::vector<MemRegion> regions(header.nregions);
  if (!regions.empty()) std::memcpy(regions.data(), m.payload.data() + sizeof header, need - sizeof header);
  return Annotate(CheckRegions(regions), RequestName(m.header.request));
}

absl::Status CheckConfig(const WireMessage& m) {
  auto config = m.As<ConfigHeader>();
  if (config.size > kMaxConfigSize || config.offset > kMaxConfigSize ||
      config.offset + config.size > kMaxConfigSize) {
    return Malformed(m, "offset {} size {} is beyond {}", config.offset, config.size, kMaxConfigSize);
  }
  if (m.payload.size() != sizeof config + config.size) {
    return Malformed(m, "{} bytes of payload for size {}", m.payload.size(), config.size);
  }
  if (config.flags > 1) return Malformed(m, "unknown flags {:#x}", config.flags);
  return absl::OkStatus();
}

absl::Status CheckInflight(const WireMessage& m) {
  auto inflight = m.As<InflightDescription>();
  if (inflight.num_queues == 0 || inflight.num_queues > kMaxVrings)
    return Malformed(m, "{} queues", inflight.num_queues);
  if (inflight.queue_size == 0 || inflight.queue_size > 32768)
    return Malformed(m, "queue size {}", inflight.queue_size);
  uint64_t end;
  if (__builtin_add_overflow(inflight.mmap_size, inflight.mmap_offset, &end) || end > (uint64_t{1} << 30)) {
    return Malformed(m, "size {} at offset {} is absurd", inflight.mmap_size, inflight.mmap_offset);
  }
  return absl::OkStatus();
}

absl::Status CheckContent(const WireMessage& m) {
  switch (m.request()) {
    case Request::kSetMemTable:
      return CheckMemTable(m);
    case Request::kAddMemReg:
    case Request::kRemMemReg: {
      MemRegion region = m.As<MemReg>().region;
      return Annotate(CheckRegions({&region, 1}), RequestName(m.header.request));
    }
    case Request::kSetLogBase: {
      auto log = m.As<LogDescription>();
      uint64_t end;
      if (log.mmap_size == 0 || __builtin_add_overflow(log.mmap_size, log.mmap_offset, &end)) {
        return Malformed(m, "size {} at offset {}", log.mmap_size, log.mmap_offset);
      }
      return absl::OkStatus();
    }
    case Request::kSetVringNum: {
      auto state = m.As<VringState>();
      RETURN_IF_ERROR(CheckVringIndex(m, state.index));
      if (state.num == 0 || state.num > 32768)
        return Malformed(m, "ring {}: size {}", state.index, state.num);
      return absl::OkStatus();
    }
    case Request::kSetVringBase:
      return CheckVringIndex(m, m.As<VringState>().index);
    case Request::kGetVringBase:
    case Request::kGetVringBaseSkipDrain:
      return CheckVringIndex(m, m.As<VringState>().index);
    case Request::kSetVringEnable: {
      auto state = m.As<VringState>();
      RETURN_IF_ERROR(CheckVringIndex(m, state.index));
      if (state.num > 1) return Malformed(m, "ring {}: {} is neither 0 nor 1", state.index, state.num);
      return absl::OkStatus();
    }
    case Request::kSetVringAddr: {
      auto addr = m.As<VringAddr>();
      RETURN_IF_ERROR(CheckVringIndex(m, addr.index));
      if (addr.flags & ~kVringFLog)
        return Malformed(m, "ring {}: unknown flags {:#x}", addr.index, addr.flags);
      return absl::OkStatus();
    }
    case Request::kSetVringKick:
    case Request::kSetVringCall:
    case Request::kSetVringErr:
      if (uint64_t value = m.As<uint64_t>(); value & ~(kVringIndexMask | kVringNoFd)) {
        return Malformed(m, "unknown bits in {:#x}", value);
      }
      return absl::OkStatus();
    case Request::kGetConfig:
    case Request::kSetConfig:
      return CheckConfig(m);
    case Request::kGetInflightFd:
    case Request::kSetInflightFd:
      return CheckInflight(m);
    default:
      return absl::OkStatus();
  }
}

}  // namespace

const RequestInfo* FindRequest(uint32_t id) {
  static constexpr auto kById = [] {
    std::array<const RequestInfo*, 64> by_id{};
    for (const RequestInfo& info : kRequests) by_id[static_cast<uint32_t>(info.id)] = &info;
    return by_id;
  }();
  return id < kById.size() ? kById[id] : nullptr;
}

std::string RequestName(uint32_t id) {
  if (const RequestInfo* info = FindRequest(id)) return info->name;
  for (const KnownName& known : kRefused) {
    if (known.id == id) return known.name;
  }
  return fmt::format("request {}", id);
}

std::string BackendRequestName(uint32_t id) {
  static constexpr std::array kNames = {
      "",           "IOTLB_MSG",         "CONFIG_CHANGE_MSG",    "VRING_HOST_NOTIFIER_MSG", "VRING_CALL",
      "VRING_ERR",  "SHARED_OBJECT_ADD", "SHARED_OBJECT_REMOVE", "SHARED_OBJECT_LOOKUP",    "SHMEM_MAP",
      "SHMEM_UNMAP"};
  if (id > 0 && id < kNames.size()) return kNames[id];
  return fmt::format("request {}", id);
}

absl::Status CheckHeader(const Header& header, bool reply) {
  auto invalid = [&](const std::string& what) {
    return Error(absl::StatusCode::kInvalidArgument, "message {}: {}", header.request, what);
  };
  if ((header.flags & 3) != kVersion)
    return invalid(fmt::format("version {} instead of 1", header.flags & 3));
  if (reply) {
    if (header.flags != kReplyFlags)
      return invalid(fmt::format("flags {:#x} are not those of a reply", header.flags));
  } else if (header.flags & ~(3u | kFlagNeedReply)) {
    return invalid(fmt::format("flags {:#x} are not those of a request", header.flags));
  }
  if (header.size > kMaxPayload)
    return invalid(fmt::format("{} bytes of payload, at most {} are possible", header.size, kMaxPayload));
  return absl::OkStatus();
}

absl::Status ValidateRequest(const WireMessage& m, uint64_t protocol_features) {
  const RequestInfo* info = FindRequest(m.header.request);
  if (!info) {
    return Error(absl::StatusCode::kUnimplemented, "{} is not supported", RequestName(m.header.request));
  }
  if (info->protocol_feature && !(protocol_features & info->protocol_feature)) {
    return Error(absl::StatusCode::kUnimplemented, "{} without the protocol feature {}", info->name,
                 virtio::ProtocolFeatureNames(info->protocol_feature));
  }
  if (m.payload.size() < info->min_size || m.payload.size() > info->max_size) {
    if (info->min_size == info->max_size)
      return Malformed(m, "{} bytes of payload instead of {}", m.payload.size(), info->min_size);
    return Malformed(m, "{} bytes of payload, {} to {} are possible", m.payload.size(), info->min_size,
                     info->max_size);
  }
  RETURN_IF_ERROR(CheckContent(m));
  return CheckFds(m, info->fds);
}

absl::Status ValidateReply(Request request, const WireMessage& reply, uint32_t sent_size) {
  RETURN_IF_ERROR(CheckHeader(reply.header, /*reply=*/true));
  auto invalid = [&](const std::string& what) {
    return Error(absl::StatusCode::kInvalidArgument, "reply to {}: {}",
                 RequestName(static_cast<uint32_t>(request)), what);
  };
  if (reply.request() != request)
    return invalid(fmt::format("is one to {}", RequestName(reply.header.request)));
  const size_t size = reply.payload.size();
  size_t fds = 0;
  switch (request) {
    case Request::kSetLogBase:
      // DPDK answers without payload, libvhost-user with 8 bytes that are not a result, rust-vmm echoes 16.
      if (size != 0 && size != 8 && size != 16) return invalid(fmt::format("{} bytes", size));
      break;
    case Request::kGetConfig:
      if (size == 0) {
        return absl::FailedPreconditionError(
            "reply to GET_CONFIG: the back-end has no such configuration space");
      }
      if (size != sent_size) return invalid(fmt::format("{} bytes instead of {}", size, sent_size));
      break;
    case Request::kGetInflightFd:
      if (size != sizeof(InflightDescription)) return invalid(fmt::format("{} bytes instead of 24", size));
      fds = 1;
      break;
    case Request::kSetDeviceStateFd: {
      if (size != 8) return invalid(fmt::format("{} bytes instead of 8", size));
      // Never a descriptor with an error; else one unless bit 8 says that ours is used.
      const uint64_t value = reply.As<uint64_t>();
      fds = (value & kTransferErrorMask) == 0 && !(value & kTransferNoFd) ? 1 : 0;
      break;
    }
    default:
      if (size != 8) return invalid(fmt::format("{} bytes instead of 8", size));
  }
  if (reply.fds.size() != fds)
    return invalid(fmt::format("{} descriptors instead of {}", reply.fds.size(), fds));
  return absl::OkStatus();
}

absl::Status ValidateBackendRequest(const WireMessage& m) {
  RETURN_IF_ERROR(CheckHeader(m.header, /*reply=*/false));
  if (static_cast<BackendRequest>(m.header.request) == BackendRequest::kVringErr) {
    // Sent only where IN_BAND_NOTIFICATIONS is negotiated, which it is not; understood all the same.
    if (m.payload.size() != sizeof(VringState) || !m.fds.empty() || m.As<VringState>().index >= kMaxVrings) {
      return Error(absl::StatusCode::kInvalidArgument,
                   "VRING_ERR: {} bytes and {} descriptors, or no such ring", m.payload.size(), m.fds.size());
    }
    return absl::OkStatus();
  }
  if (static_cast<BackendRequest>(m.header.request) != BackendRequest::kConfigChange) {
    return Error(absl::StatusCode::kUnimplemented, "{} of the back-end is not supported",
                 BackendRequestName(m.header.request));
  }
  if (!m.payload.empty() || !m.fds.empty()) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "CONFIG_CHANGE_MSG: {} bytes and {} descriptors instead of none", m.payload.size(),
                 m.fds.size());
  }
  return absl::OkStatus();
}

absl::Status CheckRegions(std::span<const MemRegion> regions) {
  for (const MemRegion& region : regions) RETURN_IF_ERROR(CheckRegion(region));
  for (size_t i = 0; i < regions.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const MemRegion &a = regions[j], &b = regions[i];
      if (Overlap(a.gpa, a.size, b.gpa, b.size)) {
        return Error(absl::StatusCode::kInvalidArgument,
                     "memory regions at gpa {:#x} and {:#x} overlap in guest physical addresses", a.gpa,
                     b.gpa);
      }
      if (Overlap(a.user_addr, a.size, b.user_addr, b.size)) {
        return Error(absl::StatusCode::kInvalidArgument,
                     "memory regions at gpa {:#x} and {:#x} overlap in user addresses", a.gpa, b.gpa);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace baton::vhost
