// Real peers for the mediator's tests: qemu-storage-daemon and a User-Mode Linux guest.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "agent/vhost/mediator.h"
#include "common/clock.h"
#include "common/process.h"
#include "common/status.h"

namespace baton::test {

// qemu-storage-daemon with one vhost-user-blk export that it listens for by itself, so that a killed one
// leaves its socket file behind as in real life. `throttle_us`: each request takes about so long.
class Qsd {
 public:
  struct Options {
    std::string socket;
    std::string image;
    int queues = 1;
    // Requests a second that the storage does; 0: as many as it can.
    int iops = 0;
  };
  static absl::StatusOr<Qsd> Start(const Options& options);
  pid_t pid() const { return process_.pid(); }
  void Signal(int signal) { process_.Signal(signal); }
  void Kill();

 private:
  explicit Qsd(Process process) : process_(std::move(process)) {}
  Process process_;
};

absl::Status MakeSparseFile(const std::string& path, uint64_t size);

// linux.uml with one vhost-user device and a workload of tests/lab/uml as its init.
class UmlGuest {
 public:
  struct Options {
    std::string socket;
    int threads = 1;
    int report = 100;
    std::string directory;  // for UML's own files
    // Instead of a disk: a balloon at `socket`, and the workload of tests/lab/uml/memory.cc.
    bool balloon = false;
    // Instead of a disk: a NIC, and the workload of tests/lab/uml/net_workload.cc.
    bool net = false;
  };
  static absl::StatusOr<UmlGuest> Start(const Options& options);
  // Waits for a line with `text` after the last one returned.
  absl::StatusOr<std::string> WaitFor(const std::string& text, Deadline deadline);
  // Forgets what was printed so far.
  void Skip();
  absl::Status Type(char key);
  // Waits until so many more progress lines were printed from now on.
  absl::Status Progress(int lines, Deadline deadline);
  // Stops the workload and returns its RESULT line.
  absl::StatusOr<std::string> Finish(Deadline deadline);
  const std::string& output() const { return output_; }
  Process& process() { return process_; }

 private:
  UmlGuest(Process process, UniqueFd in, UniqueFd out)
      : process_(std::move(process)), in_(std::move(in)), out_(std::move(out)) {}
  Process process_;
  UniqueFd in_, out_;
  std::string output_;
  size_t position_ = 0;
};

// True if both programs are installed; prints which is missing.
bool HaveUmlAndQsd();

// The number after `name=` in a line of name=value words.
std::optional<uint64_t> NumberAfter(const std::string& line, const std::string& name);

// Waits, by looking every few milliseconds, until `condition` holds.
bool Eventually(const std::function<bool()>& condition, Duration limit);

}  // namespace baton::test
