// Receives pages of guest memory from the data channels, straight into the mapped blocks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/memory/page_set.h"
#include "agent/stream/channel.h"
#include "baton/v1/types.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::stream {

struct ReceiverOptions {
  // As agreed in PeerHello.
  uint32_t channels = 1;
  bool page_checksums = true;
};

// Security model: every byte comes from a peer that holds the migration's token and (with TLS) a certificate,
// but that may be broken. Every header is checked against the blocks before a byte of the payload is read,
// and a bad one ends this receiver with an error, never the process.
//
// Thread rules: all methods are for any thread. One thread a channel runs from AddChannel() until its channel
// ends. `ram` must outlive it. Nobody else may write the blocks meanwhile.
class MemoryReceiver {
 public:
  // `on_error` is called once, from a channel's thread, with the first error (not after Stop()). It must not
  // call Stop() or destroy the receiver itself.
  MemoryReceiver(const memory::GuestRam& ram, ReceiverOptions options,
                 std::function<void(const absl::Status&)> on_error = nullptr);
  ~MemoryReceiver();
  MemoryReceiver(const MemoryReceiver&) = delete;
  MemoryReceiver& operator=(const MemoryReceiver&) = delete;

  // Takes over data channel `channel` (1..channels, the number in its preamble). InvalidArgument for a number
  // out of range, AlreadyExists for one that is connected.
  absl::Status AddChannel(uint32_t channel, std::unique_ptr<Channel> connection);

  // Waits until every channel has landed at least as many frames as `frames` says (RoundEnd.frames; entry 0
  // is channel 1). The barrier: afterwards all they carried is in memory. Returns the first error of any
  // channel, and DeadlineExceeded. A channel that ended in good order with fewer frames is Unavailable.
  absl::Status WaitForFrames(const std::vector<uint64_t>& frames, Deadline deadline);

  // Pages whose last copy did not match its checksum: the guest wrote them while the source read them (then
  // the source's dirty tracking sends them again), or the bytes were damaged on the way. Must be 0 after the
  // final round. Exact after WaitForFrames(), else a moment's view.
  uint64_t doubtful_pages() const;
  // The doubtful pages themselves; only after WaitForFrames() while nothing more is sent.
  memory::PageSets doubtful() const;

  // As received: data, zero, wire.
  v1::ByteCounts counts() const;
  // The first error, or OK.
  absl::Status status() const;
  // Shuts the channels down and joins their threads. Idempotent.
  void Stop();

 private:
  class Lane;
  struct Shared;
  std::unique_ptr<Shared> shared_;
};

}  // namespace baton::stream
