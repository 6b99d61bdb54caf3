// The mediator's in-flight region, and what is noted of the rings so that the next shim can go on with them.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "agent/vhost/mediator_impl.h"
#include "agent/virtio/features.h"
#include "agent/virtio/net_protocol.h"
#include "common/log.h"

namespace baton::vhost {
namespace {

// More than 256 rings of 32768 packed entries need.
constexpr uint64_t kMaxRegion = uint64_t{1} << 30;

absl::StatusOr<std::vector<uint8_t>> ReadRegion(int fd, uint64_t offset, uint64_t size) {
  std::vector<uint8_t> out(size);
  for (size_t done = 0; done < size;) {
    ssize_t n = ::pread(fd, out.data() + done, size - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoError(errno, "reading the in-flight region");
    if (n == 0) {
      return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                   "the in-flight region was made shorter by its back-end");
    }
    done += static_cast<size_t>(n);
  }
  return out;
}

}  // namespace

// How many rings there will be. VMMs start them one after the other, and the region is handed over before the
// first.
uint32_t Mediator::Impl::ExpectedRings() const {
  const uint32_t offered = static_cast<uint32_t>(offer_.queues);
  if (options_.spec.class_() != v1::NET) return offered;
  // A NIC's queues come in pairs; that is also how GET_QUEUE_NUM of its back-ends counts them. No more than
  // the VMM uses: DPDK waits for every ring that it has heard of (virtio_is_ready).
  const uint32_t pairs = options_.spec.num_queues() ? options_.spec.num_queues() : std::max(offered, 1u);
  return 2 * pairs + (record_.features && (*record_.features & virtio::kNetFCtrlVq) ? 1 : 0);
}

absl::Status Mediator::Impl::EnsureInflight() {
  if (!(link_.frontend->protocol_features() & pf::kInflightShmfd)) return absl::OkStatus();
  // A firmware drives split rings where its guest then asks for packed ones, which need another region.
  const bool misfit = record_.inflight && !RegionStride(record_.inflight.description).ok();
  if (link_.inflight_sent && !misfit) return absl::OkStatus();
  uint32_t size = std::max<uint32_t>(options_.spec.queue_size(), 256);
  uint32_t queues = ExpectedRings();
  bool needed = false;
  for (const auto& [index, vring] : record_.vrings) {
    size = std::max(size, vring.num);
    queues = std::max(queues, index + 1);
    needed |= vring.lost;
  }
  // Rings that the VMM has not come to yet.
  for (uint32_t i = 0; MemoApplies() && i < kMaxVrings; ++i) needed |= memo_->ring(i).running();
  needed |= !taken_over_.empty();
  if (!record_.inflight) {
    if (auto found = memo_->OpenRegion(); found.ok()) {
      record_.inflight = std::move(*found);
    } else if (!absl::IsNotFound(found.status())) {
      if (needed)
        return WithReason(absl::FailedPreconditionError(Message(found.status())), v1::INFLIGHT_UNKNOWN);
      LOG_WARN("device {}: a new in-flight region is made: {}", name(), Message(found.status()));
    }
  }
  if (record_.inflight) {
    queues = std::max<uint32_t>(queues, record_.inflight.description.num_queues);
    size = std::max<uint32_t>(size, record_.inflight.description.queue_size);
  }
  // The stride is the back-end's own affair; its answer tells it.
  ASSIGN_OR_RETURN(auto answer, link_.frontend->GetInflight(static_cast<uint16_t>(queues),
                                                            static_cast<uint16_t>(size), RequestDeadline()));
  InflightDescription wanted = answer.first;
  wanted.num_queues = static_cast<uint16_t>(queues);
  wanted.queue_size = static_cast<uint16_t>(size);
  struct stat st;
  if (::fstat(answer.second.get(), &st) != 0 || wanted.mmap_size > kMaxRegion ||
      wanted.mmap_offset > static_cast<uint64_t>(st.st_size) ||
      static_cast<uint64_t>(st.st_size) - wanted.mmap_offset < wanted.mmap_size) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "GET_INFLIGHT_FD: {} bytes at offset {} do not fit into the file", wanted.mmap_size,
                 wanted.mmap_offset);
  }
  RETURN_IF_ERROR(RegionStride(wanted).status());
  if (const InflightDescription& d = record_.inflight.description;
      record_.inflight && (std::exchange(replace_region_, false) || d.mmap_size != wanted.mmap_size ||
                           d.num_queues != wanted.num_queues || d.queue_size != wanted.queue_size)) {
    RETURN_IF_ERROR(AdoptRegion(wanted, needed));
  }
  if (!record_.inflight) {
    ASSIGN_OR_RETURN(std::vector<uint8_t> content,
                     ReadRegion(answer.second.get(), wanted.mmap_offset, wanted.mmap_size));
    ASSIGN_OR_RETURN(record_.inflight,
                     memo_->MakeRegion(wanted, content, static_cast<uint32_t>(options_.backend.kind())));
  }
  // DPDK moves on to a queue's part only for queues it has heard of: SET_VRING_NUM of all of them comes
  // first.
  const InflightDescription& region = record_.inflight.description;
  for (uint32_t i = 0; i < region.num_queues; ++i) {
    auto it = record_.vrings.find(i);
    VringState num{i, it != record_.vrings.end() && it->second.num ? it->second.num : region.queue_size};
    RETURN_IF_ERROR(link_.frontend->Set(Request::kSetVringNum, Bytes(num), {}, RequestDeadline()));
  }
  int fd = record_.inflight.fd.get();
  RETURN_IF_ERROR(
      link_.frontend->Set(Request::kSetInflightFd, Bytes(region), {&fd, 1}, RequestDeadline(), true));
  link_.inflight_sent = true;
  return absl::OkStatus();
}

