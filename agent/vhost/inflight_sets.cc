// What the mediator's in-flight region says of a ring: read, judged against the ring, and turned into where
// the back-end is to begin.
#include <sys/stat.h>

#include <cerrno>

#include "agent/vhost/mediator_impl.h"

namespace baton::vhost {

absl::StatusOr<virtio::InflightGeometry> Mediator::Impl::RegionGeometry() const {
  const InflightDescription& d = record_.inflight.description;
  struct stat st;
  if (::fstat(record_.inflight.fd.get(), &st) != 0) return ErrnoError(errno, "in-flight region");
  return virtio::CheckInflightGeometry(
      record_.packed() ? virtio::RingFormat::kPacked : virtio::RingFormat::kSplit, d.mmap_size, d.mmap_offset,
      d.num_queues, d.queue_size, static_cast<uint64_t>(st.st_size));
}

absl::Status Mediator::Impl::CopyPart(const virtio::InflightGeometry& geometry, uint32_t index,
                                      std::vector<uint8_t>* part) const {
  if (index >= geometry.num_queues) {
    return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
                 "ring {} is not in the in-flight region", index);
  }
  part->resize(geometry.stride);
  const uint64_t at = geometry.mmap_offset + geometry.stride * index;
  if (record_.inflight.map.Copy(at, part->data(), part->size())) return absl::OkStatus();
  return Error(v1::INFLIGHT_UNKNOWN, absl::StatusCode::kFailedPrecondition,
               "the in-flight region was made shorter by its back-end");
}

absl::StatusOr<virtio::InflightView> Mediator::Impl::ReadSet(const virtio::MemoryView& memory,
                                                             std::span<const uint8_t> part, uint32_t index,
                                                             uint32_t base,
                                                             std::span<virtio::InflightDesc> room,
                                                             virtio::InflightReader* reader) const {
  const virtio::InflightTraits& traits = virtio::TraitsOf(quirks_.inflight);
  if (record_.packed()) {
    ASSIGN_OR_RETURN(virtio::PackedRing ring, record_.Packed(index));
    ASSIGN_OR_RETURN(const virtio::InflightView set, reader->ReadPacked(part, memory, ring, room));
    RETURN_IF_ERROR(virtio::NormaliseBase(base, traits.packed_base_is_16_bit, ring.size, set).status());
    return set;
  }
  ASSIGN_OR_RETURN(virtio::SplitRing ring, record_.Split(index));
  ASSIGN_OR_RETURN(virtio::SplitIndices indices, virtio::ReadSplitIndices(memory, ring));
  ASSIGN_OR_RETURN(
      const virtio::InflightView set,
      reader->ReadSplit(part, ring.size, indices.used,
                        traits.single_completions ? virtio::BatchRule::kSingle : virtio::BatchRule::kLinked));
  RETURN_IF_ERROR(virtio::NormaliseBase(base, indices.used, static_cast<uint16_t>(set.size())).status());
  RETURN_IF_ERROR(virtio::CheckSplitInvariants(ring.size, set.last_avail(), indices));
  return set;
}

}  // namespace baton::vhost
