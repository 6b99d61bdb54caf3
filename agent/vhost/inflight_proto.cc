#include "agent/vhost/inflight_proto.h"

#include <cstring>

#include "agent/virtio/ring_access.h"

namespace baton::vhost {
namespace {

uint32_t Encode(virtio::PackedPosition p) { return uint32_t{p.idx} | uint32_t{p.wrap} << 15; }
virtio::PackedPosition Decode(uint32_t half) {
  return {static_cast<uint16_t>(half & 0x7fff), (half >> 15 & 1) != 0};
}

}  // namespace

void ToProto(const virtio::InflightView& set, v1::VringState* out) {
  const bool packed = set.format == virtio::RingFormat::kPacked;
  out->set_last_avail(packed ? Encode(set.avail) : set.avail.idx);
  out->set_used_idx(packed ? Encode(set.used) : set.used.idx);
  const int size = static_cast<int>(set.size());
  out->mutable_inflight()->Resize(size, 0);
  uint32_t* at = out->mutable_inflight()->mutable_data();
  for (const virtio::InflightRequest& request : set.requests) *at++ = request.id;
  if (!packed) return;
  out->mutable_chain_lengths()->Resize(size, 0);
  at = out->mutable_chain_lengths()->mutable_data();
  for (const virtio::InflightRequest& request : set.requests) *at++ = request.num;
  // A set holds its chains in the order of its requests, and its descriptors as they lie in a ring.
  const size_t bytes = set.descs.size() * sizeof(virtio::InflightDesc);
  if (std::string* in = out->mutable_descriptors(); RoomIn(out).data() == set.descs.data()) {
    in->resize(bytes);
  } else {
    in->assign(reinterpret_cast<const char*>(set.descs.data()), bytes);
  }
}

void MakeRoom(bool packed, uint32_t n, v1::VringState* out) {
  out->mutable_inflight()->Resize(static_cast<int>(n), 0);
  if (!packed) return;
  out->mutable_chain_lengths()->Resize(static_cast<int>(n), 0);
  out->mutable_descriptors()->resize(n * sizeof(virtio::InflightDesc));
}

std::span<virtio::InflightDesc> RoomIn(v1::VringState* out) {
  // A shorter string is kept where nothing is aligned.
  if (out->descriptors().size() < sizeof(virtio::InflightDesc)) return {};
  std::string* bytes = out->mutable_descriptors();
  return {reinterpret_cast<virtio::InflightDesc*>(bytes->data()),
          bytes->size() / sizeof(virtio::InflightDesc)};
}

absl::StatusOr<virtio::InflightSet> FromProto(const v1::VringState& vring) {
  auto mismatch = [](const std::string& what) {
    return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition, "in-flight set: {}", what);
  };
  virtio::InflightSet set;
  set.format = vring.packed() ? virtio::RingFormat::kPacked : virtio::RingFormat::kSplit;
  if (vring.last_avail() > 0xffff || vring.used_idx() > 0xffff) return mismatch("a position is no index");
  if (vring.packed()) {
    set.avail = Decode(vring.last_avail());
    set.used = Decode(vring.used_idx());
  } else {
    set.avail.idx = static_cast<uint16_t>(vring.last_avail());
    set.used.idx = static_cast<uint16_t>(vring.used_idx());
  }
  if (vring.size() == 0 || vring.size() > virtio::kMaxRingSize)
    return mismatch("the ring has no possible size");
  if (static_cast<uint32_t>(vring.inflight_size()) > vring.size())
    return mismatch(fmt::format("{} requests in a ring of {}", vring.inflight_size(), vring.size()));
  if (vring.chain_lengths_size() != (vring.packed() ? vring.inflight_size() : 0))
    return mismatch(
        fmt::format("{} chains of {} requests", vring.chain_lengths_size(), vring.inflight_size()));
  const std::string& bytes = vring.descriptors();
  const size_t descs = bytes.size() / sizeof(virtio::InflightDesc);
  if (bytes.size() % sizeof(virtio::InflightDesc) || descs > (vring.packed() ? vring.size() : 0))
    return mismatch(fmt::format("{} bytes of descriptors in a ring of {}", bytes.size(), vring.size()));
  set.descs.resize(descs);
  if (descs > 0) std::memcpy(set.descs.data(), bytes.data(), bytes.size());
  uint32_t first = 0;
  for (int i = 0; i < vring.inflight_size(); ++i) {
    const uint32_t id = vring.inflight(i), num = vring.packed() ? vring.chain_lengths(i) : 0;
    if (id > 0xffff) return mismatch(fmt::format("id {}", id));
    if (num > descs - first)
      return mismatch(fmt::format("request {} has {} descriptors, {} are left", id, num, descs - first));
    // The list's order is that of fetching.
    set.requests.push_back(
        {static_cast<uint16_t>(id), static_cast<uint16_t>(num), first, static_cast<uint64_t>(i) + 1});
    first += num;
  }
  RETURN_IF_ERROR(CheckInflightSet(static_cast<uint16_t>(vring.size()), set));
  return set;
}

}  // namespace baton::vhost
