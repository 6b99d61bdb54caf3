#include "agent/daemon/vm_entry.h"

#include <dirent.h>
#include <poll.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <utility>

#include "common/config.h"
#include "common/log.h"

namespace baton::daemon {

v1::ShimConfig VmEntry::conf() const {
  std::lock_guard lock(mutex_);
  return conf_;
}

void VmEntry::set_conf(v1::ShimConfig conf) {
  std::lock_guard lock(mutex_);
  conf_ = std::move(conf);
}

ProcessId VmEntry::shim() const {
  std::lock_guard lock(mutex_);
  return shim_;
}

void VmEntry::set_shim(ProcessId id) {
  std::lock_guard lock(mutex_);
  shim_ = id;
}

absl::Status VmEntry::Connect(const Callbacks& callbacks, Deadline deadline) {
  // The watch is set before the first try, so that a socket that appears in between is seen.
  UniqueFd watch(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  if (!watch) return ErrnoError(errno, "inotify");
  if (::inotify_add_watch(watch.get(), paths_.run_dir.c_str(), IN_CREATE | IN_MOVED_TO | IN_ATTRIB) < 0)
    return ErrnoError(errno, paths_.run_dir);
  auto process = OpenPidfd(shim());
  if (!process.ok()) return Error(absl::StatusCode::kUnavailable, "the shim has ended");
  shim::ControlClient::Handlers handlers;
  handlers.on_event = callbacks.on_event;
  handlers.on_close = [this, on_close = callbacks.on_close](const absl::Status&) {
    {
      std::lock_guard lock(mutex_);
      broken_ = true;
      changed_.notify_all();
    }
    on_close();
  };
  // Bound but not listening yet: listening makes no inotify event, and follows at once.
  const Duration soon = std::chrono::milliseconds(1), seldom = std::chrono::milliseconds(50);
  Duration pause = soon;
  while (true) {
    auto client = shim::ControlClient::Connect(paths_.control, handlers, deadline);
    if (client.ok()) {
      std::shared_ptr<shim::ControlClient> shared = *std::move(client);
      {
        std::lock_guard lock(mutex_);
        client_.swap(shared);
        broken_ = false;
      }
      shared.reset();  // a former connection is closed without the lock
      std::shared_ptr<shim::ControlClient> fresh;
      {
        std::lock_guard lock(mutex_);
        fresh = client_;
      }
      return fresh->Subscribe(deadline);
    }
    pollfd polls[2] = {{watch.get(), POLLIN, 0}, {process->get(), POLLIN, 0}};
    Deadline next = deadline.Min(Deadline::After(pause));
    pause = std::min(2 * pause, seldom);
    int n = ::poll(polls, 2, next.PollTimeoutMs());
    if (n < 0 && errno != EINTR) return ErrnoError(errno, "poll");
    if (n > 0 && polls[1].revents != 0) return Error(absl::StatusCode::kUnavailable, "the shim has ended");
    if (deadline.Expired())
      return Error(absl::StatusCode::kDeadlineExceeded, "the shim's control socket does not answer: {}",
                   Message(client.status()));
    char events[4096];
    while (::read(watch.get(), events, sizeof(events)) > 0) pause = soon;
  }
}

void VmEntry::Disconnect() {
  std::shared_ptr<shim::ControlClient> client;
  {
    std::lock_guard lock(mutex_);
    client.swap(client_);
    broken_ = false;
    changed_.notify_all();
  }
}

bool VmEntry::connected() const {
  std::lock_guard lock(mutex_);
  return client_ != nullptr && !broken_ && !client_->closed();
}

absl::StatusOr<v1::ShimReply> VmEntry::Call(const v1::ShimRequest& request, Deadline deadline, int fd) const {
  std::shared_ptr<shim::ControlClient> client;
  {
    std::lock_guard lock(mutex_);
    if (!broken_) client = client_;
  }
  if (client == nullptr)
    return Error(absl::StatusCode::kUnavailable, "the shim of VM {} does not run", name_);
  return client->Call(request, deadline, fd);
}

v1::ShimStatus VmEntry::status() const {
  std::lock_guard lock(mutex_);
  return status_.value_or(v1::ShimStatus());
}

void VmEntry::set_status(v1::ShimStatus status) {
  std::lock_guard lock(mutex_);
  status_ = std::move(status);
  changed_.notify_all();
}

absl::Status VmEntry::AwaitStatus(const std::function<bool(const v1::ShimStatus&)>& done,
                                  Deadline deadline) const {
  std::unique_lock lock(mutex_);
  while (!(status_ && done(*status_))) {
    if (client_ == nullptr || broken_) return Error(absl::StatusCode::kUnavailable, "the shim has ended");
    if (changed_.wait_until(lock, deadline.when()) == std::cv_status::timeout && deadline.Expired())
      return Error(absl::StatusCode::kDeadlineExceeded, "not in time");
  }
  return absl::OkStatus();
}

void VmEntry::set_shown(v1::Vm::State state, std::string message) {
  std::lock_guard lock(mutex_);
  status_.reset();
  shown_ = state;
  shown_message_ = std::move(message);
}

void VmEntry::set_ending(bool ending) {
  std::lock_guard lock(mutex_);
  ending_ = ending;
}

bool VmEntry::ending() const {
  std::lock_guard lock(mutex_);
  return ending_;
}

void VmEntry::set_retiring() {
  std::lock_guard lock(mutex_);
  retiring_ = true;
}

void VmEntry::set_removed() {
  std::lock_guard lock(mutex_);
  removed_ = true;
}

bool VmEntry::removed() const {
  std::lock_guard lock(mutex_);
  return removed_;
}

void VmEntry::set_finished(const std::string& migration_id) {
  std::lock_guard lock(mutex_);
  finished_ = migration_id;
}

bool VmEntry::finished(const std::string& migration_id) const {
  std::lock_guard lock(mutex_);
  return finished_ == migration_id;
}

v1::Vm VmEntry::Describe(const std::string& host) const {
  std::lock_guard lock(mutex_);
  v1::Vm vm;
  if (status_) {
    vm = status_->vm();
    vm.set_shim_pid(status_->pid());
  } else {
    vm.set_state(shown_);
    vm.set_message(shown_message_);
  }
  vm.set_name("vms/" + name_);
  vm.set_host("hosts/" + host);
  *vm.mutable_spec() = conf_.spec();
  if (vm.epoch() == 0) vm.set_epoch(conf_.epoch());
  if (vm.driver().empty()) vm.set_driver("qmp");
  return vm;
}

bool VmEntry::listed() const {
  std::lock_guard lock(mutex_);
  if (removed_ || retiring_ || !conf_.has_spec()) return false;
  if (!status_ || !status_->has_report()) return true;
  const v1::SideReport& report = status_->report();
  bool given_away = report.role() == v1::ROLE_SOURCE && report.handover() == v1::RELEASED;
  bool refused = report.role() == v1::ROLE_DESTINATION && report.handover() == v1::REFUSED;
  return !given_away && !refused;
}

absl::StatusOr<std::shared_ptr<VmEntry>> EntryOfIncoming(
    const std::map<std::string, std::shared_ptr<VmEntry>>& entries, const std::string& migration_id,
    const stream::Token& token) {
  for (const auto& [id, entry] : entries) {
    const v1::ShimConfig conf = entry->conf();
    if (conf.migration_id() != migration_id) continue;
    auto expected = stream::MakeToken(conf.token());
    if (!expected.ok() || !stream::TokensEqual(*expected, token))
      return Error(absl::StatusCode::kPermissionDenied, "wrong token for migration {}", migration_id);
    return entry;
  }
  return Error(absl::StatusCode::kNotFound, "no migration {} is expected here", migration_id);
}

std::vector<ProcessId> FindByCommandLine(const std::string& argument) {
  std::vector<ProcessId> found;
  DIR* proc = ::opendir("/proc");
  if (proc == nullptr) return found;
  while (dirent* entry = ::readdir(proc)) {
    char* end = nullptr;
    long pid = std::strtol(entry->d_name, &end, 10);
    if (*end != '\0' || pid <= 1 || pid == ::getpid()) continue;
    auto command = ReadFileLimited(fmt::format("/proc/{}/cmdline", pid), 1 << 20);
    if (!command.ok() || command->find(argument) == std::string::npos) continue;
    auto start = ProcessStartTime(static_cast<pid_t>(pid));
    if (start.ok()) found.push_back({static_cast<pid_t>(pid), *start});
  }
  ::closedir(proc);
  return found;
}

}  // namespace baton::daemon
