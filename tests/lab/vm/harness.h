// A lab guest, the mediator before its disk and the disk's back-end process, to be crashed, replaced and
// moved: what tests of crash recovery and the soak are made of. Everything but the back-end is in this
// process.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/vhost/mediator.h"
#include "common/process.h"
#include "tests/lab/vm/guest_driver.h"
#include "tests/temp_dir.h"

namespace baton::lab {

// A back-end program with one disk. It is killed with its object, and with this process.
class BackendProcess {
 public:
  // `argv`: the program and what it is told besides socket and image. It serves when Start returns: it prints
  // a line "ready", or (without `says_ready`) makes its socket.
  static absl::StatusOr<BackendProcess> Start(std::vector<std::string> argv, const std::string& socket,
                                              const std::string& image, bool says_ready, Deadline deadline);
  // SIGKILL, and waits for the end.
  void Kill();
  // Waits until it has ended by itself; false at the deadline.
  bool AwaitEnd(Deadline deadline);
  pid_t pid() const { return process_.pid(); }
  const std::string& socket() const { return socket_; }

 private:
  BackendProcess(Process process, UniqueFd in, std::string socket)
      : process_(std::move(process)), in_(std::move(in)), socket_(std::move(socket)) {}
  Process process_;
  UniqueFd in_;  // its standard input: ends with us
  std::string socket_;
};

struct HarnessOptions {
  // Back-end: its program and arguments; --socket, --image and --queues are appended, "{dir}" is replaced by
  // the harness's directory and "{n}" by the back-end's number.
  std::vector<std::string> backend;
  bool backend_says_ready = false;
  v1::BackendKind kind = v1::LAB;
  uint32_t queues = 1;
  uint32_t queue_size = 64;
  uint64_t memory_bytes = 16 << 20;
  WorkloadOptions workload;
  // Completion of a request takes at most so long, whatever happens.
  Duration lost_after = std::chrono::seconds(10);
};

// One thread. Calls are bounded; an error names what did not happen.
class Harness {
 public:
  explicit Harness(HarnessOptions options);
  // Ends everything and removes all files.
  ~Harness();

  // Back-end, mediator, guest: up to a guest that has written a little.
  absl::Status Start();

  // `more`: arguments for this life of the back-end only (a crash point, say).
  absl::Status StartBackend(const std::vector<std::string>& more = {});
  BackendProcess& backend() { return *backend_; }
  // A mediator as of a shim that starts (`returns`: the VMM ran before it).
  absl::Status StartMediator(bool returns);
  // The end of a shim, as far as the devices are concerned.
  void DropMediator() { mediator_.reset(); }
  vhost::Mediator& mediator() { return *mediator_; }
  LabGuest& guest() { return driver_->guest(); }
  LabGuestDriver& driver() { return *driver_; }

  // To another mediator and another back-end over the same image, with drained queues, as a migration does
  // it. Guest memory is copied.
  // `handoff`: what is in flight is handed over, if the back-ends can.
  absl::Status Move(bool handoff = false);

  // To another back-end at the same host, under the running guest.
  absl::Status Swap(v1::InflightAnswer inflight);

  // The guest writes so many more blocks.
  absl::Status AwaitWrites(uint64_t more);
  // Full verification by the guest; an error with the findings if there is one. The guest goes on.
  absl::Status Verify();

  const std::string& dir() const { return dir_; }
  // Where a back-end that was started with "--control {dir}/control{n}.sock" takes commands.
  std::string control() const { return fmt::format("{}/control{}.sock", dir_, backend_number_); }
  std::string image() const { return dir_ + "/image"; }
  // The last things that happened, for a failure's message.
  std::string Console() const;

 private:
  GuestConfig Config(bool incoming) const;
  std::string BackendSocket() const { return fmt::format("{}/backend{}.sock", dir_, backend_number_); }
  std::string VmmSocket() const { return fmt::format("{}/vmm{}.sock", dir_, generation_); }
  std::string Memory() const { return fmt::format("{}/ram{}", dir_, generation_); }
  absl::Status MakeMemory(bool existing);
  absl::Status AwaitExpected();
  void Say(const std::string& line);

  const HarnessOptions options_;
  // Guest memory and image in memory: what is tested is not the storage.
  const test::TempDir temp_{"/dev/shm"};
  const std::string& dir_ = temp_.path();
  int generation_ = 0;  // of the host
  int backend_number_ = 0;
  std::unique_ptr<memory::GuestRam> ram_;
  std::optional<BackendProcess> backend_;
  std::unique_ptr<vhost::Mediator> mediator_;
  std::unique_ptr<LabGuestDriver> driver_;
  mutable std::mutex mutex_;
  std::condition_variable told_;      // by the mediator, of a change
  std::vector<std::string> console_;  // guarded by mutex_
};

}  // namespace baton::lab
