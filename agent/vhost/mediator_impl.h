// The inside of Mediator, shared by its parts:
//   mediator.cc         the thread, its events, the public calls
//   vmm_requests.cc     what the VMM asks, one handler a request
//   backend_session.cc  connecting, building the device at the back-end, losing it, starting and stopping
//   ring_control.cc     where a ring is to start, and its start;  ring_stop.cc  drain and stop
//   inflight_region.cc  the in-flight region, and what outlives the shim;  inflight_sets.cc  what it says
//   suspend_status.cc   the stop of a device that has a status for it
//   suspend.cc fence.cc handing over what is in flight;  takeover.cc  being given it
//   logging.cc          dirty logging;  migration_ops.cc  the stop of a migration
//   device_state.cc     the state out of it and into it
//   swap.cc             another back-end under the running guest
//   device_events.cc    errors that the back-end tells of
//   device_transfer.cc  the back-end's own state, announcements
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "agent/vhost/device_memo.h"
#include "agent/vhost/device_record.h"
#include "agent/vhost/dirty_log.h"
#include "agent/vhost/frontend.h"
#include "agent/vhost/mediator.h"
#include "agent/vhost/quirks.h"
#include "agent/vhost/ram_view.h"
#include "agent/virtio/blk_in_flight.h"
#include "agent/virtio/inflight.h"
#include "agent/virtio/split_ring.h"
#include "common/unix_socket.h"

namespace baton::vhost {

// A VMM that stops its rings sends the next request within this time of the answer to the last.
inline constexpr auto kVmmPause = std::chrono::milliseconds(5);

// Offered to the VMM whatever the back-end has: acknowledgements are ours to give, and a channel on which
// nothing comes does no harm (User-Mode Linux up to 6.1 cannot do without one).
inline constexpr uint64_t kOwnProtocolFeatures = pf::kReplyAck | pf::kBackendReq;

// What the back-end offers, asked at each connection.
struct Offer {
  uint64_t features = 0;
  uint64_t protocol_features = 0;
  uint64_t queues = 1;
  uint64_t memory_slots = kMaxTableRegions;
};

enum class LinkState {
  kDown,     // no connection; the next attempt is due at retry_at
  kHello,    // connected, GET_FEATURES sent; a back-end that is busy or stopped does not answer yet
  kReady,    // in step: requests of the VMM are forwarded
  kOverdue,  // an answer in a stop is overdue; nothing may be sent before it comes
  kHeld,     // connected, but the device cannot be built without a guess
};

// State of a ring at the back-end, on this connection.
struct AppliedVring {
  bool running = false;
  bool kick_stale = false;  // it has a kick descriptor that nobody writes to (swap.cc)
  bool call_stale = false;  // the VMM changed the call descriptor while nothing could be sent
  bool must_stop =
      false;  // the VMM stopped it, but it still runs: nothing could be sent, or it did not run empty
  // The answer of the back-end to GET_VRING_BASE on this connection: the true base.
  std::optional<uint32_t> base;
};

struct Link {
  LinkState state = LinkState::kDown;
  std::unique_ptr<Frontend> frontend;
  std::optional<uint64_t> features_sent;
  bool memory_sent = false;
  bool memory_stale = false;
  bool inflight_sent = false;
  bool log_sent = false;
  bool state_loaded = false;  // the device state that this connection has to begin with
  // Suspended by its status (VIRTIO 1.4): the status to go on with.
  std::optional<uint64_t> suspended;
  std::map<uint32_t, AppliedVring> vrings;
  std::map<uint32_t, bool> enabled;
  Clock::time_point hello_until{};
};

// A notification that no one may have lost: spurious ones are allowed by the virtio specification.
void Inject(const Notifier& notifier);

class Mediator::Impl {
 public:
  Impl(MediatorOptions options, MediatorCallbacks callbacks);
  ~Impl();

  // mediator.cc
  absl::Status StartUp();
  v1::Device Describe() const;
  bool WaitForVmm(Deadline deadline) const;
  uint64_t wakeups() const { return wakeups_.load(std::memory_order_relaxed); }
  const std::string& name() const { return options_.spec.name(); }

