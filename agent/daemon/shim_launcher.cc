#include "agent/daemon/shim_launcher.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "common/durable_file.h"
#include "common/fd.h"

namespace baton::daemon {
namespace {

// sd_booted(3): this directory exists exactly where systemd is the service manager.
bool UnderSystemd() {
  struct stat info {};
  return ::stat("/run/systemd/system", &info) == 0 && S_ISDIR(info.st_mode);
}

class DetachedLauncher final : public ShimLauncher {
 public:
  explicit DetachedLauncher(const AgentConfig& config) : config_(config) {}

  absl::StatusOr<ProcessId> Start(const std::string& vm, const VmPaths& paths) override {
    RETURN_IF_ERROR(MakeDirectories(paths.run_dir));
    UniqueFd log(::open(paths.shim_log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    if (!log) return ErrnoError(errno, paths.shim_log);
    SpawnOptions options;
    // systemd-run --scope moves itself into a new scope and then becomes the program: same pid, same
    // descriptors.
    if (UnderSystemd()) {
      options.argv = {"systemd-run",
                      "--scope",
                      "--quiet",
                      "--collect",
                      "--slice=baton.slice",
                      "--description=baton-shim of VM " + vm,
                      "--"};
    }
    options.argv.insert(options.argv.end(), {config_.shim, "--dir", paths.state_dir});
    options.stdout_fd = log.get();
    options.stderr_fd = log.get();
    auto started = SpawnDetached(options);
    if (!started.ok())
      return WithReason(Annotate(started.status(), "the shim of VM " + vm + " cannot be started"),
                        v1::DESTINATION_START_FAILED);
    return started;
  }

 private:
  const AgentConfig& config_;
};

}  // namespace

std::unique_ptr<ShimLauncher> MakeShimLauncher(const AgentConfig& config) {
  return std::make_unique<DetachedLauncher>(config);
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
