// Queues of a balloon filled by a guest that may put anything there: no range that wraps around, no hint
// outside a session, no id used again before its STOP.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

#include "agent/virtio/balloon.h"

namespace {

using namespace baton::virtio;

class GuestBytes : public MemoryView {
 public:
  GuestBytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  absl::Status Read(uint64_t gpa, void* out, size_t size) const override {
    if (gpa > size_ || size > size_ - gpa) return absl::OutOfRangeError("outside");
    std::memcpy(out, data_ + gpa, size);
    return absl::OkStatus();
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

struct Judge final : BalloonSink {
  explicit Judge(const BalloonDevice& d) : device(d) {}
  static void Sane(uint64_t gpa, uint64_t size) {
    if (size == 0 || gpa + size < gpa) std::abort();
  }
  void OnInflate(uint64_t gpa, uint64_t size) override { Sane(gpa, size); }
  void OnDeflate(uint64_t gpa, uint64_t size) override { Sane(gpa, size); }
  void OnReported(uint64_t gpa, uint64_t size) override {
    Sane(gpa, size);
    if (device.poison() != 0) std::abort();
  }
  void OnHintStart() override {
    if (open) std::abort();
    open = true;
  }
  void OnHint(uint64_t gpa, uint64_t size) override {
    Sane(gpa, size);
    if (!open || device.state().cmd_id < kHintFirstId) std::abort();
  }
  void OnHintStop() override {
    if (!asked) std::abort();
    open = asked = false;
  }
  const BalloonDevice& device;
  bool open = false, asked = false;
};

}  // namespace

// Input: pairs of bytes (what, argument), each followed by a chain of up to three buffers of 12 bytes where
// it needs one; the whole input is the guest's memory as well.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  GuestBytes memory(data, size);
  BalloonDevice device;
  device.SetFeatures(kBalloonFStatsVq | kBalloonFFreePageHint | kBalloonFPagePoison | kBalloonFReporting);
  Judge judge(device);
  for (size_t at = 0; at + 2 <= size;) {
    const uint8_t what = data[at], argument = data[at + 1];
    at += 2;
    if (what % 8 < 5) {
      std::vector<BalloonBuffer> chain;
      for (int i = 0; i < argument % 4 && at + 12 <= size; ++i, at += 12) {
        BalloonBuffer buffer;
        std::memcpy(&buffer.gpa, data + at, 8);
        std::memcpy(&buffer.size, data + at + 8, 4);
        buffer.device_writes = (argument >> (2 + i)) & 1;
        // Mostly addresses that a small input can hold.
        if (argument & 0x80) buffer.gpa %= size, buffer.size %= 64;
        chain.push_back(buffer);
      }
      device.HandleChain(static_cast<BalloonQueue>(what % 8), argument, chain, memory, judge);
    } else if (what % 8 == 5) {
      const std::set<uint32_t> open(device.state().open_ids.begin(), device.state().open_ids.end());
      if (argument & 1) {
        auto id = device.StartHinting();
        if (id.ok() && (*id < kHintFirstId || open.contains(*id))) std::abort();
        if (id.ok()) judge.asked = true, judge.open = false;
      } else if (argument & 2) {
        device.StopHinting();
      } else {
        device.FinishHinting();
        judge.open = false;
      }
    } else if (what % 8 == 6) {
      const size_t count = std::min<size_t>(argument % 20, size - at);
      (void)device.WriteConfig(argument % 24, {data + at, count}, (argument & 0x40) != 0);
      at += count;
      uint8_t config[kBalloonConfigSize + 8];
      device.ReadConfig(argument % 24, config);
    } else {
      (void)device.TakeHeldStats();
      if (argument == 0xff) device.Reset(), judge.open = false;
      if (argument == 0xff)
        device.SetFeatures(kBalloonFStatsVq | kBalloonFFreePageHint | kBalloonFPagePoison |
                           kBalloonFReporting);
    }
  }
  return 0;
}