  // migration_ops.cc
  absl::Status StartLogging(Deadline deadline);
  absl::Status HarvestLog(memory::PageSets& out);
  absl::Status StopLogging(Deadline deadline);
  absl::Status ArmStop(StopOrder order);
  absl::StatusOr<v1::DeviceState> CollectState(Deadline deadline);
  v1::DeviceStop stop() const;
  int64_t stop_began_ns() const;
  bool TakesInflight() const;
  bool OrdersInflight() const { return quirks_.replays_in_order; }
  absl::Status DisarmStop();
  absl::Status ExpectState(const v1::DeviceState& state);
  absl::Status CheckExpected() const;
  // swap.cc
  absl::StatusOr<SwapResult> Swap(const SwapOptions& wanted, std::function<absl::Status()> record,
                                  Deadline deadline);
  absl::Status Announce(Deadline deadline);
  Duration request_timeout() const { return options_.request_timeout; }

 private:
  // --- mediator.cc: thread and events ---
  void Loop();
  // False: nothing happened until the timeout.
  bool HandleEvents(int timeout_ms);
  // The VMM stops its rings for a migration, one after the other.
  bool StopUnderWay() const { return stop_.begun && record_.any_started() && Armed(); }
  void RunPosted();
  // Something was posted, or the end has come.
  bool WorkWaits() const;
  // Runs `work` on the mediator's thread and waits for it. DeadlineExceeded: it may still run later.
  // `changes`: what it does shows in Describe at once, not only a moment later.
  absl::Status Run(std::function<absl::Status()> work, Deadline deadline, bool changes = true);
  void Publish();
  v1::Device BuildDescription() const;
  void DescribeIn(v1::Device* device) const;
  // Of an ordinary request; within the stop of a migration no more than the stop has left.
  Deadline RequestDeadline() const;
  absl::Status Listen();

  // --- vmm_requests.cc ---
  void AcceptVmm();
  void ServeVmm();
  // A request of the VMM's, or why none came.
  void ServeRequest(absl::StatusOr<WireMessage> message);
  // Ends the VMM's session: the record is forgotten, and the back-end gets a new connection for the next
  // session.
  void EndVmmSession();
  absl::Status Dispatch(WireMessage& m);
  absl::Status Reply(const WireMessage& m, std::span<const uint8_t> payload, std::span<const int> fds = {});
  absl::Status ReplyU64(const WireMessage& m, uint64_t value) { return Reply(m, Bytes(value)); }
  void AssumeStatus(Request request);
  uint64_t FeaturesForVmm() const;
  uint64_t ProtocolFeaturesForVmm() const;
  // Each returns an error to refuse the message and thereby the VMM's connection. What the back-end refused
  // is not such an error: it comes in *refused and is answered to the VMM.
  absl::Status OnSetFeatures(const WireMessage& m, absl::Status* refused);
  absl::Status OnSetProtocolFeatures(const WireMessage& m, absl::Status* refused);
  absl::Status OnMemory(WireMessage& m, absl::Status* refused);
  absl::Status OnVringNum(const WireMessage& m);
  absl::Status OnVringAddr(const WireMessage& m, absl::Status* refused);
  absl::Status OnVringBase(const WireMessage& m);
  absl::Status OnGetVringBase(const WireMessage& m);
  absl::Status OnNotifier(WireMessage& m, absl::Status* refused);
  absl::Status OnVringEnable(const WireMessage& m, absl::Status* refused);
  absl::Status OnGetConfig(const WireMessage& m);
  absl::Status OnSetConfig(const WireMessage& m, absl::Status* refused);
  absl::Status OnStatus(const WireMessage& m, absl::Status* refused);
  // Some ring runs at the back-end.
  bool AnyRuns() const;
  absl::Status OnResetDevice(absl::Status* refused);
  absl::Status CheckIndex(const WireMessage& m, uint64_t index) const;

