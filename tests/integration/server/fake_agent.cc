#include "tests/integration/server/fake_agent.h"

namespace baton::test {

FakeAgent::FakeAgent(std::string name, std::shared_ptr<grpc::Channel> channel)
    : name_(std::move(name)), channel_(std::move(channel)), thread_([this] { Run(); }) {}

FakeAgent::~FakeAgent() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    if (context_) context_->TryCancel();
  }
  changed_.notify_all();
  thread_.join();
}

void FakeAgent::Run() {
  while (true) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stopping_ || !(paused_ || hanging_); });
      if (stopping_) return;
    }
    // A back-off that ends when the channel is ready or the test is over.
    if (channel_->WaitForConnected(std::chrono::system_clock::now() + std::chrono::milliseconds(200)))
      RunSession();
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::milliseconds(60), [&] { return stopping_; });
  }
}

void FakeAgent::RunSession() {
  auto stub = v1::AgentSession::NewStub(channel_);
  grpc::ClientContext context;
  std::unique_ptr<Stream> stream;
  {
    std::lock_guard lock(mutex_);
    if (stopping_ || paused_) return;
    context_ = &context;
  }
  stream = stub->Session(&context);
  {
    std::lock_guard lock(mutex_);
    v1::AgentMessage hello;
    *hello.mutable_hello() = MakeHello();
    stream->Write(hello);
    stream_ = stream.get();
  }
  std::thread heartbeats;
  v1::ServerMessage message;
  while (stream->Read(&message)) {
    switch (message.body_case()) {
      case v1::ServerMessage::kWelcome: {
        const auto& interval = message.welcome().heartbeat_interval();
        heartbeats =
            std::thread(&FakeAgent::Heartbeats, this,
                        std::chrono::seconds(interval.seconds()) + std::chrono::nanoseconds(interval.nanos()),
                        stream.get());
        std::lock_guard lock(mutex_);
        ++sessions_;
        break;
      }
      case v1::ServerMessage::kCommand:
        OnCommand(message.command());
        break;
      case v1::ServerMessage::kReportAck: {
        std::lock_guard lock(mutex_);
        auto found = reports_.find({message.report_ack().migration_id(), message.report_ack().role()});
        if (found != reports_.end() && found->second.sequence() <= message.report_ack().sequence()) {
          reports_.erase(found);
        }
        acked_.insert(message.report_ack().migration_id());
        break;
      }
      case v1::ServerMessage::kConsole: {
        std::lock_guard lock(mutex_);
        console_input_ += message.console().data();
        break;
      }
      default:
        break;
    }
    changed_.notify_all();
  }
  {
    std::lock_guard lock(mutex_);
    stream_ = nullptr;
  }
  changed_.notify_all();
  if (heartbeats.joinable()) heartbeats.join();
  std::lock_guard lock(mutex_);
  context_ = nullptr;
  // What was held in a session can never be answered in another.
  held_.clear();
  last_status_ = stream->Finish();
  changed_.notify_all();
}

void FakeAgent::Heartbeats(Duration interval, const Stream* stream) {
  std::unique_lock lock(mutex_);
  v1::AgentMessage message;
  message.mutable_heartbeat();
  // Twice as often as asked for, so that a busy machine does not make it look dead.
  while (!changed_.wait_for(lock, interval / 2, [&] { return stream_ != stream; })) {
    if (!hanging_) Send(message);
  }
}

v1::Vm FakeAgent::MakeVm(const std::string& id) const { return vms_.at(id); }

v1::Hello FakeAgent::MakeHello() const {
  v1::Hello hello;
  hello.set_version(1);
  hello.set_start_counter(start_counter_);
  hello.mutable_host()->set_name("hosts/" + name_);
  hello.mutable_host()->set_peer_address("127.0.0.1:1");
  hello.mutable_host()->set_agent_version("fake");
  for (const auto& [id, vm] : vms_) *hello.add_vms() = vm;
  for (const auto& [key, report] : reports_) *hello.add_reports() = report;
  return hello;
}

void FakeAgent::Send(const v1::AgentMessage& message) {
  if (stream_) stream_->Write(message);
}

void FakeAgent::OnCommand(const v1::Command& command) {
  std::lock_guard lock(mutex_);
  commands_[command.body_case()].push_back(command);
  if (holding_.count(command.body_case())) {
    held_[command.body_case()].push_back(command);
    return;
  }
  v1::AgentMessage message;
  *message.mutable_result() = Carry(command);
  Send(message);
}

