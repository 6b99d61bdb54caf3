#include "tests/lab/vm/harness.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <filesystem>

#include "common/unix_socket.h"

namespace baton::lab {
namespace {

using std::chrono::seconds;

constexpr Duration kStep = seconds(60);
constexpr size_t kConsoleLines = 40;

Deadline Soon() { return Deadline::After(kStep); }

// Waits for the first line of what a process prints.
absl::Status AwaitLine(int fd, Deadline deadline) {
  for (char last = 0; last != '\n';) {
    RETURN_IF_ERROR(WaitFd(fd, POLLIN, deadline, "the back-end's first line"));
    if (::read(fd, &last, 1) != 1) return absl::UnavailableError("the back-end ended before it was ready");
  }
  return absl::OkStatus();
}

// Waits until the socket is there and listens.
absl::Status AwaitSocket(const std::string& path, Deadline deadline) {
  UniqueFd inotify(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  const std::string dir = std::filesystem::path(path).parent_path();
  if (::inotify_add_watch(inotify.get(), dir.c_str(), IN_CREATE | IN_ATTRIB) < 0)
    return ErrnoError(errno, dir);
  for (;;) {
    if (ConnectUnix(path, deadline).ok()) return absl::OkStatus();
    if (deadline.Expired()) return Error(absl::StatusCode::kDeadlineExceeded, "{}: nobody listens", path);
    // Listening makes no event of its own: look again shortly after the socket was bound.
    pollfd p{inotify.get(), POLLIN, 0};
    ::poll(&p, 1, 2);
    char events[1024];
    while (::read(inotify.get(), events, sizeof events) > 0) {
    }
  }
}

}  // namespace

absl::StatusOr<BackendProcess> BackendProcess::Start(std::vector<std::string> argv, const std::string& socket,
                                                     const std::string& image, bool says_ready,
                                                     Deadline deadline) {
  int in[2], out[2];
  if (::pipe2(in, O_CLOEXEC) < 0) return ErrnoError(errno, "pipe");
  UniqueFd in_read(in[0]), in_write(in[1]);
  if (::pipe2(out, O_CLOEXEC) < 0) return ErrnoError(errno, "pipe");
  UniqueFd out_read(out[0]), out_write(out[1]);
  argv.insert(argv.end(), {"--socket", socket, "--image", image});
  // A former life's socket would look like a new one.
  std::error_code ignored;
  std::filesystem::remove(socket, ignored);
  SpawnOptions options;
  options.argv = std::move(argv);
  options.stdin_fd = in_read.get();
  options.stdout_fd = out_write.get();
  options.stderr_fd = 2;
  options.die_with_parent = true;
  ASSIGN_OR_RETURN(Process process, Process::Spawn(options));
  out_write.reset();
  BackendProcess backend(std::move(process), std::move(in_write), socket);
  RETURN_IF_ERROR(says_ready ? AwaitLine(out_read.get(), deadline) : AwaitSocket(socket, deadline));
  return backend;
}

void BackendProcess::Kill() {
  process_.Signal(SIGKILL);
  (void)process_.Wait(Soon());
}

bool BackendProcess::AwaitEnd(Deadline deadline) { return process_.Wait(deadline).ok(); }

Harness::Harness(HarnessOptions options) : options_(std::move(options)) {}

Harness::~Harness() {
  driver_.reset();
  mediator_.reset();
  backend_.reset();
  ram_.reset();
}

void Harness::Say(const std::string& line) {
  std::lock_guard lock(mutex_);
  console_.push_back(line);
  if (console_.size() > kConsoleLines) console_.erase(console_.begin());
}

std::string Harness::Console() const {
  std::lock_guard lock(mutex_);
  std::string text;
  for (const std::string& line : console_) text += line + "\n";
  return text;
}

absl::Status Harness::MakeMemory(bool existing) {
  ASSIGN_OR_RETURN(memory::RamBlock block,
                   existing ? memory::RamBlock::Open("mem", Memory())
                            : memory::RamBlock::Create("mem", Memory(), options_.memory_bytes));
  std::vector<memory::RamBlock> blocks;
  blocks.push_back(std::move(block));
  ram_ = std::make_unique<memory::GuestRam>(std::move(blocks));
  return absl::OkStatus();
}

GuestConfig Harness::Config(bool incoming) const {
  GuestConfig config;
  config.memory_path = Memory();
  config.memory_bytes = options_.memory_bytes;
  DeviceOptions device;
  device.name = "disk0";
  device.socket = VmmSocket();
  device.queues = options_.queues;
  device.queue_size = options_.queue_size;
  device.reconnect_ms = 2;
  config.devices = {device};
  config.options = options_.workload;
  config.incoming = incoming;
  config.lost_after = options_.lost_after;
  return config;
}

absl::Status Harness::StartBackend(const std::vector<std::string>& more) {
  std::vector<std::string> argv = options_.backend;
  for (std::string& word : argv) {
    if (size_t at = word.find("{dir}"); at != std::string::npos) word.replace(at, 5, dir_);
    if (size_t at = word.find("{n}"); at != std::string::npos)
      word.replace(at, 3, std::to_string(backend_number_));
  }
  argv.insert(argv.end(), {"--queues", std::to_string(options_.queues)});
  argv.insert(argv.end(), more.begin(), more.end());
  backend_.reset();
  auto backend =
      BackendProcess::Start(std::move(argv), BackendSocket(), image(), options_.backend_says_ready, Soon());
  if (!backend.ok()) return backend.status();
  backend_.emplace(*std::move(backend));
  return absl::OkStatus();
}

absl::Status Harness::StartMediator(bool returns) {
  mediator_.reset();
  vhost::MediatorOptions options;
  options.spec.set_name("disk0");
  options.spec.set_class_(v1::BLK);
  options.spec.set_num_queues(options_.queues);
  options.spec.set_queue_size(options_.queue_size);
  options.backend.set_socket(BackendSocket());
  options.backend.set_kind(options_.kind);
  options.listen_path = VmmSocket();
  options.backend_required = !returns;
  options.vmm_returns = returns;
  options.whole_memory_tables = true;
  options.memo_dir = fmt::format("{}/memo{}", dir_, generation_);
  std::error_code ignored;
  std::filesystem::create_directory(options.memo_dir, ignored);
  options.ram = ram_.get();
  vhost::MediatorCallbacks callbacks;
  callbacks.on_memory = [ram = ram_.get()](const std::vector<vhost::MemoryRegionInfo>& regions) {
    auto layout = vhost::LayoutFor(regions, *ram);
    if (layout.ok()) (void)ram->SetLayout(*std::move(layout));
  };
  callbacks.on_change = [this](const v1::Device&) {
    std::lock_guard lock(mutex_);
    told_.notify_all();
  };
  ASSIGN_OR_RETURN(mediator_, vhost::Mediator::Start(std::move(options), std::move(callbacks)));
  return absl::OkStatus();
}

absl::Status Harness::Start() {
  if (dir_.empty()) return absl::InternalError("no directory");
  UniqueFd image_fd(::open(image().c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  const uint64_t bytes = std::max<uint64_t>(options_.workload.blocks * kBlockSize, 1 << 20);
  if (!image_fd || ::ftruncate(image_fd.get(), static_cast<off_t>(bytes)) < 0)
    return ErrnoError(errno, image());
  RETURN_IF_ERROR(MakeMemory(/*existing=*/false));
  RETURN_IF_ERROR(StartBackend());
  RETURN_IF_ERROR(StartMediator(/*returns=*/false));
  ASSIGN_OR_RETURN(
      driver_, LabGuestDriver::Launch(Config(false), {[this](const std::string& l) { Say(l); }, {}}, Soon()));
  RETURN_IF_ERROR(driver_->Start(Soon()));
  return AwaitWrites(10);
}

absl::Status Harness::Move(bool handoff) {
  RETURN_IF_ERROR(mediator_->ArmStop(vhost::StopOrder{seconds(5), handoff, /*ordered=*/true, ""}));
  ASSIGN_OR_RETURN(UniqueFd source, driver_->Freeze(Soon()));
  ASSIGN_OR_RETURN(v1::DeviceState device, mediator_->CollectState(Soon()));
  // The destination, with what arrived.
  const std::string from = Memory();
  std::optional<BackendProcess> old_backend = std::move(backend_);
  auto old_ram = std::move(ram_);
  auto old_mediator = std::move(mediator_);
  auto old_driver = std::move(driver_);
  ++generation_;
  ++backend_number_;
  RETURN_IF_ERROR(StartBackend());
  std::error_code error;
  std::filesystem::copy_file(from, Memory(), error);
  if (error) return Error(absl::StatusCode::kInternal, "copy of guest memory: {}", error.message());
  RETURN_IF_ERROR(MakeMemory(/*existing=*/true));
  RETURN_IF_ERROR(StartMediator(/*returns=*/false));
  RETURN_IF_ERROR(mediator_->ExpectState(device));
  ASSIGN_OR_RETURN(
      driver_, LabGuestDriver::Launch(Config(true), {[this](const std::string& l) { Say(l); }, {}}, Soon()));
  ASSIGN_OR_RETURN(UniqueFd destination, driver_->BeginLoad(Soon()));
  RETURN_IF_ERROR(old_driver->ContinueState(Soon()));
  for (;;) {
    char chunk[65536];
    ssize_t n = ::read(source.get(), chunk, sizeof chunk);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    if (::write(destination.get(), chunk, static_cast<size_t>(n)) != n) return ErrnoError(errno, "state");
  }
  destination.reset();
  RETURN_IF_ERROR(driver_->FinishLoad(Soon()));
  old_driver.reset();
  old_mediator.reset();
  if (old_backend) old_backend->Kill();
  RETURN_IF_ERROR(driver_->Start(Soon()));
  RETURN_IF_ERROR(AwaitExpected());
  std::filesystem::remove(from, error);
  return AwaitWrites(1);
}

// The VMM may have its answers before the mediator says what it made of them.
absl::Status Harness::AwaitExpected() {
  std::unique_lock lock(mutex_);
  absl::Status expected;
  told_.wait_until(lock, Soon().when(),
                   [&] { return !absl::IsUnavailable(expected = mediator_->CheckExpected()); });
  return expected;
}

absl::Status Harness::Swap(v1::InflightAnswer inflight) {
  std::optional<BackendProcess> old_backend = std::move(backend_);
  ++backend_number_;
  RETURN_IF_ERROR(StartBackend());
  vhost::SwapOptions wanted;
  wanted.backend.set_socket(BackendSocket());
  wanted.backend.set_kind(options_.kind);
  wanted.inflight = inflight;
  auto swapped = mediator_->Swap(
      wanted, [] { return absl::OkStatus(); }, Soon());
  if (!swapped.ok()) return swapped.status();
  old_backend->Kill();
  return absl::OkStatus();
}

absl::Status Harness::AwaitWrites(uint64_t more) {
  absl::Status status = guest().AwaitWrites(more, Soon());
  if (status.ok()) return status;
  return Annotate(status, fmt::format("device: {}; guest: {}",
                                      mediator_ ? mediator_->Describe().ShortDebugString() : "", Console()));
}

absl::Status Harness::Verify() {
  auto figures = guest().Verify(Soon());
  if (!figures.ok()) return Annotate(figures.status(), Console());
  if (!figures->clean())
    return Error(absl::StatusCode::kDataLoss, "the guest found: {}", guest().errors_text());
  return guest().GoOn(Soon());
}

}  // namespace baton::lab
