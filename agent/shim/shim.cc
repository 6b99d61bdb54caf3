#include "agent/shim/shim.h"

#include <malloc.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "agent/shim/inspection.h"
#include "common/log.h"
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
  if (control_) control_->Close();
  vm_.reset();
}

absl::Status Shim::Init() {
  ASSIGN_OR_RETURN(loop_, EventLoop::Create());
  cancel_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!cancel_) return ErrnoError(errno, "eventfd");
  RETURN_IF_ERROR(WatchSignals());
  VirtualMachine::Callbacks callbacks;
  callbacks.on_change = [this] {
    if (!publish_pending_->exchange(true)) loop_->Post([this] { PublishStatus(); });
  };
  vm_ = std::make_unique<VirtualMachine>(config_, std::move(callbacks));
  RETURN_IF_ERROR(vm_->OpenJournal());
  ControlServer::Handlers handlers;
  handlers.on_request = [this](v1::ShimRequest request, UniqueFd fd, Respond respond) {
    OnRequest(std::move(request), std::move(fd), std::move(respond));
  };
  handlers.snapshot = [this] { return Snapshot(); };
  ASSIGN_OR_RETURN(control_,
                   ControlServer::Start(*loop_, config_.Get().run_dir() + "/shim.sock", std::move(handlers)));
  return absl::OkStatus();
}

absl::Status Shim::WatchSignals() {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&set, signal);
  // Before any thread is started, so that all of them inherit it.
  if (int error = ::pthread_sigmask(SIG_BLOCK, &set, nullptr); error != 0)
    return ErrnoError(error, "sigmask");
  (void)::signal(SIGPIPE, SIG_IGN);
  signals_.reset(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!signals_) return ErrnoError(errno, "signalfd");
  return loop_->Watch(signals_.get(), EPOLLIN, [this](uint32_t) { OnSignal(); });
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

void Shim::OnSignal() {
  signalfd_siginfo info;
  while (::read(signals_.get(), &info, sizeof(info)) == sizeof(info)) {
    if (info.ssi_signo == SIGHUP) continue;
    LOG_INFO("{}: leaving; the guest stays as it is, its disks wait for the next shim",
             ::strsignal(static_cast<int>(info.ssi_signo)));
    uint64_t one = 1;
    (void)!::write(cancel_.get(), &one, sizeof(one));
    Exit(0);
  }
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
  auto work = [this, result, adopt, mode = config.mode()] {
    Deadline deadline = Deadline::After(kStartTimeout);
    if (adopt) {
      *result = vm_->Adopt(deadline);
    } else if (mode == v1::ShimConfig::FRESH) {
      *result = vm_->StartFresh(deadline);
    } else {
      *result = vm_->StartIncoming(deadline);
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
    if (adopt) {
      absl::Status resumed = vm_->driver().Resume(Deadline::After(kStartTimeout));
      vm_->SetState(resumed.ok() ? v1::Vm::RUNNING : v1::Vm::PAUSED, Message(resumed));
    }
  };
  (void)StartTask("starting the VM", std::move(work), std::move(done));
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
  VirtualMachine::Ending ending = vm_->OnVmmExit();
  reason_ = ending.wanted ? v1::NONE : v1::SOURCE_VMM_FAILED;
  PublishStatus();
}

v1::ShimStatus Shim::Status() const {
  v1::ShimStatus status;
  status.set_pid(static_cast<uint64_t>(::getpid()));
  status.set_version(kVersion);
  *status.mutable_vm() = vm_->Describe();
  status.set_incoming_ready(status.vm().state() == v1::Vm::INCOMING);
  status.set_reason(reason_);
  return status;
}

std::vector<v1::ShimReply> Shim::Snapshot() const {
  v1::ShimReply status;
  *status.mutable_event_status() = Status();
  return {status};
}

void Shim::PublishStatus() {
  publish_pending_->store(false);
  v1::ShimReply event;
  *event.mutable_event_status() = Status();
  control_->Publish(std::move(event));
}

void Shim::OnRequest(v1::ShimRequest request, [[maybe_unused]] UniqueFd fd, Respond respond) {
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
    *reply.mutable_inspection() = **std::move(result);
    respond(std::move(reply));
  };
  absl::Status status = StartTask("inspecting the VM", std::move(work), std::move(done));
  if (!status.ok()) respond(status);
}

void Shim::Stop(const v1::StopVmCommand& command, Respond respond) {
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

void Shim::Retire(Respond respond) {
  if (!task_name_.empty() || vm_->state() != v1::Vm::STOPPED) {
    return respond(Error(absl::StatusCode::kFailedPrecondition,
                         "the VM is {}; a shim retires when its VM has ended",
                         v1::Vm::State_Name(vm_->state())));
  }
  vm_->Dismantle();
  respond(v1::ShimReply());
  loop_->Post([this] { Exit(0); });
}

}  // namespace baton::shim
