// Inside of OutgoingMigration, split over source.cc (pre-copy, requests), source_hints.cc (round 0 with free
// page hints), source_blackout.cc (switchover) and source_settle.cc (verdict, release, resume, report). Not
// for users.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "agent/migration/convergence.h"
#include "agent/migration/rate_meter.h"
#include "agent/migration/source.h"
#include "agent/migration/verdict_asker.h"
#include "agent/migration/wake_fd.h"

namespace baton::migration {

class OutgoingMigration::Impl {
 public:
  Impl(SourceOptions options, SourceParts parts, Handover handover);
  ~Impl();
  void Launch(bool only_ask);

  absl::Status Cancel();
  absl::Status Retune(std::optional<uint64_t> bandwidth, std::optional<Duration> max_downtime);
  absl::Status Resolve(v1::HandoverState verdict, bool fenced);
  v1::SideReport report() const { return reporter_.report(); }
  Outcome outcome() const;
  absl::StatusOr<Outcome> Wait(Deadline deadline);

 private:
  struct Resolution {
    v1::HandoverState verdict = v1::IDLE;
    bool fenced = false;
  };
  // Points of the blackout, for the figures.
  struct BlackoutFigures {
    int64_t frozen_at_ns = 0;  // CLOCK_MONOTONIC, vCPUs stopped
    int64_t devices_stopped_ns = 0;
    Duration drain{0};
    std::vector<std::pair<std::string, Duration>> parts;
    Clock::time_point yield_sent{};
  };

  // --- source.cc ---
  void Monitor();
  void Interrupt();
  bool VmmEnded() const;
  void Run();
  absl::Status Connect();
  void OnLinkEvent();
  absl::StatusOr<v1::PeerMessage> Await(const std::function<bool(const v1::PeerMessage&)>& wanted,
                                        Deadline deadline);
  absl::Status Objection(const v1::PeerMessage& message);
  absl::Status Cause(const absl::Status& status);
  static absl::Status AtSource(const absl::Status& status);
  absl::Status Precopy();
  absl::Status BeginHints();
  absl::Status SendHinted(const memory::PageSets& pages, Deadline deadline);
  absl::Status ResolveHints(const memory::PageSets& dirty);
  void EndHints();
  absl::StatusOr<RoundSample> SendRound(const memory::PageSets& pages, uint32_t round, bool final,
                                        Deadline deadline);
  absl::Status TakeDoubtful(const v1::RoundAck& ack);
  absl::Status SendRoundEnd(uint32_t round, bool final, Deadline deadline);
  absl::Status Interrupted();
  absl::Status Harvest(memory::PageSets& pages);
  static uint64_t CountBytes(const memory::PageSets& pages);
  void ApplyNewLimit(Convergence& convergence);
  bool stopping() const;
  absl::Status Apply(Handover::Event event);
  Handover handover() const;

  // --- source_blackout.cc ---
  absl::Status Blackout();
  absl::Status FreezeGuest(Deadline deadline);
  absl::Status GiveAway(v1::DeviceStates states, Deadline deadline);
  absl::Status RelayState(Deadline deadline);
  absl::Status SendLastPages(std::thread& relay, const absl::Status& relayed, Deadline deadline);
  void WriteYielded();
  absl::Status AwaitVerdict();
  void Mark(const std::string& name, Clock::time_point begin);

  // --- source_settle.cc ---
  void Settle(const absl::Status& status);
  void RepairYield();
  void AskUntilHeard();
  void Hear(v1::HandoverState verdict, const std::string& how);
  void WriteRefusal();
  void Release();
  void ResumeHere(const absl::Status& status);
  void AbortPeer(const absl::Status& status);
  void StopTracking();
  void RecordStops();
  void Record(const RoundSample& sample, const ConvergenceDecision& decision);
  // Bytes of guest memory a second, over the last second; nothing while that is not known yet.
  std::optional<uint64_t> PresentRate();
  void TickProgress();
  void FillCounts(v1::Progress& progress);
  void FillDowntimes(const v1::Resumed& resumed);
  void End(Outcome outcome);
  // False if the engine is being destroyed.
  bool SleepUnlessStopping(Duration duration);

  SourceOptions o_;
  SourceParts p_;
  Reporter reporter_;
  ConvergenceLimits limits_;
  Duration drain_timeout_{0};
  std::set<std::string> takes_inflight_, orders_inflight_;  // devices, by the destination's word
  Duration max_duration_{0};

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Handover handover_;  // guarded by mutex_, as the rest of this block
  bool stopping_ = false, cancelled_ = false, ended_ = false;
  std::optional<Resolution> resolution_;
  std::optional<Duration> new_max_downtime_;
  Outcome outcome_ = Outcome::kNone;
  int waiters_ = 0;  // threads inside Wait()
  std::unique_ptr<VerdictAsker> asker_;
  // Set once by the main thread, under mutex_; the objects serve any thread.
  std::unique_ptr<stream::MemorySender> sender_;
  // Ends first: until its thread has ended, that may tell of a lost link and cancel the sender.
  std::unique_ptr<ControlLink> link_;

  std::atomic<bool> vmm_dead_{false}, ticking_{false}, monitor_done_{false};
  std::atomic<uint32_t> round_{0};
  WakeFd monitor_stop_;

  // Of the main thread.
  std::vector<std::unique_ptr<memory::DirtySource>> dirty_sources_;
  std::optional<HintRound> hints_;  // from the baseline of the dirty sources to the end of round 0
  memory::PageSets deferred_;       // populated, and not sent in round 0 because of hints
  memory::PageSets left_over_;      // harvested, not sent
  memory::PageSets doubtful_;       // to be sent again whether written or not; empty until there are any
  uint32_t next_round_ = 0;
  BlackoutFigures blackout_;
  Duration state_time_{0};  // of the relay's thread until it was joined
  RoundSample last_round_;
  UniqueFd state_fd_;
  bool freeze_tried_ = false;
  bool frozen_ = false;
  absl::Status yield_write_;
  absl::Status refusal_;  // what the destination said when it was asked
  Clock::time_point started_{};
  std::atomic<uint64_t> hole_bytes_{0}, hint_bytes_{0}, state_bytes_{0};
  RateMeter rate_{std::chrono::seconds(1)};  // guarded by mutex_

  std::thread thread_, monitor_;
};

}  // namespace baton::migration
