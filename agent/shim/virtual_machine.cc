#include "agent/shim/virtual_machine.h"

#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>
#include <filesystem>
#include <utility>

#include "common/durable_file.h"
#include "common/log.h"
#include "common/units.h"
#include "common/vm_spec.h"

namespace baton::shim {
namespace {

using std::chrono::seconds;

// Largest time that a back-end may take to accept and to say what it offers.
constexpr Duration kBackendConnect = seconds(5);
// How long QEMU may take to come back to the devices of a shim that takes over.
constexpr Duration kVmmReconnect = seconds(5);

// A shim that was killed a moment ago may still be about to end.
constexpr Duration kFormerShimEnds = seconds(3);

absl::Status StartFailed(const absl::Status& status, v1::Reason reason) {
  return ReasonOf(status, v1::REASON_UNSPECIFIED) == v1::REASON_UNSPECIFIED ? WithReason(status, reason)
                                                                            : status;
}

// A sparse file never fails when it is made, but a guest that touches a page for which the tmpfs has no room
// dies (SIGBUS in the VMM). So the room is looked at first.
absl::Status CheckRoom(const std::string& path, uint64_t size) {
  std::string dir = std::filesystem::path(path).parent_path();
  struct statvfs fs {};
  if (::statvfs(dir.c_str(), &fs) < 0) return ErrnoError(errno, "guest memory in " + dir);
  uint64_t available = uint64_t{fs.f_bavail} * fs.f_frsize;
  if (available >= size) return absl::OkStatus();
  return Error(v1::RESOURCE_EXHAUSTED_REASON, absl::StatusCode::kResourceExhausted,
               "guest memory: {} are needed, {} has {} left", FormatSize(size), dir, FormatSize(available));
}

absl::Status CheckWritable(const std::string& dir) {
  if (::access(dir.c_str(), W_OK | X_OK) == 0) return absl::OkStatus();
  return ErrnoError(errno, "runtime directory " + dir);
}

}  // namespace

VirtualMachine::VirtualMachine(ConfigStore& config, Callbacks callbacks)
    : config_(config), callbacks_(std::move(callbacks)) {}

VirtualMachine::~VirtualMachine() {
  // QEMU first: it must not be told anything by mediators that go away while its monitor is still ours.
  driver_.reset();
  mediators_.clear();
}

absl::Status VirtualMachine::OpenJournal() {
  ASSIGN_OR_RETURN(journal_, migration::Journal::Open(config_.Get().state_dir() + "/journal",
                                                      Deadline::After(kFormerShimEnds)));
  if (journal_->dropped_bytes() > 0) {
    LOG_WARN("journal: dropped {} bytes of a write that was never finished", journal_->dropped_bytes());
  }
  return absl::OkStatus();
}

absl::StatusOr<migration::Ownership> VirtualMachine::ReadOwnership() const {
  return migration::ReplayOwnership(journal_->Records());
}

absl::Status VirtualMachine::MakeMemory(bool existing) {
  v1::ShimConfig config = config_.Get();
  absl::StatusOr<memory::RamBlock> block = absl::UnknownError("");
  if (existing) {
    block = memory::RamBlock::Open("mem", config.memory_path());
  } else {
    RETURN_IF_ERROR(CheckRoom(config.memory_path(), config.spec().memory_bytes()));
    block = memory::RamBlock::Create("mem", config.memory_path(), config.spec().memory_bytes());
  }
  if (!block.ok()) return Annotate(block.status(), "guest memory");
  std::vector<memory::RamBlock> blocks;
  blocks.push_back(*std::move(block));
  auto ram = std::make_unique<memory::GuestRam>(std::move(blocks));
  std::lock_guard lock(mutex_);
  ram_ = std::move(ram);
  return absl::OkStatus();
}

void VirtualMachine::OnMemoryTable(const std::vector<vhost::MemoryRegionInfo>& regions) {
  auto layout = vhost::LayoutFor(regions, *ram_);
  absl::Status status = layout.ok() ? ram_->SetLayout(*std::move(layout)) : layout.status();
  if (!status.ok()) LOG_ERROR("memory table of the VMM: {}", Message(status));
}

absl::Status VirtualMachine::StartMediators(bool required) {
  v1::ShimConfig config = config_.Get();
  for (int i = 0; i < config.spec().devices_size(); ++i) {
    vhost::MediatorOptions options;
    options.spec = config.spec().devices(i);
    const v1::ResolvedDevice& resolved = config.devices(i);
    options.backend = resolved.backend();
    options.fence.command.assign(resolved.fence().begin(), resolved.fence().end());
    options.fence.env = {{"BATON_VM", config.spec().name()}};
    if (resolved.has_fence_timeout()) options.fence.timeout = migration::ToDuration(resolved.fence_timeout());
    options.listen_path = vmm::DeviceSocketPath(config.run_dir(), options.spec.name());
    options.backend_required = required;
    options.vmm_returns = !required;
    options.memo_dir = config.run_dir();
    RETURN_IF_ERROR(AddMediator(std::move(options)));
  }
  return StartBalloon(required);
}

absl::Status VirtualMachine::AddMediator(vhost::MediatorOptions options) {
  options.whole_memory_tables = true;
  options.connect_timeout = kBackendConnect;
  options.ram = ram_.get();
  vhost::MediatorCallbacks callbacks;
  callbacks.on_memory = [this](const auto& regions) { OnMemoryTable(regions); };
  callbacks.on_change = [this](const v1::Device&) { Changed(); };
  auto mediator = vhost::Mediator::Start(std::move(options), std::move(callbacks));
  if (!mediator.ok()) return mediator.status();
  std::lock_guard lock(mutex_);
  mediators_.push_back(*std::move(mediator));
  return absl::OkStatus();
}

// Baton's own balloon: a back-end of this process, behind a mediator like every other.
absl::Status VirtualMachine::StartBalloon(bool required) {
  v1::ShimConfig config = config_.Get();
  if (!config.spec().free_page_hints()) return absl::OkStatus();
  vhost::BalloonBackendOptions balloon;
  balloon.name = kHintBalloonName;
  balloon.listen_path = config.run_dir() + "/balloon.sock";
  balloon.ram = ram_.get();
  balloon.state = config.balloon();
  balloon.on_state = [this](const v1::BalloonState& state) {
    absl::Status kept = config_.Update([&](v1::ShimConfig& c) { *c.mutable_balloon() = state; });
    if (!kept.ok()) LOG_WARN("state of the balloon: {}", Message(kept));
  };
  ASSIGN_OR_RETURN(balloon_, vhost::BalloonBackend::Start(std::move(balloon)));
  vhost::MediatorOptions options;
  options.spec.set_name(kHintBalloonName);
  options.spec.set_class_(v1::BALLOON);
  options.spec.set_num_queues(vhost::BalloonBackend::kQueues);
  options.spec.set_queue_size(vhost::BalloonBackend::kQueueSize);
  options.backend.set_socket(config.run_dir() + "/balloon.sock");
  // What it is asked can be done twice, so an order that is likely is good enough.
  options.backend.set_recovery(v1::RECOVERY_ORDERED);
  options.listen_path = vmm::DeviceSocketPath(config.run_dir(), kHintBalloonName);
  options.vmm_returns = !required;
  return AddMediator(std::move(options));
}

absl::Status VirtualMachine::StartQemu(bool incoming, Deadline deadline) {
  v1::ShimConfig config = config_.Get();
  vmm::QemuLaunch launch;
  launch.command.spec = config.spec();
  launch.command.qemu_path = config.qemu_path();
  launch.command.qemu_args.assign(config.qemu_args().begin(), config.qemu_args().end());
  launch.command.run_dir = config.run_dir();
  launch.command.memory_path = config.memory_path();
  launch.command.console_log = config.console_log();
  launch.command.kvm = config.kvm();
  launch.command.incoming = incoming;
  launch.env.insert(config.qemu_env().begin(), config.qemu_env().end());
  launch.log_path = config.run_dir() + "/qemu.log";
  auto driver = vmm::QmpDriver::Launch(std::move(launch), deadline);
  if (!driver.ok()) return driver.status();
  {
    std::lock_guard lock(mutex_);
    driver_ = *std::move(driver);
    start_time_ = std::time(nullptr);
  }
  return config_.Update([&](v1::ShimConfig& c) {
    c.set_vmm_pid(static_cast<uint64_t>(driver_->process().pid));
    c.set_vmm_start_time(driver_->process().start_time);
  });
}

absl::Status VirtualMachine::StartFresh(Deadline deadline) {
  v1::ShimConfig config = config_.Get();
  auto start = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(migration::Ownership before, ReadOwnership());
    using State = migration::Ownership::State;
    if (before.state == State::kYielded) {
      return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                   "the journal says that the guest was given away in {} and not what became of it",
                   before.migration);
    }
    uint64_t epoch = std::max<uint64_t>({1, config.epoch(), before.epoch + 1});
    RETURN_IF_ERROR(journal_->Reserve(8));
    RETURN_IF_ERROR(CheckWritable(config.run_dir()));
    RETURN_IF_ERROR(StartFailed(MakeMemory(false), v1::RESOURCE_EXHAUSTED_REASON));
    RETURN_IF_ERROR(StartFailed(StartMediators(true), v1::SOURCE_BACKEND_FAILED));
    RETURN_IF_ERROR(StartFailed(StartQemu(false, deadline), v1::SOURCE_VMM_FAILED));
    RETURN_IF_ERROR(journal_->Append({migration::JournalRecord::Kind::kOwner, epoch, ""}));
    SetEpoch(epoch);
    RETURN_IF_ERROR(config_.Update([&](v1::ShimConfig& c) {
      c.set_mode(v1::ShimConfig::ADOPT);
      c.set_epoch(epoch);
    }));
    return StartFailed(driver_->Start(deadline), v1::SOURCE_VMM_FAILED);
  };
  absl::Status status = start();
  if (!status.ok()) {
    Dismantle();
    return status;
  }
  SetState(v1::Vm::RUNNING);
  return absl::OkStatus();
}

