// The vhost-user messages: layouts, the table of requests, and the validation of what a peer sent. Pure.
//
// Security model: a VMM is one step away from its guest, a back-end is a program of somebody else. Nothing in
// a message is believed: sizes, descriptor counts, indices, flags and address arithmetic are checked here, in
// one place, and every refusal says which value was wrong. A refused message closes the connection that it
// came on.
//
// Byte order is that of the host (vhost-user.rst, "Message Specification").
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "common/fd.h"
#include "common/status.h"

namespace baton::vhost {

// Requests of the front-end (vhost-user.rst, "Front-end message types").
enum class Request : uint32_t {
  kNone = 0,
  kGetFeatures = 1,
  kSetFeatures = 2,
  kSetOwner = 3,
  kResetOwner = 4,
  kSetMemTable = 5,
  kSetLogBase = 6,
  kSetLogFd = 7,
  kSetVringNum = 8,
  kSetVringAddr = 9,
  kSetVringBase = 10,
  kGetVringBase = 11,
  kSetVringKick = 12,
  kSetVringCall = 13,
  kSetVringErr = 14,
  kGetProtocolFeatures = 15,
  kSetProtocolFeatures = 16,
  kGetQueueNum = 17,
  kSetVringEnable = 18,
  kSendRarp = 19,
  kNetSetMtu = 20,
  kSetBackendReqFd = 21,
  kIotlbMsg = 22,
  kSetVringEndian = 23,
  kGetConfig = 24,
  kSetConfig = 25,
  kGetInflightFd = 31,
  kSetInflightFd = 32,
  kResetDevice = 34,
  kGetMaxMemSlots = 36,
  kAddMemReg = 37,
  kRemMemReg = 38,
  kSetStatus = 39,
  kGetStatus = 40,
  kSetDeviceStateFd = 42,
  kCheckDeviceState = 43,
  kGetVringBaseSkipDrain = 45,
};

// Requests of the back-end, on the channel of SET_BACKEND_REQ_FD.
enum class BackendRequest : uint32_t {
  kNone = 0,
  kIotlbMsg = 1,
  kConfigChange = 2,
  kHostNotifier = 3,
  kVringErr = 5,
};

// Protocol features (bit numbers).
namespace pf {
constexpr uint64_t kMq = 1u << 0;
constexpr uint64_t kLogShmfd = 1u << 1;
constexpr uint64_t kRarp = 1u << 2;
constexpr uint64_t kReplyAck = 1u << 3;
constexpr uint64_t kNetMtu = 1u << 4;
constexpr uint64_t kBackendReq = 1u << 5;
constexpr uint64_t kConfig = 1u << 9;
constexpr uint64_t kInflightShmfd = 1u << 12;
constexpr uint64_t kResetDevice = 1u << 13;
constexpr uint64_t kConfigureMemSlots = 1u << 15;
constexpr uint64_t kStatus = 1u << 16;
constexpr uint64_t kDeviceState = 1u << 19;
// GET_VRING_BASE stops without completing what is in flight, always. rust-vmm before 2026-03 has SHMEM here.
constexpr uint64_t kGetVringBaseInflight = 1u << 20;
// GET_VRING_BASE_SKIP_DRAIN does, and GET_VRING_BASE completes.
constexpr uint64_t kSkipDrain = 1u << 23;
}  // namespace pf

inline constexpr uint32_t kVersion = 1;
inline constexpr uint32_t kFlagReply = 1u << 2;
inline constexpr uint32_t kFlagNeedReply = 1u << 3;
inline constexpr uint32_t kReplyFlags = kVersion | kFlagReply;

// KICK, CALL and ERR carry a ring index in bits 0-7 and "no descriptor attached" in bit 8.
inline constexpr uint64_t kVringIndexMask = 0xff;
inline constexpr uint64_t kVringNoFd = 1u << 8;
inline constexpr uint32_t kMaxVrings = 256;
inline constexpr uint32_t kVringFLog = 1u << 0;

// SET_MEM_TABLE holds up to 8 regions; more need CONFIGURE_MEM_SLOTS. 512 is what QEMU uses at most.
inline constexpr uint32_t kMaxTableRegions = 8;
inline constexpr uint32_t kMaxMemSlots = 512;
// VHOST_USER_MAX_CONFIG_SIZE.
inline constexpr uint32_t kMaxConfigSize = 256;
// Longer than every message we know (the largest is SET_MEM_TABLE with 264, or GET_CONFIG with 268 bytes).
inline constexpr uint32_t kMaxPayload = 4096;
// Descriptors that may come with one message.
inline constexpr uint32_t kMaxFds = 8;

struct Header {
  uint32_t request = 0;
  uint32_t flags = 0;
  uint32_t size = 0;
};
static_assert(sizeof(Header) == 12);

// Payload of SET_DEVICE_STATE_FD. Its answer: bits 0-7 not zero: failed; bit 8: no descriptor attached.
struct TransferState {
  uint32_t direction;  // 0 save, 1 load
  uint32_t phase;      // 0: all rings stopped
};
static_assert(sizeof(TransferState) == 8);
inline constexpr uint64_t kTransferErrorMask = 0xff;
inline constexpr uint64_t kTransferNoFd = 1u << 8;

struct VringState {
  uint32_t index;
  uint32_t num;
};
static_assert(sizeof(VringState) == 8);

struct VringAddr {
  uint32_t index;
  uint32_t flags;
  uint64_t desc;
  uint64_t used;  // before avail, unlike everywhere else
  uint64_t avail;
  uint64_t log_guest_addr;
};
static_assert(sizeof(VringAddr) == 40);

struct MemRegion {
  uint64_t gpa;
  uint64_t size;
  uint64_t user_addr;
  uint64_t mmap_offset;
};
static_assert(sizeof(MemRegion) == 32);

struct MemTableHeader {
  uint32_t nregions;
  uint32_t padding;
};

struct MemReg {
  uint64_t padding;
  MemRegion region;
};
static_assert(sizeof(MemReg) == 40);

struct LogDescription {
  uint64_t mmap_size;
  uint64_t mmap_offset;
};
static_assert(sizeof(LogDescription) == 16);

struct ConfigHeader {
  uint32_t offset;
  uint32_t size;
  uint32_t flags;
};
static_assert(sizeof(ConfigHeader) == 12);

// 24 bytes on the wire: four bytes of tail padding, which every implementation insists on.
struct InflightDescription {
  uint64_t mmap_size;
  uint64_t mmap_offset;
  uint16_t num_queues;
  uint16_t queue_size;
  uint32_t padding;
};
static_assert(sizeof(InflightDescription) == 24);

// A message with the descriptors that came with its header. Move-only.
struct WireMessage {
  Header header;
  std::vector<uint8_t> payload;
  std::vector<UniqueFd> fds;

