#include "agent/virtio/completion_queue.h"

#include <algorithm>

#include "agent/virtio/split_ring.h"

namespace baton::virtio {

CompletionQueue::CompletionQueue(uint16_t n, bool hold) : n_(n), hold_(hold), requests_(n), order_(n) {
  // So that making room moves what is staged at most once per n completions.
  staged_.reserve(size_t{2} * n);
}

absl::Status CompletionQueue::Begin(Chain* chain, bool known_order) {
  if (chain->id >= requests_.size()) requests_.resize(size_t{chain->id} + 1);
  Request& request = requests_[chain->id];
  if (request.state != State::kIdle) {
    return Mismatch(fmt::format("buffer {} is made available while it is in flight", chain->id));
  }
  if (in_flight_ >= n_) return Mismatch(fmt::format("more than {} buffers in flight", n_));
  chain->sequence = next_sequence_++;
  request = {chain->sequence, chain->writable_bytes, chain->slots, State::kRunning};
  ++in_flight_;
  slots_ += chain->slots;
  if (!known_order) unknown_ = next_sequence_;
  return absl::OkStatus();
}

bool CompletionQueue::Undo(const Chain& chain) {
  if (chain.id >= requests_.size() || chain.sequence + 1 != next_sequence_) return false;
  Request& request = requests_[chain.id];
  if (request.state != State::kRunning || request.sequence != chain.sequence) return false;
  request.state = State::kIdle;
  --next_sequence_;
  --in_flight_;
  slots_ -= request.slots;
  return true;
}

absl::Status CompletionQueue::Stage(uint16_t id, uint32_t len) {
  if (id >= requests_.size() || requests_[id].state != State::kRunning) {
    return Error(absl::StatusCode::kInvalidArgument, "buffer {} is completed, but not in flight", id);
  }
  Request& request = requests_[id];
  if (len > request.writable) {
    return Error(absl::StatusCode::kInvalidArgument, "{} bytes written to buffer {}, which has room for {}",
                 len, id, request.writable);
  }
  if (staged_begin_ && staged_.size() == staged_.capacity()) {
    staged_.erase(staged_.begin(), staged_.begin() + static_cast<std::ptrdiff_t>(staged_begin_));
    staged_begin_ = 0;
  }
  const Completion completion{request.sequence, len, id, request.slots, len == request.writable};
  if (!hold_) {
    staged_.push_back(completion);
  } else {
    if (!order_.Complete(request.sequence, completion)) {
      return Error(absl::StatusCode::kInternal, "buffer {} is outside the window of its ring", id);
    }
    order_.Drain([this](const Completion& next) { staged_.push_back(next); });
  }
  request.state = State::kStaged;
  return absl::OkStatus();
}

void CompletionQueue::Published(size_t count) {
  for (const Completion& completion : staged().first(count)) {
    requests_[completion.id].state = State::kIdle;
    slots_ -= completion.slots;
    highest_ = std::max(highest_, completion.sequence + 1);
  }
  in_flight_ = static_cast<uint16_t>(in_flight_ - count);
  published_ += count;
  staged_begin_ += count;
  if (staged_begin_ < staged_.size()) return;
  staged_.clear();
  staged_begin_ = 0;
}

void CompletionQueue::SetHold(bool hold) {
  if (hold == hold_) return;
  hold_ = hold;
  if (hold) {
    order_.Restart(published_);
  } else {
    order_.Release([this](const Completion& held) { staged_.push_back(held); });
  }
}

}  // namespace baton::virtio
