#include "agent/vmm/qmp/qmp_driver.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/log.h"
#include "common/unix_socket.h"

namespace baton::vmm {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;
using std::chrono::seconds;

// QEMU writes the state of ROMs and video memory before it reaches pre-switchover, while nobody reads yet;
// the socket has to hold it. Memory is used only for what is really written.
constexpr int kStateBuffer = 64 << 20;
constexpr char kSourceFd[] = "baton-state-out";
constexpr char kDestinationFd[] = "baton-state-in";
constexpr size_t kLogTail = 2000;
// For a migration to get as far as it does without the destination.
constexpr Duration kOnItsWay = std::chrono::seconds(1);
// For one that has ended to be put away.
constexpr Duration kPutAway = std::chrono::seconds(5);

bool Is(const std::string& state, std::initializer_list<const char*> states) {
  return std::any_of(states.begin(), states.end(), [&](const char* s) { return state == s; });
}

absl::Status CheckReadable(const std::string& what, const std::string& path) {
  if (path.empty() || ::access(path.c_str(), R_OK) == 0) return absl::OkStatus();
  return ErrnoError(errno, fmt::format("{} {} on this host", what, path));
}

absl::StatusOr<UniqueFd> OpenLog(const std::string& path, uint64_t& size) {
  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  if (!fd) return ErrnoError(errno, path);
  struct stat st {};
  if (::fstat(fd.get(), &st) < 0) return ErrnoError(errno, path);
  size = static_cast<uint64_t>(st.st_size);
  return fd;
}

absl::StatusOr<QemuVersion> AskVersion(const QemuLaunch& launch, Deadline deadline) {
  SpawnOptions options;
  options.argv = {launch.command.qemu_path, "--version"};
  options.env = launch.env;
  auto output = RunCommand(options, deadline);
  if (!output.ok()) return Annotate(output.status(), "QEMU binary " + launch.command.qemu_path);
  if (!output->status.ok()) {
    return Error(absl::StatusCode::kFailedPrecondition, "QEMU binary {}: --version {}: {}",
                 launch.command.qemu_path, output->status.ToString(), output->err.substr(0, kLogTail));
  }
  auto version = ParseQemuVersion(output->out.substr(0, output->out.find('\n')));
  if (!version.ok()) return Annotate(version.status(), "QEMU binary " + launch.command.qemu_path);
  return version;
}

}  // namespace

QmpDriver::QmpDriver(ProcessId id, UniqueFd pidfd, std::string log_path, uint64_t log_start)
    : id_(id), pidfd_(std::move(pidfd)), log_path_(std::move(log_path)), log_start_(log_start) {}

QmpDriver::~QmpDriver() {
  qmp_.reset();
  std::lock_guard lock(exit_mutex_);
  if (child_) child_->Release();
}

absl::StatusOr<std::unique_ptr<QmpDriver>> QmpDriver::Launch(QemuLaunch launch, Deadline deadline) {
  RETURN_IF_ERROR(CheckReadable("kernel", launch.command.spec.boot().kernel()));
  RETURN_IF_ERROR(CheckReadable("initrd", launch.command.spec.boot().initrd()));
  ASSIGN_OR_RETURN(QemuVersion version, AskVersion(launch, deadline));
  launch.command.reconnect_ms = version.major > 9 || (version.major == 9 && version.minor >= 2);

  // The monitor's socket is made here and inherited, so that it can be connected to at once: the greeting
  // comes when QEMU is ready, and an end of QEMU is an end of the connection. Nothing has to be polled for.
  constexpr int kQmpFd = 3;
  ASSIGN_OR_RETURN(UnixListener listener, UnixListener::Listen(QmpSocketPath(launch.command.run_dir)));
  launch.command.qmp_fd = kQmpFd;
  ASSIGN_OR_RETURN(std::vector<std::string> argv, BuildQemuCommand(launch.command));
  uint64_t log_start = 0;
  ASSIGN_OR_RETURN(UniqueFd log, OpenLog(launch.log_path, log_start));

  SpawnOptions options;
  options.argv = std::move(argv);
  options.env = launch.env;
  options.stdout_fd = log.get();
  options.stderr_fd = log.get();
  options.inherit = {{listener.fd(), kQmpFd}};
  options.new_session = true;
  auto spawned = Process::Spawn(options);
  if (!spawned.ok()) return Annotate(spawned.status(), "QEMU binary " + launch.command.qemu_path);
  Process process = std::move(spawned).value();
  UniqueFd socket = listener.Release();
  socket.reset();

  ASSIGN_OR_RETURN(uint64_t start_time, ProcessStartTime(process.pid()));
  UniqueFd pidfd(::fcntl(process.pidfd(), F_DUPFD_CLOEXEC, 3));
  if (!pidfd) return ErrnoError(errno, "pidfd");
  std::unique_ptr<QmpDriver> driver(
      new QmpDriver({process.pid(), start_time}, std::move(pidfd), launch.log_path, log_start));
  driver->child_ = std::move(process);
  if (absl::Status status = driver->Attach(launch.command.run_dir, deadline); !status.ok()) {
    driver->Kill();
    if (launch.command.spec.free_page_hints() && Message(status).find(kGenericDevice) != std::string::npos)
      return Error(
          absl::StatusCode::kFailedPrecondition,
          "free_page_hints needs a VMM that gives a guest the device {}; leave it out (`balloon: on` "
          "makes holes of what the guest frees): {}",
          kGenericDevice, Message(status));
    return status;
  }
  return driver;
}

