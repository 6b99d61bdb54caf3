#include "agent/virtio/blk_in_flight.h"

#include <algorithm>
#include <array>
#include <memory>

#include "agent/virtio/chain.h"
#include "agent/virtio/ring_access.h"

namespace baton::virtio {
namespace {

// A descriptor of the guest's, each word read once.
SplitDesc LoadDescAnywhere(const uint8_t* at) {
  const uint64_t words[2] = {LoadAnywhere<uint64_t>(at), LoadAnywhere<uint64_t>(at + 8)};
  SplitDesc out;
  std::memcpy(&out, words, sizeof out);
  return out;
}

bool HasSegments(uint32_t type) {
  return type == kBlkDiscard || type == kBlkWriteZeroes || type == kBlkSecureErase;
}

// Gathers one request's first bytes and lengths, reusing its buffers for the next.
class BlkReader {
 public:
  BlkReader(const MemoryView& memory, uint64_t desc, uint16_t n, const InflightView& set,
            std::vector<GuestSpan>* buffers)
      : memory_(memory), pieces_(memory), set_(set), n_(n), limit_(MaxChain(n)), buffers_(buffers) {
    if (set.format != RingFormat::kSplit || set.empty()) return;
    ring_table_ = memory.PieceAt(desc).At(desc, sizeof(SplitDesc) * n);
    if (ring_table_) return;
    // One read instead of one a descriptor.
    table_copy_ = std::make_unique_for_overwrite<uint8_t[]>(sizeof(SplitDesc) * n);
    if (memory.Read(desc, table_copy_.get(), sizeof(SplitDesc) * n).ok()) ring_table_ = table_copy_.get();
  }

  // Each request of the set once, in its order.
  BlkRequest Read(size_t k) {
    return Walk(k) ? ClassifyBlk({head_.data(), head_size_}, readable_, writable_) : BlkRequest();
  }
  RequestClass ReadClass(size_t k) {
    return Walk(k) && head_size_ >= kBlkHeaderBytes ? BlkClassOf(Type()) : RequestClass::kNotIdempotent;
  }

  // A split ring's descriptors: the guest's own, or a copy. Null if they are not to be had.
  const uint8_t* ring_table() const { return ring_table_; }

 private:
  bool Walk(size_t k) {
    head_size_ = 0;
    readable_ = writable_ = 0;
    count_ = 0;
    const InflightRequest& request = set_.requests[k];
    return set_.format == RingFormat::kSplit ? WalkSplit(request.id) : WalkPacked(set_.DescsOf(request));
  }