  // --- backend_session.cc ---
  // Dials and sends the first request; leaves the link in kHello or kDown.
  absl::Status Dial();
  // `appeared`: its socket has just been put there.
  void TryConnect(bool appeared);
  // What inotify tells of the back-end's directory.
  struct Appearance {
    bool anything = false, socket = false;
  };
  Appearance ReadAppearance();
  // The answer to GET_FEATURES is there: the rest of the handshake, then the device is built.
  void FinishHello();
  absl::Status Negotiate(uint64_t features);
  // Builds everything the record says at a fresh connection.
  absl::Status Build();
  // Its two halves: everything but the rings, and the rings.
  absl::Status BuildDevice();
  absl::Status BuildRings();
  // Once the rings run: which are enabled, and the status that the VMM set.
  absl::Status EnableRings();
  // Whether the ring is enabled, unless the VMM never said or the back-end has been told.
  absl::Status SendEnable(uint32_t index);
  // After an overdue stop was answered: brings the back-end to what the VMM asked for meanwhile.
  void Reconcile();
  void FinishOverdue();
  // An answer did not come in time, in a stop: wait for it without holding up the VMM.
  void AwaitOverdue(const absl::Status& why);
  // Forwards: OK, or *refused by the back-end; anything else loses the link (and counts as OK: the record has
  // it).
  absl::Status Forward(const absl::Status& status, absl::Status* refused);
  void LoseBackend(const absl::Status& why);
  void Hold(const absl::Status& why);
  void ScheduleRetry(bool fresh);
  bool Ready() const { return link_.state == LinkState::kReady; }
  uint64_t EffectiveFeatures() const;
  uint64_t EffectiveProtocolFeatures() const;
  absl::Status SendFeatures();
  absl::Status SendMemory();
  absl::Status SendVringAddr(uint32_t index);
  absl::Status SendNotifier(Request request, uint32_t index, const Notifier& notifier);
  void RefreshConfig();
  // If the back-end or an announcement changed the configuration space: reads it again, and tells the VMM.
  void TellOfConfigChange();
  uint32_t ConfigSize() const;

  // --- inflight_region.cc ---
  // Gives the back-end the region: the one that an earlier mediator or connection left, else a new one.
  absl::Status EnsureInflight();
  uint32_t ExpectedRings() const;
  // Finds the region that was noted and the back-end can go on with, laid out anew if its strides differ.
  absl::Status AdoptRegion(const InflightDescription& wanted, bool needed);
  // Initialises one queue's part of the in-flight region for a ring that starts with nothing in flight.
  // `used`: of a split ring its used->idx.
  absl::Status InitInflightPart(uint32_t index, virtio::PackedPosition used);
  // What is in flight by the region, whatever back-end serves the ring or none. INFLIGHT_UNKNOWN when it
  // contradicts the ring. For a ring that is being served the answer may be old before it is given.
  absl::StatusOr<virtio::InflightSet> ReadInflightPart(uint32_t index);
  absl::StatusOr<uint64_t> RegionStride(const InflightDescription& region) const;
  // Where a ring with a region begins: initialises its part, or, if it was lost, goes by what the part says.
  absl::StatusOr<uint32_t> BaseByRegion(uint32_t index, uint32_t asked);
  // The first start of a ring in a session: what the memo knows of this very ring becomes part of the record.
  void Recall(uint32_t index);
  // Notes how the ring stands. To be called before a back-end is let at it, and after it has left it.
  void Memorize(uint32_t index, bool starts = false);
  // All rings of the record; after what they have in common has changed.
  void MemorizeAll();
  // The memo is about the guest that the record is about.
  bool MemoApplies() const;
  uint64_t MemoryDigest() const;

  // --- inflight_sets.cc ---
  absl::StatusOr<virtio::InflightGeometry> RegionGeometry() const;
  // Copies one queue's part.
  absl::Status CopyPart(const virtio::InflightGeometry& geometry, uint32_t index,
                        std::vector<uint8_t>* part) const;
  // What one queue's part says, checked against the ring, and against the back-end's answer to its stop.
  // `room`: where a packed ring's descriptors are to stay.
  absl::StatusOr<virtio::InflightView> ReadSet(const virtio::MemoryView& memory,
                                               std::span<const uint8_t> part, uint32_t index, uint32_t base,
                                               std::span<virtio::InflightDesc> room,
                                               virtio::InflightReader* reader) const;