v1::CommandResult FakeAgent::Carry(const v1::Command& command) {
  v1::CommandResult result;
  if (auto scripted = scripted_.find(command.body_case()); scripted != scripted_.end()) {
    result = scripted->second;
    scripted_.erase(scripted);
    result.set_id(command.id());
    if (command.has_start_vm() && result.code() != 0) {
      // As baton-agent does: what was begun is removed first.
      v1::AgentMessage message;
      message.mutable_vm_gone()->set_vm(command.start_vm().spec().name());
      message.mutable_vm_gone()->set_message(result.message());
      Send(message);
    }
    return result;
  }
  result.set_id(command.id());
  auto fail = [&](absl::StatusCode code, const std::string& message) {
    result.set_code(static_cast<int>(code));
    result.set_message(message);
  };
  switch (command.body_case()) {
    case v1::Command::kStartVm: {
      const v1::VmSpec& spec = command.start_vm().spec();
      v1::Vm& vm = vms_[spec.name()];
      vm.set_name("vms/" + spec.name());
      vm.set_host("hosts/" + name_);
      vm.set_state(v1::Vm::RUNNING);
      *vm.mutable_spec() = spec;
      if (vm.epoch() == 0) vm.set_epoch(1);
      *result.mutable_vm() = vm;
      break;
    }
    case v1::Command::kStopVm:
      if (vms_.erase(command.stop_vm().vm()) == 0) fail(absl::StatusCode::kNotFound, "no such VM");
      break;
    case v1::Command::kInspectVm: {
      auto found = vms_.find(command.inspect_vm().vm());
      if (found == vms_.end()) {
        fail(absl::StatusCode::kNotFound, "no such VM");
        break;
      }
      *result.mutable_inspection()->mutable_vm() = found->second;
      result.mutable_inspection()->set_epoch(found->second.epoch());
      result.mutable_inspection()->set_memory_used(64 << 20);
      if (command.inspect_vm().has_dirty_sample()) result.mutable_inspection()->set_dirty_rate(1 << 20);
      auto* block = result.mutable_inspection()->add_blocks();
      block->set_id("ram");
      block->set_size(256 << 20);
      break;
    }
    case v1::Command::kPrepareIncoming: {
      const auto& prepare = command.prepare_incoming();
      for (const v1::Finding& finding : findings_) *result.mutable_prepared()->add_findings() = finding;
      if (incoming_.count(prepare.migration_id()) && incoming_[prepare.migration_id()] == v1::REFUSED) {
        fail(absl::StatusCode::kFailedPrecondition, "was refused");
        break;
      }
      if (!prepare.validate_only()) incoming_[prepare.migration_id()] = v1::IDLE;
      result.mutable_prepared()->set_peer_address("127.0.0.1:1");
      result.mutable_prepared()->set_token(std::string(32, 't'));
      break;
    }
    case v1::Command::kAbortIncoming: {
      auto& verdict = incoming_[command.abort_incoming().migration_id()];
      if (verdict == v1::OWNER) {
        fail(absl::StatusCode::kFailedPrecondition, "owns the guest");
      } else {
        verdict = v1::REFUSED;
      }
      break;
    }
    case v1::Command::kStartOutgoing:
      outgoing_.insert(command.start_outgoing().migration_id());
      break;
    case v1::Command::kCancelOutgoing:
      if (!outgoing_.count(command.cancel_outgoing().migration_id())) {
        fail(absl::StatusCode::kNotFound, "no such migration");
      }
      break;
    case v1::Command::kConsoleOpen:
      console_stream_ = command.console_open().stream();
      break;
    default:
      break;
  }
  return result;
}

void FakeAgent::AddVm(const std::string& id, uint64_t epoch, v1::Vm::State state) {
  std::lock_guard lock(mutex_);
  v1::Vm& vm = vms_[id];
  vm.set_name("vms/" + id);
  vm.set_host("hosts/" + name_);
  vm.set_state(state);
  vm.set_epoch(epoch);
  vm.mutable_spec()->set_name(id);
  v1::AgentMessage message;
  *message.mutable_vm() = vm;
  Send(message);
}

