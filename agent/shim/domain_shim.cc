#include "agent/shim/domain_shim.h"

#include <libvirt/libvirt.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/durable_file.h"
#include "common/log.h"
#include "common/version.h"

namespace baton::shim {

void DomainShim::GetReady() {
  // Does nothing the second time; what is wrong shows with the first connection.
  (void)::virInitialize();
}

absl::StatusOr<std::unique_ptr<DomainShim>> DomainShim::Create(const std::string& dir) {
  ASSIGN_OR_RETURN(ConfigStore config, ConfigStore::Load(dir));
  std::unique_ptr<DomainShim> shim(new DomainShim(std::move(config)));
  RETURN_IF_ERROR(shim->Init());
  return shim;
}

DomainShim::~DomainShim() {
  // Migrations use the connection and report through the control server.
  outgoing_.reset();
  incoming_.reset();
  caller_.reset();
  local_.reset();
  devices_.reset();
  if (control_) control_->Close();
}

absl::Status DomainShim::Init() {
  ASSIGN_OR_RETURN(loop_, EventLoop::Create());
  RETURN_IF_ERROR(loop_->WatchTermination([this](int signal) { OnSignal(signal); }));
  const v1::ShimConfig config = config_.Get();
  // libvirt answers while the disk is waited for.
  Connect(config);
  ASSIGN_OR_RETURN(journal_, DomainJournal::Open(config.state_dir() + "/journal"));
  ControlServer::Handlers handlers;
  handlers.on_request = [this](v1::ShimRequest request, UniqueFd fd, Respond respond) {
    OnRequest(std::move(request), std::move(fd), std::move(respond));
  };
  handlers.snapshot = [this] { return Snapshot(); };
  ASSIGN_OR_RETURN(control_,
                   ControlServer::Start(*loop_, config.run_dir() + "/shim.sock", std::move(handlers)));
  return absl::OkStatus();
}

int DomainShim::Run() {
  loop_->Post([this] { Begin(); });
  loop_->Run();
  return exit_code_;
}

void DomainShim::Exit(int code) {
  if (exiting_) return;
  exiting_ = true;
  exit_code_ = code;
  loop_->Quit();
}

void DomainShim::OnSignal(int signal) {
  if (const std::string active = Active(); !active.empty()) {
    LOG_WARN("{}: ignored during migration {}", ::strsignal(signal), active);
    return;
  }
  LOG_INFO("{}: leaving; the domain goes on", ::strsignal(signal));
  Exit(0);
}

DomainOutgoingParts DomainShim::OutgoingParts() {
  OpenCaller(config_.Get().libvirt_uri());
  return {config_,
          *journal_,
          *local_,
          *caller_,
          devices_.get(),
          [this](const v1::SideReport& report) { TakeReport(report); },
          [this] { loop_->Post([this] { PublishStatus(); }); }};
}

void DomainShim::Connect(const v1::ShimConfig& config) {
  vmm::LibvirtOptions options;
  options.uri = config.libvirt_uri();
  options.events = vmm::LibvirtOptions::Events::kMigration;
  vmm::LibvirtCallbacks callbacks;
  callbacks.on_state = [this](bool up, const std::string&) {
    loop_->Post([this, up] {
      if (outgoing_) outgoing_->OnLibvirt(up);
      if (incoming_) incoming_->OnLibvirt(up);
    });
  };
  callbacks.on_event = [this, uuid = config.domain_uuid()](const vmm::DomainEvent& event) {
    if (event.uuid != uuid) return;
    loop_->Post([this, event] {
      if (outgoing_) outgoing_->OnEvent(event);
      if (incoming_) incoming_->OnEvent(event);
    });
  };
  local_ = vmm::LibvirtConnection::Start(std::move(options), std::move(callbacks));
  // One that was started neither for a domain that comes nor for its devices is there to move it.
  if (config.migration_id().empty() && !config.domain_host().resident()) OpenCaller(config.libvirt_uri());
}

void DomainShim::OpenCaller(const std::string& uri) {
  if (caller_) return;
  vmm::LibvirtOptions options;
  options.uri = uri;
  options.events = vmm::LibvirtOptions::Events::kNone;
  vmm::LibvirtCallbacks callbacks;
  callbacks.on_state = [this](bool, const std::string&) {
    loop_->Post([this] {
      if (outgoing_) outgoing_->OnCaller();
    });
  };
  caller_ = vmm::LibvirtConnection::Start(std::move(options), std::move(callbacks));
}

void DomainShim::Begin() {
  const v1::ShimConfig config = config_.Get();
  StartDevices(config);
  // The domain must not come before its devices are served.
  if (!config.migration_id().empty() && devices_failed_.ok()) {
    DomainIncomingParts parts{config_,
                              *journal_,
                              *local_,
                              devices_.get(),
                              [this](const v1::SideReport& report) { TakeReport(report); },
                              [this] { loop_->Post([this] { PublishStatus(); }); },
                              [this] { loop_->Post([this] { PublishStatus(); }); }};
    incoming_ = std::make_unique<DomainIncoming>(std::move(parts));
  }
  if (!config.outgoing().migration_id().empty())
    outgoing_ = std::make_unique<DomainOutgoing>(OutgoingParts(), config.outgoing(), /*resume=*/true);
  PublishStatus();
}

void DomainShim::StartDevices(const v1::ShimConfig& config) {
  if (config.devices().empty()) return;
  // Lost at a reboot, as QEMU is: without it no shim has served these devices to this QEMU.
  const std::string mark = config.run_dir() + "/served";
  const bool returning = ::access(mark.c_str(), F_OK) == 0;
  auto devices =
      DomainDevices::Start(config, returning, [this] { loop_->Post([this] { PublishStatus(); }); });
  if (!devices.ok()) {
    LOG_ERROR("{}", Message(devices.status()));
    devices_failed_ = devices.status();
    return;
  }
  devices_ = *std::move(devices);
  if (absl::Status marked = WriteFileDurable(mark, ""); !marked.ok()) LOG_WARN("{}", Message(marked));
}

void DomainShim::OnRequest(v1::ShimRequest request, UniqueFd fd, Respond respond) {
  auto answer = [&](const absl::Status& status) {
    respond(status.ok() ? absl::StatusOr<v1::ShimReply>(v1::ShimReply()) : status);
  };
  auto of = [&](const std::string& migration) -> absl::StatusOr<DomainOutgoing*> {
    if (!outgoing_ || outgoing_->id() != migration)
      return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "migration {} is not under way here",
                   migration);
    return outgoing_.get();
  };
  switch (request.body_case()) {
    case v1::ShimRequest::kStatus: {
      v1::ShimReply reply;
      *reply.mutable_status() = Status();
      return respond(std::move(reply));
    }
    case v1::ShimRequest::kStartOutgoing:
      return answer(StartOutgoing(request.start_outgoing()));
    case v1::ShimRequest::kCancel: {
      auto outgoing = of(request.cancel().migration_id());
      return answer(outgoing.ok() ? (*outgoing)->Cancel() : outgoing.status());
    }
    case v1::ShimRequest::kRetune: {
      auto outgoing = of(request.retune().migration_id());
      return answer(outgoing.ok() ? (*outgoing)->Retune(request.retune()) : outgoing.status());
    }
    case v1::ShimRequest::kResolve: {
      auto outgoing = of(request.resolve().migration_id());
      return answer(outgoing.ok() ? (*outgoing)->Resolve(request.resolve()) : outgoing.status());
    }
    case v1::ShimRequest::kAcceptChannel:
      if (!incoming_)
        return answer(
            Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "no migration to this host is under way"));
      return answer(incoming_->AcceptChannel(request.accept_channel(), std::move(fd)));
    case v1::ShimRequest::kAbortIncoming:
      return AbortIncoming(request.abort_incoming(), std::move(respond));
    case v1::ShimRequest::kReportAck:
      Acknowledge(request.report_ack());
      return answer(absl::OkStatus());
    case v1::ShimRequest::kRetire: {
      absl::Status retired = Retire();
      answer(retired);
      if (retired.ok()) loop_->Post([this] { Exit(0); });
      return;
    }
    default:
      return respond(Error(absl::StatusCode::kUnimplemented, "request {} is not for the shim of a domain",
                           static_cast<int>(request.body_case())));
  }
}

