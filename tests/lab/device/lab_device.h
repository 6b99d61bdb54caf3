// The lab device: a vhost-user back-end for tests, benchmarks and the demo, which does on command what real
// back-ends do now and then: complete late and out of order, stop without completing what they have, run out
// of space, fall silent, answer wrongly, die at a given point. What it does for the guest is its model's
// (device_model.h); see docs/lab.md for its options and commands.
#pragma once

#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "agent/vhost/socket.h"
#include "agent/vhost/wire.h"
#include "agent/virtio/device_queue.h"
#include "agent/virtio/features.h"
#include "agent/virtio/inflight_layout.h"
#include "agent/virtio/inflight_tracker.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/unix_socket.h"
#include "tests/lab/device/device_model.h"
#include "tests/lab/device/event_loop.h"
#include "tests/lab/device/guest_map.h"

namespace baton::lab {

// Message ids and protocol bits of suspension without completing, and of device state.
inline constexpr uint32_t kMsgSetDeviceStateFd = 42, kMsgCheckDeviceState = 43, kMsgGetBaseSkipDrain = 45;
inline constexpr uint64_t kPfDeviceState = 1u << 19, kPfGetBaseInflight = 1u << 20,
                          kPfGetBaseSkipDrain = 1u << 23;
inline constexpr uint32_t kMsgBackendConfigChange = 2, kMsgBackendVringErr = 5;

// Faults that are set at start, or any time by Command({"cmd":"set", ...}) with the same names. A message is
// given by its number or name; 0: none.
struct LabFaults {
  // Never answered, nor acted on.
  uint32_t silent_at = 0;
  // Acted on, and never answered.
  uint32_t lose_reply_at = 0;
  // Answered with a malformed reply, instead of being acted on.
  uint32_t garble_at = 0;
  // Answered with "no" (or, where that cannot be said, by closing the connection).
  uint32_t refuse_at = 0;
  // The connection is closed instead.
  uint32_t disconnect_at = 0;
  // Added to the base that a suspension is answered with, which then is wrong.
  int32_t base_offset = 0;
  // The process ends at the `crash_after`-th passing of this point (CrashPoints() names them all).
  std::string crash_at;
  uint64_t crash_after = 1;
};

// Places at which crash_at may end the process, in the order of a request's life.
const std::vector<std::string>& CrashPoints();

struct LabDeviceOptions {
  // Where the front-end connects.
  std::string socket;
  // Where commands are taken; empty: only from Command().
  std::string control;
  // Offered; of EXTRA, what is not offered by itself (PARTIAL_ORDER, SUSPEND).
  uint64_t without_features = 0, extra_features = 0;
  uint64_t without_protocol = 0;
  // INFLIGHT_SHMFD, and with it suspension without completing.
  bool inflight = true;
  // Layout and stride of the in-flight region, and what bases mean while something is in flight, are those of
  // this kind of back-end; the latter may be chosen.
  virtio::InflightKind kind = virtio::InflightKind::kSpec;
  std::optional<virtio::BaseConvention> base;
  // GET_VRING_BASE (without bit 20) completes what is in flight first. False: it answers at once and forgets,
  // as some back-ends do after a time.
  bool drains = true;
  // PARTIAL_ORDER: complete in order.
  bool in_order = true;
  LabFaults faults;
  // A crash ends the process by SIGKILL; false: Run returns Aborted "crashed", with everything left as it is.
  bool crash_kills = true;
};

class LabDevice final : private DeviceHost {
 public:
  static absl::StatusOr<std::unique_ptr<LabDevice>> Create(LabDeviceOptions options,
                                                           std::unique_ptr<DeviceModel> model);
  ~LabDevice() override;

  // Serves one connection after the other, on the calling thread, until `stop_fd` is readable (-1: for ever).
  absl::Status Run(int stop_fd);

  // Carries out one command of the control socket (docs/lab.md) and returns its answer. From any thread,
  // while Run runs; returns {"ok": false, ...} when Run has ended.
  nlohmann::json Command(const nlohmann::json& command);

  // The settings of the command "set". Only while Run does not run.
  absl::Status Set(const nlohmann::json& settings) { return SetFaults(settings); }

  DeviceModel& model() { return *model_; }

