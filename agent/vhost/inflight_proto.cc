#include "agent/vhost/inflight_proto.h"

namespace baton::vhost {
namespace {

uint32_t Encode(virtio::PackedPosition p) { return uint32_t{p.idx} | uint32_t{p.wrap} << 15; }
virtio::PackedPosition Decode(uint32_t half) {
  return {static_cast<uint16_t>(half & 0x7fff), (half >> 15 & 1) != 0};
}

}  // namespace

void ToProto(const virtio::InflightSet& set, v1::VringState* out) {
  const bool packed = set.format == virtio::RingFormat::kPacked;
  out->set_last_avail(packed ? Encode(set.avail) : set.avail.idx);
  out->set_used_idx(packed ? Encode(set.used) : set.used.idx);
  for (const virtio::InflightRequest& request : set.requests) {
    v1::InflightRequest* r = out->add_inflight();
    r->set_id(request.id);
    r->set_counter(request.counter);
    for (const virtio::InflightDesc& desc : set.DescsOf(request)) {
      v1::PackedDescriptor* d = r->add_descriptors();
      d->set_addr(desc.addr);
      d->set_len(desc.len);
      d->set_id(desc.id);
      d->set_flags(desc.flags);
    }
  }
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
  for (const v1::InflightRequest& r : vring.inflight()) {
    if (r.id() > 0xffff) return mismatch(fmt::format("id {}", r.id()));
    if (static_cast<uint32_t>(r.descriptors_size()) > vring.size() ||
        (!vring.packed() && !r.descriptors().empty())) {
      return mismatch(fmt::format("{} descriptors of request {}", r.descriptors_size(), r.id()));
    }
    virtio::InflightRequest request;
    request.id = static_cast<uint16_t>(r.id());
    request.counter = r.counter();
    request.first = static_cast<uint32_t>(set.descs.size());
    request.num = static_cast<uint16_t>(r.descriptors_size());
    if (!vring.packed()) request.first = 0;
    for (const v1::PackedDescriptor& d : r.descriptors()) {
      if (d.id() > 0xffff || d.flags() > 0xffff)
        return mismatch(fmt::format("a descriptor of request {} is none", r.id()));
      set.descs.push_back(
          {d.addr(), d.len(), static_cast<uint16_t>(d.id()), static_cast<uint16_t>(d.flags())});
    }
    set.requests.push_back(request);
  }
  RETURN_IF_ERROR(virtio::CheckInflightSet(static_cast<uint16_t>(vring.size()), set));
  return set;
}

}  // namespace baton::vhost
