#include "agent/daemon/agent.h"

#include <fcntl.h>
#include <sys/file.h>

#include <cerrno>
#include <chrono>

#include "agent/daemon/host_info.h"
#include "common/durable_file.h"
#include "common/grpc_credentials.h"
#include "common/log.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;

// For a batond that sets no timeout.
constexpr Duration kDefaultCommandTimeout = seconds(60);

Deadline DeadlineOf(const v1::Command& command) {
  Duration timeout =
      seconds(command.timeout().seconds()) + std::chrono::nanoseconds(command.timeout().nanos());
  return Deadline::After(timeout > Duration(0) ? timeout : kDefaultCommandTimeout);
}

// For metrics: the name of the body's field, "start_vm".
std::string KindOf(const v1::Command& command) {
  const auto* field = v1::Command::descriptor()->FindFieldByNumber(static_cast<int>(command.body_case()));
  return field == nullptr ? "unknown" : field->name();
}

}  // namespace

Agent::Agent(AgentConfig config)
    : config_(std::move(config)),
      store_(config_),
      reports_(config_.state_dir + "/reports"),
      backends_(config_) {}

absl::StatusOr<std::unique_ptr<Agent>> Agent::Start(AgentConfig config,
                                                    std::unique_ptr<ShimLauncher> launcher) {
  RETURN_IF_ERROR(CheckAgentEnvironment(config));
  std::unique_ptr<Agent> agent(new Agent(std::move(config)));
  agent->launcher_ = launcher ? std::move(launcher) : MakeShimLauncher(agent->config_, &agent->vm_tasks_);
  RETURN_IF_ERROR(agent->LockStateDir());
  RETURN_IF_ERROR(agent->StartServices());
  return agent;
}

absl::Status Agent::LockStateDir() {
  std::string path = config_.state_dir + "/agent.lock";
  lock_ = UniqueFd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!lock_) return ErrnoError(errno, path);
  if (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0)
    return Error(absl::StatusCode::kFailedPrecondition, "another baton-agent runs with state_dir {}",
                 config_.state_dir);
  return absl::OkStatus();
}

absl::Status Agent::StartServices() {
  start_counter_ = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                                             std::chrono::system_clock::now().time_since_epoch())
                                             .count());
  RETURN_IF_ERROR(reports_.Load());
  host_ = DescribeHost(config_, qemu_, Deadline::After(seconds(20)));
  VmEvents events;
  events.on_vm = [this](const v1::Vm& vm) {
    if (auto s = session()) s->Send(vm);
  };
  events.on_gone = [this](const std::string& vm, const std::string& message) {
    if (auto s = session()) s->SendGone(vm, message);
  };
  events.on_report = [this](const v1::SideReport& report) {
    if (auto s = session()) s->Send(report);
  };
  vms_ = std::make_unique<VmManager>(
      VmManagerParts{config_, store_, reports_, backends_, qemu_, *launcher_, metrics_, vm_tasks_},
      std::move(events));
  consoles_ = std::make_unique<ConsoleRelay>([this](const v1::ConsoleData& data) {
    auto s = session();
    return s != nullptr && s->Send(data);
  });
  if (config_.metrics) {
    auto endpoint = MetricsEndpoint::Start(*config_.metrics, metrics_.registry());
    if (!endpoint.ok()) return Annotate(endpoint.status(), "metrics");
    metrics_endpoint_ = *std::move(endpoint);
  }
  if (!config_.peer.require_tls)
    LOG_WARN("peer.tls is off: guest memory travels unprotected, which only loopback and unix sockets allow");
  if (config_.peer.tls.any()) {
    auto tls = stream::TlsContext::Load(config_.peer.tls.ca, config_.peer.tls.cert, config_.peer.tls.key);
    if (!tls.ok()) return Annotate(tls.status(), "peer");
  }
  StartLibvirt();
  // Peers find their VMs from the first connection on.
  RETURN_IF_ERROR(vms_->FindAgain(Deadline::After(seconds(60))));
  if (domains_) RETURN_IF_ERROR(domains_->FindAgain(Deadline::After(seconds(60))));
  launcher_->KeepSpare();
  ASSIGN_OR_RETURN(peer_port_, PeerPort::Start(config_, *vms_, domains_.get(), metrics_, peer_tasks_));
  TlsFiles tls{config_.session_tls.ca, config_.session_tls.cert, config_.session_tls.key};
  auto channel = MakeChannel(config_.batond, tls, config_.session_server_name, LongStreamArguments());
  if (!channel.ok()) return Annotate(channel.status(), "batond");
  if (!config_.session_tls.any()) LOG_WARN("the session with batond is not protected by TLS");
  Session::Handlers handlers;
  handlers.hello = [this] { return MakeHello(); };
  handlers.on_command = [this](const v1::Command& command, uint64_t session) { OnCommand(command, session); };
  handlers.on_report_ack = [this](const v1::ReportAck& ack) {
    reports_.Acknowledge(ack.migration_id(), ack.role(), ack.sequence());
  };
  handlers.on_console = [this](const v1::ConsoleData& data) { consoles_->OnData(data); };
  handlers.on_state = [this](bool up) {
    metrics_.SetSessionUp(up);
    if (!up) consoles_->CloseAll();
  };
  auto session = std::make_shared<Session>(*channel, std::move(handlers));
  {
    std::lock_guard lock(session_mutex_);
    session_ = std::move(session);
  }
  return absl::OkStatus();
}