 private:
  struct CrashNow {
    std::string point;
  };
  struct TrackerCrash {
    LabDevice* device;
    void operator()(virtio::TrackerStep step) const;
  };
  struct Slot {
    IoRequest io;
    virtio::Chain chain;
    bool busy = false;
  };
  struct Vring final : virtio::WriteLog {
    LabDevice* device = nullptr;
    uint32_t index = 0;
    // As set by the front-end.
    uint16_t size = 0;
    uint32_t base = 0;
    std::optional<vhost::VringAddr> addr;
    UniqueFd kick, call, err;
    bool enabled = false;
    // Serving.
    bool started = false;
    bool broken = false;  // by the driver
    bool stopping = false;
    bool emptied = false;   // the model has been told that there is no more
    bool fetching = false;  // in Fetch, which asks for kicks when the model has looked
    std::optional<virtio::DeviceQueue> queue;
    std::optional<virtio::InflightTracker<TrackerCrash>> tracker;
    uint64_t next_counter = 1;
    std::vector<std::unique_ptr<Slot>> slots;
    std::vector<uint32_t> free_slots;
    // In the model's hands.
    uint32_t outstanding = 0;
    // Completed, by buffer id: their counters, until they are published.
    std::vector<uint64_t> counter_of;
    bool to_publish = false;
    uint64_t device_area = 0;

    void Wrote(uint64_t gpa, uint64_t size) override;
  };
  struct Reply {
    uint32_t request;
    uint32_t queue;
  };
  struct Client {
    UniqueFd fd;
    uint64_t serial = 0;  // descriptors' numbers come back
    std::string input;
  };
  struct Wait {
    nlohmann::json command;
    Deadline deadline;
    std::function<void(nlohmann::json)> answer;
  };
  struct Transfer {
    UniqueFd fd;
    bool load = false;
    std::string data;
    size_t sent = 0;
    bool finished = false;
    absl::Status result;
  };

  explicit LabDevice(LabDeviceOptions options, std::unique_ptr<DeviceModel> model);

  // DeviceHost, for the model.
  IoRequest* Pop(uint32_t queue) override;
  void Complete(IoRequest* request, uint32_t written) override;
  void Abandon(IoRequest* request) override;
  bool Running(uint32_t queue) const override;
  uint64_t features() const override { return features_; }
  void TickAt(Clock::time_point when) override;
  void Watch(int fd, std::function<void()> ready) override;
  void Unwatch(int fd) override { loop_->Unwatch(fd); }
  void ConfigChanged() override;
  void QueueError(uint32_t queue) override;
  void CrashPoint(const char* name) override;
  int64_t& Counter(const std::string& name) override { return counters_[name]; }

  // Connection (connection.cc).
  void AcceptFrontend();
  void CloseFrontend(const std::string& why);
  void ReceiveMessages();
  absl::Status Serve(vhost::WireMessage& message);
  absl::Status Handle(vhost::WireMessage& message);
  absl::Status CheckMessage(const vhost::WireMessage& message) const;
  absl::Status Respond(uint32_t request, std::span<const uint8_t> payload, std::span<const int> fds = {});
  absl::Status RespondU64(uint32_t request, uint64_t value) { return Respond(request, vhost::Bytes(value)); }
  absl::Status AnswerBases();
  absl::Status RemapRings();
  // Serves what came while rings were coming to rest, and was not to be served then.
  void ServeStashed();
  bool Busy() const { return !bases_.empty() || suspending_ || checking_state_; }
  void SendOnChannel(uint32_t request, std::span<const uint8_t> payload);
  absl::Status MakeInflight(const vhost::WireMessage& message);
  absl::Status TakeInflight(const vhost::WireMessage& message, int fd);
  absl::Status GetConfig(const vhost::WireMessage& message);
  absl::Status SetConfig(const vhost::WireMessage& message);
  absl::Status SetStatus(uint64_t status);
  absl::Status StartTransfer(vhost::WireMessage& message);
  void ContinueTransfer();
  uint64_t OfferedFeatures() const;
  uint64_t OfferedProtocol() const;

