#include "server/fleet/fleet.h"

#include <algorithm>
#include <chrono>
#include <set>

#include "common/grpc_status.h"
#include "common/log.h"
#include "server/fleet/session.h"
#include "server/names.h"

namespace baton::server {
namespace {

google::protobuf::Timestamp WallNow() {
  google::protobuf::Timestamp stamp;
  auto now = std::chrono::system_clock::now().time_since_epoch();
  stamp.set_seconds(std::chrono::duration_cast<std::chrono::seconds>(now).count());
  stamp.set_nanos(static_cast<int32_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count() %
                                       1'000'000'000));
  return stamp;
}

}  // namespace

Fleet::Fleet(EventLoop& loop, Store& store, ServerMetrics& metrics, const FleetOptions& options)
    : loop_(loop), store_(store), metrics_(metrics), options_(options) {}

Fleet::~Fleet() = default;

absl::Status Fleet::Load() {
  auto read = [](const Item& item, auto& record) {
    return record.ParseFromString(item.value)
               ? absl::OkStatus()
               : Error(absl::StatusCode::kDataLoss, "store: {} cannot be read", item.key);
  };
  RETURN_IF_ERROR(
      store_.ForEach("hosts/", [&](const Item& item) { return read(item, hosts_[IdOf(item.key)].record); }));
  RETURN_IF_ERROR(
      store_.ForEach("vms/", [&](const Item& item) { return read(item, vms_[IdOf(item.key)].record); }));
  RETURN_IF_ERROR(ForgetSwaps());
  CountHosts();
  return absl::OkStatus();
}

void Fleet::CountHosts() {
  metrics_.hosts_known->Set(static_cast<double>(hosts_.size()));
  metrics_.hosts_connected->Set(static_cast<double>(sessions_.size()));
  metrics_.vms_known->Set(static_cast<double>(vms_.size()));
}

// --- sessions ---

absl::StatusOr<uint64_t> Fleet::Connect(const v1::Hello& hello, std::shared_ptr<AgentLink> link) {
  if (hello.version() != 1) {
    return Error(
        absl::StatusCode::kFailedPrecondition,
        "this batond speaks version 1 of the agent protocol, the agent speaks {}: upgrade the older one",
        hello.version());
  }
  ASSIGN_OR_RETURN(std::string id, ParseName(hello.host().name(), "hosts", "hello.host.name"));
  HostEntry& entry = hosts_[id];
  if (entry.session && hello.start_counter() < entry.session->start_counter) {
    return Error(absl::StatusCode::kAlreadyExists, "a newer agent of hosts/{} has a session", id);
  }
  HostRecord record = entry.record;
  bool cordoned = record.host().cordoned();
  *record.mutable_host() = hello.host();
  record.mutable_host()->set_cordoned(cordoned);
  record.mutable_host()->clear_connected();
  record.set_start_counter(hello.start_counter());
  if (absl::Status status = SaveHost(entry, record); !status.ok()) {
    if (entry.record.host().name().empty()) hosts_.erase(id);
    return status;
  }
  if (entry.session) {
    CloseSession(entry.session,
                 Error(absl::StatusCode::kAborted, "replaced by a newer session of hosts/{}", id));
  }
  auto session = std::make_shared<Session>();
  session->number = next_session_++;
  session->host = id;
  session->start_counter = hello.start_counter();
  session->link = std::move(link);
  session->last_heard = Clock::now();
  sessions_[session->number] = session;
  entry.session = session;

  v1::ServerMessage welcome;
  welcome.mutable_welcome()->set_server_version(options_.server_version);
  auto interval = std::chrono::duration_cast<std::chrono::milliseconds>(options_.heartbeat_interval);
  welcome.mutable_welcome()->mutable_heartbeat_interval()->set_seconds(interval.count() / 1000);
  welcome.mutable_welcome()->mutable_heartbeat_interval()->set_nanos(
      static_cast<int32_t>(interval.count() % 1000 * 1'000'000));
  session->link->Send(std::move(welcome));
  metrics_.sessions->Increment();
  CountHosts();
  LOG_INFO("hosts/{}: session {} of agent {} with {} VMs and {} reports", id, session->number,
           hello.host().agent_version(), hello.vms_size(), hello.reports_size());

  // VMs that the host had and has no more went while there was no session.
  std::set<std::string> present;
  for (const v1::Vm& vm : hello.vms()) present.insert(IdFor(vm));
  const std::set<std::string> unread(hello.unread_drivers().begin(), hello.unread_drivers().end());
  std::vector<std::string> gone;
  for (const auto& [vm_id, vm] : vms_) {
    if (unread.count(vm.record.vm().driver())) continue;
    if (vm.record.owner() == "hosts/" + id && !present.count(vm_id) && !vm.starting) gone.push_back(vm_id);
  }
  entry.vms.clear();
  for (const auto& [vm_id, vm] : vms_) {
    if (!present.count(vm_id)) ClearStale(vm_id, "hosts/" + id);
  }
  for (const std::string& vm_id : gone)
    DropVm(entry, vm_id, fmt::format("hosts/{} does not have it any more", id));
  for (const v1::Vm& vm : hello.vms()) TakeVm(entry, vm);
  ArmHeartbeat(session);
  if (observer_) observer_->OnHostUp(id, hello);
  return session->number;
}

void Fleet::ArmHeartbeat(const std::shared_ptr<Session>& session) {
  session->timer =
      loop_.At(session->last_heard + options_.heartbeat_timeout, [this, weak = std::weak_ptr(session)] {
        auto session = weak.lock();
        if (!session || !sessions_.count(session->number)) return;
        if (Clock::now() - session->last_heard < options_.heartbeat_timeout) return ArmHeartbeat(session);
        LOG_WARN("hosts/{}: the agent has been silent for {} s; its session is closed", session->host,
                 std::chrono::duration_cast<std::chrono::seconds>(options_.heartbeat_timeout).count());
        CloseSession(session, absl::DeadlineExceededError("no heartbeat came in time"));
      });
}

void Fleet::CloseSession(const std::shared_ptr<Session>& session, const absl::Status& why) {
  session->link->Close(why);
  Disconnect(session->number);
}

void Fleet::Disconnect(uint64_t number) {
  auto found = sessions_.find(number);
  if (found == sessions_.end()) return;
  std::shared_ptr<Session> session = found->second;
  sessions_.erase(found);
  loop_.Cancel(session->timer);
  metrics_.sessions_lost->Increment();
  HostEntry& entry = hosts_[session->host];
  if (entry.session == session) {
    entry.session = nullptr;
    *entry.record.mutable_host()->mutable_last_seen() = WallNow();
  }
  CountHosts();
  LOG_INFO("hosts/{}: session {} ended", session->host, number);
  std::vector<uint64_t> streams;
  for (const auto& [stream, console] : consoles_) {
    if (console.host == session->host) streams.push_back(stream);
  }
  for (uint64_t stream : streams) {
    ConsoleSink sink = std::move(consoles_[stream].sink);
    consoles_.erase(stream);
    sink("", true,
         Error(v1::AGENT_UNREACHABLE, absl::StatusCode::kUnavailable, "the session of hosts/{} broke",
               session->host));
  }
  auto pending = std::move(session->pending);
  session->pending.clear();
  for (auto& [id, command] : pending) {
    loop_.Cancel(command.timer);
    command.callback({Error(v1::AGENT_UNREACHABLE, absl::StatusCode::kUnavailable,
                            "the session with the agent of hosts/{} broke", session->host),
                      false,
                      {}});
  }
  if (observer_) observer_->OnHostDown(session->host);
}

void Fleet::Receive(uint64_t number, const v1::AgentMessage& message) {
  auto found = sessions_.find(number);
  if (found == sessions_.end()) return;
  std::shared_ptr<Session> session = found->second;
  session->last_heard = Clock::now();
  HostEntry& entry = hosts_[session->host];
  switch (message.body_case()) {
    case v1::AgentMessage::kHeartbeat:
      entry.record.mutable_host()->set_memory_free(message.heartbeat().memory_free());
      *entry.record.mutable_host()->mutable_last_seen() = WallNow();
      return;
    case v1::AgentMessage::kResult:
      return OnResult(*session, message.result());
    case v1::AgentMessage::kVm:
      return TakeVm(entry, message.vm());
    case v1::AgentMessage::kVmGone: {
      std::string id = IdOf(message.vm_gone().vm());
      if (!entry.vms.count(id)) {
        // A domain that goes by its UUID here, because its name was taken.
        auto same = std::find_if(entry.vms.begin(), entry.vms.end(),
                                 [&](const auto& vm) { return vm.second.domain().name() == id; });
        if (same != entry.vms.end()) id = same->first;
      }
      entry.vms.erase(id);
      ClearStale(id, entry.record.host().name());
      return DropVm(entry, id, message.vm_gone().message());
    }
    case v1::AgentMessage::kReport:
      if (observer_) observer_->OnReport(session->host, message.report());
      return;
    case v1::AgentMessage::kConsole: {
      auto console = consoles_.find(message.console().stream());
      if (console == consoles_.end() || console->second.host != session->host) return;
      const v1::ConsoleData& data = message.console();
      absl::Status error = data.error().empty() ? absl::OkStatus() : absl::UnavailableError(data.error());
      ConsoleSink sink = console->second.sink;
      if (data.close()) consoles_.erase(console);
      return sink(data.data(), data.close(), error);
    }
    default:
      LOG_WARN("hosts/{}: a message that has no place here was ignored", session->host);
  }
}

void Fleet::OnResult(Session& session, const v1::CommandResult& result) {
  auto found = session.pending.find(result.id());
  if (found == session.pending.end()) {
    LOG_DEBUG("hosts/{}: result of unknown command {}", session.host, result.id());
    return;
  }
  Session::Pending pending = std::move(found->second);
  session.pending.erase(found);
  loop_.Cancel(pending.timer);
  CommandReply reply;
  reply.answered = true;
  reply.result = result;
  if (result.code() != 0) {
    reply.status = absl::Status(static_cast<absl::StatusCode>(result.code()), result.message());
    if (result.reason() != v1::REASON_UNSPECIFIED && v1::Reason_IsValid(result.reason())) {
      reply.status = WithReason(std::move(reply.status), result.reason());
    }
  }
  pending.callback(std::move(reply));
}

void Fleet::Send(const std::string& host, v1::Command command, ReplyCallback callback) {
  auto found = hosts_.find(host);
  if (found == hosts_.end() || !found->second.session) {
    // Later, like every other answer, so that callers need not expect to be called back from within.
    loop_.Post([callback = std::move(callback), host] {
      callback({Error(v1::AGENT_UNREACHABLE, absl::StatusCode::kUnavailable,
                      "the agent of hosts/{} has no session", host),
                false,
                {}});
    });
    return;
  }
  std::shared_ptr<Session> session = found->second.session;
  uint64_t id = next_command_++;
  command.set_id(id);
  // The agent keeps the command's own timeout; this one only catches an agent that does not.
  Duration limit = std::chrono::seconds(command.timeout().seconds()) + std::chrono::seconds(5);
  Session::Pending pending;
  pending.callback = std::move(callback);
  pending.timer = loop_.At(Clock::now() + limit, [weak = std::weak_ptr(session), id] {
    auto session = weak.lock();
    if (!session) return;
    auto found = session->pending.find(id);
    if (found == session->pending.end()) return;
    ReplyCallback callback = std::move(found->second.callback);
    session->pending.erase(found);
    callback({Error(v1::AGENT_UNREACHABLE, absl::StatusCode::kDeadlineExceeded,
                    "the agent of hosts/{} did not answer in time", session->host),
              false,
              {}});
  });
  session->pending.emplace(id, std::move(pending));
  v1::ServerMessage message;
  *message.mutable_command() = std::move(command);
  session->link->Send(std::move(message));
}

void Fleet::SendAck(const std::string& host, const v1::ReportAck& ack) {
  auto found = hosts_.find(host);
  if (found == hosts_.end() || !found->second.session) return;
  v1::ServerMessage message;
  *message.mutable_report_ack() = ack;
  found->second.session->link->Send(std::move(message));
}

bool Fleet::Connected(const std::string& host) const {
  auto found = hosts_.find(host);
  return found != hosts_.end() && found->second.session;
}

// --- resources ---

absl::Status Fleet::SaveHost(HostEntry& entry, HostRecord record) {
  // Free memory and times change all the time and are told anew by every session: not worth a write.
  HostRecord before = entry.record, after = record;
  for (HostRecord* r : {&before, &after}) {
    r->mutable_host()->clear_memory_free();
    r->mutable_host()->clear_last_seen();
    r->mutable_host()->clear_vm_count();
  }
  if (before.SerializeAsString() != after.SerializeAsString()) {
    Batch batch;
    batch.Put(record.host().name(), record.SerializeAsString());
    RETURN_IF_ERROR(store_.Commit(batch).status());
  }
  *record.mutable_host()->mutable_last_seen() = WallNow();
  entry.record = std::move(record);
  return absl::OkStatus();
}

v1::Host Fleet::View(const HostEntry& host) const {
  v1::Host view = host.record.host();
  view.set_connected(host.session != nullptr);
  uint32_t count = 0;
  for (const auto& [id, vm] : vms_) count += vm.record.owner() == view.name();
  view.set_vm_count(count);
  v1::Host stable = host.record.host();
  stable.clear_memory_free();
  stable.clear_last_seen();
  view.set_etag(fmt::format("{:016x}", std::hash<std::string>()(stable.SerializeAsString())));
  return view;
}

absl::StatusOr<v1::Host> Fleet::GetHost(const std::string& id) const {
  auto found = hosts_.find(id);
  if (found == hosts_.end()) return NoSuch("hosts", id);
  return View(found->second);
}

std::vector<v1::Host> Fleet::ListHosts(const std::string& after, size_t limit) const {
  std::vector<v1::Host> hosts;
  for (auto it = hosts_.upper_bound(after); it != hosts_.end() && hosts.size() < limit; ++it) {
    hosts.push_back(View(it->second));
  }
  return hosts;
}

absl::StatusOr<v1::Host> Fleet::SetCordon(const std::string& id, bool cordoned) {
  auto found = hosts_.find(id);
  if (found == hosts_.end()) return NoSuch("hosts", id);
  HostRecord record = found->second.record;
  record.mutable_host()->set_cordoned(cordoned);
  RETURN_IF_ERROR(SaveHost(found->second, std::move(record)));
  return View(found->second);
}

// --- consoles ---

absl::StatusOr<uint64_t> Fleet::OpenConsole(const std::string& vm, ConsoleSink sink) {
  auto found = vms_.find(vm);
  if (found == vms_.end()) return NoSuch("vms", vm);
  std::string host = IdOf(found->second.record.owner());
  if (!Connected(host)) {
    return Error(v1::AGENT_UNREACHABLE, absl::StatusCode::kUnavailable,
                 "the agent of hosts/{} has no session", host);
  }
  uint64_t stream = next_console_++;
  consoles_[stream] = {host, std::move(sink)};
  v1::Command command;
  command.mutable_console_open()->set_vm(vm);
  command.mutable_console_open()->set_stream(stream);
  command.mutable_timeout()->set_seconds(10);
  Send(host, std::move(command), [this, stream](CommandReply reply) {
    auto console = consoles_.find(stream);
    if (reply.status.ok() || console == consoles_.end()) return;
    ConsoleSink sink = std::move(console->second.sink);
    consoles_.erase(console);
    sink("", true, reply.status);
  });
  return stream;
}

void Fleet::ConsoleInput(uint64_t stream, const std::string& data) {
  auto found = consoles_.find(stream);
  if (found == consoles_.end()) return;
  auto host = hosts_.find(found->second.host);
  if (host == hosts_.end() || !host->second.session) return;
  v1::ServerMessage message;
  message.mutable_console()->set_stream(stream);
  message.mutable_console()->set_data(data);
  host->second.session->link->Send(std::move(message));
}

void Fleet::CloseConsole(uint64_t stream) {
  auto found = consoles_.find(stream);
  if (found == consoles_.end()) return;
  auto host = hosts_.find(found->second.host);
  consoles_.erase(found);
  if (host == hosts_.end() || !host->second.session) return;
  v1::ServerMessage message;
  message.mutable_console()->set_stream(stream);
  message.mutable_console()->set_close(true);
  host->second.session->link->Send(std::move(message));
}

}  // namespace baton::server