absl::StatusOr<std::unique_ptr<QmpDriver>> QmpDriver::Adopt(const ProcessId& process,
                                                            const std::string& run_dir,
                                                            const std::string& log_path, Deadline deadline) {
  auto pidfd = OpenPidfd(process);
  if (!pidfd.ok()) return Annotate(pidfd.status(), fmt::format("QEMU with pid {} is gone", process.pid));
  if (WaitPidfd(pidfd->get(), Deadline::After(Duration(0))).ok())
    return Error(absl::StatusCode::kNotFound, "QEMU with pid {} has ended", process.pid);
  uint64_t log_size = 0;
  ASSIGN_OR_RETURN(UniqueFd log, OpenLog(log_path, log_size));
  std::unique_ptr<QmpDriver> driver(new QmpDriver(process, *std::move(pidfd), log_path, log_size));
  RETURN_IF_ERROR(driver->Attach(run_dir, deadline));
  return driver;
}

absl::Status QmpDriver::Attach(const std::string& run_dir, Deadline deadline) {
  auto qmp = QmpClient::Connect(QmpSocketPath(run_dir), deadline);
  if (!qmp.ok()) return Explain(qmp.status());
  qmp_ = *std::move(qmp);
  json capabilities = json::array();
  for (const char* name : {"events", "x-ignore-shared", "pause-before-switchover"}) {
    capabilities.push_back({{"capability", name}, {"state", true}});
  }
  absl::Status status =
      Execute("migrate-set-capabilities", {{"capabilities", capabilities}}, deadline).status();
  // While a migration is under way (a shim that died left it so) QEMU keeps what was set.
  if (!status.ok()) {
    ASSIGN_OR_RETURN(std::string state, MigrationState(deadline));
    if (!Is(state, {"setup", "active", "pre-switchover", "device", "cancelling"})) return status;
  }
  // QEMU's default of 128 MiB/s would pace the few hundred KiB of state over several steps of its limiter.
  return Execute("migrate-set-parameters", {{"max-bandwidth", uint64_t{100} << 30}}, deadline).status();
}

std::string QmpDriver::version() const {
  auto v = qmp_->version();
  return fmt::format("QEMU emulator version {}.{}.{}", v.major, v.minor, v.micro);
}

absl::StatusOr<json> QmpDriver::Execute(const std::string& command, const json& arguments, Deadline deadline,
                                        int fd) {
  auto result = qmp_->Execute(command, arguments, deadline, fd);
  if (!result.ok()) return Explain(result.status());
  return result;
}

absl::Status QmpDriver::Explain(const absl::Status& status) {
  if (status.code() != absl::StatusCode::kUnavailable) return status;
  // The monitor closes a moment before the process is gone.
  if (!WaitPidfd(pidfd_.get(), Deadline::After(seconds(2))).ok()) return status;
  return absl::UnavailableError(DescribeExit());
}

absl::StatusOr<std::string> QmpDriver::RunState(Deadline deadline) {
  ASSIGN_OR_RETURN(json status, Execute("query-status", json::object(), deadline));
  return StringAt(status, "status");
}

absl::StatusOr<bool> QmpDriver::IsRunning(Deadline deadline) {
  ASSIGN_OR_RETURN(std::string state, RunState(deadline));
  return state == "running";
}

absl::StatusOr<std::string> QmpDriver::MigrationState(Deadline deadline) {
  ASSIGN_OR_RETURN(json info, Execute("query-migrate", json::object(), deadline));
  std::string state = StringAt(info, "status");
  return state.empty() ? "none" : state;
}

std::string QmpDriver::MigrationError(Deadline deadline) {
  auto info = Execute("query-migrate", json::object(), deadline);
  if (!info.ok()) return Message(info.status());
  std::string text = StringAt(*info, "error-desc");
  if (text.empty()) text = LogTail();
  return text.empty() ? "QEMU gives no reason" : text;
}