  // Rings (rings.cc).
  Vring& RingAt(uint32_t index);
  absl::Status StartRing(Vring& ring);
  absl::StatusOr<uint32_t> RecoverRing(Vring& ring, const virtio::QueueLayout& layout,
                                       virtio::InflightSet* set);
  void UpdateRing(Vring& ring);
  void StopRing(Vring& ring, StopMode mode);
  // Waits until the model has given back everything of a stopping ring; serves no message meanwhile.
  void Settle(Vring& ring);
  void DropRing(Vring& ring);
  void BreakRing(Vring& ring, const absl::Status& why);
  void ResetDevice();
  void Fetch(Vring& ring);
  bool Serving(const Vring& ring) const {
    return ring.started && ring.enabled && !ring.broken && !ring.stopping;
  }
  IoRequest* TakeSlot(Vring& ring, Slot** slot);
  absl::Status FillRequest(Vring& ring, Slot& slot, uint64_t counter, bool replayed);
  void Release(IoRequest* request);
  void MarkForPublishing(Vring& ring);
  void PublishAll();
  void Publish(Vring& ring);
  void PublishBatch(Vring& ring);
  void Call(Vring& ring);
  absl::StatusOr<uint32_t> BaseOf(const Vring& ring) const;
  virtio::BaseConvention StopBase() const;
  virtio::BaseConvention StartBase() const;
  virtio::RingFormat Format() const {
    return features_ & virtio::kFRingPacked ? virtio::RingFormat::kPacked : virtio::RingFormat::kSplit;
  }

  // Commands (commands.cc).
  void AfterEvents();
  void Dispatch(const nlohmann::json& command, std::function<void(nlohmann::json)> answer);
  nlohmann::json RunCommand(const nlohmann::json& command);
  nlohmann::json Stats();
  absl::Status SetFaults(const nlohmann::json& settings);
  bool WaitMet(const Wait& wait);
  void CheckWaits();
  void FailWaits();
  Deadline NextWaitEnd() const;
  void AcceptClient();
  void ReadClient(int fd);
  void AnswerClient(int fd, uint64_t serial, const nlohmann::json& answer);
  void RunPosted();
  [[noreturn]] void Crash(const std::string& point);

  LabDeviceOptions options_;
  std::unique_ptr<EventLoop> master_;  // commands; and loop_ unless frozen
  std::unique_ptr<EventLoop> loop_;    // everything that the device does
  // Outlives the model, which holds references to them.
  std::map<std::string, int64_t> counters_;
  int64_t& done_ = counters_["done"];
  int64_t& in_flight_ = counters_["in_flight"];
  int64_t& fetched_ = counters_["fetched"];
  int64_t& published_ = counters_["published"];
  int64_t& cancelled_ = counters_["cancelled"];
  int64_t& resubmitted_ = counters_["resubmitted"];
  int64_t& kicks_ = counters_["kicks"];
  int64_t& calls_ = counters_["calls"];
  int64_t& rings_running_ = counters_["rings_running"];
  std::unique_ptr<DeviceModel> model_;
  UnixListener listener_;
  UnixListener control_;
  bool frozen_ = false;
  Clock::time_point tick_at_ = Clock::time_point::max();

  vhost::Connection connection_;
  vhost::Connection channel_;
  uint64_t features_ = 0, protocol_ = 0;
  uint8_t status_ = 0;
  bool suspending_ = false;  // by VIRTIO 1.4's SUSPEND; an answer to SET_STATUS may be due
  bool suspend_answer_ = false;
  bool suspended_ = false;
  bool checking_state_ = false;  // CHECK_DEVICE_STATE waits for the transfer's end
  GuestMap memory_;
  SharedLog log_;
  SharedMapping inflight_;
  std::optional<virtio::InflightGeometry> inflight_geometry_;
  std::map<uint32_t, Vring> rings_;
  std::vector<uint32_t> publish_list_;
  std::vector<uint16_t> ids_;
  // GET_VRING_BASE and its kin that wait for their rings, to be answered in order.
  std::deque<Reply> bases_;
  std::optional<vhost::WireMessage> stashed_;
  std::unique_ptr<Transfer> transfer_;
  uint64_t crash_passed_ = 0;

  std::map<int, Client> clients_;
  uint64_t client_serial_ = 0;
  std::vector<Wait> waits_;
  std::mutex mutex_;
  struct Posted {
    nlohmann::json command;
    std::promise<nlohmann::json> answer;
  };
  std::deque<std::shared_ptr<Posted>> posted_;  // guarded by mutex_
  bool ended_ = false;                          // guarded by mutex_
  UniqueFd wake_;
};

}  // namespace baton::lab