absl::Status VirtualMachine::StartIncoming(Deadline deadline) {
  v1::ShimConfig config = config_.Get();
  auto start = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(migration::Ownership before, ReadOwnership());
    using State = migration::Ownership::State;
    if (before.state == State::kOwner || before.state == State::kYielded) {
      return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                   "the journal of this host says that it {} the guest",
                   before.state == State::kOwner ? "owns" : "has given away and not yet released");
    }
    // Room for every record that this VM may need is set aside now, not in the blackout.
    RETURN_IF_ERROR(journal_->Reserve(8));
    RETURN_IF_ERROR(CheckWritable(config.run_dir()));
    RETURN_IF_ERROR(StartFailed(MakeMemory(false), v1::RESOURCE_EXHAUSTED_REASON));
    RETURN_IF_ERROR(StartFailed(StartMediators(true), v1::DESTINATION_BACKEND_FAILED));
    RETURN_IF_ERROR(StartFailed(StartQemu(true, deadline), v1::DESTINATION_VMM_FAILED));
    return absl::OkStatus();
  };
  absl::Status status = start();
  if (!status.ok()) {
    Dismantle();
    return StartFailed(status, v1::DESTINATION_START_FAILED);
  }
  SetEpoch(config.epoch());
  SetState(v1::Vm::INCOMING);
  return absl::OkStatus();
}

