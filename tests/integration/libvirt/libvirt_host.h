// What the tests of the libvirt driver share: a host with a real libvirtd, in namespaces of its own.
#pragma once

#include <fcntl.h>

#include <csignal>
#include <optional>
#include <string>

#include "common/fd.h"
#include "common/process.h"

namespace baton::vmm {

// A daemon that starts asks every QEMU of its host what it can.
inline constexpr auto kSoon = std::chrono::seconds(90);

// A libvirtd of its own; everything in it ends with the object.
class LibvirtHost {
 public:
  explicit LibvirtHost(const std::string& dir) : dir_(dir) {}

  absl::Status Start() {
    const UniqueFd log(::open((dir_ + ".log").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    SpawnOptions options;
    options.argv = {BATON_LIBVIRT_HOST, dir_, "hosta"};
    options.stdout_fd = options.stderr_fd = log.get();
    options.new_session = true;
    options.die_with_parent = true;
    ASSIGN_OR_RETURN(Process process, Process::Spawn(options));
    process_.emplace(std::move(process));
    return absl::OkStatus();
  }
  void Kill() {
    if (!process_) return;
    process_->Signal(SIGKILL);
    (void)process_->Wait(Deadline::After(kSoon));
    process_.reset();
  }
  std::string uri() const { return "qemu:///system?socket=" + dir_ + "/run/libvirt/libvirt-sock"; }
  pid_t pid() const { return process_->pid(); }

 private:
  const std::string dir_;
  std::optional<Process> process_;
};

}  // namespace baton::vmm
