#include "tests/integration/shim/shim_host.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/inotify.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "common/durable_file.h"

namespace baton::test {
namespace {

using std::chrono::seconds;

// Connects as soon as somebody listens at `path`; fails early if `pidfd` ends.
absl::Status AwaitListener(const std::string& path, int pidfd, Deadline deadline) {
  UniqueFd inotify(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  std::string dir = std::filesystem::path(path).parent_path();
  if (::inotify_add_watch(inotify.get(), dir.c_str(), IN_CREATE | IN_MOVED_TO | IN_ATTRIB) < 0) {
    return ErrnoError(errno, dir);
  }
  for (;;) {
    auto fd = ConnectUnix(path, deadline);
    if (fd.ok()) return absl::OkStatus();
    // Between bind and listen a socket refuses, and listen makes no event in the file system: look again
    // shortly.
    pollfd items[2] = {{inotify.get(), POLLIN, 0}, {pidfd, POLLIN, 0}};
    ::poll(items, 2, std::min(deadline.PollTimeoutMs(), 20));
    if (items[1].revents != 0) return absl::UnavailableError("the shim has exited");
    if (deadline.Expired()) return fd.status();
    char events[4096];
    while (::read(inotify.get(), events, sizeof(events)) > 0) {
    }
  }
}

}  // namespace

ShimHost::ShimHost(const TempDirs& dirs, const std::string& name)
    : console(dirs.dir() + "/" + name + "/run/console.log", dirs.dir() + "/" + name + "/run/console.sock"),
      dir_(dirs.dir() + "/" + name),
      run_dir_(dir_ + "/run"),
      state_dir_(dir_ + "/state"),
      memory_path_(dirs.shm() + "/" + name + ".ram") {
  std::filesystem::create_directories(run_dir_);
  std::filesystem::create_directories(state_dir_);
}

ShimHost::~ShimHost() {
  if (control_) control_->Close();
  KillShim();
  auto config = ReadConfig();
  if (config.ok() && config->vmm_pid() != 0) {
    (void)KillProcess({static_cast<pid_t>(config->vmm_pid()), config->vmm_start_time()},
                      Deadline::After(seconds(10)));
  }
}

absl::Status ShimHost::StartDisk(const std::string& image, int queues) {
  auto disk = StorageDaemon::Start(disk_socket(), image, queues);
  if (!disk.ok()) return disk.status();
  disk_.emplace(*std::move(disk));
  return absl::OkStatus();
}

v1::ShimConfig ShimHost::MakeConfig(const v1::VmSpec& spec, v1::ShimConfig::Mode mode) const {
  v1::ShimConfig config;
  config.set_mode(mode);
  *config.mutable_spec() = spec;
  config.set_run_dir(run_dir_);
  config.set_state_dir(state_dir_);
  config.set_memory_path(memory_path_);
  config.set_qemu_path(QemuPath());
  config.set_console_log(run_dir_ + "/console.log");
  config.set_dirty_tracking("auto");
  config.set_epoch(1);
  for (const v1::DeviceSpec& device : spec.devices()) {
    v1::ResolvedDevice* resolved = config.add_devices();
    resolved->set_name(device.name());
    resolved->mutable_backend()->set_socket(disk_socket());
    resolved->mutable_backend()->set_kind(v1::QEMU_STORAGE_DAEMON);
  }
  return config;
}

void ShimHost::ForgetEvents() {
  std::lock_guard lock(mutex_);
  status_.reset();
  report_.reset();
  closed_ = false;
}

absl::Status ShimHost::StartShim(const v1::ShimConfig& config, const std::string& pause_at) {
  RETURN_IF_ERROR(WriteMessageDurable(state_dir_ + "/shim.conf", config));
  control_.reset();
  ForgetEvents();
  UniqueFd log(::open((dir_ + "/shim.log").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  SpawnOptions options;
  options.argv = {std::string(BATON_BINARY_DIR) + "/bin/baton-shim", "--dir", state_dir_};
  if (!pause_at.empty()) options.env["BATON_PAUSE_AT"] = pause_at;
  options.stdout_fd = log.get();
  options.stderr_fd = log.get();
  ASSIGN_OR_RETURN(Process process, Process::Spawn(options));
  shim_.emplace(std::move(process));
  std::string socket = run_dir_ + "/shim.sock";
  absl::Status listening = AwaitListener(socket, shim_->pidfd(), Deadline::After(seconds(60)));
  if (!listening.ok()) return Annotate(listening, ShimLog());
  ControlClient::Handlers handlers;
  handlers.on_event = [this](const v1::ShimReply& event) {
    std::lock_guard lock(mutex_);
    if (event.has_event_status()) status_ = event.event_status();
    if (event.has_event_report()) report_ = event.event_report();
    changed_.notify_all();
  };
  handlers.on_close = [this](const absl::Status&) {
    std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  };
  ASSIGN_OR_RETURN(control_,
                   ControlClient::Connect(socket, std::move(handlers), Deadline::After(seconds(60))));
  return control_->Subscribe(Deadline::After(seconds(60)));
}

absl::Status ShimHost::WaitPause(const std::string& point, Deadline deadline) {
  UniqueFd inotify(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  if (::inotify_add_watch(inotify.get(), run_dir_.c_str(), IN_CREATE) < 0) return ErrnoError(errno, run_dir_);
  while (!std::filesystem::exists(run_dir_ + "/pause-" + point)) {
    absl::Status status = WaitFd(inotify.get(), POLLIN, deadline, "pause point " + point);
    if (!status.ok()) return Annotate(status, ShimLog());
    char events[4096];
    while (::read(inotify.get(), events, sizeof(events)) > 0) {
    }
  }
  return absl::OkStatus();
}

void ShimHost::Continue(const std::string& point) { std::filesystem::remove(run_dir_ + "/pause-" + point); }

absl::StatusOr<v1::ShimConfig> ShimHost::ReadConfig() const {
  v1::ShimConfig config;
  RETURN_IF_ERROR(ReadMessage(state_dir_ + "/shim.conf", &config));
  return config;
}

absl::Status ShimHost::StartShimAgain(v1::ShimConfig::Mode mode) {
  ASSIGN_OR_RETURN(v1::ShimConfig config, ReadConfig());
  config.set_mode(mode);
  return StartShim(config);
}

absl::StatusOr<v1::ShimStatus> ShimHost::WaitStatus(const std::function<bool(const v1::ShimStatus&)>& wanted,
                                                    Deadline deadline) {
  std::unique_lock lock(mutex_);
  bool ok =
      changed_.wait_until(lock, deadline.when(), [&] { return closed_ || (status_ && wanted(*status_)); });
  if (status_ && wanted(*status_)) return *status_;
  return Error(ok ? absl::StatusCode::kUnavailable : absl::StatusCode::kDeadlineExceeded,
               "{}; last status: {}; log: {}",
               ok ? "the shim closed the connection" : "no such status in time",
               status_ ? status_->ShortDebugString().substr(0, 2000) : "none", ShimLog());
}

absl::StatusOr<v1::ShimStatus> ShimHost::WaitState(v1::Vm::State state, Deadline deadline) {
  // A start that failed is told at once, not at the deadline.
  auto status = WaitStatus(
      [&](const v1::ShimStatus& s) { return s.vm().state() == state || s.vm().state() == v1::Vm::STOPPED; },
      deadline);
  if (status.ok() && status->vm().state() != state) {
    return Error(absl::StatusCode::kFailedPrecondition, "the VM is stopped: {}", status->vm().message());
  }
  return status;
}

absl::StatusOr<v1::SideReport> ShimHost::WaitReport(const std::function<bool(const v1::SideReport&)>& wanted,
                                                    Deadline deadline) {
  std::unique_lock lock(mutex_);
  bool ok =
      changed_.wait_until(lock, deadline.when(), [&] { return closed_ || (report_ && wanted(*report_)); });
  if (report_ && wanted(*report_)) return *report_;
  return Error(ok ? absl::StatusCode::kUnavailable : absl::StatusCode::kDeadlineExceeded,
               "{}; last report: {}; log: {}",
               ok ? "the shim closed the connection" : "no such report in time",
               report_ ? report_->ShortDebugString() : "none", ShimLog());
}

absl::StatusOr<v1::ShimReply> ShimHost::Call(v1::ShimRequest request, Duration timeout, int fd) {
  return control_->Call(std::move(request), Deadline::After(timeout), fd);
}

void ShimHost::KillShim() {
  if (!shim_) return;
  shim_->Signal(SIGKILL);
  (void)shim_->Wait(Deadline::After(seconds(10)));
}

absl::StatusOr<ExitStatus> ShimHost::WaitShimExit(Deadline deadline) { return shim_->Wait(deadline); }

std::string ShimHost::ShimLog() const {
  std::ifstream in(dir_ + "/shim.log", std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  std::string all = text.str();
  return all.substr(all.size() > 6000 ? all.size() - 6000 : 0);
}

}  // namespace baton::test
