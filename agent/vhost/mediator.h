// The mediator of one vhost-user device: a complete back-end towards the VMM, a complete front-end towards
// the real back-end, and a record of the device between them.
//
//   VMM (QEMU, User-Mode Linux)  --vhost-user-->  Mediator  --vhost-user-->  back-end (qemu-storage-daemon,
//   …)
//          |                                         control messages only                |
//          +---------- guest memory, kick and call descriptors: direct -------------------+
//
// Every request of the VMM is validated, recorded, and forwarded or answered from the record. From the record
// the mediator can rebuild the device at a back-end that came back, stop it within a bound, and hand its
// state to another host. Descriptors pass through, so no byte and no notification of the data path meets
// Baton.
//
// Order of calls in a migration:
//   source:      StartLogging → HarvestLog… → ArmStop → (the VMM stops the device) → CollectState
//                → last HarvestLog → the end of the object, or DisarmStop and StopLogging if the guest stays
//   destination: Start → ExpectState → (the VMM starts the device)
//
// Threads: one thread of its own, which sleeps as long as nobody talks. All methods may be called from any
// thread; those that take a deadline wait for that thread, at most that long. Callbacks run on the mediator's
// thread and must not call methods of the same mediator that take a deadline.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/memory/dirty_source.h"
#include "agent/memory/guest_ram.h"
#include "baton/v1/fleet.pb.h"
#include "baton/v1/peer.pb.h"
#include "baton/v1/types.pb.h"
#include "baton/v1/vm_spec.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::vhost {

// One region of the memory table that the VMM handed over.
struct MemoryRegionInfo {
  uint64_t gpa = 0;
  uint64_t size = 0;
  uint64_t user_addr = 0;    // in the VMM's address space; opaque
  uint64_t mmap_offset = 0;  // of the region's first byte in the file
  dev_t device = 0;          // st_dev and st_ino of the file
  ino_t inode = 0;
};

// Translates a memory table into the layout of `ram` by device and inode. Regions whose file is not a block
// of `ram` are an error (FailedPrecondition): their pages would not move.
absl::StatusOr<std::vector<memory::GpaRange>> LayoutFor(const std::vector<MemoryRegionInfo>& regions,
                                                        const memory::GuestRam& ram);

// The fence: a command that confirms, by ending with 0, that nothing of what a back-end had in flight reaches
// the storage or guest memory any more. Run with "fence" or "unfence" as its last argument, and BATON_DEVICE,
// BATON_SOCKET, BATON_ACTION and `env` in its environment.
struct FenceCommand {
  std::vector<std::string> command;  // empty: there is none
  std::map<std::string, std::string> env;
  Duration timeout = std::chrono::seconds(10);
};

// How the next stop, that of a migration, is to go.
struct StopOrder {
  // For all queues, from the first of them, to finish what is in flight.
  Duration drain_bound{0};
  // Hand over what is in flight, if it may be done.
  bool handoff = false;
  // The back-end that is given the requests keeps those in order that overlap.
  bool ordered = false;
  // Why it may not, although it was asked for; empty otherwise.
  std::string why_not;
};

