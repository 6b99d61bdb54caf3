#include "agent/daemon/session.h"

#include <algorithm>
#include <random>

#include "agent/daemon/host_info.h"
#include "common/grpc_status.h"
#include "common/log.h"

namespace baton::daemon {
namespace {

constexpr Duration kFirstBackoff = std::chrono::milliseconds(200);
// How long batond is dialled before the log says why it cannot be reached.
constexpr Duration kDialTime = std::chrono::seconds(5);
// A terminal shows a few KiB at a time; what is beyond this has scrolled away.
constexpr size_t kMaxConsoleBytes = 1 << 20;

Duration FromProto(const google::protobuf::Duration& d) {
  return std::chrono::seconds(d.seconds()) + std::chrono::nanoseconds(d.nanos());
}

// Whether `queued` says nothing that `message` does not say better: an earlier state of the same thing.
bool Supersedes(const v1::AgentMessage& message, const v1::AgentMessage& queued) {
  if (message.has_vm() && queued.has_vm()) return message.vm().name() == queued.vm().name();
  return message.has_report() && queued.has_report() && !queued.report().done() &&
         message.report().migration_id() == queued.report().migration_id() &&
         message.report().role() == queued.report().role();
}

}  // namespace

Session::Session(std::shared_ptr<grpc::Channel> channel, Handlers handlers, Duration max_backoff)
    : channel_(std::move(channel)), handlers_(std::move(handlers)), max_backoff_(max_backoff) {
  thread_ = std::thread([this] { Run(); });
}

Session::~Session() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    if (context_ != nullptr) context_->TryCancel();
    changed_.notify_all();
  }
  thread_.join();
}

void Session::Push(v1::AgentMessage message) {
  std::lock_guard lock(mutex_);
  if (!open_) return;
  // Keeps a slow connection from being sent every step of a progress that is long past. Order among messages
  // of different kinds about one thing (vm, gone) stays.
  for (auto queued = outbox_.rbegin(); queued != outbox_.rend(); ++queued) {
    if (queued->has_vm_gone() && message.has_vm()) break;
    if (Supersedes(message, *queued)) {
      *queued = std::move(message);
      return;
    }
  }
  outbox_.push_back(std::move(message));
  changed_.notify_all();
}

void Session::Send(const v1::Vm& vm) {
  v1::AgentMessage message;
  *message.mutable_vm() = vm;
  Push(std::move(message));
}

void Session::SendGone(const std::string& vm, const std::string& text) {
  v1::AgentMessage message;
  message.mutable_vm_gone()->set_vm(vm);
  message.mutable_vm_gone()->set_message(text);
  Push(std::move(message));
}

void Session::Send(const v1::SideReport& report) {
  v1::AgentMessage message;
  *message.mutable_report() = report;
  Push(std::move(message));
}

void Session::Send(const v1::CommandResult& result, uint64_t session) {
  {
    std::lock_guard lock(mutex_);
    if (session != session_) return;
  }
  v1::AgentMessage message;
  *message.mutable_result() = result;
  Push(std::move(message));
}

bool Session::Send(const v1::ConsoleData& data) {
  std::lock_guard lock(mutex_);
  if (!open_) return false;
  if (!data.close() && console_bytes_ + data.data().size() > kMaxConsoleBytes) return false;
  console_bytes_ += data.data().size();
  v1::AgentMessage message;
  *message.mutable_console() = data;
  outbox_.push_back(std::move(message));
  changed_.notify_all();
  return true;
}

void Session::Renew() {
  std::lock_guard lock(mutex_);
  if (context_ != nullptr) context_->TryCancel();
}

void Session::Run() {
  std::mt19937_64 random(std::random_device{}());
  std::uniform_real_distribution<double> jitter(0.75, 1.25);
  Duration backoff = kFirstBackoff;
  while (true) {
    RunOnce();
    std::unique_lock lock(mutex_);
    if (welcomed_) backoff = kFirstBackoff;
    auto pause = std::chrono::duration_cast<Duration>(backoff * jitter(random));
    backoff = std::min<Duration>(backoff * 2, max_backoff_);
    if (changed_.wait_for(lock, pause, [this] { return stopping_; })) return;
  }
}

