// Changing the steering rule without a reset: what of the old rule must be completed before the new one
// begins. The 2012 multiqueue thread asks for it in both directions:
//   transmit: the device completes what was in the queues of the old rule before it touches a packet that was
//             queued under the new one;
//   receive:  what the device already assigned to a queue under the old rule reaches the driver before
//             anything of the new rule, so that no flow overtakes itself on another queue.
// Pure: positions in, permissions out. One switch at a time: while one is under way the control queue waits,
// which it can, because completing the old queues needs nothing of the driver but receive buffers, and those
// are not waited for (a device that has none drops, as it does at any time).
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace baton::virtio {

class QueueSwitch {
 public:
  struct OldTx {
    uint32_t queue = 0;
    // Packets that are available and not yet processed at the moment of the command.
    uint32_t outstanding = 0;
  };
  struct OldRx {
    uint32_t queue = 0;
    // Packets assigned to the queue and not yet put into a buffer of it.
    uint32_t backlog = 0;
  };
  // A control command changed the rule. `tx`, `rx`: all queues of the old rule. Must not be called while
  // active().
  void Begin(const std::vector<OldTx>& tx, const std::vector<OldRx>& rx);
  // Something of the old rule is outstanding: the control queue must not be read.
  bool active() const { return tx_total_ != 0 || rx_total_ != 0; }

  // How many packets of transmit queue `queue` may be processed now (of those that are available).
  uint32_t TxBudget(uint32_t queue, uint32_t available) const;
  void TxProcessed(uint32_t queue, uint32_t packets);
  // The driver stopped or reset the queue: nothing of it is outstanding any more.
  void TxStopped(uint32_t queue);

  // Whether a packet that the new rule assigned to a receive queue may be put into it; else it waits.
  bool RxNewAllowed() const { return rx_total_ == 0; }
  // A packet of the old backlog was delivered or dropped.
  void RxOldDone(uint32_t queue, uint32_t packets = 1);
  // The queue was stopped, and its backlog dropped.
  void RxStopped(uint32_t queue);

 private:
  std::map<uint32_t, uint32_t> tx_;  // outstanding, by queue; no zeros
  std::map<uint32_t, uint32_t> rx_;
  uint64_t tx_total_ = 0;
  uint64_t rx_total_ = 0;
};

}  // namespace baton::virtio