absl::Status VirtualMachine::Adopt(Deadline deadline) {
  v1::ShimConfig config = config_.Get();
  SetEpoch(config.epoch());
  ProcessId process{static_cast<pid_t>(config.vmm_pid()), config.vmm_start_time()};
  if (process.pid == 0 || !ProcessAlive(process)) {
    return Error(v1::SOURCE_VMM_FAILED, absl::StatusCode::kNotFound, "QEMU (pid {}) is gone", process.pid);
  }
  RETURN_IF_ERROR(StartFailed(MakeMemory(true), v1::SOURCE_SHIM_FAILED));
  // The guest has stood still on its disks since the last shim died; a back-end that is away as well is
  // waited for.
  RETURN_IF_ERROR(StartFailed(StartMediators(false), v1::SOURCE_BACKEND_FAILED));
  auto driver = vmm::QmpDriver::Adopt(process, config.run_dir(), config.run_dir() + "/qemu.log", deadline);
  if (!driver.ok()) return StartFailed(driver.status(), v1::SOURCE_VMM_FAILED);
  {
    std::lock_guard lock(mutex_);
    driver_ = *std::move(driver);
    start_time_ = std::time(nullptr);
  }
  // QEMU tries each second. A guest that stands still must not be started before: QEMU would start its
  // devices on connections that are gone, and not try again.
  for (const auto& mediator : mediators_) {
    if (!mediator->WaitForVmm(deadline.Min(Deadline::After(kVmmReconnect)))) {
      LOG_WARN("device {}: QEMU has not come back to it yet", mediator->name());
    }
  }
  return absl::OkStatus();
}

