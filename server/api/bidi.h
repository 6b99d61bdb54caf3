// The half of a bidirectional stream that both of batond's have: one message read at a time, a queue of
// messages to write, an end that comes exactly once.
#pragma once

#include <grpcpp/support/server_callback.h>

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "common/grpc_status.h"
#include "server/event_loop.h"

namespace baton::server {

// Derived classes live behind a shared_ptr and call Open(self) once. OnMessage and OnEnd run on the loop,
// OnEnd last and exactly once. The next message is read when OnMessage has returned, so a sender cannot
// outrun the loop.
template <typename In, typename Out>
class Bidi : public grpc::ServerBidiReactor<In, Out> {
 public:
  // `max_queued` messages may wait to be written; a peer that does not read more is cut off.
  Bidi(EventLoop& loop, size_t max_queued) : loop_(loop), max_queued_(max_queued) {}

  // Any thread.
  void Write(Out message) {
    std::lock_guard lock(mutex_);
    if (finish_wanted_) return;
    if (queue_.size() >= max_queued_) {
      return FinishLocked(Error(absl::StatusCode::kResourceExhausted,
                                "the reader is too slow: {} messages wait", queue_.size()));
    }
    queue_.push_back(std::move(message));
    WriteNextLocked();
  }
  // Any thread. What is queued is still written, unless the status is an error.
  void End(const absl::Status& status) {
    std::lock_guard lock(mutex_);
    FinishLocked(status);
  }

 protected:
  virtual void OnMessage(const In& message) = 0;
  virtual void OnEnd() = 0;

  void Open(std::shared_ptr<Bidi> self) {
    alive_ = std::move(self);
    this->StartRead(&in_);
  }
  EventLoop& loop() { return loop_; }

 private:
  void OnReadDone(bool ok) final {
    if (!ok) return End(absl::OkStatus());
    loop_.Post([this, self = alive_] {
      OnMessage(in_);
      std::lock_guard lock(mutex_);
      if (!finish_wanted_) this->StartRead(&in_);
    });
  }
  void OnWriteDone(bool ok) final {
    std::lock_guard lock(mutex_);
    writing_ = false;
    queue_.pop_front();
    if (!ok) {
      queue_.clear();
      FinishLocked(absl::CancelledError("the peer went away"));
    }
    WriteNextLocked();
  }
  void OnCancel() final { End(absl::CancelledError("the peer went away")); }
  void OnDone() final {
    loop_.Post([this, self = std::move(alive_)] { OnEnd(); });
  }

  void WriteNextLocked() {
    if (writing_ || finished_) return;
    if (!queue_.empty() && !(finish_wanted_ && !status_.ok())) {
      writing_ = true;
      this->StartWrite(&queue_.front());
    } else if (finish_wanted_) {
      finished_ = true;
      this->Finish(ToGrpc(status_));
    }
  }
  void FinishLocked(const absl::Status& status) {
    if (finish_wanted_) return;
    finish_wanted_ = true;
    status_ = status;
    WriteNextLocked();
  }

  EventLoop& loop_;
  const size_t max_queued_;
  std::shared_ptr<Bidi> alive_;  // until OnDone
  In in_;                        // the reader's; handed over by StartRead and OnReadDone
  std::mutex mutex_;
  std::deque<Out> queue_;       // guarded by mutex_; the front one is being written while writing_
  bool writing_ = false;        // guarded by mutex_
  bool finish_wanted_ = false;  // guarded by mutex_
  bool finished_ = false;       // guarded by mutex_
  absl::Status status_;         // guarded by mutex_
};

}  // namespace baton::server