  bool WalkSplit(uint16_t head) {
    uint16_t index = head;
    for (uint32_t steps = 0; ring_table_ && steps < n_ && index < n_; ++steps) {
      const SplitDesc d = LoadDescAnywhere(ring_table_ + sizeof(SplitDesc) * index);
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
    if (++count_ > limit_) return false;
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
    if (len == 0 || head_size_ < kBlkHeaderBytes || !HasSegments(Type())) return true;
    if (head_size_ >= kBlkHeadBytes) return true;
    return Append(addr, static_cast<uint32_t>(std::min<uint64_t>(len, kBlkHeadBytes - head_size_)));
  }

  bool Append(uint64_t addr, uint32_t len) {
    // Nearly always a whole header.
    const uint8_t* at = len == kBlkHeaderBytes ? pieces_.At(addr) : nullptr;
    if (at) {
      const uint64_t words[2] = {LoadAnywhere<uint64_t>(at), LoadAnywhere<uint64_t>(at + 8)};
      std::memcpy(head_.data() + head_size_, words, sizeof words);
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

  const MemoryView& memory_;
  PieceCache<kBlkHeaderBytes> pieces_;
  const InflightView set_;
  const uint16_t n_;
  const uint32_t limit_;
  std::vector<GuestSpan>* const buffers_;
  std::array<uint8_t, kBlkHeadBytes> head_;
  size_t head_size_ = 0;
  uint64_t readable_ = 0, writable_ = 0;
  uint32_t count_ = 0;
  const uint8_t* ring_table_ = nullptr;  // the guest's, or table_copy_
  std::unique_ptr<uint8_t[]> table_copy_;
  std::vector<SplitDesc> split_table_;
  std::vector<PackedDesc> packed_table_;
};

// The types of requests as nearly all are: all descriptors in the ring, the header in the first of them and
// mapped, and no segments. This is done for thousands of requests while the guest stands still, so it looks
// at nothing that the class does not depend on.
class PlainReader {
 public:
  // Of any other request, and of one that is malformed: BlkReader says what it is.
  static constexpr uint64_t kNotPlain = uint64_t{1} << 32;

  PlainReader(const MemoryView& memory, const InflightView& set, const uint8_t* ring_table, uint16_t n)
      : pieces_(memory), set_(set), table_(ring_table), n_(n), limit_(MaxChain(n)) {
    for (size_t k = 0; table_ && k < std::min(kHeaderAhead, set.size()); ++k) Ahead(set.requests[k]);
  }

  uint64_t Type(size_t k, std::vector<GuestSpan>* buffers) {
    const InflightRequest* const request = &set_.requests[k];
    if (set_.format == RingFormat::kPacked)
      return PackedType(set_.descs.data() + request->first, request->num, buffers);
    if (!table_) return kNotPlain;
    if (set_.requests.size() - k > kHeaderAhead) Ahead(request[kHeaderAhead]);
    return SplitType(request->id, buffers);
  }

 private:
  // Guest memory was last written by other processors, and to wait for it costs more than all that is done
  // with it: headers are asked for this many requests ahead. (A packed ring's have been already, with its
  // chains.)
  static constexpr size_t kHeaderAhead = 48;

  void Ahead(const InflightRequest& request) {
    if (request.id >= n_) return;
    // Only a hint: what counts is read when its turn comes.
    const auto header = LoadAnywhere<uint64_t>(table_ + sizeof(SplitDesc) * request.id);
    if (const uint8_t* at = pieces_.At(header)) __builtin_prefetch(at);
  }

  uint64_t HeaderType(uint64_t gpa, uint32_t len, uint16_t flags) {
    if ((flags & (kDescWrite | kDescIndirect)) || len < kBlkHeaderBytes) return kNotPlain;
    const uint8_t* at = pieces_.At(gpa);
    if (!at) return kNotPlain;
    const auto type = LoadAnywhere<uint32_t>(at);
    return HasSegments(type) ? kNotPlain : type;
  }

  uint64_t PackedType(const PackedDesc* d, uint16_t num, std::vector<GuestSpan>* buffers) {
    if (num == 0 || num > limit_) return kNotPlain;
    const uint64_t type = HeaderType(d->addr, d->len, d->flags);
    if (type == kNotPlain) return kNotPlain;
    bool written = false;
    for (const PackedDesc* const end = d + num; ++d != end;) {
      if (!(d->flags & (kDescWrite | kDescIndirect))) {
        if (written) return kNotPlain;
        continue;
      }
      if (d->flags & kDescIndirect) return kNotPlain;
      written = true;
      buffers->push_back({d->addr, d->len});
    }
    return type;
  }

  uint64_t SplitType(uint16_t head, std::vector<GuestSpan>* buffers) {
    if (head >= n_) return kNotPlain;
    SplitDesc d = LoadDescAnywhere(table_ + sizeof(SplitDesc) * head);
    const uint64_t type = HeaderType(d.addr, d.len, d.flags);
    if (type == kNotPlain) return kNotPlain;
    bool written = false;
    for (uint32_t left = n_; d.flags & kDescNext;) {
      if (--left == 0 || d.next >= n_) return kNotPlain;
      d = LoadDescAnywhere(table_ + sizeof(SplitDesc) * d.next);
      if (!(d.flags & (kDescWrite | kDescIndirect))) {
        if (written) return kNotPlain;
        continue;
      }
      if (d.flags & kDescIndirect) return kNotPlain;
      written = true;
      buffers->push_back({d.addr, d.len});
    }
    return type;
  }

  PieceCache<kBlkHeaderBytes> pieces_;
  const InflightView set_;
  const uint8_t* const table_;
  const uint32_t n_, limit_;
};

}  // namespace

std::vector<BlkRequest> ReadBlkRequests(const MemoryView& memory, uint64_t desc, uint16_t n,
                                        const InflightView& set, std::vector<GuestSpan>* buffers) {
  std::vector<BlkRequest> out;
  out.reserve(set.size());
  BlkReader reader(memory, desc, n, set, buffers);
  for (size_t k = 0; k < set.size(); ++k) out.push_back(reader.Read(k));
  return out;
}

ClassesPresent ReadClasses(const MemoryView& memory, uint64_t desc, uint16_t n, const InflightView& set,
                           v1::DeviceClass device_class, std::vector<GuestSpan>* buffers) {
  if (device_class != v1::BLK) return ClassesOf(device_class, set.size());
  ClassesPresent out;
  std::vector<GuestSpan> unwanted;
  if (!buffers) buffers = &unwanted;
  BlkReader reader(memory, desc, n, set, buffers);
  PlainReader plain(memory, set, reader.ring_table(), n);
  for (size_t k = 0; k < set.size(); ++k) {
    const size_t before = buffers->size();
    const uint64_t type = plain.Type(k, buffers);
    if (type != PlainReader::kNotPlain) {
      out.Add(BlkClassOf(static_cast<uint32_t>(type)));
      continue;
    }
    buffers->resize(before);
    out.Add(reader.ReadClass(k));
  }
  return out;
}

}  // namespace baton::virtio
