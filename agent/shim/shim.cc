#include "agent/shim/shim.h"

#include <malloc.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "agent/shim/device_swap.h"
#include "agent/shim/inspection.h"
#include "common/log.h"
#include "common/pause_point.h"
#include "common/process.h"
#include "common/version.h"

namespace baton::shim {
namespace {

using std::chrono::seconds;

// A VMM that neither comes up nor exits within this is given up. Generous: a host under load starts slowly.
constexpr Duration kStartTimeout = seconds(60);
// How long a guest may take to power off, and how often it is reminded: a guest that has not yet loaded its
// button driver does not see the first press.
constexpr Duration kPowerDownTimeout = seconds(60);
constexpr Duration kPowerDownRepeat = seconds(5);
// Beside the sample itself.
constexpr Duration kInspectTimeout = seconds(30);

Duration FromProto(const google::protobuf::Duration& d) {
  return seconds(d.seconds()) + std::chrono::nanoseconds(d.nanos());
}

}  // namespace

absl::StatusOr<std::unique_ptr<Shim>> Shim::Create(const std::string& dir) {
  ASSIGN_OR_RETURN(ConfigStore config, ConfigStore::Load(dir));
  std::unique_ptr<Shim> shim(new Shim(std::move(config)));
  RETURN_IF_ERROR(shim->Init());
  return shim;
}

Shim::Shim(ConfigStore config)
    : config_(std::move(config)), publish_pending_(std::make_shared<std::atomic<bool>>(false)) {}

Shim::~Shim() {
  if (task_.joinable()) task_.join();
  // Engines use the VM; what they still report goes nowhere.
  migrations_.reset();
  if (control_) control_->Close();
  vm_.reset();
}

absl::Status Shim::Init() {
  ASSIGN_OR_RETURN(loop_, EventLoop::Create());
  cancel_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!cancel_) return ErrnoError(errno, "eventfd");
  RETURN_IF_ERROR(loop_->WatchTermination([this](int signal) { OnSignal(signal); }));
  VirtualMachine::Callbacks callbacks;
  callbacks.on_change = [this] {
    if (!publish_pending_->exchange(true)) loop_->Post([this] { PublishStatus(); });
  };
  vm_ = std::make_unique<VirtualMachine>(config_, std::move(callbacks));
  RETURN_IF_ERROR(vm_->OpenJournal());
  MigrationHost::Callbacks migration_callbacks;
  migration_callbacks.on_report = [this](const v1::SideReport& report) {
    v1::ShimReply event;
    *event.mutable_event_report() = report;
    control_->Publish(std::move(event));
  };
  migration_callbacks.on_end = [this](const std::string& id) {
    loop_->Post([this, id] { OnMigrationEnd(id); });
  };
  migrations_ = std::make_unique<MigrationHost>(*vm_, std::move(migration_callbacks));
  ControlServer::Handlers handlers;
  handlers.on_request = [this](v1::ShimRequest request, UniqueFd fd, Respond respond) {
    OnRequest(std::move(request), std::move(fd), std::move(respond));
  };
  handlers.snapshot = [this] { return Snapshot(); };
  ASSIGN_OR_RETURN(control_,
                   ControlServer::Start(*loop_, config_.Get().run_dir() + "/shim.sock", std::move(handlers)));
  return absl::OkStatus();
}

int Shim::Run() {
  loop_->Post([this] { BringUp(); });
  loop_->Run();
  return exit_code_;
}

void Shim::Exit(int code) {
  if (exiting_) return;
  exiting_ = true;
  exit_code_ = code;
  loop_->Quit();
}

void Shim::OnSignal(int signal) {
  if (migrations_->busy()) {
    LOG_WARN("{}: ignored during migration {}", ::strsignal(signal), migrations_->active());
    return;
  }
  LOG_INFO("{}: leaving; the guest stays as it is, its disks wait for the next shim", ::strsignal(signal));
  uint64_t one = 1;
  (void)!::write(cancel_.get(), &one, sizeof(one));
  Exit(0);
}

absl::Status Shim::StartTask(const std::string& what, std::function<void()> work,
                             std::function<void()> done) {
  if (!task_name_.empty()) {
    return Error(absl::StatusCode::kFailedPrecondition, "the shim is busy {}", task_name_);
  }
  if (exiting_) return absl::UnavailableError("the shim is exiting");
  task_name_ = what;
  task_ = std::thread([this, work = std::move(work), done = std::move(done)] {
    work();
    loop_->Post([this, done] {
      task_.join();
      task_name_.clear();
      done();
      if (std::exchange(vmm_ended_, false)) OnVmmExit();
      if (stop_after_task_) std::exchange(stop_after_task_, nullptr)();
      // What a task has freed goes back to the system: this process idles for months.
      ::malloc_trim(0);
    });
  });
  return absl::OkStatus();
}