void FakeAgent::AddDomain(const std::string& name, const std::string& uuid, v1::Vm::State state) {
  std::lock_guard lock(mutex_);
  v1::Vm& vm = vms_[name];
  vm.set_name("vms/" + name);
  vm.set_host("hosts/" + name_);
  vm.set_state(state);
  vm.set_driver("libvirt");
  vm.mutable_domain()->set_name(name);
  vm.mutable_domain()->set_uuid(uuid);
  v1::AgentMessage message;
  *message.mutable_vm() = vm;
  Send(message);
}

void FakeAgent::RemoveVm(const std::string& id) {
  std::lock_guard lock(mutex_);
  vms_.erase(id);
  v1::AgentMessage message;
  message.mutable_vm_gone()->set_vm(id);
  message.mutable_vm_gone()->set_message("removed by the test");
  Send(message);
}

bool FakeAgent::HasVm(const std::string& id) const {
  std::lock_guard lock(mutex_);
  return vms_.count(id) > 0;
}

void FakeAgent::Hold(v1::Command::BodyCase kind) {
  std::lock_guard lock(mutex_);
  holding_.insert(kind);
}

void FakeAgent::Release(v1::Command::BodyCase kind) {
  std::lock_guard lock(mutex_);
  holding_.erase(kind);
  for (const v1::Command& command : held_[kind]) {
    v1::AgentMessage message;
    *message.mutable_result() = Carry(command);
    Send(message);
  }
  held_[kind].clear();
}

void FakeAgent::AnswerNext(v1::Command::BodyCase kind, v1::CommandResult result) {
  std::lock_guard lock(mutex_);
  scripted_[kind] = std::move(result);
}

void FakeAgent::SetFindings(std::vector<v1::Finding> findings) {
  std::lock_guard lock(mutex_);
  findings_ = std::move(findings);
}

void FakeAgent::Pause() {
  std::unique_lock lock(mutex_);
  paused_ = true;
  if (context_) context_->TryCancel();
  changed_.wait(lock, [&] { return stream_ == nullptr; });
}

void FakeAgent::Hang() {
  std::lock_guard lock(mutex_);
  hanging_ = true;
}

void FakeAgent::Wake() {
  {
    std::lock_guard lock(mutex_);
    hanging_ = false;
  }
  changed_.notify_all();
}

void FakeAgent::Resume() {
  std::lock_guard lock(mutex_);
  paused_ = false;
  ++start_counter_;
  changed_.notify_all();
}

void FakeAgent::Report(v1::SideReport report) {
  std::lock_guard lock(mutex_);
  report.set_sequence(++sequence_);
  if (report.role() == v1::ROLE_DESTINATION &&
      (report.handover() == v1::OWNER || report.handover() == v1::REFUSED)) {
    incoming_[report.migration_id()] = report.handover();
  }
  reports_[{report.migration_id(), report.role()}] = report;
  v1::AgentMessage message;
  *message.mutable_report() = report;
  Send(message);
}

bool FakeAgent::Await(const std::function<bool()>& condition) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(60), condition);
}

bool FakeAgent::AwaitCommand(v1::Command::BodyCase kind, int count) {
  return Await([&] { return static_cast<int>(commands_[kind].size()) >= count; });
}

v1::Command FakeAgent::LastCommand(v1::Command::BodyCase kind) const {
  std::lock_guard lock(mutex_);
  auto found = commands_.find(kind);
  return found == commands_.end() || found->second.empty() ? v1::Command() : found->second.back();
}

int FakeAgent::CommandCount(v1::Command::BodyCase kind) const {
  std::lock_guard lock(mutex_);
  auto found = commands_.find(kind);
  return found == commands_.end() ? 0 : static_cast<int>(found->second.size());
}

bool FakeAgent::AwaitSession(int count) {
  return Await([&] { return sessions_ >= count; });
}

bool FakeAgent::AwaitAck(const std::string& migration) {
  return Await([&] { return acked_.count(migration) > 0; });
}

grpc::Status FakeAgent::last_status() const {
  std::lock_guard lock(mutex_);
  return last_status_;
}

std::string FakeAgent::console_input() const {
  std::lock_guard lock(mutex_);
  return console_input_;
}

void FakeAgent::ConsoleOutput(const std::string& data, bool close) {
  std::lock_guard lock(mutex_);
  v1::AgentMessage message;
  message.mutable_console()->set_stream(console_stream_);
  message.mutable_console()->set_data(data);
  message.mutable_console()->set_close(close);
  Send(message);
}

}  // namespace baton::test
