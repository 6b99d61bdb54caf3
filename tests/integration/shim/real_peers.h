// Real peers for integration tests: the lab guest's kernel and initramfs, qemu-storage-daemon, a guest's
// console.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "baton/v1/vm_spec.pb.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/process.h"
#include "common/status.h"
#include "common/unix_socket.h"
#include "tests/temp_dir.h"

namespace baton::test {

// A directory under /tmp with a short path, and one under /dev/shm for memory files; both are removed at the
// end.
class TempDirs {
 public:
  const std::string& dir() const { return dir_.path(); }
  const std::string& shm() const { return shm_.path(); }

 private:
  const TempDir dir_, shm_{"/dev/shm"};
};

// Path of a program, by environment variable or in PATH; empty if it is not there.
std::string FindProgram(const std::string& env, const std::string& name);
// QEMU under test: $BATON_QEMU or qemu-system-x86_64. Its storage daemon: $BATON_QSD or qemu-storage-daemon.
std::string QemuPath();
std::string QsdPath();
bool HaveQemuAndQsd();

// Directory with vmlinuz and initrd.gz of the lab guest, built on first use.
absl::StatusOr<std::string> LabGuest();

// A VM of 128 MiB (TCG) that boots the lab guest; `cmdline` is added to the kernel's command line. One
// vhost-user disk "disk0" if `disk`.
absl::StatusOr<v1::VmSpec> LabSpec(const std::string& name, bool disk, const std::string& cmdline);

// qemu-storage-daemon with one vhost-user-blk export of an image file. It listens when Start returns.
class StorageDaemon {
 public:
  static absl::StatusOr<StorageDaemon> Start(const std::string& socket, const std::string& image,
                                             int queues = 1);
  void Signal(int signal) { process_.Signal(signal); }
  void Kill();
  pid_t pid() const { return process_.pid(); }

 private:
  explicit StorageDaemon(Process process) : process_(std::move(process)) {}
  Process process_;
};

// Makes an empty image file.
absl::Status MakeImage(const std::string& path, uint64_t size);

// A file that grows, read as text from where the last match ended. Waits by inotify.
class GrowingFile {
 public:
  explicit GrowingFile(std::string path);
  // Waits until `text` appears after the current position and moves the position behind the end of its line.
  // Returns the line.
  absl::StatusOr<std::string> WaitFor(const std::string& text, Deadline deadline);
  // Moves the position to the end: only what comes from now on counts.
  void SkipToEnd();
  // Everything so far.
  std::string All() const;

 private:
  std::string path_;
  UniqueFd inotify_;
  size_t position_ = 0;
};

// The guest's serial console: output from QEMU's log file, input through QEMU's socket.
class Console {
 public:
  Console(std::string log, std::string socket) : out(std::move(log)), socket_(std::move(socket)) {}
  absl::Status Type(const std::string& keys);
  // Types `keys`, returns the line that contains `answer`.
  absl::StatusOr<std::string> Ask(const std::string& keys, const std::string& answer, Deadline deadline);
  GrowingFile out;

 private:
  std::string socket_;
};

// The number after `name=` in a line of name=value words; nullopt if absent.
std::optional<uint64_t> NumberIn(const std::string& line, const std::string& name);

}  // namespace baton::test