void Shim::BringUp() {
  auto result = std::make_shared<absl::Status>();
  v1::ShimConfig config = config_.Get();
  bool adopt = config.mode() == v1::ShimConfig::ADOPT ||
               (config.vmm_pid() != 0 &&
                ProcessAlive({static_cast<pid_t>(config.vmm_pid()), config.vmm_start_time()}));
  auto work = [this, result, adopt, mode = config.mode(), run_dir = config.run_dir()] {
    Deadline deadline = Deadline::After(kStartTimeout);
    if (adopt) {
      *result = vm_->Adopt(deadline);
    } else if (mode == v1::ShimConfig::FRESH) {
      *result = vm_->StartFresh(deadline);
    } else {
      *result = vm_->StartIncoming(deadline);
      if (result->ok()) PausePoint(run_dir, "prepared");
    }
  };
  auto done = [this, result, adopt] {
    if (!result->ok()) {
      reason_ = ReasonOf(*result, v1::INTERNAL);
      LOG_ERROR("the VM was not started: {}", Message(*result));
      vm_->SetState(v1::Vm::STOPPED, Message(*result));
      return;
    }
    WatchVmm();
    absl::Status settled;
    if (adopt) {
      settled = SettleAdopted();
    } else if (vm_->state() == v1::Vm::INCOMING) {
      settled = migrations_->StartIncoming(/*recover=*/false);
      incoming_ready_ = settled.ok();
      PublishStatus();
    }
    if (settled.ok()) return;
    LOG_ERROR("{}", Message(settled));
    reason_ = ReasonOf(settled, v1::INTERNAL);
    if (vm_->state() == v1::Vm::INCOMING) {
      vm_->Dismantle();
      vm_->SetState(v1::Vm::STOPPED, Message(settled));
    } else {
      vm_->SetState(v1::Vm::PAUSED, Message(settled));
    }
  };
  (void)StartTask("starting the VM", std::move(work), std::move(done));
}

absl::Status Shim::SettleAdopted() {
  ASSIGN_OR_RETURN(migration::Ownership ownership, vm_->ReadOwnership());
  v1::ShimConfig config = config_.Get();
  vm_->SetEpoch(ownership.epoch);
  using State = migration::Ownership::State;
  switch (ownership.state) {
    case State::kOwner: {
      if (!config.migration_id().empty() && ownership.migration == config.migration_id() &&
          config.outgoing().migration_id().empty()) {
        // Came by a migration, whose end the old shim may not have told.
        return migrations_->StartIncoming(/*recover=*/true);
      }
      // A word of the outgoing migration in the journal (REFUSED) is the engine's business; without one the
      // guest had not been given away.
      absl::Status resumed = migrations_->ResumeOutgoing();
      if (resumed.code() != absl::StatusCode::kFailedPrecondition) return resumed;
      RETURN_IF_ERROR(vm_->driver().Resume(Deadline::After(kStartTimeout)));
      vm_->SetState(v1::Vm::RUNNING);
      if (!config.outgoing().migration_id().empty()) migrations_->ReportInterrupted(config.outgoing());
      return absl::OkStatus();
    }
    case State::kYielded:
      vm_->SetState(v1::Vm::PAUSED,
                    fmt::format("given away in migration {}; asking what became of it", ownership.migration));
      return migrations_->ResumeOutgoing();
    case State::kReleased:
      return migrations_->ResumeOutgoing();
    default:
      // Nothing is owned here; what had arrived of an undecided migration died with the old shim.
      vm_->SetState(v1::Vm::INCOMING, "the shim that received the guest died");
      return migrations_->StartIncoming(/*recover=*/true);
  }
}

void Shim::OnMigrationEnd(const std::string& migration_id) {
  auto ended = migrations_->OnEnd(migration_id);
  if (!ended) return;
  using End = MigrationHost::End;
  if (auto ownership = vm_->ReadOwnership(); ownership.ok()) vm_->SetEpoch(ownership->epoch);
  switch (ended->end) {
    case End::kRunning: {
      const uint64_t epoch = vm_->Describe().epoch();
      absl::Status status = config_.Update([&](v1::ShimConfig& c) {
        c.set_mode(v1::ShimConfig::ADOPT);
        c.set_epoch(epoch);
      });
      if (!status.ok()) LOG_WARN("{}", Message(status));
      vm_->SetState(v1::Vm::RUNNING);
      break;
    }
    case End::kPaused:
      vm_->SetState(v1::Vm::PAUSED, ended->report.message());
      break;
    case End::kReleased:
    case End::kRefused:
    case End::kLost: {
      if (std::exchange(watching_vmm_, false)) loop_->Unwatch(vm_->driver().exit_fd());
      vmm_ended_ = false;
      std::string how = ended->end == End::kLost ? vm_->driver().DescribeExit() : ended->report.message();
      reason_ = ended->report.reason();
      vm_->Dismantle();
      vm_->SetState(v1::Vm::STOPPED,
                    ended->end == End::kReleased ? "moved away in migration " + migration_id : how);
      break;
    }
  }
  if (abort_) {
    Respond respond = std::exchange(abort_, nullptr);
    if (ended->end != End::kRefused) {
      respond(Error(absl::StatusCode::kFailedPrecondition, "this host owns the guest of migration {}",
                    migration_id));
    } else {
      respond(v1::ShimReply());
      loop_->Post([this] { Exit(0); });
    }
  }
  if (std::exchange(vmm_ended_, false)) OnVmmExit();
  ::malloc_trim(0);
}