  // --- suspend.cc, fence.cc: the stop of a migration ---
  // With the first queue that the VMM stops. Suspends, or drains as far as that can be done for all at once.
  void StopAllRings();
  std::vector<uint32_t> RunningRings() const;
  void DrainRings();
  // suspend_status.cc: stops the whole device by its status, where it offers that; it completes what it has.
  bool SuspendsByStatus() const;
  void SuspendByStatus(Deadline deadline);
  // Lets a device that was suspended so go on.
  absl::Status LiftSuspend();
  // Stops all without completing; an error says why that may not be, and then they run again.
  absl::Status SuspendRings();
  // Makes stop_space_ ready.
  void PrepareSpace();
  // What the rings that have stopped so far have in flight, and whether that may go over.
  struct Judgement;
  // `base`: the back-end's answer. `next`: the ring whose turn is next, or any number beyond.
  absl::Status JudgeRing(uint32_t index, uint32_t base, uint32_t next, Judgement* judgement);
  // After the last ring.
  absl::Status JudgeAll(const Judgement& judgement) const;
  void ResumeSuspended(const std::vector<uint32_t>& rings);
  // The base as the VMM is told it: the next request to fetch.
  uint32_t ToldBase(const virtio::InflightView& set) const;
  bool HasFence() const { return !options_.fence.command.empty(); }
  absl::Status FenceIfNeeded();
  // Before anything is submitted at this side again.
  absl::Status LiftFence();
  absl::Status RunFence(const std::string& action);
  bool HandoffWanted() const;
  // Overlapping requests may be submitted again here and at the destination.
  bool OrderKept() const;

  // --- takeover.cc ---
  absl::Status TakeOver(const v1::DeviceState& state);
  // So that the next shim knows of it, too; and what the one before noted.
  void NoteTakenOver();
  void RecallTakenOver();

  // --- ring_control.cc, ring_stop.cc ---
  // Where the back-end is to begin with the ring.
  absl::StatusOr<uint32_t> ResolveBase(uint32_t index);
  // The rings of the record in the order in which they are to start: of a NIC the receive queues first, so
  // that what the first transmitted packet provokes finds buffers.
  std::vector<uint32_t> StartOrder() const;
  // At the destination of a migration a NIC's transmit queue waits for the receive queues that ran at the
  // source: true if this one has to. Bounded by ReleaseHeldRings.
  bool MustHold(uint32_t index) const;
  // Starts held rings: those that need not wait any more, or all of them (`force`, or their time is over).
  absl::Status ReleaseHeldRings(bool force);
  absl::Status StartVring(uint32_t index);
  // Asks the back-end for the base and watches the ring drain, until `deadline`. Returns what to tell the
  // VMM.
  uint32_t StopVring(uint32_t index);
  // Waits until everything that the guest made available is used. False at the deadline, or when the back-end
  // is lost.
  bool AwaitAllUsed(uint32_t index, Deadline deadline);
  // Serves the back-end for a moment of a drain; an error when it is lost.
  absl::Status DrainMoment();
  // The device consumes whatever is made available, so that a ring whose driver is quiet runs empty by
  // itself.
  bool RunsEmpty() const {
    return options_.spec.class_() == v1::BLK || options_.backend.kind() == v1::QEMU_STORAGE_DAEMON;
  }
  // The ring still runs at the back-end, and the VMM starts it again just as it stopped it.
  bool ResumesInPlace(uint32_t index) const;
  absl::Status ResumeInPlace(uint32_t index);
  // used->idx of a ring, or what was last known.
  uint32_t UsedIndex(uint32_t index) const;
  uint32_t AvailIndex(uint32_t index) const;

