// The workload of a NIC of the lab guest: numbered packets with checksums on every queue pair, to whoever is
// on the wire, and an account of what came from others.
//
// A network may drop, duplicate and reorder; a corrupt packet, one of another length, or one that this guest
// sent itself is an error. Losses and duplicates are counted and left to the test to judge. The state lies in
// guest memory and moves. Pure: no clock, no thread, no file descriptor.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>

#include "common/status.h"
#include "tests/lab/vm/block_workload.h"
#include "tests/lab/vm/options.h"
#include "tests/lab/vm/ram.h"

namespace baton::lab {

// Not thread-safe.
class NetWorkload {
 public:
  struct Setup {
    uint32_t nic = 0;
    uint32_t pairs = 1;
    uint32_t buffers = 64;  // of each queue
    std::array<uint8_t, 6> mac{};
    bool control = false;  // the control queue is there: tell the device how many pairs are in use
    WorkloadOptions options;
  };
  struct Counters {
    uint64_t sent = 0;       // handed to the device
    uint64_t completed = 0;  // and given back by it
    uint64_t received = 0;
    // By the numbers of the packets that came: not seen (yet), seen more than once, seen after a later one.
    uint64_t missing = 0, duplicates = 0, reordered = 0;
    uint64_t errors = 0;
  };
  using OnError = std::function<void(const std::string&)>;

  static uint64_t Bytes(uint32_t pairs, uint32_t buffers);
  NetWorkload(const Ram& ram, uint64_t gpa, Setup setup, QueuePort& port, OnError on_error);

  void Boot(uint64_t run);
  absl::Status Check() const;
  // Sends what is due, and gives the device receive buffers; never catches up more than a tenth of a second.
  void Issue(int64_t now_us);
  int64_t NextDue() const { return next_due_; }
  void Resumed(int64_t now_us);
  // `queue`: 2 k receives, 2 k + 1 transmits for pair k; 2 * pairs is the control queue.
  void Complete(uint32_t queue, uint32_t tag, uint32_t written, int64_t now_us);

  // Stops sending; Quiet() once the device gave back every transmitted packet.
  void Silence(bool silent);
  bool Quiet() const;
  // Transmitted packets and commands that the device has. Receive buffers do not count: it keeps them.
  uint32_t outstanding() const;
  void FindLost(int64_t now_us, int64_t limit_us);
  uint64_t Digest() const;
  const Counters& counters() const;

 private:
  struct Header;
  struct Peer;
  struct Slot;
  Header& header() const { return *ram_.At<Header>(gpa_); }
  Slot& slot(uint32_t queue, uint32_t index) const;
  uint64_t buffer(uint32_t queue, uint32_t index) const;
  bool Send(uint32_t pair, int64_t now_us);
  void Refill(uint32_t queue);
  void Command(int64_t now_us);
  void Receive(uint64_t gpa, uint32_t written);
  void Account(const std::array<uint8_t, 6>& mac, uint32_t flow, uint64_t sequence);
  void Report(const std::string& what);

  const Ram& ram_;
  const uint64_t gpa_;
  const Setup setup_;
  QueuePort& port_;
  const OnError on_error_;
  int64_t start_us_ = 0, next_due_ = 0;
  uint64_t done_ = 0;
};

}  // namespace baton::lab
