#include "agent/virtio/blk_in_flight.h"

#include <algorithm>
#include <array>
#include <memory>

#include "agent/virtio/chain.h"
#include "agent/virtio/ring_access.h"

namespace baton::virtio {
namespace {

// Gathers one request's first bytes and lengths, reusing its buffers for the next.
class BlkReader {
 public:
  BlkReader(const MemoryView& memory, uint64_t desc, uint16_t n, std::vector<GuestSpan>* buffers)
      : memory_(memory), desc_(desc), n_(n), buffers_(buffers) {}

  // Before the first request. A split ring's table is copied whole: one read instead of one a descriptor.
  void Begin(const InflightSet& set) {
    if (set.format != RingFormat::kSplit || set.empty()) return;
    ring_table_ = std::make_unique_for_overwrite<SplitDesc[]>(n_);
    if (!memory_.Read(desc_, ring_table_.get(), sizeof(SplitDesc) * n_).ok()) ring_table_.reset();
  }

  BlkRequest Read(const InflightSet& set, const InflightRequest& request) {
    return Walk(set, request) ? ClassifyBlk({head_.data(), head_size_}, readable_, writable_) : BlkRequest();
  }

  RequestClass ReadClass(const InflightSet& set, const InflightRequest& request) {
    return Walk(set, request) && head_size_ >= kBlkHeaderBytes ? BlkClassOf(Type())
                                                               : RequestClass::kNotIdempotent;
  }

 private:
  bool Walk(const InflightSet& set, const InflightRequest& request) {
    head_size_ = 0;
    readable_ = writable_ = 0;
    count_ = 0;
    return set.format == RingFormat::kSplit ? WalkSplit(request.id) : WalkPacked(set.DescsOf(request));
  }

  bool WalkSplit(uint16_t head) {
    uint16_t index = head;
    for (uint32_t steps = 0; ring_table_ && steps < n_ && index < n_; ++steps) {
      const SplitDesc& d = ring_table_[index];
      if (d.flags & kDescIndirect) {
        return !(d.flags & kDescNext) && ReadTable(d.addr, d.len, &split_table_) && WalkSplitTable();
      }
      if (!Add(d.addr, d.len, d.flags)) return false;
      if (!(d.flags & kDescNext)) return true;
      index = d.next;
    }
    return false;
  }

  bool WalkSplitTable() {
    size_t at = 0;
    for (size_t steps = 0; steps < split_table_.size() && at < split_table_.size(); ++steps) {
      const SplitDesc& d = split_table_[at];
      if ((d.flags & kDescIndirect) || !Add(d.addr, d.len, d.flags)) return false;
      if (!(d.flags & kDescNext)) return true;
      at = d.next;
    }
    return false;
  }

  bool WalkPacked(std::span<const PackedDesc> chain) {
    for (const PackedDesc& d : chain) {
      if (!(d.flags & kDescIndirect)) {
        if (!Add(d.addr, d.len, d.flags)) return false;
        continue;
      }
      if (chain.size() != 1 || !ReadTable(d.addr, d.len, &packed_table_)) return false;
      return std::all_of(packed_table_.begin(), packed_table_.end(), [this](const PackedDesc& entry) {
        return !(entry.flags & kDescIndirect) && Add(entry.addr, entry.len, entry.flags);
      });
    }
    return !chain.empty();
  }

  template <typename Desc>
  bool ReadTable(uint64_t addr, uint32_t bytes, std::vector<Desc>* table) {
    if (bytes == 0 || bytes % sizeof(Desc) || bytes / sizeof(Desc) > MaxChain(n_)) return false;
    table->resize(bytes / sizeof(Desc));
    return memory_.Read(addr, table->data(), bytes).ok();
  }

  bool Add(uint64_t addr, uint32_t len, uint16_t flags) {
    if (++count_ > MaxChain(n_)) return false;
    if (flags & kDescWrite) {
      writable_ += len;
      if (buffers_) buffers_->push_back({addr, len});
      return true;
    }
    if (writable_) return false;
    readable_ += len;
    return Gather(addr, len);
  }

  // The first 16 bytes always; more only of the types that have segments.
  bool Gather(uint64_t addr, uint32_t len) {
    if (len == 0) return true;
    if (head_size_ < kBlkHeaderBytes) {
      const auto part = static_cast<uint32_t>(std::min<uint64_t>(len, kBlkHeaderBytes - head_size_));
      if (!Append(addr, part)) return false;
      addr += part;
      len -= part;
    }
    if (len == 0 || head_size_ < kBlkHeaderBytes || !HasSegments()) return true;
    if (head_size_ >= kBlkHeadBytes) return true;
    return Append(addr, static_cast<uint32_t>(std::min<uint64_t>(len, kBlkHeadBytes - head_size_)));
  }

  bool Append(uint64_t addr, uint32_t len) {
    // Nearly always a whole header: a copy of constant size, of thousands while the guest stands still.
    const uint8_t* at = len == kBlkHeaderBytes ? memory_.Mapped(addr, kBlkHeaderBytes) : nullptr;
    if (at) {
      std::memcpy(head_.data() + head_size_, at, kBlkHeaderBytes);
    } else if (!memory_.Read(addr, head_.data() + head_size_, len).ok()) {
      return false;
    }
    head_size_ += len;
    return true;
  }

  uint32_t Type() const {
    uint32_t type;
    std::memcpy(&type, head_.data(), sizeof type);
    return type;
  }

  bool HasSegments() const {
    const uint32_t type = Type();
    return type == kBlkDiscard || type == kBlkWriteZeroes || type == kBlkSecureErase;
  }

  const MemoryView& memory_;
  const uint64_t desc_;
  const uint16_t n_;
  std::vector<GuestSpan>* const buffers_;
  std::array<uint8_t, kBlkHeadBytes> head_;
  size_t head_size_ = 0;
  uint64_t readable_ = 0, writable_ = 0;
  uint32_t count_ = 0;
  std::unique_ptr<SplitDesc[]> ring_table_;
  std::vector<SplitDesc> split_table_;
  std::vector<PackedDesc> packed_table_;
};

}  // namespace

std::vector<BlkRequest> ReadBlkRequests(const MemoryView& memory, uint64_t desc, uint16_t n,
                                        const InflightSet& set, std::vector<GuestSpan>* buffers) {
  std::vector<BlkRequest> out;
  out.reserve(set.size());
  BlkReader reader(memory, desc, n, buffers);
  reader.Begin(set);
  for (const InflightRequest& request : set.requests) out.push_back(reader.Read(set, request));
  return out;
}

ClassesPresent ReadClasses(const MemoryView& memory, uint64_t desc, uint16_t n, const InflightSet& set,
                           v1::DeviceClass device_class, std::vector<GuestSpan>* buffers) {
  if (device_class != v1::BLK) return ClassesOf(device_class, set.size());
  ClassesPresent out;
  BlkReader reader(memory, desc, n, buffers);
  reader.Begin(set);
  for (const InflightRequest& request : set.requests) out.Add(reader.ReadClass(set, request));
  return out;
}

}  // namespace baton::virtio