void Agent::StartLibvirt() {
  if (config_.libvirt.uri.empty()) return;
  VmEvents events;
  events.on_vm = [this](const v1::Vm& vm) {
    if (auto s = session()) s->Send(Localize(vm));
  };
  events.on_report = [this](const v1::SideReport& report) {
    if (auto s = session()) s->Send(report);
  };
  domains_ = std::make_unique<DomainManager>(
      DomainManagerParts{config_, store_, reports_, backends_, *launcher_, metrics_, vm_tasks_},
      std::move(events));
  vmm::InventoryOptions options;
  options.libvirt.uri = config_.libvirt.uri;
  options.mediator_dir = config_.libvirt.socket_dir;
  vmm::InventoryCallbacks callbacks;
  callbacks.on_vm = [this](const v1::Vm& vm) { domains_->Tell(vm.domain().uuid()); };
  callbacks.on_gone = [this](const v1::Vm& vm, const std::string& message) {
    domains_->OnGone(vm.domain().uuid(), [&] {
      const std::string name = Localize(vm).name();
      if (auto s = session()) s->SendGone(name.substr(name.find('/') + 1), message);
    });
  };
  callbacks.on_read = [this] {
    // What batond knows of this host's domains may be from before the agent or libvirt was restarted.
    if (!libvirt_unread_.exchange(false)) return;
    if (auto s = session()) s->Renew();
  };
  libvirt_ = vmm::LibvirtInventory::Start(std::move(options), std::move(callbacks));
  domains_->Use(libvirt_.get());
  // The first Hello lists what is there; a libvirt that is slow or absent must not keep the agent from its
  // session.
  if (!libvirt_->WaitForFirst(Deadline::After(seconds(3))))
    LOG_WARN("libvirt {} has not answered yet: {}", config_.libvirt.uri, libvirt_->connection().trouble());
}

v1::Vm Agent::Localize(v1::Vm vm) const {
  vm.set_host("hosts/" + config_.name);
  // A VM of Baton's own has the name first.
  const std::string id = vm.name().substr(vm.name().find('/') + 1);
  if (auto own = vms_->Find(id); own != nullptr && own->listed()) vm.set_name("vms/" + vm.domain().uuid());
  domains_->Complete(&vm);
  return vm;
}

bool Agent::IsDomain(const std::string& vm) const {
  return domains_ && vms_->Find(vm) == nullptr && domains_->Has(vm);
}

absl::Status Agent::Forward(const std::string& vm, const v1::ShimRequest& request, Deadline deadline) {
  return IsDomain(vm) ? domains_->Forward(vm, request, deadline) : vms_->Forward(vm, request, deadline);
}

absl::Status Agent::CheckOurs(const std::string& vm) const {
  if (!libvirt_ || vms_->Find(vm) != nullptr) return absl::OkStatus();
  if (!libvirt_->Find(vm).ok()) return absl::OkStatus();
  return Error(
      v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
      "vms/{} is a libvirt domain of hosts/{}: starting and stopping it is libvirt's; it goes on as it is "
      "(virsh shutdown)",
      vm, config_.name);
}

Agent::~Agent() {
  // Nothing new comes in, then nothing runs any more, then the parts go. Shims stay.
  std::shared_ptr<Session> session;
  {
    std::lock_guard lock(session_mutex_);
    session.swap(session_);
  }
  session.reset();
  commands_.Stop();
  peer_tasks_.Stop();
  peer_port_.reset();
  vm_tasks_.Stop();
  if (domains_) domains_->Close();
  libvirt_.reset();
  domains_.reset();
  vms_.reset();
}

std::shared_ptr<Session> Agent::session() {
  std::lock_guard lock(session_mutex_);
  return session_;
}

v1::Hello Agent::MakeHello() {
  v1::Hello hello;
  hello.set_version(1);
  *hello.mutable_host() = host_;
  hello.mutable_host()->set_memory_free(MemoryAvailable());
  for (const v1::Vm& vm : vms_->Inventory()) *hello.add_vms() = vm;
  if (libvirt_) {
    // In this order, so that a first reading that ends meanwhile is not missed: it begins a new session.
    libvirt_unread_ = true;
    if (libvirt_->read()) {
      libvirt_unread_ = false;
    } else {
      hello.add_unread_drivers("libvirt");
    }
    for (const v1::Vm& vm : libvirt_->Vms()) *hello.add_vms() = Localize(vm);
  }
  for (const v1::SideReport& report : reports_.All()) *hello.add_reports() = report;
  hello.set_start_counter(start_counter_);
  return hello;
}

