// One side of a migration in a test: guest memory, a "VMM" whose guest is a thread that writes pages with
// sequence numbers and remembers every one of them, devices, and a journal that can fail.
#pragma once

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/migration/device_set.h"
#include "agent/migration/journal.h"
#include "agent/migration/state_pipe.h"
#include "agent/migration/wake_fd.h"
#include "agent/vmm/driver.h"

namespace baton::migration::test {

inline constexpr uint64_t kPages = 1024;

// Steps that a test can make fail, on either side.
class Faults {
 public:
  void Fail(const std::string& step, int times = 1000000) {
    std::lock_guard lock(mutex_);
    failing_[step] = times;
  }
  void Clear() {
    std::lock_guard lock(mutex_);
    failing_.clear();
  }
  absl::Status At(const std::string& step) {
    std::lock_guard lock(mutex_);
    auto it = failing_.find(step);
    if (it == failing_.end() || it->second == 0) return absl::OkStatus();
    --it->second;
    return absl::UnavailableError("injected failure of " + step);
  }

 private:
  std::mutex mutex_;
  std::map<std::string, int> failing_;
};

class MemoryLog final : public RecordLog {
 public:
  MemoryLog(Faults& faults, std::vector<JournalRecord> records)
      : faults_(faults), records_(std::move(records)) {}
  absl::Status Append(const JournalRecord& record) override {
    std::lock_guard lock(mutex_);
    if (uncertain_) return WithReason(absl::InternalError("poisoned"), v1::STATE_WRITE_FAILED);
    if (absl::Status s = faults_.At(std::string("append ") + KindName(record.kind)); !s.ok())
      return WithReason(s, v1::STATE_WRITE_FAILED);
    if (absl::Status s = faults_.At(std::string("uncertain ") + KindName(record.kind)); !s.ok()) {
      uncertain_ = true;
      return WithReason(s, v1::STATE_WRITE_FAILED);
    }
    records_.push_back(record);
    return absl::OkStatus();
  }
  bool certainly_absent() const override {
    std::lock_guard lock(mutex_);
    return !uncertain_;
  }
  absl::Status Repair() override {
    std::lock_guard lock(mutex_);
    RETURN_IF_ERROR(faults_.At("repair"));
    uncertain_ = false;
    return absl::OkStatus();
  }
  std::vector<JournalRecord> Records() const override {
    std::lock_guard lock(mutex_);
    return records_;
  }
  absl::Status Reserve(size_t) override { return faults_.At("reserve"); }

 private:
  Faults& faults_;
  mutable std::mutex mutex_;
  std::vector<JournalRecord> records_;
  bool uncertain_ = false;
};

inline memory::GuestRam MakeRam() {
  std::vector<memory::RamBlock> blocks;
  UniqueFd fd(memfd_create("guest", MFD_CLOEXEC));
  (void)!ftruncate(fd.get(), kPages * memory::kPageSize);
  blocks.push_back(*memory::RamBlock::FromFd("ram", std::move(fd)));
  return memory::GuestRam(std::move(blocks));
}

// The last page is the device's "ring": its first word is used->idx.
inline constexpr uint64_t kRingPage = kPages - 1;

inline constexpr uint64_t kFreePage = UINT64_MAX;

// What the guest knows: the sequence number last written to each page. Travels as the VMM's state.
struct GuestState {
  uint64_t sequence = 0;
  uint64_t pages[kPages] = {};
};

class FakeVmm final : public vmm::VmmDriver {
 public:
  FakeVmm(memory::GuestRam& ram, Faults& faults, bool runs) : ram_(ram), faults_(faults), dirty_(kPages) {
    if (runs) {
      // Half of the memory is populated before the start.
      for (uint64_t page = 0; page < kPages / 2; ++page) WritePage(page);
      Run();
    }
  }
  ~FakeVmm() override {
    Halt();
    if (loader_.joinable()) loader_.join();
  }

  pid_t pid() const override { return 0; }
  int exit_fd() const override { return exited_.fd(); }
  std::string version() const override { return "fake"; }
  absl::StatusOr<bool> IsRunning(Deadline) override {
    if (dead_) return absl::UnavailableError("VMM ended (killed)");
    return running_.load();
  }

