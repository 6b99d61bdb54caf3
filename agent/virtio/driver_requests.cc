#include "agent/virtio/driver_requests.h"

#include <algorithm>

#include "agent/virtio/split_ring.h"

namespace baton::virtio {

void DriverRequests::Begin(uint16_t id, uint64_t token, uint32_t writable, uint16_t slots, uint16_t last) {
  requests_[id] = {token, begun_, writable, slots, last, 1};
  order_[begun_ % order_.size()] = id;
  ++begun_;
}

absl::Status DriverRequests::Claim(uint32_t id, uint32_t len, bool in_order, uint32_t most) {
  if (id >= requests_.size()) {
    return Mismatch(fmt::format("the device used buffer {} of a ring of {}", id, requests_.size()));
  }
  const Request& request = requests_[id];
  if (!request.outstanding || request.sequence >= visible_) {
    return Mismatch(fmt::format("the device used buffer {}, which was not available", id));
  }
  if (len > request.writable) {
    return Mismatch(
        fmt::format("the device wrote {} bytes to buffer {} with room for {}", len, id, request.writable));
  }
  uint64_t first = request.sequence;
  if (in_order) {
    // Everything before taken_ is taken, and nothing after: the outstanding buffers are consecutive.
    if (!prefix()) return Mismatch("the device claims to use buffers in order, but has not");
    first = taken_;
    if (request.sequence - first >= most) {
      return Mismatch(fmt::format("the device used {} buffers at once, but returned {}",
                                  request.sequence - first + 1, most));
    }
  }
  claim_ = first;
  claim_end_ = request.sequence + 1;
  claim_id_ = static_cast<uint16_t>(id);
  claim_len_ = len;
  return absl::OkStatus();
}

bool DriverRequests::Take(UsedBuffer* out, uint16_t* slots, uint16_t* last) {
  if (!claimed()) return false;
  const bool named = claim_ + 1 == claim_end_;
  const uint16_t id = named ? claim_id_ : order_[claim_ % order_.size()];
  Request& request = requests_[id];
  *out = {request.token, id, named ? claim_len_ : request.writable, !named};
  *slots = request.slots;
  *last = request.last;
  request.outstanding = 0;
  ++taken_;
  highest_ = std::max(highest_, claim_ + 1);
  ++claim_;
  return true;
}

void DriverState::Put(const DriverRequests& r) {
  Put(r.requests_);
  Put(r.order_);
  for (uint64_t value : {r.begun_, r.visible_, r.taken_, r.highest_, r.claim_, r.claim_end_}) Put(value);
  Put(r.claim_id_);
  Put(r.claim_len_);
}

bool DriverState::Get(DriverRequests* r) {
  if (!Get(&r->requests_) || !Get(&r->order_)) return false;
  for (uint64_t* value : {&r->begun_, &r->visible_, &r->taken_, &r->highest_, &r->claim_, &r->claim_end_}) {
    if (!Get(value)) return false;
  }
  return Get(&r->claim_id_) && Get(&r->claim_len_);
}

bool DriverRequests::Consistent(std::vector<bool>* seen, uint32_t* slots) const {
  const uint64_t n = requests_.size();
  if (begun_ < visible_ || visible_ < taken_ || begun_ - taken_ > n || highest_ < taken_ ||
      highest_ > visible_) {
    return false;
  }
  // Sequence numbers are unique if each id that has one is the one that some place in this list names.
  std::vector<uint64_t> sequences;
  seen->assign(n, false);
  *slots = 0;
  for (uint64_t id = 0; id < n; ++id) {
    const Request& request = requests_[id];
    if (!request.outstanding) continue;
    if (request.sequence >= begun_ || request.slots == 0 || request.slots > n || request.last >= n)
      return false;
    (*seen)[id] = true;
    *slots += request.slots;
    sequences.push_back(request.sequence);
  }
  std::sort(sequences.begin(), sequences.end());
  if (std::adjacent_find(sequences.begin(), sequences.end()) != sequences.end()) return false;
  if (sequences.size() != begun_ - taken_ || *slots > n) return false;
  // In order: what is outstanding is what comes after the taken ones, and the list of ids says so.
  auto named = [&](uint16_t id, uint64_t sequence) {
    return id < n && requests_[id].outstanding && requests_[id].sequence == sequence;
  };
  for (uint64_t sequence = taken_; prefix() && sequence < begun_; ++sequence) {
    if (!named(order_[sequence % n], sequence)) return false;
  }
  if (claim_ > claim_end_ || claim_end_ > visible_ || claim_end_ - claim_ > n) return false;
  if (!claimed()) return true;
  if (claim_end_ - claim_ > 1 && (!prefix() || claim_ != taken_)) return false;
  return named(claim_id_, claim_end_ - 1) && claim_len_ <= requests_[claim_id_].writable;
}

absl::Status CheckAdd(std::span<const Segment> readable, std::span<const Segment> writable) {
  if (readable.empty() && writable.empty()) {
    return Error(absl::StatusCode::kInvalidArgument, "a buffer of no segments");
  }
  const uint64_t room = TotalBytes(writable);
  if (room > UINT32_MAX || TotalBytes(readable) + room > UINT32_MAX) {
    return Error(absl::StatusCode::kInvalidArgument, "a buffer of {} bytes", TotalBytes(readable) + room);
  }
  return absl::OkStatus();
}

uint64_t TotalBytes(std::span<const Segment> segments) {
  uint64_t total = 0;
  for (const Segment& segment : segments) total += segment.len;
  return total;
}

}  // namespace baton::virtio
