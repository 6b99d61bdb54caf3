// A limit on bytes a second that several threads share.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "common/clock.h"
#include "common/status.h"

namespace baton::stream {

// A token bucket that may go into debt: whoever finds it not empty takes all it needs, and those after it
// wait until the debt is paid. Holds at most 10 ms worth of tokens, so that a pause is not followed by a
// burst. All methods are for any thread.
class Pacer {
 public:
  // Bytes a second; 0 is unlimited.
  explicit Pacer(uint64_t rate = 0) : rate_(rate), refilled_(Clock::now()) {}

  // Takes effect at once, for those who wait as well.
  void SetRate(uint64_t rate);
  uint64_t rate() const;
  // Waits until `bytes` may be sent. Cancelled after Cancel(), DeadlineExceeded if it would not be before the
  // deadline.
  absl::Status Acquire(uint64_t bytes, Deadline deadline);
  void Cancel();

 private:
  void Refill(Clock::time_point now);  // needs mutex_

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t rate_;               // guarded by mutex_, as all below
  double tokens_ = 0;           // bytes; negative is debt
  Clock::time_point refilled_;  // when tokens_ was true
  bool cancelled_ = false;
};

}  // namespace baton::stream