void Session::AwaitConnection() {
  // gRPC connects only while somebody polls, and a call to a channel in TRANSIENT_FAILURE fails at once,
  // before it polled: between calls alone, a connection that came to be in the pause after a failure would
  // never be noticed.
  Deadline deadline = Deadline::After(kDialTime);
  while (!deadline.Expired()) {
    auto slice = std::chrono::system_clock::now() + std::chrono::milliseconds(100);
    if (channel_->WaitForConnected(slice)) return;
    std::lock_guard lock(mutex_);
    if (stopping_) return;
  }
  // The call that follows fails, and says why.
}

void Session::RunOnce() {
  grpc::ClientContext context;
  uint64_t session = 0;
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return;
    context_ = &context;
    session = ++session_;
    welcomed_ = false;
  }
  AwaitConnection();
  auto stub = v1::AgentSession::NewStub(channel_);
  auto stream = stub->Session(&context);
  // What happens from here on is queued behind the Hello, so nothing falls between inventory and events.
  v1::AgentMessage hello;
  {
    std::lock_guard lock(mutex_);
    outbox_.clear();
    console_bytes_ = 0;
    open_ = true;
  }
  *hello.mutable_hello() = handlers_.hello();
  std::thread writer;
  if (stream->Write(hello)) {
    writer = std::thread([&] { Write(*stream); });
    v1::ServerMessage message;
    while (stream->Read(&message)) OnMessage(message, session);
  }
  bool was_up = false;
  {
    std::lock_guard lock(mutex_);
    open_ = false;
    was_up = welcomed_;
    outbox_.clear();
    changed_.notify_all();
  }
  context.TryCancel();
  if (writer.joinable()) writer.join();
  absl::Status end = FromGrpc(stream->Finish());
  bool stopping = false;
  {
    std::lock_guard lock(mutex_);
    context_ = nullptr;
    stopping = stopping_;
  }
  if (was_up) handlers_.on_state(false);
  if (stopping) return;
  std::string error = end.ok() ? "closed by batond" : Message(end);
  if (was_up || error != last_error_) LOG_WARN("no session with batond: {}; trying again", error);
  last_error_ = error;
}

void Session::Write(grpc::ClientReaderWriter<v1::AgentMessage, v1::ServerMessage>& stream) {
  std::unique_lock lock(mutex_);
  while (open_) {
    if (outbox_.empty()) {
      if (changed_.wait_for(lock, heartbeat_) == std::cv_status::no_timeout || !open_ || !outbox_.empty())
        continue;
      v1::AgentMessage heartbeat;
      heartbeat.mutable_heartbeat()->set_memory_free(MemoryAvailable());
      outbox_.push_back(std::move(heartbeat));
    }
    v1::AgentMessage message = std::move(outbox_.front());
    outbox_.pop_front();
    if (message.has_console()) console_bytes_ -= std::min(console_bytes_, message.console().data().size());
    lock.unlock();
    bool written = stream.Write(message);
    lock.lock();
    if (!written) return;  // the reader hears of it, too
  }
}

void Session::OnMessage(const v1::ServerMessage& message, uint64_t session) {
  switch (message.body_case()) {
    case v1::ServerMessage::kWelcome: {
      {
        std::lock_guard lock(mutex_);
        welcomed_ = true;
        Duration interval = FromProto(message.welcome().heartbeat_interval());
        if (interval > Duration(0)) heartbeat_ = interval;
        changed_.notify_all();
      }
      last_error_.clear();
      LOG_INFO("session with batond {} is up", message.welcome().server_version());
      handlers_.on_state(true);
      break;
    }
    case v1::ServerMessage::kCommand:
      handlers_.on_command(message.command(), session);
      break;
    case v1::ServerMessage::kReportAck:
      handlers_.on_report_ack(message.report_ack());
      break;
    case v1::ServerMessage::kConsole:
      handlers_.on_console(message.console());
      break;
    case v1::ServerMessage::BODY_NOT_SET:
      LOG_DEBUG("a message of batond that this version does not know");
      break;
  }
}

}  // namespace baton::daemon