void Agent::OnCommand(const v1::Command& command, uint64_t session_number) {
  Deadline deadline = DeadlineOf(command);
  commands_.Post([this, command, session_number, deadline] {
    v1::CommandResult result = Execute(command, deadline);
    if (auto s = session()) s->Send(result, session_number);
  });
}

v1::CommandResult Agent::Execute(const v1::Command& command, Deadline deadline) {
  auto begin = Clock::now();
  v1::CommandResult result;
  absl::Status status = Run(command, deadline, &result);
  std::chrono::duration<double> took = Clock::now() - begin;
  metrics_.CountCommand(KindOf(command), status, took.count());
  result.set_id(command.id());
  if (!status.ok()) {
    LOG_WARN("command {} failed: {}", KindOf(command), Message(status));
    result.clear_body();
    result.set_code(static_cast<int>(status.code()));
    result.set_message(Message(status));
    result.set_reason(ReasonOf(status, v1::REASON_UNSPECIFIED));
  }
  return result;
}

absl::Status Agent::Run(const v1::Command& command, Deadline deadline, v1::CommandResult* result) {
  v1::ShimRequest request;
  switch (command.body_case()) {
    case v1::Command::kStartVm: {
      ASSIGN_OR_RETURN(*result->mutable_vm(), vms_->StartVm(command.start_vm(), deadline));
      return absl::OkStatus();
    }
    case v1::Command::kStopVm:
      RETURN_IF_ERROR(CheckOurs(command.stop_vm().vm()));
      return vms_->StopVm(command.stop_vm(), deadline);
    case v1::Command::kInspectVm: {
      ASSIGN_OR_RETURN(*result->mutable_inspection(), IsDomain(command.inspect_vm().vm())
                                                          ? domains_->Inspect(command.inspect_vm(), deadline)
                                                          : vms_->Inspect(command.inspect_vm(), deadline));
      return absl::OkStatus();
    }
    case v1::Command::kPrepareIncoming: {
      if (!command.prepare_incoming().source().domain_xml().empty()) {
        if (!domains_)
          return Error(v1::VALIDATION_FAILED, absl::StatusCode::kFailedPrecondition,
                       "host {} has no libvirt (`libvirt` in its agent's configuration)", config_.name);
        ASSIGN_OR_RETURN(*result->mutable_prepared(),
                         domains_->PrepareIncoming(command.prepare_incoming(), deadline));
        return absl::OkStatus();
      }
      ASSIGN_OR_RETURN(*result->mutable_prepared(),
                       vms_->PrepareIncoming(command.prepare_incoming(), deadline));
      return absl::OkStatus();
    }
    case v1::Command::kSwapDevice: {
      ASSIGN_OR_RETURN(*result->mutable_swapped(), vms_->SwapDevice(command.swap_device(), deadline));
      return absl::OkStatus();
    }
    case v1::Command::kAbortIncoming:
      if (domains_ && domains_->Expects(command.abort_incoming().migration_id()))
        return domains_->AbortIncoming(command.abort_incoming(), deadline);
      return vms_->AbortIncoming(command.abort_incoming(), deadline);
    case v1::Command::kStartOutgoing:
      if (domains_ && command.start_outgoing().has_domain())
        return domains_->StartOutgoing(command.start_outgoing(), deadline);
      return vms_->StartOutgoing(command.start_outgoing(), deadline);
    case v1::Command::kCancelOutgoing:
      *request.mutable_cancel() = command.cancel_outgoing();
      return Forward(command.cancel_outgoing().vm(), request, deadline);
    case v1::Command::kRetune:
      *request.mutable_retune() = command.retune();
      return Forward(command.retune().vm(), request, deadline);
    case v1::Command::kResolve:
      *request.mutable_resolve() = command.resolve();
      return Forward(command.resolve().vm(), request, deadline);
    case v1::Command::kConsoleOpen: {
      std::shared_ptr<VmEntry> entry = vms_->Find(command.console_open().vm());
      if (entry == nullptr || !entry->listed())
        return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "no VM {} on host {}",
                     command.console_open().vm(), config_.name);
      return consoles_->Open(command.console_open().stream(), entry->name(), entry->paths());
    }
    case v1::Command::kMediateDomain: {
      if (!domains_)
        return Error(absl::StatusCode::kFailedPrecondition,
                     "host {} has no libvirt (`libvirt` in its agent's configuration)", config_.name);
      ASSIGN_OR_RETURN(*result->mutable_mediated(), domains_->Mediate(command.mediate_domain(), deadline));
      return absl::OkStatus();
    }
    case v1::Command::BODY_NOT_SET:
      break;
  }
  return Error(absl::StatusCode::kUnimplemented, "this agent does not know the command");
}

}  // namespace baton::daemon