void Shim::AbortIncoming(const v1::AbortIncomingCommand& command, Respond respond) {
  absl::Status status = migrations_->AbortIncoming(command.migration_id());
  if (!status.ok()) return respond(status);
  if (migrations_->active() == command.migration_id()) {
    abort_ = std::move(respond);
    return;
  }
  respond(v1::ShimReply());
  loop_->Post([this] { Exit(0); });
}

void Shim::WatchVmm() {
  absl::Status status = loop_->Watch(vm_->driver().exit_fd(), EPOLLIN, [this](uint32_t) { OnVmmExit(); });
  if (!status.ok()) LOG_ERROR("cannot watch QEMU: {}", Message(status));
  watching_vmm_ = status.ok();
}

void Shim::OnVmmExit() {
  if (std::exchange(watching_vmm_, false)) loop_->Unwatch(vm_->driver().exit_fd());
  if (!task_name_.empty()) {
    vmm_ended_ = true;
    return;
  }
  if (migrations_->busy()) {
    vmm_ended_ = true;
    const std::string how = vm_->driver().DescribeExit();
    // The engine ends the VMM itself when the guest has moved away or was refused.
    if (!vm_->driver().killed()) LOG_WARN("{}", how);
    (void)migrations_->OnVmmExit(how);
    return;
  }
  VirtualMachine::Ending ending = vm_->OnVmmExit();
  reason_ = ending.wanted ? v1::NONE : v1::SOURCE_VMM_FAILED;
  PublishStatus();
}

v1::ShimStatus Shim::Status() const {
  v1::ShimStatus status;
  status.set_pid(static_cast<uint64_t>(::getpid()));
  status.set_version(kVersion);
  *status.mutable_vm() = vm_->Describe();
  status.set_incoming_ready(incoming_ready_ && status.vm().state() == v1::Vm::INCOMING);
  if (auto reports = migrations_->Reports(); !reports.empty()) *status.mutable_report() = reports.back();
  status.set_reason(reason_);
  return status;
}

std::vector<v1::ShimReply> Shim::Snapshot() const {
  v1::ShimReply status;
  *status.mutable_event_status() = Status();
  std::vector<v1::ShimReply> events{status};
  for (v1::SideReport& report : migrations_->Reports()) {
    *events.emplace_back().mutable_event_report() = std::move(report);
  }
  return events;
}

void Shim::PublishStatus() {
  publish_pending_->store(false);
  v1::ShimReply event;
  *event.mutable_event_status() = Status();
  control_->Publish(std::move(event));
}

void Shim::OnRequest(v1::ShimRequest request, UniqueFd fd, Respond respond) {
  auto answer = [&](const absl::Status& status) {
    respond(status.ok() ? absl::StatusOr<v1::ShimReply>(v1::ShimReply()) : status);
  };
  switch (request.body_case()) {
    case v1::ShimRequest::kStatus: {
      v1::ShimReply reply;
      *reply.mutable_status() = Status();
      return respond(std::move(reply));
    }
    case v1::ShimRequest::kInspect:
      return Inspect(request.inspect(), std::move(respond));
    case v1::ShimRequest::kStop:
      return Stop(request.stop(), std::move(respond));
    case v1::ShimRequest::kRetire:
      return Retire(std::move(respond));
    case v1::ShimRequest::kStartOutgoing:
      if (!task_name_.empty()) {
        return respond(Error(absl::StatusCode::kFailedPrecondition, "the shim is busy {}", task_name_));
      }
      return answer(migrations_->StartOutgoing(request.start_outgoing()));
    case v1::ShimRequest::kCancel:
      return answer(migrations_->Cancel(request.cancel().migration_id()));
    case v1::ShimRequest::kRetune:
      return answer(migrations_->Retune(request.retune()));
    case v1::ShimRequest::kResolve:
      return answer(migrations_->Resolve(request.resolve()));
    case v1::ShimRequest::kAcceptChannel:
      return answer(migrations_->AcceptChannel(request.accept_channel(), std::move(fd)));
    case v1::ShimRequest::kSwapDevice:
      return SwapDevice(request.swap_device(), std::move(respond));
    case v1::ShimRequest::kAbortIncoming:
      return AbortIncoming(request.abort_incoming(), std::move(respond));
    case v1::ShimRequest::kReportAck:
      migrations_->Acknowledge(request.report_ack());
      return answer(absl::OkStatus());
    default:
      return respond(Error(absl::StatusCode::kUnimplemented, "request {} is not known to this shim",
                           static_cast<int>(request.body_case())));
  }
}