  absl::StatusOr<UniqueFd> Freeze(Deadline) override {
    RETURN_IF_ERROR(Alive("freeze"));
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return ErrnoError(errno, "socketpair");
    state_out_.reset(pair[0]);
    Halt();
    if (absl::Status s = faults_.At("freeze late"); !s.ok()) return s;
    RETURN_IF_ERROR(WriteState(state_out_.get(), "setup", Deadline::After(std::chrono::seconds(5))));
    return UniqueFd(pair[1]);
  }
  absl::Status ContinueState(Deadline deadline) override {
    RETURN_IF_ERROR(Alive("continue"));
    // Devices touch memory even now.
    WritePage(7);
    std::string data(reinterpret_cast<const char*>(&guest_), sizeof guest_);
    RETURN_IF_ERROR(WriteState(state_out_.get(), data, deadline));
    state_out_.reset();
    return absl::OkStatus();
  }
  absl::Status ConfirmState(Deadline) override {
    absl::Status whole = faults_.At("state not whole");
    // As QEMU does with a guest whose state it could not give.
    if (!whole.ok()) Run();
    return whole;
  }
  absl::Status Resume(Deadline) override {
    RETURN_IF_ERROR(Alive("resume"));
    if (!running_) Run();
    return absl::OkStatus();
  }
  absl::StatusOr<UniqueFd> BeginLoad(Deadline) override {
    RETURN_IF_ERROR(Alive("begin load"));
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return ErrnoError(errno, "socketpair");
    loader_ = std::thread([this, fd = UniqueFd(pair[0])] {
      (void)ReadToEnd(fd.get(), Deadline::After(std::chrono::seconds(30)), [&](std::string piece) {
        loaded_ += piece;
        return absl::OkStatus();
      });
    });
    return UniqueFd(pair[1]);
  }
  absl::Status FinishLoad(Deadline) override {
    RETURN_IF_ERROR(Alive("finish load"));
    if (loader_.joinable()) loader_.join();
    if (loaded_.size() != 5 + sizeof guest_ || loaded_.substr(0, 5) != "setup")
      return Error(absl::StatusCode::kDataLoss, "state of {} bytes", loaded_.size());
    std::memcpy(&guest_, loaded_.data() + 5, sizeof guest_);
    return absl::OkStatus();
  }
  absl::Status Start(Deadline) override {
    RETURN_IF_ERROR(Alive("start"));
    Run();
    return absl::OkStatus();
  }
  absl::Status Announce(Deadline) override { return absl::OkStatus(); }
  absl::Status PowerDown(Deadline) override { return absl::OkStatus(); }
  void Kill() override {
    dead_ = true;
    Halt();
    exited_.Signal();
  }

  bool runs() const { return running_; }
  bool dead() const { return dead_; }
  uint64_t sequence() {
    std::lock_guard lock(mutex_);
    return guest_.sequence;
  }
  // The guest does not care any more what these pages hold, until it writes them again.
  void Free(uint64_t first, uint64_t count) {
    std::lock_guard lock(mutex_);
    for (uint64_t page = first; page < first + count; ++page) guest_.pages[page] = kFreePage;
  }
  bool IsFree(uint64_t page) {
    std::lock_guard lock(mutex_);
    return guest_.pages[page] == kFreePage;
  }
  // Every page holds what the guest wrote there last. The guest must stand still, or this stops it.
  absl::Status Verify() {
    Halt();
    for (uint64_t page = 0; page < kPages; ++page) {
      if (page == kRingPage || guest_.pages[page] == kFreePage) continue;
      const auto* words =
          reinterpret_cast<const uint64_t*>(ram_.blocks()[0].base() + page * memory::kPageSize);
      for (size_t word : {0, 255, 511})
        if (words[word] != guest_.pages[page])
          return Error(absl::StatusCode::kDataLoss, "page {} holds {} instead of {}", page, words[word],
                       guest_.pages[page]);
    }
    return absl::OkStatus();
  }
  void HarvestDirty(memory::PageSets& out) {
    std::lock_guard lock(mutex_);
    out[0].Union(dirty_);
    if (writes_everything && running_) out[0].SetAll();
    dirty_.Reset();
  }
  // Guest writes a second, about.
  std::atomic<int> pause_us{20};
  std::atomic<bool> tracking{false};
  // The guest writes all of its memory in every round, however long that takes.
  std::atomic<bool> writes_everything{false};
  // The guest writes this many pages again and again.
  std::atomic<uint64_t> working_set{64};
  // ... and now and then any other.
  std::atomic<bool> roams{true};

 private:
  absl::Status Alive(const std::string& step) {
    if (dead_) return absl::UnavailableError("VMM ended (killed)");
    return faults_.At(step);
  }
  // Pages are read while their guest writes them: what was half written is dirty, and is sent again. A guest
  // is no thread of the process that reads, so ThreadSanitizer is not to see its stores.
  __attribute__((no_sanitize("thread"))) static void StoreAsGuest(uint64_t* word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
  }
  void WritePage(uint64_t page) {
    std::lock_guard lock(mutex_);
    auto* words = reinterpret_cast<uint64_t*>(ram_.blocks()[0].base() + page * memory::kPageSize);
    const uint64_t value = ++guest_.sequence;
    // Word by word, as a guest does, so that a page may be read half written.
    for (size_t word : {0, 255, 511}) StoreAsGuest(&words[word], value);
    guest_.pages[page] = value;
    dirty_.Set(page);
  }
  void Run() {
    Halt();
    halt_ = false;
    running_ = true;
    vcpu_ = std::thread([this] {
      uint64_t random = 88172645463325252u;
      while (!halt_) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        WritePage(random % (roams && random % 16 == 0 ? kRingPage : working_set.load()));
        std::this_thread::sleep_for(std::chrono::microseconds(pause_us.load()));
      }
    });
  }
  void Halt() {
    halt_ = true;
    if (vcpu_.joinable()) vcpu_.join();
    running_ = false;
  }