  Request request() const { return static_cast<Request>(header.request); }
  bool need_reply() const { return (header.flags & kFlagNeedReply) != 0; }
  // The payload as a T; it must have been validated (or its size compared) before. Zero-filled if shorter.
  template <typename T>
  T As() const {
    T out{};
    // Without a payload there is no pointer either, and memcpy(3) wants one.
    if (!payload.empty())
      std::memcpy(&out, payload.data(), payload.size() < sizeof out ? payload.size() : sizeof out);
    return out;
  }
};

template <typename T>
std::span<const uint8_t> Bytes(const T& value) {
  return {reinterpret_cast<const uint8_t*>(&value), sizeof value};
}

// What accompanies a request.
enum class FdRule {
  kNone,
  kTolerateOne,  // none by the specification, but some front-ends send one
  kOne,
  kVring,    // one unless bit 8 of the payload says none
  kRegions,  // one for each region of the table
};

enum class ReplyRule {
  kAck,     // a u64 when need_reply is set and REPLY_ACK was negotiated
  kNative,  // always, with a payload of its own
};

struct RequestInfo {
  Request id;
  const char* name;
  uint32_t min_size;
  uint32_t max_size;
  FdRule fds;
  ReplyRule reply;
  // Protocol feature without which the request is not allowed; 0: none.
  uint64_t protocol_feature;
};

// The entry of a request that this program understands, or null.
const RequestInfo* FindRequest(uint32_t id);
// "SET_VRING_KICK", also for requests we know by name only; "request 77" for others.
std::string RequestName(uint32_t id);
std::string BackendRequestName(uint32_t id);

// Checks version, flags and size of a header before its payload is read. `reply`: a reply is expected.
absl::Status CheckHeader(const Header& header, bool reply);

// Checks a request of the VMM completely: known, allowed by `protocol_features`, payload size, number of
// descriptors, and every field that can be judged by itself (indices, counts, flags, overflow).
// Unimplemented: not known or not negotiated. InvalidArgument: malformed. Both carry the request's name.
absl::Status ValidateRequest(const WireMessage& message, uint64_t protocol_features);

// Checks a reply to `request`: same id, size of the payload as `request` demands, descriptors only for
// GET_INFLIGHT_FD. `sent_size`: payload size of the request (GET_CONFIG answers with the same).
absl::Status ValidateReply(Request request, const WireMessage& reply, uint32_t sent_size);

// Checks a request of the back-end on its channel.
absl::Status ValidateBackendRequest(const WireMessage& message);

// Overlap, overflow and alignment of a set of regions (in gpa and in user_addr). InvalidArgument names both.
absl::Status CheckRegions(std::span<const MemRegion> regions);

}  // namespace baton::vhost
