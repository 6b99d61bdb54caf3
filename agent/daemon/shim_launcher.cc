#include "agent/daemon/shim_launcher.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "baton/v1/shim.pb.h"
#include "common/durable_file.h"
#include "common/fd.h"
#include "common/log.h"
#include "common/message_socket.h"
#include "common/vm_spec.h"

namespace baton::daemon {
namespace {

constexpr Duration kNextSpare = std::chrono::seconds(2);
// For a spare to take its VM: it does nothing but wait for it.
constexpr Duration kTellSpare = std::chrono::seconds(1);

// sd_booted(3): this directory exists exactly where systemd is the service manager.
bool UnderSystemd() {
  struct stat info {};
  return ::stat("/run/systemd/system", &info) == 0 && S_ISDIR(info.st_mode);
}

// systemd-run --scope moves itself into a new scope and then becomes the program: same pid, same descriptors.
std::vector<std::string> Scope(const std::string& description) {
  if (!UnderSystemd()) return {};
  return {
      "systemd-run", "--scope", "--quiet", "--collect", "--slice=baton.slice", "--description=" + description,
      "--"};
}

class DetachedLauncher final : public ShimLauncher {
 public:
  DetachedLauncher(const AgentConfig& config, TaskQueue* tasks)
      : config_(config),
        tasks_(tasks),
        room_(std::max(PathsOf(config, std::string(kMaxNameLength, '-')).state_dir.size(),
                       DomainPathsOf(config, std::string(kMaxNameLength, '-')).state_dir.size())) {}

  absl::StatusOr<ProcessId> Start(const std::string& vm, const VmPaths& paths) override {
    RETURN_IF_ERROR(MakeDirectories(paths.run_dir));
    UniqueFd log(::open(paths.shim_log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    if (!log) return ErrnoError(errno, paths.shim_log);
    ASSIGN_OR_RETURN(const std::optional<ProcessId> spare, TurnSpare(paths, log.get()));
    if (spare) return *spare;
    SpawnOptions options;
    options.argv = Scope("baton-shim of VM " + vm);
    options.argv.insert(options.argv.end(), {config_.shim, "--dir", paths.state_dir});
    options.stdout_fd = log.get();
    options.stderr_fd = log.get();
    auto started = SpawnDetached(options);
    if (!started.ok())
      return WithReason(Annotate(started.status(), "the shim of VM " + vm + " cannot be started"),
                        v1::DESTINATION_START_FAILED);
    return started;
  }

  void KeepSpare() override {
    if (tasks_ == nullptr) return;
    std::lock_guard lock(mutex_);
    if (spare_) return;
    auto started = StartSpare();
    if (started.ok()) {
      spare_ = *std::move(started);
    } else {
      LOG_WARN("no spare shim: {}", Message(started.status()));
    }
  }

 private:
  struct Spare {
    ProcessId process;
    MessageSocket socket;
  };

  absl::StatusOr<Spare> StartSpare() const {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
      return ErrnoError(errno, "socketpair");
    Spare spare;
    spare.socket = MessageSocket(UniqueFd(ends[0]));
    const UniqueFd theirs(ends[1]);
    SpawnOptions options;
    options.argv = Scope("baton-shim, spare when it was started");
    options.argv.insert(options.argv.end(), {config_.shim, "--spare", std::string(room_, '-')});
    options.stdin_fd = theirs.get();
    ASSIGN_OR_RETURN(spare.process, SpawnDetached(options));
    return spare;
  }

  // Nothing if there is no spare, or none that answers.
  absl::StatusOr<std::optional<ProcessId>> TurnSpare(const VmPaths& paths, int log) {
    std::optional<Spare> spare;
    {
      std::lock_guard lock(mutex_);
      spare = std::exchange(spare_, std::nullopt);
    }
    if (tasks_ != nullptr) tasks_->PostAfter(kNextSpare, [this] { KeepSpare(); });
    if (!spare) return std::nullopt;
    v1::ShimConfig vm, taken;
    vm.set_state_dir(paths.state_dir);
    const Deadline deadline = Deadline::After(kTellSpare);
    absl::Status told = spare->socket.Send(vm, deadline, {log});
    if (told.ok()) told = spare->socket.Receive(taken, deadline);
    if (told.ok()) return spare->process;
    LOG_WARN("the spare shim is of no use: {}", Message(told));
    // It may yet wake up and take the VM.
    if (absl::Status ended = KillProcess(spare->process, Deadline::After(kTellSpare)); !ended.ok())
      return WithReason(Annotate(ended, "the spare shim does not end"), v1::DESTINATION_START_FAILED);
    return std::nullopt;
  }

  const AgentConfig& config_;
  TaskQueue* const tasks_;
  const size_t room_;
  std::mutex mutex_;
  std::optional<Spare> spare_;  // guarded by mutex_
};

}  // namespace

std::unique_ptr<ShimLauncher> MakeShimLauncher(const AgentConfig& config, TaskQueue* tasks) {
  return std::make_unique<DetachedLauncher>(config, tasks);
}

std::string TailOfShimLog(const VmPaths& paths, size_t bytes) {
  UniqueFd fd(::open(paths.shim_log.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return "";
  off_t size = ::lseek(fd.get(), 0, SEEK_END);
  off_t from = size > static_cast<off_t>(bytes) ? size - static_cast<off_t>(bytes) : 0;
  std::string text(static_cast<size_t>(size - from), '\0');
  ssize_t n = ::pread(fd.get(), text.data(), text.size(), from);
  text.resize(n > 0 ? static_cast<size_t>(n) : 0);
  if (from > 0) text.erase(0, text.find('\n') + 1);
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

}  // namespace baton::daemon
