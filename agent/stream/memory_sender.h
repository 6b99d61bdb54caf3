// Sends pages of guest memory over the data channels, straight from the mapped blocks.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/memory/page_set.h"
#include "agent/stream/channel.h"
#include "agent/stream/pacer.h"
#include "baton/v1/types.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::stream {

// How the bytes of data frames leave. Plain writes are the default because they win on loopback (bench_stream
// measures the others beside them); on a NIC it may differ. TLS channels always write.
enum class SendStrategy {
  kWrite,
  // sendfile(2) from the block's file: no copy into the kernel for the sender, pages are referenced.
  kSendfile,
  // sendmsg(2) with MSG_ZEROCOPY; falls back to a copy where the kernel refuses.
  kZeroCopy,
};
// "write", "sendfile", "zerocopy"; InvalidArgument otherwise.
absl::StatusOr<SendStrategy> ParseSendStrategy(const std::string& name);

struct SenderOptions {
  SendStrategy strategy = SendStrategy::kWrite;
  // Data frames carry a checksum for each page; for plaintext channels. With TLS the record layer does it.
  bool page_checksums = true;
  // Upper bound of the guest memory in one data frame; a multiple of 4096, at most kStripeSize.
  uint32_t frame_bytes = 512u << 10;
  // Bytes a second over all channels; 0 is unlimited.
  uint64_t bandwidth = 0;
};

struct RoundOptions {
  // Look for pages that are holes in the file by now (ballooned since they were written) and send them as
  // free runs instead of reading them, which would allocate them again. Costs a system call a page: for
  // rounds while the guest runs, except round 0, whose pages come from RamBlock::Populated().
  bool skip_holes = false;
};

// Thread rules: SendRound() by one thread at a time; everything else by any thread. Owns one thread a
// channel, idle between rounds. `ram` must outlive it.
class MemorySender {
 public:
  // `channels`: data channels 1..N in order, at least one.
  MemorySender(const memory::GuestRam& ram, std::vector<std::unique_ptr<Channel>> channels,
               SenderOptions options);
  // Cancels what is under way, then joins the threads.
  ~MemorySender();
  MemorySender(const MemorySender&) = delete;
  MemorySender& operator=(const MemorySender&) = delete;

  // Writes all `pages` to the channels: pages that hold only zeroes as zero runs, the others as data, each as
  // it is when its turn comes. Returns when the last byte is written (not: received; the peer's RoundAck
  // tells that) or at the first error, after which every later call fails. The sets must have the shape of
  // GuestRam::MakeSets().
  absl::Status SendRound(const memory::PageSets& pages, uint32_t round, const RoundOptions& options,
                         Deadline deadline);

  // Frames written on each channel since the start, for RoundEnd.frames. Between rounds.
  std::vector<uint64_t> frames() const;
  // Since the start: data, zero, resent, wire. hole_skipped counts the free runs of skip_holes.
  v1::ByteCounts counts() const;
  // Guest memory that the current round has not dealt with yet, bytes.
  uint64_t remaining() const;

  // Bytes a second over all channels, 0 unlimited; takes effect at once.
  void SetBandwidth(uint64_t bytes_per_second);
  // Ends a round under way with Cancelled and shuts the channels down.
  void Cancel();

  size_t channels() const;

 private:
  class Worker;
  struct Shared;
  std::unique_ptr<Shared> shared_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace baton::stream