  // --- device_events.cc, on the thread ---
  // Gives the back-end an error descriptor of ours for the ring; the VMM's is written when ours was.
  absl::Status SendVringErr(uint32_t index);
  // Ours of all rings are watched no more.
  void ForgetErrors();
  // Descriptors of errors_ are readable.
  void OnErrors();
  void OnDeviceError(uint32_t index);
  // When the next errors are looked at; far away unless some were seen a moment ago.
  bool ErrorsMuted() const { return Clock::now() < errors_muted_until_; }

  // --- swap.cc, on the thread ---
  absl::StatusOr<SwapResult> SwapNow(const SwapOptions& wanted, const std::function<absl::Status()>& record);
  // A ready connection to options_.backend, with everything but the rings.
  absl::Status ConnectForSwap(Deadline deadline);
  // Takes every ring from the back-end with nothing in flight. On failure all of them run there again, or
  // will once it answers.
  absl::Status StopForSwap(Deadline deadline);
  absl::Status StopRingForSwap(uint32_t index, Deadline deadline);
  absl::Status AwaitRead(int silence, Deadline deadline);
  // For back-ends that drain when they are left: leaves it, and waits until it speaks again.
  absl::Status DrainByDisconnect(Deadline deadline);
  void ResumeAfterSwap();
  // Gives a ring that runs its own kick descriptor back.
  absl::Status RestoreKick(uint32_t index);
  // Requests in flight by the region of all rings; nothing if there is no region, or it contradicts itself.
  std::optional<uint64_t> InFlightByRegion();

  // --- logging.cc, migration_ops.cc, device_state.cc, on the thread ---
  // With vmm_moves_memory: the VMM's log, and whether the back-end is to write to it.
  absl::Status OnLogBase(WireMessage& m, absl::Status* refused);
  absl::Status LogForVmm(bool on, absl::Status* refused);
  // Whatever the back-end may have written without coming to its bit.
  void MarkAllDirty();
  absl::Status EnsureLog();
  absl::Status ApplyLogging(bool on);
  void MarkDirty(uint64_t gpa, uint64_t size);
  // Under log_mutex_.
  void SetBits(uint64_t gpa, uint64_t size);
  // `total`: bytes marked so far in this stop.
  void MarkBuffersDirty(const std::vector<virtio::GuestSpan>& buffers, uint64_t* total);
  void MarkRingDirty(uint32_t index);
  absl::StatusOr<v1::DeviceState> BuildState();
  // A ring whose requests in flight go over: the rest of what is to be said of it.
  absl::Status AddHandedOff(const virtio::MemoryView& memory, uint32_t index, v1::VringState* v);
  // Guest memory for the many small reads of a stop: what is mapped already needs no system call for each.
  // `ram` is where a view of it may be put.
  const virtio::MemoryView& StopMemory(std::optional<RamView>* ram) const;
  void CompareWithExpected(uint32_t index, uint32_t base);
  // With vmm_moves_memory: the last ring has stopped, and nobody knows yet.
  void TellStopped();
  // A ring starts again, so that the stop before was not the end: the next one is a stop of its own.
  void RenewStop();
  // Begins the stop if `begin`, and says until when it may last.
  Deadline StopDeadline(bool begin);
  bool Armed() const;

  // --- device_transfer.cc ---
  // Adds the back-end's own state to what the rings gave, where it has one.
  absl::Status SaveStateInto(v1::DeviceState* out, Deadline deadline);
  // Hands a state that waits to be loaded to this connection's back-end, once, before its first ring.
  absl::Status EnsureStateLoaded(Deadline deadline);
  // The next of a series of announcements is due.
  void AnnounceNow();

  // options_.backend and quirks_ follow a swap; the thread's. The rest is constant.
  MediatorOptions options_;
  const MediatorCallbacks callbacks_;
  Quirks quirks_;