struct MediatorOptions {
  // Name, class and size of the device. Only the name is needed; it appears in every message.
  v1::DeviceSpec spec;
  // Where the back-end listens, what it is, what may be assumed when it dies.
  v1::Backend backend;
  // Where the VMM will connect. A socket left there by an earlier process is replaced. Mode 0600.
  std::string listen_path;
  // Watchdog of each request to the back-end.
  Duration request_timeout = std::chrono::seconds(5);
  // Bound of a stop that the VMM asks for outside of a migration (guest reset, shutdown).
  Duration stop_timeout = std::chrono::seconds(30);
  // True: Start fails when the back-end cannot be reached within `connect_timeout`. False: the device begins
  // as BACKEND_LOST, and the VMM can connect once the back-end has been seen.
  bool backend_required = true;
  // Before the first attempt to reach a back-end that went away; each later wait is twice as long, up to two
  // seconds. Whatever it is, a socket that appears at the back-end's path is tried at once and soon again.
  Duration first_retry = std::chrono::milliseconds(10);
  // The VMM ran before this mediator and comes back to it. QEMU (vhost-user-blk, 7.2 to 10.0) whose device
  // was stopped when its connection ended does not notice the end: it goes on over the new connection as if
  // it were the old one, and negotiates nothing. So a session that begins without questions is taken to have
  // accepted all that is offered.
  bool vmm_returns = false;
  // Directory in a tmpfs for what must outlive this process: which rings ran, and the in-flight region
  // (device_memo.h). With vmm_returns what an earlier mediator left there is taken over, else it is removed.
  // Empty: nothing outlives the mediator. The files stay when it ends; ForgetDevice removes them.
  std::string memo_dir;
  // The VMM copies guest memory itself (the vmm engine): the log of what the back-end writes is the VMM's own
  // and goes to the back-end, and a stop is told to on_stopped. StartLogging is not for such a device.
  bool vmm_moves_memory = false;
  // Memory is to be handed over as whole tables (no CONFIGURE_MEM_SLOTS): such a QEMU would otherwise only
  // name the regions that changed. At most 8 regions then.
  bool whole_memory_tables = false;
  Duration connect_timeout = std::chrono::seconds(5);
  FenceCommand fence;
  // Guest memory for HarvestLog; may be null, then HarvestLog fails. Must outlive the mediator. Its layout
  // must have been set (see MediatorCallbacks::on_memory) before the first harvest.
  const memory::GuestRam* ram = nullptr;
};

struct MediatorCallbacks {
  // The VMM handed over a new memory table; `regions` is the whole of it. Called before the table is used.
  std::function<void(const std::vector<MemoryRegionInfo>& regions)> on_memory;
  // Something in Describe() changed: started, stopped, back-end lost, back, held.
  std::function<void(const v1::Device& device)> on_change;
  // With vmm_moves_memory, while a stop is armed: the VMM has asked for its last ring, and is answered once
  // this has returned. So what happens here happens before the VMM can send the device's state to anyone.
  // `state` is what CollectState would return.
  std::function<void(const absl::StatusOr<v1::DeviceState>& state)> on_stopped;
};

// Another back-end of the same host for a device under a running guest.
struct SwapOptions {
  v1::Backend backend;
  v1::InflightAnswer inflight = v1::DRAIN;
  // How long the old one may take to stop.
  Duration drain_bound = std::chrono::seconds(5);
};

struct SwapResult {
  // The device had that back-end already; nothing was done.
  bool unchanged = false;
  // How long no back-end served the device.
  Duration pause{};
  uint32_t handed_off = 0;
};

class Mediator {
 public:
  // Connects to the back-end, asks what it offers, then listens for the VMM. Errors name device and path:
  // Unavailable/NotFound (no back-end), DeadlineExceeded (it is silent), FailedPrecondition (it cannot be
  // used), and whatever kept the listening socket from being made.
  static absl::StatusOr<std::unique_ptr<Mediator>> Start(MediatorOptions options,
                                                         MediatorCallbacks callbacks);
  // Disconnects both sides and removes the listening socket.
  ~Mediator();
  Mediator(const Mediator&) = delete;
  Mediator& operator=(const Mediator&) = delete;

  const std::string& name() const;
  // The device as of now. Never waits.
  v1::Device Describe() const;
  // The VMM has started at least one queue and the back-end serves it.
  bool Active() const;
  // Waits until the VMM is connected; false at the deadline.
  bool WaitForVmm(Deadline deadline) const;

  // --- source of a migration ---
  // Makes the back-end log its writes to guest memory. The full copy of memory must begin after this
  // returned. A device that the VMM starts later, and a back-end that is reconnected, log from their start.
  // Idempotent. FailedPrecondition when the back-end cannot log.
  absl::Status StartLogging(Deadline deadline);
  // Adds every page written since the last harvest. After the back-end died while logging, the first harvest
  // adds all pages. Any thread, one at a time; never waits.
  absl::Status HarvestLog(memory::PageSets& out);
  // Idempotent.
  absl::Status StopLogging(Deadline deadline);
  // The above as a DirtySource (each call bounded by the request timeout). Must not outlive the mediator.
  std::unique_ptr<memory::DirtySource> MakeDirtySource();

