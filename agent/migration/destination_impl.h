// Inside of IncomingMigration, split over destination.cc (connections, queries, requests),
// destination_receive.cc (taking in) and destination_decide.cc (OWNER or REFUSED). Not for users.
#pragma once

#include <atomic>
#include <condition_variable>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "agent/migration/destination.h"
#include "agent/stream/memory_receiver.h"

namespace baton::migration {

class IncomingMigration::Impl {
 public:
  Impl(DestinationOptions options, DestinationParts parts, Handover handover);
  ~Impl();
  void Launch(bool recovered);

  absl::Status AcceptChannel(const stream::PreambleBytes& preamble, UniqueFd socket);
  absl::Status Abort(const std::string& why);
  v1::SideReport report() const { return reporter_.report(); }
  Outcome outcome() const;
  absl::StatusOr<Outcome> Wait(Deadline deadline);

 private:
  // A thread of one accepted connection.
  struct Greeter {
    std::thread thread;
    std::atomic<bool> done{false};
  };

  // --- destination.cc ---
  absl::Status Greet(const stream::Preamble& preamble, UniqueFd socket);
  void AnswerQuery(std::unique_ptr<stream::MessageChannel> channel);
  v1::PeerMessage VerdictMessage() const;
  absl::Status Apply(Handover::Event event);
  Handover handover() const;
  bool stopping() const;
  // False if the engine is being destroyed.
  bool SleepUnlessStopping(Duration duration);

  // --- destination_receive.cc ---
  absl::Status Receive();
  absl::Status AwaitControl();
  absl::Status Hello();
  absl::Status CheckHello(const v1::PeerHello& hello) const;
  absl::StatusOr<v1::PeerMessage> NextMessage(Deadline deadline);
  absl::Status Interrupted();
  absl::Status Handle(const v1::PeerMessage& message, Deadline deadline);
  absl::Status LandRound(const v1::RoundEnd& end, Deadline deadline);
  absl::Status AwaitFrames(const std::vector<uint64_t>& frames, Deadline deadline);
  absl::Status TakeState(const v1::VmmState& state, Deadline deadline);
  absl::Status FeedState(const std::string& data, Deadline deadline);
  absl::Status TakeYield(const v1::Yield& yield);
  // Checks and loads once everything is here.
  absl::Status LoadIfComplete();
  absl::Status SetLayout();
  absl::Status Cause(const absl::Status& status);
  void Tick();

  // --- destination_decide.cc ---
  void Run(bool recovered);
  absl::Status Own();
  void StartGuest();
  void Refuse(const absl::Status& why);
  void End(Outcome outcome);
  void AddTime(const std::string& name, Clock::time_point begin);

  DestinationOptions o_;
  DestinationParts p_;
  Reporter reporter_;
  Duration max_duration_{0};

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Handover handover_;  // guarded by mutex_, as the rest of this block
  bool stopping_ = false, ended_ = false;
  std::string abort_why_;
  absl::Status refusal_;  // why, for verdicts
  Outcome outcome_ = Outcome::kNone;
  int waiters_ = 0;               // threads inside Wait()
  std::set<uint32_t> connected_;  // channel numbers
  std::unique_ptr<stream::MessageChannel> control_;
  std::map<uint32_t, std::unique_ptr<stream::Channel>> waiting_channels_;
  std::list<Greeter> greeters_;
  // Set once by the main thread, under mutex_; the objects serve any thread.
  std::unique_ptr<ControlLink> link_;
  std::unique_ptr<stream::MemoryReceiver> receiver_;

  // Of the main thread.
  bool recovered_ = false;
  UniqueFd load_fd_;
  std::string held_state_;  // FINAL, until the last round has landed
  bool state_complete_ = false, landed_ = false, have_devices_ = false, loaded_ = false;
  v1::DeviceStates devices_;
  int64_t source_frozen_at_ns_ = 0;
  int64_t running_at_ns_ = 0;
  std::vector<std::pair<std::string, Duration>> parts_;
  uint64_t state_bytes_ = 0;

  std::thread thread_;
};

}  // namespace baton::migration