  // Owned by the mediator's thread (by StartUp before it runs).
  UnixListener listen_;
  UniqueFd inotify_;
  std::unique_ptr<DeviceMemo> memo_;
  Connection vmm_;
  bool vmm_heard_ = false;    // the VMM has said something on this connection
  bool vmm_assumed_ = false;  // it negotiated nothing, because it goes on with what it had
  DeviceRecord record_;
  Link link_;
  Offer offer_;
  bool offer_known_ = false;
  std::vector<uint8_t> config_;
  bool config_changed_ = false;
  bool status_reset_due_ = false;  // the VMM's SET_STATUS 0 waits until no ring runs
  bool rebuild_counts_ = false;
  uint32_t reconnects_ = 0;
  uint32_t swaps_ = 0;
  bool replace_region_ = false;             // the next back-end gets a region file of its own
  UniqueFd errors_;                         // epoll of the rings' error descriptors
  std::map<uint32_t, UniqueFd> error_fds_;  // by ring
  Clock::time_point errors_muted_until_{};
  std::string message_;
  v1::Device description_;  // what Publish made last: the next one takes no memory
  bool untold_ = false;     // something happened in a stop, and Publish waits for its end
  Duration backoff_{};
  Clock::time_point retry_at_{};
  bool logging_ = false;
  std::optional<Clock::time_point> stop_began_, stop_ended_;
  // The stop of a migration.
  struct MigrationStop {
    bool begun = false;
    std::string drain_reason;  // why it drains although handoff was asked for
    // A ring whose requests go over.
    struct HandedOff {
      uint32_t told = 0;  // to the VMM, as the ring's base
      size_t requests = 0;
      v1::VringState state;  // as far as the set tells; CollectState takes it, once
      bool collected = false;
    };
    // By ring. Empty with drain.
    std::map<uint32_t, HandedOff> handed_off;
    uint32_t requests() const {
      size_t sum = 0;
      for (const auto& [index, ring] : handed_off) sum += ring.requests;
      return static_cast<uint32_t>(sum);
    }
  };
  MigrationStop stop_;
  // Memory for a stop with handoff, touched before it begins: the first touch of a page costs more than what
  // is done with it, and the guest stands still. One ring after the other goes through the same buffers.
  struct StopSpace {
    std::vector<uint8_t> part;
    virtio::InflightReader reader;
    std::vector<virtio::GuestSpan> buffers;
    std::map<uint32_t, v1::VringState> states;  // by ring, of the largest size
  };
  StopSpace stop_space_;
  bool fenced_ = false;
  // Rings (and their sizes) whose requests in flight came from another host and are in the region.
  std::map<uint32_t, uint32_t> taken_over_;
  std::optional<v1::DeviceState> expected_;
  absl::Status expected_result_;
  std::vector<uint32_t> expected_seen_;
  // From the source, until the first ring runs with it.
  std::optional<std::string> state_to_load_;
  // Transmit queues that the VMM has started and that wait (see MustHold), and until when.
  std::vector<uint32_t> held_rings_;
  Clock::time_point held_until_{};
  std::optional<uint64_t> announce_mac_;  // SEND_RARP's payload
  size_t announced_ = 0;
  Clock::time_point announce_at_{};

  // Shared with callers.
  UniqueFd wake_;
  std::thread thread_;
  std::atomic<bool> quit_{false};
  std::atomic<uint64_t> wakeups_{0};
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::deque<std::function<void()>> posted_;  // guarded by mutex_
  v1::Device published_;                      // guarded by mutex_
  std::string published_bytes_;               // guarded by mutex_
  uint64_t change_count_ = 0;                 // guarded by mutex_
  std::optional<StopOrder> armed_;            // guarded by mutex_
  v1::DeviceStop stop_told_;                  // guarded by mutex_
  Duration stop_duration_{};                  // guarded by mutex_
  absl::Status published_expected_;           // guarded by mutex_
  bool published_vmm_ = false;                // guarded by mutex_

  std::mutex log_mutex_;
  std::shared_ptr<DirtyLog> log_;  // guarded by log_mutex_
  std::vector<uint64_t> carry_;    // guarded by log_mutex_: bits taken from an older log, or set by us
  bool log_incomplete_ = false;    // guarded by log_mutex_
};

}  // namespace baton::vhost