absl::Status DomainShim::StartOutgoing(const v1::StartOutgoingCommand& command) {
  if (outgoing_ && outgoing_->id() == command.migration_id()) return absl::OkStatus();
  {
    std::lock_guard lock(mutex_);
    if (reports_.contains({command.migration_id(), v1::ROLE_SOURCE})) return absl::OkStatus();
  }
  if (const std::string active = Active(); !active.empty())
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "the domain is in migration {}", active);
  if (!command.has_domain() || command.domain().tunnel_dir().empty() ||
      command.domain().tunnel_dir()[0] != '/')
    return absl::InvalidArgumentError("the command does not say how the domain is to be moved");
  RETURN_IF_ERROR(journal_->CheckSettled());
  // A crash of the host ends the guest's QEMU and libvirt's call as well: what is lost with it is a word that
  // this migration was begun, and the disk is waited for while the connections are made.
  RETURN_IF_ERROR(config_.UpdateSoon([&](v1::ShimConfig& c) { *c.mutable_outgoing() = command; }));
  outgoing_.reset();
  outgoing_ = std::make_unique<DomainOutgoing>(OutgoingParts(), command, /*resume=*/false);
  PublishStatus();
  // After the answer.
  loop_->Post([this, id = command.migration_id()] {
    if (absl::Status synced = config_.Sync(); !synced.ok()) LOG_WARN("migration {}: {}", id, Message(synced));
  });
  return absl::OkStatus();
}

