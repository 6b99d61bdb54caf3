// The driver side of a ring whose device writes anything anywhere, at any time: every buffer that comes back
// was added and comes back once, no walk runs on, and state that was saved restores or is refused.
//
// Input: 4 bytes of set-up, then commands of 4 bytes: what to do, or where to write which byte.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <set>

#include "agent/virtio/driver_queue.h"

namespace {

using namespace baton::virtio;

void Expect(bool ok) {
  if (!ok) std::abort();
}

struct alignas(64) Memory {
  uint8_t bytes[8192];
};
constexpr uint64_t kGpa = 0x10000;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 4) return 0;
  static auto memory = std::make_unique<Memory>();
  std::memset(memory->bytes, 0, sizeof memory->bytes);
  const GuestMemory guest = GuestMemory::Create({{kGpa, sizeof memory->bytes, memory->bytes}}).value();
  QueueOptions options;
  options.features = kFVersion1 | (data[0] & 1 ? kFRingPacked : 0) | (data[0] & 2 ? kFIndirectDesc : 0) |
                     (data[0] & 4 ? kFEventIdx : 0) | (data[0] & 8 ? kFInOrder : 0);
  if ((data[0] & 24) == 16) options.features |= kFPartialOrder;
  const bool packed = options.Has(kFRingPacked);
  const auto n = static_cast<uint16_t>(packed ? 1 + data[1] % 64 : 1u << (data[1] % 7));
  const QueueLayout layout{n, kGpa, kGpa + 0x400, kGpa + 0x600};
  const IndirectArea indirect{kGpa + 0x1000, 4};
  data += 4;
  size -= 4;

  auto queue = DriverQueue::Create(guest, layout, options, indirect);
  Expect(queue.ok());
  std::set<uint64_t> outstanding;
  uint64_t token = 0;
  const Segment segment{kGpa + 0x1f00, 16};
  for (; size >= 4; data += 4, size -= 4) {
    const uint16_t where = static_cast<uint16_t>(data[1] | data[2] << 8);
    switch (data[0] % 12) {
      case 0:
      case 1:
        memory->bytes[where % sizeof memory->bytes] = data[3];
        break;
      case 2:
      case 3: {
        // A used element where the driver may look, or a packed descriptor marked used.
        const size_t slot = where % n;
        uint8_t* at = memory->bytes + (packed ? 16 * slot + 12 : 0x604 + 8 * slot);
        at[0] = data[3];
        if (packed) {
          at[1] = 0;
          at[2] = data[0] & 128 ? 0x82 : 0x02;
          at[3] = static_cast<uint8_t>((data[0] & 64 ? 0x80 : 0) | (data[0] & 32 ? 0x40 : 0));
        } else {
          memory->bytes[0x602] = static_cast<uint8_t>(memory->bytes[0x602] + (data[0] >> 6));
        }
        break;
      }
      case 4:
      case 5: {
        std::vector<Segment> readable(data[1] % 4, segment);
        std::vector<Segment> writable(data[2] % 4, segment);
        auto id = queue->Add(readable, writable, token);
        if (id.ok()) outstanding.insert(token++);
        break;
      }
      case 6:
        queue->Publish();
        (void)queue->NeedsKick();
        break;
      case 7:
      case 8: {
        UsedBuffer used;
        auto taken = queue->TakeUsed(&used);
        if (taken.ok() && *taken) {
          Expect(outstanding.erase(used.token) == 1);
          Expect(used.len <= 3 * segment.len);
        }
        break;
      }
      case 9:
        (void)queue->EnableCalls();
        break;
      case 10:
        queue->DisableCalls();
        break;
      case 11: {
        std::vector<uint8_t> state = queue->Save();
        auto again = DriverQueue::Restore(guest, layout, options, indirect, state);
        Expect(again.ok());
        // A file of the same length with a wrong byte: refused, or as harmless as a hostile ring.
        state[where % state.size()] ^= data[3];
        auto damaged = DriverQueue::Restore(guest, layout, options, indirect, state);
        if (!damaged.ok()) break;
        UsedBuffer used;
        for (int i = 0; i < 4; ++i) (void)damaged->TakeUsed(&used);
        (void)damaged->Add({&segment, 1}, {}, 0);
        break;
      }
    }
    Expect(outstanding.size() <= n);
  }
  return 0;
}
