#include "agent/virtio/queue_switch.h"

#include <algorithm>

namespace baton::virtio {
namespace {

// Takes up to `count` off the queue's share and off the total.
void TakeOff(std::map<uint32_t, uint32_t>& by_queue, uint64_t& total, uint32_t queue, uint32_t count) {
  auto it = by_queue.find(queue);
  if (it == by_queue.end()) return;
  count = std::min(count, it->second);
  total -= count;
  it->second -= count;
  if (it->second == 0) by_queue.erase(it);
}

}  // namespace

void QueueSwitch::Begin(const std::vector<OldTx>& tx, const std::vector<OldRx>& rx) {
  tx_.clear();
  rx_.clear();
  tx_total_ = rx_total_ = 0;
  for (const OldTx& old : tx) {
    if (old.outstanding == 0) continue;
    tx_[old.queue] += old.outstanding;
    tx_total_ += old.outstanding;
  }
  for (const OldRx& old : rx) {
    if (old.backlog == 0) continue;
    rx_[old.queue] += old.backlog;
    rx_total_ += old.backlog;
  }
}

uint32_t QueueSwitch::TxBudget(uint32_t queue, uint32_t available) const {
  if (tx_total_ == 0) return available;
  auto it = tx_.find(queue);
  return it == tx_.end() ? 0 : std::min(available, it->second);
}

void QueueSwitch::TxProcessed(uint32_t queue, uint32_t packets) { TakeOff(tx_, tx_total_, queue, packets); }
void QueueSwitch::TxStopped(uint32_t queue) { TakeOff(tx_, tx_total_, queue, UINT32_MAX); }
void QueueSwitch::RxOldDone(uint32_t queue, uint32_t packets) { TakeOff(rx_, rx_total_, queue, packets); }
void QueueSwitch::RxStopped(uint32_t queue) { TakeOff(rx_, rx_total_, queue, UINT32_MAX); }

}  // namespace baton::virtio