void DomainShim::AbortIncoming(const v1::AbortIncomingCommand& command, Respond respond) {
  if (!incoming_ || incoming_->id() != command.migration_id())
    return respond(Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "migration {} does not come here",
                         command.migration_id()));
  incoming_->Abort([respond](absl::Status status) {
    if (!status.ok()) return respond(status);
    respond(v1::ShimReply());
  });
}

absl::Status DomainShim::Retire() {
  if (const std::string active = Active(); !active.empty())
    return Error(absl::StatusCode::kFailedPrecondition, "migration {} is under way", active);
  return absl::OkStatus();
}

void DomainShim::Acknowledge(const v1::ReportAck& ack) {
  const bool source = ack.role() == v1::ROLE_SOURCE;
  bool reported;
  {
    std::lock_guard lock(mutex_);
    auto it = reports_.find({ack.migration_id(), ack.role()});
    reported = it != reports_.end();
    if (reported && !it->second.done()) return;
    if (reported) reports_.erase(it);
  }
  // The agent repeats itself as long as the file names the migration. A shim that was started anew has yet to
  // see the end by itself.
  if (!reported && (source ? outgoing_ != nullptr : incoming_ != nullptr)) return;
  // A later shim has nothing left to do with it.
  const v1::ShimConfig config = config_.Get();
  absl::Status status;
  if (source && config.outgoing().migration_id() == ack.migration_id()) {
    outgoing_.reset();
    caller_.reset();
    status = config_.Update([](v1::ShimConfig& c) { c.clear_outgoing(); });
  } else if (!source && config.migration_id() == ack.migration_id()) {
    incoming_.reset();
    status = config_.Update([](v1::ShimConfig& c) {
      c.clear_migration_id();
      c.clear_token();
      c.clear_domain();
    });
  } else if (!reported) {
    // It was cleared, and could not be written then.
    status = config_.Update([](v1::ShimConfig&) {});
  }
  if (!status.ok()) LOG_WARN("{}", Message(status));
}

std::string DomainShim::Active() const {
  if (outgoing_ && !outgoing_->ended()) return outgoing_->id();
  if (incoming_ && !incoming_->ended() && incoming_->failure().ok()) return incoming_->id();
  return "";
}

void DomainShim::TakeReport(const v1::SideReport& report) {
  {
    std::lock_guard lock(mutex_);
    reports_[{report.migration_id(), report.role()}] = report;
  }
  v1::ShimReply event;
  *event.mutable_event_report() = report;
  control_->Publish(std::move(event));
}

std::vector<v1::SideReport> DomainShim::Reports() const {
  std::lock_guard lock(mutex_);
  std::vector<v1::SideReport> reports;
  for (const auto& [key, report] : reports_) reports.push_back(report);
  // One that is under way last: whoever keeps only one keeps that.
  std::stable_partition(reports.begin(), reports.end(), [](const v1::SideReport& r) { return r.done(); });
  return reports;
}

v1::ShimStatus DomainShim::Status() const {
  const v1::ShimConfig config = config_.Get();
  v1::ShimStatus status;
  status.set_pid(static_cast<uint64_t>(::getpid()));
  status.set_version(kVersion);
  v1::Vm* vm = status.mutable_vm();
  vm->set_driver("libvirt");
  vm->mutable_domain()->set_uuid(config.domain_uuid());
  vm->set_migration(Active().empty() ? "" : "migrations/" + Active());
  // libvirt knows how the domain is; this only says what the shim is for.
  vm->set_state(incoming_ && !incoming_->ended() ? v1::Vm::INCOMING : v1::Vm::RUNNING);
  if (auto now = journal_->Now(); now.ok()) vm->set_epoch(now->epoch);
  if (incoming_) {
    status.set_incoming_ready(incoming_->ready());
    if (absl::Status failure = incoming_->failure(); !failure.ok()) {
      vm->set_state(v1::Vm::STOPPED);
      vm->set_message(Message(failure));
      status.set_reason(ReasonOf(failure, v1::DESTINATION_START_FAILED));
    }
  }
  if (!devices_failed_.ok()) {
    vm->set_state(v1::Vm::STOPPED);
    vm->set_message(Message(devices_failed_));
    status.set_reason(ReasonOf(devices_failed_, v1::DESTINATION_BACKEND_FAILED));
  }
  if (devices_) {
    for (v1::Device& device : devices_->Describe()) *vm->add_devices() = std::move(device);
  }
  if (auto reports = Reports(); !reports.empty()) *status.mutable_report() = reports.back();
  return status;
}

std::vector<v1::ShimReply> DomainShim::Snapshot() const {
  v1::ShimReply status;
  *status.mutable_event_status() = Status();
  std::vector<v1::ShimReply> events{status};
  for (v1::SideReport& report : Reports()) *events.emplace_back().mutable_event_report() = std::move(report);
  return events;
}

void DomainShim::PublishStatus() {
  v1::ShimReply event;
  *event.mutable_event_status() = Status();
  control_->Publish(std::move(event));
}

}  // namespace baton::shim