absl::Status Mediator::Impl::AdoptRegion(const InflightDescription& wanted, bool needed) {
  // A back-end of another kind, whose queues lie closer together or further apart, or more or longer rings.
  // What a queue's part begins with is the same.
  const InflightRegion old = std::exchange(record_.inflight, {});
  if (!needed) return absl::OkStatus();
  const InflightDescription& d = old.description;
  ASSIGN_OR_RETURN(uint64_t from, RegionStride(d));
  ASSIGN_OR_RETURN(uint64_t to, RegionStride(wanted));
  if (record_.packed() && d.queue_size != wanted.queue_size) {
    // The free list ends at the last entry of a part.
    return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                 "the in-flight region is for packed rings of {}, not of {}", d.queue_size,
                 wanted.queue_size);
  }
  ASSIGN_OR_RETURN(std::vector<uint8_t> bytes, ReadRegion(old.fd.get(), d.mmap_offset, d.mmap_size));
  std::vector<uint8_t> content(wanted.mmap_size);
  for (uint32_t i = 0; i < d.num_queues; ++i) {
    uint8_t* part = content.data() + i * to;
    std::copy_n(bytes.begin() + static_cast<ptrdiff_t>(i * from), std::min(from, to), part);
    if (record_.packed()) continue;
    virtio::InflightSplitHeader header;
    std::memcpy(&header, part, sizeof header);
    if (header.version == 0) continue;
    header.desc_num = wanted.queue_size;
    std::memcpy(part, &header, sizeof header);
  }
  ASSIGN_OR_RETURN(record_.inflight,
                   memo_->MakeRegion(wanted, content, static_cast<uint32_t>(options_.backend.kind())));
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> Mediator::Impl::RegionStride(const InflightDescription& d) const {
  return virtio::InferInflightStride(
      record_.packed() ? virtio::RingFormat::kPacked : virtio::RingFormat::kSplit, d.mmap_size, d.num_queues,
      d.queue_size);
}

absl::Status Mediator::Impl::InitInflightPart(uint32_t index, virtio::PackedPosition used) {
  const InflightDescription& d = record_.inflight.description;
  ASSIGN_OR_RETURN(uint64_t stride, RegionStride(d));
  if (index >= d.num_queues) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "ring {} has no place in the in-flight region of {} queues", index, d.num_queues);
  }
  std::vector<uint8_t> part(stride);
  RETURN_IF_ERROR(record_.packed() ? virtio::InitInflightPacked(part, d.queue_size, used)
                                   : virtio::InitInflightSplit(part, d.queue_size, used.idx));
  ssize_t n = ::pwrite(record_.inflight.fd.get(), part.data(), part.size(),
                       static_cast<off_t>(d.mmap_offset + stride * index));
  if (n != static_cast<ssize_t>(part.size())) return ErrnoError(errno, "writing the in-flight region");
  return absl::OkStatus();
}

absl::StatusOr<virtio::InflightSet> Mediator::Impl::ReadInflightPart(uint32_t index) {
  const InflightDescription& d = record_.inflight.description;
  ASSIGN_OR_RETURN(uint64_t stride, RegionStride(d));
  auto unknown = [&](const std::string& what) {
    return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition, "ring {}: {}", index, what);
  };
  if (!record_.inflight || index >= d.num_queues) return unknown("it is not in the in-flight region");
  ASSIGN_OR_RETURN(std::vector<uint8_t> part,
                   ReadRegion(record_.inflight.fd.get(), d.mmap_offset + stride * index, stride));
  if (record_.packed()) {
    ASSIGN_OR_RETURN(virtio::PackedRing ring, record_.Packed(index));
    ASSIGN_OR_RETURN(auto set, virtio::ReadInflightPacked(part, record_.memory, ring));
    if (absl::Status sound = virtio::CheckInflightPacked(ring.size, set); !sound.ok())
      return unknown(Message(sound));
    return set;
  }
  ASSIGN_OR_RETURN(virtio::SplitRing ring, record_.Split(index));
  ASSIGN_OR_RETURN(virtio::SplitIndices indices, virtio::ReadSplitIndices(record_.memory, ring));
  ASSIGN_OR_RETURN(auto set, virtio::ReadInflightSplit(part, ring.size, indices.used));
  if (const uint16_t outstanding = static_cast<uint16_t>(indices.avail - indices.used);
      set.size() > outstanding) {
    return unknown(
        fmt::format("{} requests are in flight by the in-flight region, but only {} were made available",
                    set.size(), outstanding));
  }
  return set;
}

