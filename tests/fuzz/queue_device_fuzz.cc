// The device side of a ring whose driver writes anything anywhere, at any time: every chain that comes out
// keeps the promises of chain.h, every walk ends, and nothing but the ring's device area (split) or its
// descriptors and event area (packed) is written.
//
// Input: 8 bytes of set-up, the memory's first bytes, then commands of 4 bytes: what to do, or where to write
// which byte.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>

#include "agent/virtio/device_queue.h"

namespace {

using namespace baton::virtio;

void Expect(bool ok) {
  if (!ok) std::abort();
}

struct alignas(64) Memory {
  uint8_t bytes[4096];
};
constexpr uint64_t kGpa = 0x10000;

// Descriptors, driver area, device area; what is left is for tables and buffers.
QueueLayout LayoutOf(uint16_t n) { return {n, kGpa, kGpa + 0x400, kGpa + 0x600}; }

void CheckChain(const Chain& chain, const QueueLayout& layout) {
  Expect(chain.segments.size() <= MaxChain(layout.size));
  Expect(chain.readable <= chain.segments.size());
  Expect(chain.slots >= 1 && chain.slots <= layout.size);
  uint64_t readable = 0;
  uint64_t writable = 0;
  for (const Segment& segment : chain.Readable()) readable += segment.len;
  for (const Segment& segment : chain.Writable()) writable += segment.len;
  Expect(readable == chain.readable_bytes && writable == chain.writable_bytes);
  Expect(readable + writable <= uint64_t{1} << 32);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8) return 0;
  static auto memory = std::make_unique<Memory>();
  std::memset(memory->bytes, 0, sizeof memory->bytes);
  const GuestMemory guest = GuestMemory::Create({{kGpa, sizeof memory->bytes, memory->bytes}}).value();
  QueueOptions options;
  options.features = kFVersion1 | (data[0] & 1 ? kFRingPacked : 0) | (data[0] & 2 ? kFIndirectDesc : 0) |
                     (data[0] & 4 ? kFEventIdx : 0) | (data[0] & 8 ? kFInOrder : 0);
  if ((data[0] & 24) == 16) options.features |= kFPartialOrder;
  uint16_t n = 1 + data[1] % 64;
  // Mostly sizes that a split ring can have.
  if (!(data[0] & 1) && !(data[0] & 128)) n = static_cast<uint16_t>(1u << (data[1] % 7));
  uint32_t base = 0;
  std::memcpy(&base, data + 2, 4);
  if (!(data[0] & 64)) base = options.Has(kFRingPacked) ? kPackedBaseAfterReset : 0;
  const QueueLayout layout = LayoutOf(n);
  const size_t filled = std::min<size_t>(size_t{data[6]} * 16, size - 8);
  std::memcpy(memory->bytes, data + 8, std::min(filled, sizeof memory->bytes));
  data += 8 + filled;
  size -= 8 + filled;

  auto queue = DeviceQueue::Create(guest, layout, options, base);
  if (!queue.ok()) return 0;
  // What is in flight, and not staged.
  std::map<uint16_t, Chain> running;
  Chain chain;
  std::vector<iovec> iovecs;
  for (; size >= 4; data += 4, size -= 4) {
    const uint16_t where = static_cast<uint16_t>(data[1] | data[2] << 8);
    switch (data[0] % 12) {
      case 0:
      case 1:
      case 2:
        memory->bytes[where % sizeof memory->bytes] = data[3];
        break;
      case 3: {
        // The index of a split ring, or the flags of a packed descriptor.
        const size_t at = options.Has(kFRingPacked) ? size_t{16} * (where % n) + 14 : 0x402;
        memory->bytes[at] = data[3];
        memory->bytes[at + 1] = data[0] & 128 ? 0x80 : 0;
        break;
      }
      case 4:
      case 5:
      case 6: {
        auto popped = queue->Pop(&chain);
        if (!popped.ok() || !*popped) break;
        CheckChain(chain, layout);
        iovecs.clear();
        (void)AppendIovecs(guest, chain.segments, &iovecs);
        Expect(running.emplace(chain.id, chain).second);
        break;
      }
      case 7: {
        if (running.empty()) break;
        auto it = running.lower_bound(where);
        if (it == running.end()) it = running.begin();
        const uint64_t room = it->second.writable_bytes;
        Expect(queue->Stage(it->first, static_cast<uint32_t>(std::min<uint64_t>(data[3], room))).ok());
        Expect(!queue->Stage(it->first, 0).ok());
        running.erase(it);
        break;
      }
      case 8:
        queue->Publish(data[3] & 1 ? 1 : UINT16_MAX);
        (void)queue->NeedsCall();
        break;
      case 9:
        if (data[3] & 1) {
          (void)queue->EnableKicks();
        } else {
          queue->DisableKicks();
        }
        break;
      case 10: {
        queue->SetOrdering(data[3] & 1 ? Ordering::kInOrder : Ordering::kAsCompleted);
        auto available = queue->Available();
        Expect(!available.ok() || *available <= n);
        break;
      }
      case 11: {
        // Recovered from wherever: descriptors out of the memory that the driver owns.
        std::vector<PackedDesc> saved(1 + data[3] % 4);
        std::memcpy(saved.data(), memory->bytes + where % 1024, saved.size() * sizeof(PackedDesc));
        if (queue->Resubmit(static_cast<uint16_t>(data[3] >> 2), saved, &chain).ok()) {
          CheckChain(chain, layout);
          Expect(running.emplace(chain.id, chain).second);
        }
        break;
      }
    }
    Expect(running.size() <= n);
    if (queue->packed()) Expect(queue->in_flight() <= n);
  }
  return 0;
}