absl::StatusOr<UniqueFd> QmpDriver::PassSocket(const std::string& name, bool qemu_writes, Deadline deadline) {
  // A socket rather than a pipe: QEMU can then shut it down when a migration is cancelled while it writes.
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) return ErrnoError(errno, "socketpair");
  UniqueFd ours(pair[0]), theirs(pair[1]);
  int writer = qemu_writes ? theirs.get() : ours.get();
  if (::setsockopt(writer, SOL_SOCKET, SO_SNDBUFFORCE, &kStateBuffer, sizeof(kStateBuffer)) < 0) {
    LOG_WARN("no CAP_NET_ADMIN: large VMM state may not fit into the socket buffer ({})",
             std::strerror(errno));
    (void)::setsockopt(writer, SOL_SOCKET, SO_SNDBUF, &kStateBuffer, sizeof(kStateBuffer));
  }
  RETURN_IF_ERROR(Execute("getfd", {{"fdname", name}}, deadline, theirs.get()).status());
  return ours;
}

absl::StatusOr<std::string> QmpDriver::AwaitMigration(uint64_t after,
                                                      std::initializer_list<const char*> wanted,
                                                      Deadline deadline) {
  auto event = qmp_->WaitEvent(
      after,
      [&](const QmpEvent& e) { return e.name == "MIGRATION" && Is(StringAt(e.data, "status"), wanted); },
      deadline);
  if (!event.ok()) return Explain(event.status());
  return StringAt(event->data, "status");
}

absl::StatusOr<std::vector<Obstacle>> QmpDriver::Obstacles(Deadline deadline) {
  std::vector<Obstacle> found;
  ASSIGN_OR_RETURN(json info, Execute("query-migrate", json::object(), deadline));
  // Devices that cannot be moved, and settings that rule a migration out (QEMU tells since 6.0).
  if (auto reasons = info.find("blocked-reasons"); reasons != info.end() && reasons->is_array()) {
    for (const json& reason : *reasons) {
      found.push_back({"VMM_BLOCKS_MIGRATION", "VMM",
                       reason.is_string() ? reason.get<std::string>() : reason.dump(),
                       "take the device out of extra_args"});
    }
  }
  // A disk of QEMU's own that bypasses the page cache: the storage writes to guest memory by DMA, to pages
  // that were pinned before they were last protected, and such writes leave no trace in the page tables.
  ASSIGN_OR_RETURN(json nodes, Execute("query-named-block-nodes", {{"flat", true}}, deadline));
  if (!nodes.is_array()) return absl::InternalError("QEMU's list of block nodes is no list");
  for (const json& node : nodes) {
    if (!node.is_object() || !node.contains("cache") || !node["cache"].is_object()) continue;
    auto direct = node["cache"].find("direct");
    if (direct == node["cache"].end() || !direct->is_boolean() || !direct->get<bool>()) continue;
    const std::string file = StringAt(node, "file");
    found.push_back(
        {"VMM_DIRECT_IO", "disk " + (file.empty() ? StringAt(node, "node-name") : file),
         "QEMU itself reads it with direct I/O, and what that writes to guest memory cannot be tracked",
         "attach it through a vhost-user back-end, or without cache.direct (cache=writeback)"});
  }
  return found;
}

absl::StatusOr<UniqueFd> QmpDriver::Freeze(Deadline deadline) {
  const uint64_t mark = freeze_events_ = qmp_->LastEvent();
  ASSIGN_OR_RETURN(UniqueFd state, PassSocket(kSourceFd, /*qemu_writes=*/true, deadline));
  RETURN_IF_ERROR(Execute("migrate", {{"uri", fmt::format("fd:{}", kSourceFd)}}, deadline).status());
  auto reached = AwaitMigration(mark, {"pre-switchover", "completed", "failed", "cancelled"}, deadline);
  if (!reached.ok()) return Annotate(reached.status(), "QEMU did not freeze the guest");
  if (*reached != "pre-switchover") {
    return Error(absl::StatusCode::kUnavailable, "QEMU did not freeze the guest (migration {}): {}", *reached,
                 MigrationError(deadline));
  }
  auto stop = qmp_->Newest("STOP");
  frozen_at_ns_ = stop && stop->sequence > mark ? stop->at_ns : 0;
  return state;
}

absl::Status QmpDriver::ContinueState(Deadline deadline) {
  return Execute("migrate-continue", {{"state", "pre-switchover"}}, deadline).status();
}

