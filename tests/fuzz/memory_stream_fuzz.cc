// What a peer may send on a data channel: the receiver writes inside the blocks and nowhere else, ends with
// an error or at the end of the bytes, and never waits for ever. Header checksums would stop the fuzzer at
// the door, so inputs of one kind get right ones: the first byte chooses.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "agent/memory/guest_ram.h"
#include "agent/stream/channel.h"
#include "agent/stream/memory_frame.h"
#include "agent/stream/memory_receiver.h"

namespace {

using namespace baton;
using namespace baton::stream;

// Gives the input in pieces of a few sizes, then the end.
class BytesChannel final : public Channel {
 public:
  explicit BytesChannel(std::string bytes) : Channel("fuzzer"), bytes_(std::move(bytes)) {}
  absl::StatusOr<size_t> ReadSome(const iovec* buffers, int count, Deadline) override {
    if (at_ == bytes_.size()) return Error(absl::StatusCode::kOutOfRange, "end");
    size_t budget = 1 + (++calls_ * 7919) % 6000, total = 0;
    for (int i = 0; i < count && budget > 0; ++i) {
      const size_t n = std::min({buffers[i].iov_len, budget, bytes_.size() - at_});
      std::memcpy(buffers[i].iov_base, bytes_.data() + at_, n);
      at_ += n, total += n, budget -= n;
    }
    return total;
  }
  absl::Status WriteAll(iovec*, int, Deadline) override { return absl::OkStatus(); }
  absl::Status CloseWrite(Deadline) override { return absl::OkStatus(); }
  void Shutdown() override {}
  int plain_fd() const override { return -1; }

 private:
  const std::string bytes_;
  size_t at_ = 0;
  size_t calls_ = 0;
};

memory::RamBlock Block(uint64_t pages) {
  UniqueFd fd(::memfd_create("fuzz", MFD_CLOEXEC));
  if (::ftruncate(fd.get(), static_cast<off_t>(pages * memory::kPageSize)) != 0) std::abort();
  return memory::RamBlock::FromFd("fuzz", std::move(fd)).value();
}

// Puts the right checksum on whatever lies where headers would, as far as the frames can be followed.
void Repair(std::string& bytes, bool checksums) {
  for (size_t at = 0; at + kFrameHeaderSize <= bytes.size();) {
    uint8_t* header = reinterpret_cast<uint8_t*>(bytes.data()) + at;
    std::memcpy(header, &kFrameMagic, 4);
    const uint64_t hash = XXH3_64bits(header, 40);
    std::memcpy(header + 40, &hash, 8);
    uint32_t payload;
    std::memcpy(&payload, header + 28, 4);
    at += kFrameHeaderSize;
    if (header[4] == static_cast<uint8_t>(FrameType::kData)) {
      at += (checksums ? payload / memory::kPageSize * 8 : 0) + uint64_t{payload};
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  const uint8_t mode = data[0];
  std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const bool checksums = (mode & 1) != 0;
  if ((mode & 2) == 0) Repair(bytes, checksums);
  std::vector<memory::RamBlock> blocks;
  blocks.push_back(Block(40));
  blocks.push_back(Block(3));
  const memory::GuestRam ram(std::move(blocks));
  MemoryReceiver receiver(ram, {.channels = 1, .page_checksums = checksums});
  if (!receiver.AddChannel(1, std::make_unique<BytesChannel>(std::move(bytes))).ok()) std::abort();
  // More frames than any input holds: returns when the lane has ended.
  absl::Status status = receiver.WaitForFrames({~uint64_t{0}}, Deadline::After(std::chrono::seconds(50)));
  if (status.code() == absl::StatusCode::kDeadlineExceeded) std::abort();
  receiver.Stop();
  if (receiver.doubtful_pages() > 43) std::abort();
  return 0;
}
