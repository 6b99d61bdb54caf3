// Asks the destination what became of a migration, on connections of its own, until it is known.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "agent/stream/dial.h"
#include "baton/v1/peer.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::migration {

class VerdictAsker {
 public:
  struct Options {
    stream::DialOptions dial;
    Duration backoff = std::chrono::milliseconds(100);
    Duration backoff_max = std::chrono::seconds(5);
    // Bound of one question.
    Duration attempt_timeout = std::chrono::seconds(30);
  };
  // `on_failure` gets what went wrong with each attempt.
  VerdictAsker(Options options, std::function<void(const absl::Status&)> on_failure)
      : options_(std::move(options)), on_failure_(std::move(on_failure)) {}

  // Asks for ever; returns OWNER or REFUSED, or Cancelled after Stop(). One thread.
  absl::StatusOr<v1::Verdict> Ask();
  // Ends Ask(), now or when it is called. Any thread.
  void Stop();

 private:
  absl::StatusOr<v1::Verdict> AskOnce();

  const Options options_;
  const std::function<void(const absl::Status&)> on_failure_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;                       // guarded by mutex_
  stream::MessageChannel* talking_ = nullptr;  // guarded by mutex_; owned by AskOnce
};

}  // namespace baton::migration