// The event is sent before QEMU closes the stream, so this seldom waits.
absl::Status QmpDriver::ConfirmState(Deadline deadline) {
  auto reached = AwaitMigration(freeze_events_, {"completed", "failed", "cancelled"}, deadline);
  if (!reached.ok()) return Annotate(reached.status(), "QEMU did not say that its state is whole");
  if (*reached == "completed") return absl::OkStatus();
  return Error(absl::StatusCode::kUnavailable, "QEMU did not give its state (migration {}): {}", *reached,
               MigrationError(deadline));
}

absl::Status QmpDriver::Resume(Deadline deadline) {
  for (;;) {
    uint64_t mark = qmp_->LastEvent();
    ASSIGN_OR_RETURN(std::string state, MigrationState(deadline));
    // One that is cancelled in the moment before pre-switchover never ends, and the guest stands still with
    // it: QEMU's migration thread has looked whether it was cancelled, gives its lock away and waits for a
    // semaphore that cancelling posts in pre-switchover only (migration_maybe_pause and migrate_fd_cancel of
    // QEMU 7.2). It soon gets there by itself: no memory is sent.
    if (Is(state, {"setup", "active"})) {
      (void)AwaitMigration(mark, {"pre-switchover", "cancelled", "failed", "completed"},
                           deadline.Min(Deadline::After(kOnItsWay)));
      ASSIGN_OR_RETURN(state, MigrationState(deadline));
    }
    if (Is(state, {"none", "cancelled", "failed", "completed"})) break;
    if (state != "cancelling") {
      // Harmless if the migration ended meanwhile; the state is asked for again.
      RETURN_IF_ERROR(Execute("migrate_cancel", json::object(), deadline).status());
    }
    ASSIGN_OR_RETURN(state, MigrationState(deadline));
    if (Is(state, {"none", "cancelled", "failed", "completed"})) break;
    RETURN_IF_ERROR(AwaitMigration(mark, {"cancelled", "failed", "completed"}, deadline).status());
  }
  // A cancelled migration starts the guest again by itself, a completed one leaves it in postmigrate.
  ASSIGN_OR_RETURN(std::string run_state, RunState(deadline));
  if (run_state != "running") RETURN_IF_ERROR(Start(deadline));
  // The guest runs, which is what counts; QEMU would refuse another migration, or worse.
  if (absl::Status away = AwaitPutAway(deadline.Min(Deadline::After(kPutAway))); !away.ok())
    LOG_WARN("QEMU (pid {}) has not put its migration away: {}", id_.pid, Message(away));
  return absl::OkStatus();
}

// query-migrate calls a migration failed when its thread has yet to leave, and in that moment `migrate` fails
// with the state of a migration set up: the thread does not know it and QEMU ends (SIGSEGV after "Unknown
// ending state 1" of migration_iteration_finish, QEMU 7.2). The yank instance is given back last
// (migrate_fd_cleanup); nothing tells when.
absl::Status QmpDriver::AwaitPutAway(Deadline deadline) {
  for (;;) {
    ASSIGN_OR_RETURN(json instances, Execute("query-yank", json::object(), deadline));
    if (std::none_of(instances.begin(), instances.end(),
                     [](const json& i) { return i.is_object() && StringAt(i, "type") == "migration"; }))
      return absl::OkStatus();
    if (deadline.Expired()) return absl::DeadlineExceededError("its thread has not left");
    (void)qmp_->WaitEvent(
        qmp_->LastEvent(), [](const QmpEvent&) { return true; },
        deadline.Min(Deadline::After(std::chrono::milliseconds(1))));
  }
}

absl::StatusOr<UniqueFd> QmpDriver::BeginLoad(Deadline deadline) {
  load_events_ = qmp_->LastEvent();
  ASSIGN_OR_RETURN(UniqueFd state, PassSocket(kDestinationFd, /*qemu_writes=*/false, deadline));
  RETURN_IF_ERROR(
      Execute("migrate-incoming", {{"uri", fmt::format("fd:{}", kDestinationFd)}}, deadline).status());
  return state;
}

absl::Status QmpDriver::FinishLoad(Deadline deadline) {
  auto reached = AwaitMigration(load_events_, {"completed", "failed"}, deadline);
  if (!reached.ok()) return Annotate(reached.status(), "QEMU did not load the state");
  if (*reached != "completed") {
    return Error(absl::StatusCode::kUnavailable, "QEMU did not load the state: {}", MigrationError(deadline));
  }
  ASSIGN_OR_RETURN(std::string state, RunState(deadline));
  if (!Is(state, {"paused", "prelaunch"})) {
    return Error(absl::StatusCode::kInternal, "QEMU is {} after loading, not paused", state);
  }
  return absl::OkStatus();
}