absl::StatusOr<uint32_t> Mediator::Impl::BaseByRegion(uint32_t index, uint32_t asked) {
  VringRecord& vring = record_.vrings[index];
  virtio::PackedPosition used = virtio::DecodePackedBase(asked).used;
  bool at_beginning = asked == virtio::kPackedBaseAfterReset;
  if (!record_.packed()) {
    ASSIGN_OR_RETURN(virtio::SplitRing ring, record_.Split(index));
    ASSIGN_OR_RETURN(virtio::SplitIndices indices, virtio::ReadSplitIndices(record_.memory, ring));
    used = {indices.used, true};
    at_beginning = asked == 0 && indices.used == 0;
  }
  if (vring.lost) {
    auto set = ReadInflightPart(index);
    if (set.ok()) {
      LOG_INFO("device {}: ring {}: {} requests in flight will be submitted again", name(), index,
               set->size());
      auto base = virtio::BaseFor(quirks_.inflight, static_cast<uint16_t>(vring.num), *set);
      // A kind that nothing is known of is told what most back-ends want: they add what is in flight
      // themselves.
      if (!base.ok() && !record_.packed()) return used.idx;
      return base;
    }
    // A guest that was reset while nobody served it has other requests at the same place.
    if (!at_beginning) return set.status();
    LOG_INFO("device {}: ring {} begins anew: {}", name(), index, Message(set.status()));
  }
  RETURN_IF_ERROR(InitInflightPart(index, used));
  return record_.packed() ? asked : used.idx;
}

uint64_t Mediator::Impl::MemoryDigest() const {
  // FNV-1a: nobody gains by a collision, which would need a VMM that forges its own memory table.
  uint64_t hash = 0xcbf29ce484222325;
  for (const auto& region : record_.memory.regions()) {
    for (uint64_t value : {region.wire.gpa, region.wire.size, region.wire.user_addr, region.wire.mmap_offset,
                           uint64_t{region.device}, uint64_t{region.inode}}) {
      hash = (hash ^ value) * 0x100000001b3;
    }
  }
  return hash;
}

bool Mediator::Impl::MemoApplies() const {
  const MemoDevice device = memo_->device();
  return device.features == (record_.features.value_or(0) & ~virtio::kVhostOnly) &&
         device.memory_digest == MemoryDigest();
}

void Mediator::Impl::Recall(uint32_t index) {
  VringRecord& vring = record_.vrings[index];
  if (!vring.addr || std::exchange(vring.recalled, true)) return;
  const MemoRing memo = memo_->ring(index);
  if (!memo.known() || memo.num != vring.num || memo.desc != vring.addr->desc ||
      memo.used != vring.addr->used || memo.avail != vring.addr->avail || !MemoApplies()) {
    return;
  }
  if ((memo.flags & MemoRing::kTold) && !vring.told) vring.told = memo.told;
  // A back-end that completes what it has before it serves the next connection left nothing in flight.
  if (memo.running() && !quirks_.drains_on_disconnect) vring.lost = true;
}

void Mediator::Impl::Memorize(uint32_t index, bool starts) {
  const VringRecord& vring = record_.vrings[index];
  if (!vring.addr) return;
  if (!MemoApplies()) return MemorizeAll();
  MemoRing memo;
  memo.flags = MemoRing::kKnown;
  memo.num = vring.num;
  memo.desc = vring.addr->desc;
  memo.used = vring.addr->used;
  memo.avail = vring.addr->avail;
  auto it = link_.vrings.find(index);
  if (starts || vring.lost || (it != link_.vrings.end() && it->second.running))
    memo.flags |= MemoRing::kRunning;
  if (vring.told) {
    memo.flags |= MemoRing::kTold;
    memo.told = *vring.told;
  }
  if (it != link_.vrings.end() && it->second.base) {
    memo.flags |= MemoRing::kBase;
    memo.base = *it->second.base;
  }
  memo_->set_ring(index, memo);
}

void Mediator::Impl::MemorizeAll() {
  for (auto& [index, vring] : record_.vrings) Recall(index);
  memo_->ForgetRings();
  NoteTakenOver();
  MemoDevice device = memo_->device();
  device.features = record_.features.value_or(0) & ~virtio::kVhostOnly;
  device.memory_digest = MemoryDigest();
  memo_->set_device(device);
  // A ring that is about to start counts as running.
  for (const auto& [index, vring] : record_.vrings) Memorize(index, vring.started);
}

}  // namespace baton::vhost