void Shim::Inspect(const v1::InspectVmCommand& command, Respond respond) {
  auto result = std::make_shared<absl::StatusOr<v1::Inspection>>(absl::UnknownError(""));
  Duration sample = FromProto(command.dirty_sample());
  auto work = [this, result, sample] {
    *result = InspectVm(*vm_, sample, cancel_.get(), Deadline::After(sample + kInspectTimeout));
  };
  auto done = [result, respond] {
    if (!result->ok()) return respond(result->status());
    v1::ShimReply reply;
    *reply.mutable_inspection() = *std::move(*result);
    respond(std::move(reply));
  };
  absl::Status status = StartTask("inspecting the VM", std::move(work), std::move(done));
  if (!status.ok()) respond(status);
}

void Shim::Stop(const v1::StopVmCommand& command, Respond respond) {
  if (migrations_->busy()) {
    return respond(Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                         "the VM is in migration {}; cancel that first", migrations_->active()));
  }
  // The VM is RUNNING a moment before the task that started it ends; nobody should have to ask twice for
  // that.
  if (!task_name_.empty() && !stop_after_task_ && !exiting_) {
    stop_after_task_ = [this, command, respond] { Stop(command, respond); };
    return;
  }
  auto result = std::make_shared<absl::Status>();
  bool force = command.force();
  auto work = [this, result, force] {
    if (!vm_->has_vmm() || vm_->state() == v1::Vm::STOPPED) return;
    if (force) return vm_->driver().Kill();
    Deadline deadline = Deadline::After(kPowerDownTimeout);
    for (;;) {
      absl::Status asked = vm_->driver().PowerDown(deadline);
      if (asked.code() == absl::StatusCode::kUnavailable) return;  // it has ended
      if (!asked.ok()) {
        *result = asked;
        return;
      }
      if (WaitPidfd(vm_->driver().exit_fd(), deadline.Min(Deadline::After(kPowerDownRepeat))).ok()) return;
      if (deadline.Expired()) {
        *result = Error(absl::StatusCode::kDeadlineExceeded,
                        "the guest did not power off within {} s; force ends it",
                        std::chrono::duration_cast<seconds>(kPowerDownTimeout).count());
        return;
      }
    }
  };
  auto done = [this, result, respond] {
    if (!result->ok()) return respond(*result);
    if (std::exchange(watching_vmm_, false)) loop_->Unwatch(vm_->driver().exit_fd());
    vmm_ended_ = false;
    vm_->Dismantle();
    reason_ = v1::NONE;
    vm_->SetState(v1::Vm::STOPPED, "stopped on request");
    respond(v1::ShimReply());
    loop_->Post([this] { Exit(0); });
  };
  absl::Status status = StartTask("stopping the VM", std::move(work), std::move(done));
  if (!status.ok()) respond(status);
}

void Shim::SwapDevice(const v1::SwapDeviceCommand& command, Respond respond) {
  if (migrations_->busy()) {
    return respond(Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                         "the VM is in migration {}; swap its devices after that", migrations_->active()));
  }
  if (vm_->state() != v1::Vm::RUNNING) {
    return respond(Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                         "the VM is {}; devices of running VMs are swapped",
                         v1::Vm::State_Name(vm_->state())));
  }
  auto result = std::make_shared<absl::StatusOr<v1::DeviceSwapped>>(absl::UnknownError(""));
  auto work = [this, result, command] { *result = shim::SwapDevice(*vm_, command); };
  auto done = [result, respond] {
    if (!result->ok()) return respond(result->status());
    v1::ShimReply reply;
    *reply.mutable_swapped() = *std::move(*result);
    respond(std::move(reply));
  };
  absl::Status status = StartTask("swapping a back-end", std::move(work), std::move(done));
  if (!status.ok()) respond(status);
}

void Shim::Retire(Respond respond) {
  if (!task_name_.empty() || migrations_->busy() || vm_->state() != v1::Vm::STOPPED) {
    return respond(Error(absl::StatusCode::kFailedPrecondition,
                         "the VM is {}; a shim retires when its VM has ended",
                         v1::Vm::State_Name(vm_->state())));
  }
  vm_->Dismantle();
  respond(v1::ShimReply());
  loop_->Post([this] { Exit(0); });
}

}  // namespace baton::shim