bool VirtualMachine::has_vmm() const {
  std::lock_guard lock(mutex_);
  return driver_ != nullptr;
}

vhost::Mediator* VirtualMachine::FindMediator(const std::string& device) const {
  for (const auto& mediator : mediators_) {
    if (mediator->name() == device) return mediator.get();
  }
  return nullptr;
}

v1::Vm VirtualMachine::Describe() const {
  v1::ShimConfig config = config_.Get();
  v1::Vm vm;
  vm.set_name(config.spec().name());
  *vm.mutable_spec() = config.spec();
  vm.set_driver("qmp");
  vm.set_shim_pid(static_cast<uint64_t>(::getpid()));
  std::lock_guard lock(mutex_);
  vm.set_state(state_);
  vm.set_message(message_);
  vm.set_migration(migration_);
  vm.set_epoch(epoch_);
  if (start_time_ != 0) vm.mutable_start_time()->set_seconds(start_time_);
  if (driver_ && state_ != v1::Vm::STOPPED) vm.set_vmm_pid(static_cast<uint64_t>(driver_->pid()));
  for (const auto& mediator : mediators_) *vm.add_devices() = mediator->Describe();
  return vm;
}

v1::Vm::State VirtualMachine::state() const {
  std::lock_guard lock(mutex_);
  return state_;
}

void VirtualMachine::SetState(v1::Vm::State state, const std::string& message) {
  {
    std::lock_guard lock(mutex_);
    if (state_ == state && message_ == message) return;
    state_ = state;
    message_ = message;
  }
  LOG_INFO("VM is {}{}{}", v1::Vm::State_Name(state), message.empty() ? "" : ": ", message);
  Changed();
}

void VirtualMachine::SetMigration(const std::string& migration_id) {
  {
    std::lock_guard lock(mutex_);
    migration_ = migration_id;
  }
  Changed();
}

void VirtualMachine::SetEpoch(uint64_t epoch) {
  std::lock_guard lock(mutex_);
  epoch_ = epoch;
}

void VirtualMachine::Changed() {
  if (callbacks_.on_change) callbacks_.on_change();
}

VirtualMachine::Ending VirtualMachine::OnVmmExit() {
  Ending ending;
  if (!driver_) return ending;
  ending.text = driver_->DescribeExit();
  ending.wanted = driver_->GuestShutDown();
  Dismantle();
  SetState(v1::Vm::STOPPED, ending.text);
  return ending;
}

void VirtualMachine::Dismantle() {
  if (driver_) driver_->Kill();
  // Destroyed outside the lock: a mediator's last change calls back.
  std::vector<std::unique_ptr<vhost::Mediator>> mediators;
  {
    std::lock_guard lock(mutex_);
    mediators.swap(mediators_);
  }
  mediators.clear();
  balloon_.reset();
  v1::ShimConfig config = config_.Get();
  for (const v1::DeviceSpec& device : config.spec().devices())
    vhost::ForgetDevice(config.run_dir(), device.name());
  std::error_code ignored;
  std::filesystem::remove(config.memory_path(), ignored);
  std::filesystem::remove(vmm::QmpSocketPath(config.run_dir()), ignored);
  std::filesystem::remove(vmm::ConsoleSocketPath(config.run_dir()), ignored);
}

}  // namespace baton::shim