  // From now on a stop of the VMM is the stop of a migration. With the first queue that the VMM stops, all
  // are stopped: without completing what they have in flight, if that is wanted and may be done (the set is
  // exact, its effects are confirmed to have ended, every request may be done again); else queues are given
  // `drain_bound` to finish; at the bound the VMM is answered all the same and CollectState fails.
  absl::Status ArmStop(StopOrder order);
  // The same with drain.
  absl::Status ArmStop(Duration drain_bound) { return ArmStop(StopOrder{drain_bound, false, false, ""}); }
  // Waits until the VMM has stopped every queue, and returns the state to ship. Every invariant has been
  // checked against guest memory. DRAIN_TIMEOUT: requests are still in flight. STATE_MISMATCH: the rings
  // contradict the back-end. SOURCE_BACKEND_FAILED: it was lost. A device that the guest never started gives
  // a state without vrings.
  absl::StatusOr<v1::DeviceState> CollectState(Deadline deadline);
  // How the stop of CollectState went: what was done, how long it took from the first to the last queue, how
  // many requests go over, and why it drained although handoff was asked for.
  v1::DeviceStop stop() const;
  // When its first queue began to stop, CLOCK_MONOTONIC; 0 before that.
  int64_t stop_began_ns() const;
  // The migration was given up: stops are ordinary again. Idempotent.
  absl::Status DisarmStop();

  // --- destination of a migration ---
  // Requests in flight of another host could be given to the back-end as it is now.
  bool TakesInflight() const;
  // And it would keep those in order that overlap.
  bool OrdersInflight() const;
  // What the VMM must ask for when it starts the device. Checked queue by queue; a difference is reported in
  // Describe().message and the log, and by CheckExpected(). What is in flight is put into the in-flight
  // region, from where the back-end submits it once the device starts; DESTINATION_BACKEND_FAILED if that
  // cannot be. A back-end's own state (DEVICE_STATE) is loaded before any ring; a
  // back-end that refuses it is reconnected.
  absl::Status ExpectState(const v1::DeviceState& state);
  // OK once the VMM has started the device as expected (or nothing is expected); Unavailable before it has;
  // STATE_MISMATCH with the first difference.
  absl::Status CheckExpected() const;
  // After the guest has started: makes the network learn where a NIC is now. A guest that negotiated
  // GUEST_ANNOUNCE is asked by its configuration space where the VMM takes that from the back-end (else it is
  // the VMM's to ask); for others the back-end sends RARP (protocol feature RARP), repeated for half a
  // second. Does nothing for other devices.
  absl::Status Announce(Deadline deadline);

  // --- back-end swap ---
  // Gives the device to another back-end: connects to it and tells it everything but the rings, takes the
  // rings from the old one with nothing in flight, calls `record` (durable: a later mediator is to begin with
  // the new one), and starts them at the new one. Whatever fails before `record` has succeeded leaves the old
  // back-end serving. An error with a Device message that names the new back-end came after it: the mediator
  // goes on connecting to the new one. Call CheckSwap first. VM_NOT_MIGRATABLE: a migration is under way.
  // DRAIN_TIMEOUT: requests were still in flight at the bound. `record` runs on the mediator's thread. Waits
  // until `deadline` for the thread to begin, and from then on as long as it takes (bounded by the drain and
  // a few requests).
  absl::StatusOr<SwapResult> Swap(const SwapOptions& wanted, std::function<absl::Status()> record,
                                  Deadline deadline);

  // Number of times this mediator's thread woke up. For tests of "no work on the data path".
  uint64_t wakeups() const;

 private:
  class Impl;
  explicit Mediator(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Removes what a mediator of that device kept in `memo_dir`; when its VM has ended.
void ForgetDevice(const std::string& memo_dir, const std::string& device);

// Compares a shipped state with the memory that arrived: for every vring avail->idx and used->idx are read
// again, and every invariant is checked. Call at the destination before OWNER. The layout of `ram` must be
// set. STATE_MISMATCH names the device, the vring and the value.
absl::Status VerifyAgainstMemory(const v1::DeviceState& state, const memory::GuestRam& ram);

}  // namespace baton::vhost
