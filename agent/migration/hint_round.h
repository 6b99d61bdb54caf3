// Free page hints of one outgoing migration: asks the guest, and decides how long its answer is waited for.
// What the answer means is memory/hint_session.h's.
//
// The guest's answer and the sending of memory overlap: as long as hints come in faster than memory could be
// sent, nothing is sent; after that what is not hinted goes first, and what is hinted last, or never.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>

#include "agent/memory/hint_session.h"
#include "agent/memory/hint_source.h"
#include "agent/memory/page_set.h"
#include "baton/v1/types.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::migration {

struct HintOptions {
  // The guest's balloon must have begun to answer by then, or memory is sent meanwhile.
  Duration first_hint = std::chrono::milliseconds(250);
  // Waiting goes on while this many bytes are hinted in each window: about what a fast link sends in it.
  Duration window = std::chrono::milliseconds(50);
  uint64_t worth_waiting = 64u << 20;
  // ... and at most so long.
  Duration head = std::chrono::seconds(3);
  // For the in-band stop, once everything else has been sent.
  Duration stop = std::chrono::seconds(2);
};

// One thread, except as HintListener.
class HintRound final : private memory::HintListener {
 public:
  // `source` must outlive the round. `none`: empty sets of the shape of guest memory.
  HintRound(memory::HintSource& source, memory::PageSets none, HintOptions options);
  // Tells the guest that it may have its pages back.
  ~HintRound() override;
  HintRound(const HintRound&) = delete;
  HintRound& operator=(const HintRound&) = delete;

  // All dirty sources are on and have just been harvested. FailedPrecondition: the guest gives no hints, in
  // words.
  absl::Status Begin();
  // Waits as long as it pays. `interrupted` is asked now and then; its error ends the wait.
  absl::Status AwaitHead(const std::function<absl::Status()>& interrupted);
  // The guest has said all it will, or nothing it said counts.
  bool settled() const;
  // What is better sent last.
  memory::PageSets Hinted() const;
  // Asks the guest to stop if it has not yet, and waits for it. Afterwards settled().
  absl::Status Settle(const std::function<absl::Status()>& interrupted);
  // `dirty`: all that was written since Begin. The pages that need not be sent at all.
  absl::StatusOr<memory::PageSets> Resolve(const memory::PageSets& dirty);
  // DONE. Idempotent.
  void Finish();

  // `unused` in words if hints were dropped. spoilt is the caller's.
  v1::HintFigures figures() const;

 private:
  void OnStart() override;
  void OnHint(uint32_t block, uint64_t first_page, uint64_t pages) override;
  void OnStop() override;
  void OnLost(const std::string& why) override;

  memory::HintSource& source_;
  const HintOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  memory::HintSession session_;  // guarded by mutex_, as the rest
  Clock::time_point published_at_{};
  Duration answer_{0}, waited_{0};
};

}  // namespace baton::migration
