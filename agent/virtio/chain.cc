#include "agent/virtio/chain.h"

#include <algorithm>

#include "agent/virtio/split_ring.h"

namespace baton::virtio {
namespace {

constexpr uint64_t kMaxChainBytes = uint64_t{1} << 32;

// Calls `copy(host, done, bytes)` for the mapped pieces of [offset, offset + size) of the segments' bytes.
template <typename Copy>
absl::StatusOr<size_t> ForPieces(const GuestMemory& memory, std::span<const Segment> segments,
                                 uint64_t offset, size_t size, Copy copy) {
  size_t done = 0;
  for (const Segment& segment : segments) {
    if (offset >= segment.len) {
      offset -= segment.len;
      continue;
    }
    uint64_t gpa = segment.gpa + offset;
    uint64_t left = std::min<uint64_t>(segment.len - offset, size - done);
    offset = 0;
    while (left) {
      uint64_t piece = left;
      uint8_t* host = memory.Piece(gpa, &piece);
      if (!host) return Error(absl::StatusCode::kOutOfRange, "a buffer has no guest memory at {:#x}", gpa);
      copy(host, done, piece);
      gpa += piece;
      done += piece;
      left -= piece;
    }
    if (done == size) break;
  }
  return done;
}

template <typename Desc>
absl::Status ReadTable(const GuestMemory& memory, uint64_t addr, uint32_t bytes, uint32_t limit,
                       std::vector<Desc>* table) {
  if (bytes == 0 || bytes % sizeof(Desc)) {
    return Mismatch(fmt::format("an indirect table of {} bytes", bytes));
  }
  if (bytes / sizeof(Desc) > limit) {
    return Mismatch(
        fmt::format("an indirect table of {} descriptors, {} are the most", bytes / sizeof(Desc), limit));
  }
  table->resize(bytes / sizeof(Desc));
  return memory.Read(addr, table->data(), bytes);
}

}  // namespace

absl::Status AppendIovecs(const GuestMemory& memory, std::span<const Segment> segments,
                          std::vector<iovec>* out) {
  return ForPieces(memory, segments, 0, SIZE_MAX,
                   [&](uint8_t* host, size_t, size_t bytes) {
                     out->push_back({.iov_base = host, .iov_len = bytes});
                   })
      .status();
}

absl::StatusOr<size_t> CopyFromSegments(const GuestMemory& memory, std::span<const Segment> segments,
                                        uint64_t offset, void* out, size_t size) {
  return ForPieces(memory, segments, offset, size, [&](const uint8_t* host, size_t done, size_t bytes) {
    std::memcpy(static_cast<uint8_t*>(out) + done, host, bytes);
  });
}

absl::StatusOr<size_t> CopyToSegments(const GuestMemory& memory, std::span<const Segment> segments,
                                      uint64_t offset, const void* bytes, size_t size) {
  return ForPieces(memory, segments, offset, size, [&](uint8_t* host, size_t done, size_t piece) {
    std::memcpy(host, static_cast<const uint8_t*>(bytes) + done, piece);
  });
}

ChainBuilder::ChainBuilder(Chain* chain, uint16_t queue_size) : chain_(chain), limit_(MaxChain(queue_size)) {
  chain_->segments.clear();
  chain_->descriptors.clear();
  chain_->readable = 0;
  chain_->readable_bytes = 0;
  chain_->writable_bytes = 0;
}

absl::Status ChainBuilder::Add(uint64_t addr, uint32_t len, bool device_writes) {
  if (++count_ > limit_) return Mismatch(fmt::format("a chain of more than {} descriptors", limit_));
  const bool written_before = chain_->segments.size() > chain_->readable;
  if (!device_writes && written_before) {
    return Mismatch("a descriptor to read follows one to write in a chain");
  }
  if (len == 0) return absl::OkStatus();
  if (addr + (len - 1) < addr) return Mismatch(fmt::format("{} bytes at {:#x} in a descriptor", len, addr));
  (device_writes ? chain_->writable_bytes : chain_->readable_bytes) += len;
  if (chain_->readable_bytes + chain_->writable_bytes > kMaxChainBytes) {
    return Mismatch("a chain of more than 4 GiB");
  }
  chain_->segments.push_back({addr, len});
  if (!device_writes) ++chain_->readable;
  return absl::OkStatus();
}

absl::Status ChainBuilder::AddSplitTable(const GuestMemory& memory, uint64_t addr, uint32_t bytes,
                                         std::vector<SplitDesc>* scratch) {
  RETURN_IF_ERROR(ReadTable(memory, addr, bytes, limit_, scratch));
  uint32_t index = 0;
  // A table of k descriptors has no chain of more than k without a loop.
  for (size_t steps = 0; steps < scratch->size(); ++steps) {
    const SplitDesc& desc = (*scratch)[index];
    if (desc.flags & kDescIndirect) return Mismatch("an indirect table within an indirect table");
    RETURN_IF_ERROR(Add(desc.addr, desc.len, desc.flags & kDescWrite));
    if (!(desc.flags & kDescNext)) return absl::OkStatus();
    if (desc.next >= scratch->size()) {
      return Mismatch(
          fmt::format("an indirect table of {} leads to descriptor {}", scratch->size(), desc.next));
    }
    index = desc.next;
  }
  return Mismatch("an indirect table is a loop");
}

absl::Status ChainBuilder::AddPackedTable(const GuestMemory& memory, uint64_t addr, uint32_t bytes,
                                          std::vector<PackedDesc>* scratch) {
  RETURN_IF_ERROR(ReadTable(memory, addr, bytes, limit_, scratch));
  for (const PackedDesc& desc : *scratch) {
    // WRITE is the only flag with a meaning here; the others are reserved and ignored (2.8.8).
    RETURN_IF_ERROR(Add(desc.addr, desc.len, desc.flags & kDescWrite));
  }
  return absl::OkStatus();
}

}  // namespace baton::virtio