  memory::GuestRam& ram_;
  Faults& faults_;
  std::mutex mutex_;
  GuestState guest_;
  memory::PageSet dirty_;
  std::thread vcpu_, loader_;
  std::string loaded_;
  UniqueFd state_out_;
  std::atomic<bool> halt_{false}, running_{false}, dead_{false};
  WakeFd exited_;
};

class FakeDirtySource final : public memory::DirtySource {
 public:
  FakeDirtySource(FakeVmm& vmm, Faults& faults) : vmm_(vmm), faults_(faults) {}
  ~FakeDirtySource() override { Stop(); }
  std::string name() const override { return "fake"; }
  absl::Status Start() override {
    vmm_.tracking = true;
    return faults_.At("track");
  }
  absl::Status Harvest(memory::PageSets& out) override {
    RETURN_IF_ERROR(faults_.At("harvest"));
    vmm_.HarvestDirty(out);
    return absl::OkStatus();
  }
  void Stop() override { vmm_.tracking = false; }

 private:
  FakeVmm& vmm_;
  Faults& faults_;
};

class FakeDevices final : public DeviceSet {
 public:
  FakeDevices(memory::GuestRam& ram, Faults& faults) : ram_(ram), faults_(faults) {}
  std::vector<std::unique_ptr<memory::DirtySource>> MakeDirtySources() override {
    std::vector<std::unique_ptr<memory::DirtySource>> out;
    out.push_back(std::make_unique<Ring>(*this));
    return out;
  }
  absl::Status ArmStop(const StopOrders& orders) override {
    orders_ = orders;
    armed = true;
    return faults_.At("arm");
  }
  absl::StatusOr<v1::DeviceStates> CollectStates(const memory::GuestRam&, Deadline) override {
    if (!faults_.At("drain").ok())
      return Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded,
                   "disk0: 3 requests are still in flight");
    stopped_ = true;
    ++*ring();  // the last completion before the stop
    v1::DeviceStates states;
    v1::DeviceState* device = states.add_devices();
    device->set_name("disk0");
    device->add_vrings()->set_used_idx(*ring());
    v1::RamRange* range = states.add_layout();
    range->set_size(kPages * memory::kPageSize);
    return states;
  }
  std::vector<v1::DeviceStop> stops() const override { return stops_; }
  std::vector<std::string> TakesInflight() const override { return takes_inflight_; }
  std::vector<std::string> OrdersInflight() const override { return {}; }
  Duration stop_duration() const override { return std::chrono::microseconds(100); }
  absl::Status DisarmStop() override {
    armed = false;
    stopped_ = false;
    return absl::OkStatus();
  }
  absl::Status ExpectStates(const v1::DeviceStates&) override { return faults_.At("expect"); }
  absl::Status VerifyAgainstMemory(const v1::DeviceStates& states, const memory::GuestRam&) override {
    if (states.devices(0).vrings(0).used_idx() != *ring())
      return Error(v1::STATE_MISMATCH, absl::StatusCode::kDataLoss,
                   "disk0: used index {} in memory, {} shipped", *ring(),
                   states.devices(0).vrings(0).used_idx());
    return absl::OkStatus();
  }
  absl::Status CheckStarted() const override { return absl::OkStatus(); }

  memory::HintSource* hints() override { return hint_source; }

  std::atomic<bool> armed{false};
  memory::HintSource* hint_source = nullptr;
  std::vector<v1::DeviceStop> stops_;
  std::vector<std::string> takes_inflight_;
  StopOrders orders_;  // the last
  // The back-end forgets to log its last write.
  std::atomic<bool> lose_page{false};

 private:
  class Ring final : public memory::DirtySource {
   public:
    explicit Ring(FakeDevices& devices) : devices_(devices) {}
    std::string name() const override { return "disk0"; }
    absl::Status Start() override { return absl::OkStatus(); }
    absl::Status Harvest(memory::PageSets& out) override {
      if (!devices_.stopped_) ++*devices_.ring();
      if (!devices_.lose_page) out[0].Set(kRingPage);
      return absl::OkStatus();
    }
    void Stop() override {}

   private:
    FakeDevices& devices_;
  };
  uint32_t* ring() {
    return reinterpret_cast<uint32_t*>(ram_.blocks()[0].base() + kRingPage * memory::kPageSize);
  }
  memory::GuestRam& ram_;
  Faults& faults_;
  std::atomic<bool> stopped_{false};
};

}  // namespace baton::migration::test