absl::Status QmpDriver::Start(Deadline deadline) {
  const uint64_t mark = qmp_->LastEvent();
  absl::Status asked = Execute("cont", json::object(), deadline).status();
  // QEMU refuses for a moment after a migration ended ("not finalized yet"), and has no event for the end of
  // that.
  while (!asked.ok() && Message(asked).find("not finalized") != std::string::npos && !deadline.Expired()) {
    (void)qmp_->WaitEvent(
        qmp_->LastEvent(), [](const QmpEvent&) { return true; },
        deadline.Min(Deadline::After(std::chrono::milliseconds(10))));
    asked = Execute("cont", json::object(), deadline).status();
  }
  RETURN_IF_ERROR(asked);
  // The usual case, without another question: the guest waits.
  if (auto resumed = qmp_->Newest("RESUME"); resumed && resumed->sequence > mark) return absl::OkStatus();
  ASSIGN_OR_RETURN(std::string state, RunState(deadline));
  if (state == "running") return absl::OkStatus();
  return Error(absl::StatusCode::kUnavailable, "the guest does not run after cont: QEMU is {}", state);
}

absl::Status QmpDriver::Announce(Deadline deadline) {
  // Milliseconds: five rounds over about half a second, as QEMU itself does after a migration.
  return Execute("announce-self", {{"initial", 50}, {"max", 550}, {"rounds", 5}, {"step", 100}}, deadline)
      .status();
}

absl::Status QmpDriver::PowerDown(Deadline deadline) {
  return Execute("system_powerdown", json::object(), deadline).status();
}

void QmpDriver::Kill() {
  killed_ = true;
  if (::syscall(SYS_pidfd_send_signal, pidfd_.get(), SIGKILL, nullptr, 0) < 0 && errno != ESRCH) {
    LOG_ERROR("cannot kill QEMU pid {}: {}", id_.pid, std::strerror(errno));
    return;
  }
  // Bounded only against a kernel that cannot end the process (a device in uninterruptible sleep).
  if (!WaitPidfd(pidfd_.get(), Deadline::After(seconds(30))).ok()) {
    LOG_ERROR("QEMU pid {} does not end after SIGKILL", id_.pid);
    return;
  }
  (void)DescribeExit();
}

bool QmpDriver::GuestShutDown() const {
  if (!qmp_) return false;
  // The reader may still have to see the last lines.
  (void)qmp_->WaitClosed(Deadline::After(milliseconds(500)));
  auto event = qmp_->Newest("SHUTDOWN");
  return event && StringAt(event->data, "reason") == "guest-shutdown";
}

std::string QmpDriver::DescribeExit() {
  if (!WaitPidfd(pidfd_.get(), Deadline::After(milliseconds(500))).ok()) {
    return fmt::format("QEMU (pid {}) runs", id_.pid);
  }
  std::string cause;
  if (qmp_) {
    (void)qmp_->WaitClosed(Deadline::After(milliseconds(500)));
    if (auto event = qmp_->Newest("SHUTDOWN")) cause = StringAt(event->data, "reason");
  }
  std::lock_guard lock(exit_mutex_);
  if (exit_text_) return *exit_text_;
  std::string text = fmt::format("QEMU (pid {}) ended", id_.pid);
  if (child_) {
    auto status = child_->Wait(Deadline::After(seconds(1)));
    if (status.ok()) text = fmt::format("QEMU (pid {}) {}", id_.pid, status->ToString());
  }
  if (cause == "guest-shutdown") {
    text += " after the guest powered off";
  } else if (!cause.empty()) {
    text += fmt::format(" ({})", cause);
  }
  if (std::string tail = LogTail(); !tail.empty()) text += fmt::format("; it said: {}", tail);
  exit_text_ = text;
  return text;
}

std::string QmpDriver::LogTail() const {
  UniqueFd fd(::open(log_path_.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat st {};
  if (!fd || ::fstat(fd.get(), &st) < 0) return "";
  uint64_t size = static_cast<uint64_t>(st.st_size);
  uint64_t from = std::max(log_start_, size > kLogTail ? size - kLogTail : 0);
  if (from >= size) return "";
  std::string text(size - from, '\0');
  ssize_t n = ::pread(fd.get(), text.data(), text.size(), static_cast<off_t>(from));
  text.resize(n > 0 ? static_cast<size_t>(n) : 0);
  // One line: messages end up in logs and tables.
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  std::string line;
  for (char c : text) line += c == '\n' ? std::string(" | ") : std::string(1, c);
  return line;
}

}  // namespace baton::vmm
