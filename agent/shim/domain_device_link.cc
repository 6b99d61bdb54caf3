#include "agent/shim/domain_device_link.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <set>
#include <thread>

#include "agent/migration/reporter.h"
#include "agent/stream/preamble.h"
#include "agent/vhost/inflight_answer.h"
#include "common/log.h"
#include "common/pause_point.h"

namespace baton::shim {
namespace {

using std::chrono::seconds;

constexpr Duration kDrainBound = seconds(5);
// For the destination to take the state of a device, in the blackout.
constexpr Duration kTellTimeout = seconds(3);
// Of an answer to the source.
constexpr Duration kAnswerTime = seconds(10);
// A migration may take long before a device stops; Stop() ends the wait.
constexpr Duration kIdle = std::chrono::hours(24);

}  // namespace

// --- source ---

DomainDeviceSender::DomainDeviceSender(DomainDevices& devices, Options options)
    : devices_(devices),
      options_(std::move(options)),
      drain_bound_(migration::DurationOr(options_.params.has_drain_timeout(), options_.params.drain_timeout(),
                                         kDrainBound)) {
  devices_.SetStopHandler([this](const std::string& device, const absl::StatusOr<v1::DeviceState>& state) {
    OnStopped(device, state);
  });
}

DomainDeviceSender::~DomainDeviceSender() {
  for (vhost::Mediator* mediator : devices_.All()) {
    if (absl::Status disarmed = mediator->DisarmStop(); !disarmed.ok()) LOG_WARN("{}", Message(disarmed));
  }
  devices_.SetStopHandler(nullptr);
  std::lock_guard lock(mutex_);
  if (channel_) channel_->Shutdown();
}

absl::StatusOr<v1::PeerWelcome> DomainDeviceSender::Greet(const stream::DialOptions& dial,
                                                          Deadline deadline) {
  ASSIGN_OR_RETURN(std::unique_ptr<stream::MessageChannel> channel, stream::DialControl(dial, deadline));
  v1::PeerMessage hello;
  hello.mutable_hello()->set_version(stream::kProtocolVersion);
  hello.mutable_hello()->set_migration_id(options_.migration_id);
  hello.mutable_hello()->set_vm(options_.vm);
  hello.mutable_hello()->set_epoch(options_.epoch);
  RETURN_IF_ERROR(channel->Send(hello, deadline));
  ASSIGN_OR_RETURN(v1::PeerMessage answer, channel->Receive(deadline));
  if (answer.has_verdict() && answer.verdict().reason() != v1::NONE)
    return WithReason(absl::FailedPreconditionError(answer.verdict().message()), answer.verdict().reason());
  if (!answer.has_welcome() || answer.welcome().version() != stream::kProtocolVersion)
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss,
                 "the destination answers something else");
  std::lock_guard lock(mutex_);
  channel_ = std::move(channel);
  return answer.welcome();
}

absl::Status DomainDeviceSender::Begin(const stream::DialOptions& dial, Deadline deadline) {
  auto welcome = Greet(dial, deadline);
  std::set<std::string> takes, orders;
  if (welcome.ok()) {
    takes.insert(welcome->takes_inflight().begin(), welcome->takes_inflight().end());
    orders.insert(welcome->orders_inflight().begin(), welcome->orders_inflight().end());
  }
  for (vhost::Mediator* mediator : devices_.All()) {
    vhost::StopOrder order;
    order.drain_bound = drain_bound_;
    order.ordered = orders.contains(mediator->name());
    if (vhost::AnswerFor(options_.params, mediator->name(), mediator->Describe().class_()) == v1::HANDOFF) {
      order.handoff = takes.contains(mediator->name());
      if (!order.handoff)
        order.why_not = welcome.ok() ? "the destination's back-end cannot be given requests in flight"
                                     : "the destination could not be asked: " + Message(welcome.status());
    }
    RETURN_IF_ERROR(mediator->ArmStop(std::move(order)));
  }
  return Annotate(welcome.status(), "the devices of the destination");
}

absl::Status DomainDeviceSender::Tell(const v1::DeviceState& state, Deadline deadline) {
  std::shared_ptr<stream::MessageChannel> channel;
  {
    std::lock_guard lock(mutex_);
    channel = channel_;
  }
  if (!channel)
    return Error(v1::PEER_CONNECTION_FAILED, absl::StatusCode::kUnavailable,
                 "there is no connection to the destination's devices");
  auto tell = [&]() -> absl::StatusOr<v1::PeerMessage> {
    v1::PeerMessage message;
    *message.mutable_devices()->add_devices() = state;
    RETURN_IF_ERROR(channel->Send(message, deadline));
    return channel->Receive(deadline);
  };
  auto answer = tell();
  // QEMU stops one device after the other; what comes too late must not be taken for the next one's answer.
  if (!answer.ok() || !answer->has_verdict()) {
    std::lock_guard lock(mutex_);
    channel->Shutdown();
    channel_.reset();
    return Error(v1::PEER_CONNECTION_FAILED, absl::StatusCode::kUnavailable,
                 "the destination was not heard: {}",
                 answer.ok() ? "it answers something else" : Message(answer.status()));
  }
  const v1::Verdict& verdict = answer->verdict();
  if (verdict.reason() == v1::NONE) return absl::OkStatus();
  return WithReason(absl::FailedPreconditionError(verdict.message()), verdict.reason());
}

void DomainDeviceSender::OnStopped(const std::string& device, const absl::StatusOr<v1::DeviceState>& state) {
  if (!state.ok()) {
    // Whatever QEMU would send of it would be wrong.
    LOG_WARN("migration {}: {}", options_.migration_id, Message(state.status()));
    return options_.cut(ReasonOf(state.status(), v1::SOURCE_BACKEND_FAILED), Message(state.status()));
  }
  const absl::Status told = Tell(*state, Deadline::After(kTellTimeout));
  if (told.ok()) return;
  const std::string message =
      fmt::format("device {}: its state was not taken at the destination: {}", device, Message(told));
  // Of a drained device the VMM's own state says everything; that it is compared is a precaution.
  if (ReasonOf(told) == v1::PEER_CONNECTION_FAILED && !state->handed_off() && !state->has_backend_state()) {
    LOG_WARN("migration {}: {}", options_.migration_id, message);
    return;
  }
  options_.cut(ReasonOf(told, v1::DESTINATION_BACKEND_FAILED), message);
}

void DomainDeviceSender::FillProgress(v1::Progress* progress) const {
  progress->clear_device_stops();
  uint32_t handed_off = 0;
  Duration drain{};
  for (const vhost::Mediator* mediator : devices_.All()) {
    v1::DeviceStop stop = mediator->stop();
    const Duration took = migration::ToDuration(stop.duration());
    if (stop.answer() == v1::DRAIN) drain = std::max(drain, took);
    handed_off += stop.handed_off();
    *progress->add_device_stops() = std::move(stop);
  }
  progress->set_inflight_handed_off(handed_off);
  migration::SetDuration(progress->mutable_drain(), drain);
}

// --- destination ---

struct DomainDeviceReceiver::Session {
  std::mutex mutex;
  bool ended = false;  // guarded by mutex, as all below but the thread
  // Its hello was in order: it is the source, and no other connection takes its place.
  bool greeted = false;
  // The connection's socket once more, for whoever ends it while TLS is being set up.
  UniqueFd socket;
  std::shared_ptr<stream::MessageChannel> channel;
  bool stopped = false;
  std::thread thread;

  void EndLocked() {
    stopped = true;
    if (channel) channel->Shutdown();
    if (socket) ::shutdown(socket.get(), SHUT_RDWR);
  }
};

DomainDeviceReceiver::DomainDeviceReceiver(DomainDevices* devices, Options options)
    : devices_(devices), options_(std::move(options)) {}

DomainDeviceReceiver::~DomainDeviceReceiver() { Stop(); }

void DomainDeviceReceiver::Stop() {
  std::shared_ptr<Session> session;
  {
    std::lock_guard lock(mutex_);
    session.swap(session_);
  }
  if (!session) return;
  {
    std::lock_guard lock(session->mutex);
    session->EndLocked();
  }
  session->thread.join();
}

absl::Status DomainDeviceReceiver::Accept(UniqueFd socket, std::shared_ptr<const stream::TlsContext> tls) {
  std::shared_ptr<Session> before;
  {
    std::lock_guard lock(mutex_);
    before = session_;
  }
  if (before) {
    std::lock_guard lock(before->mutex);
    // Nobody waits here for what it is doing. One that has not said what it is does nothing: whoever holds
    // the token and is silent must not keep the source out.
    if (!before->ended && before->greeted)
      return absl::FailedPreconditionError("the source's devices are connected already");
    if (!before->ended) {
      LOG_WARN("migration {}: a connection for the devices without a hello gives way to a newer one",
               options_.migration_id);
      before->EndLocked();
    }
  }
  Stop();
  auto session = std::make_shared<Session>();
  session->socket.reset(::fcntl(socket.get(), F_DUPFD_CLOEXEC, 0));
  if (!session->socket) return ErrnoError(errno, "the source's devices: dup");
  auto shared = std::make_shared<UniqueFd>(std::move(socket));
  std::lock_guard lock(mutex_);
  session->thread = std::thread([this, session, shared, tls] { Serve(session, std::move(*shared), tls); });
  session_ = std::move(session);
  return absl::OkStatus();
}

void DomainDeviceReceiver::Serve(const std::shared_ptr<Session>& session, UniqueFd socket,
                                 const std::shared_ptr<const stream::TlsContext>& tls) {
  auto serve = [&]() -> absl::Status {
    const Deadline greeting = Deadline::After(options_.greeting);
    ASSIGN_OR_RETURN(auto plain, stream::AcceptChannel(std::move(socket), tls, "", greeting));
    auto channel = std::make_shared<stream::MessageChannel>(std::move(plain));
    {
      std::lock_guard lock(session->mutex);
      if (session->stopped) return absl::OkStatus();
      session->channel = channel;
    }
    auto hello = channel->Receive(greeting);
    if (!hello.ok()) return Annotate(hello.status(), "its hello");
    absl::Status checked = CheckHello(*hello);
    {
      std::lock_guard lock(session->mutex);
      if (session->stopped) return absl::OkStatus();
      session->greeted = checked.ok();
    }
    if (!checked.ok()) {
      // So that the source's side can say why as well; the connection ends either way.
      (void)SendVerdict(*channel, checked);
      return checked;
    }
    RETURN_IF_ERROR(Welcome(*channel));
    for (;;) {
      auto message = channel->Receive(Deadline::After(kIdle));
      if (absl::IsOutOfRange(message.status())) return absl::OkStatus();
      RETURN_IF_ERROR(message.status());
      RETURN_IF_ERROR(TakeStates(*channel, *message));
    }
  };
  absl::Status served = serve();
  std::lock_guard lock(session->mutex);
  session->ended = true;
  session->channel.reset();
  session->socket.reset();
  // The source's end takes the connection along.
  if (absl::IsUnavailable(served) || session->stopped) return;
  if (!served.ok())
    LOG_WARN("migration {}: the source's devices: {}", options_.migration_id, Message(served));
}

// The token has been compared before; it says which migration was meant, not what the source believes of it.
absl::Status DomainDeviceReceiver::CheckHello(const v1::PeerMessage& message) const {
  if (!message.has_hello())
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument,
                 "the source's devices did not begin with a hello");
  const v1::PeerHello& hello = message.hello();
  if (hello.version() != stream::kProtocolVersion)
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kFailedPrecondition,
                 "the source speaks version {} of the stream, this side {}", hello.version(),
                 stream::kProtocolVersion);
  if (hello.migration_id() != options_.migration_id)
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument,
                 "a hello of migration '{}'; this side was prepared for '{}'", hello.migration_id(),
                 options_.migration_id);
  if (hello.epoch() != options_.epoch)
    return Error(v1::STATE_MISMATCH, absl::StatusCode::kFailedPrecondition,
                 "the source has the domain at epoch {}; this side was prepared for epoch {}", hello.epoch(),
                 options_.epoch);
  return absl::OkStatus();
}

absl::Status DomainDeviceReceiver::Welcome(stream::MessageChannel& channel) {
  v1::PeerMessage out;
  out.mutable_welcome()->set_version(stream::kProtocolVersion);
  if (devices_) {
    for (const vhost::Mediator* mediator : devices_->All()) {
      if (mediator->TakesInflight()) out.mutable_welcome()->add_takes_inflight(mediator->name());
      if (mediator->OrdersInflight()) out.mutable_welcome()->add_orders_inflight(mediator->name());
    }
  }
  return channel.Send(out, Deadline::After(kAnswerTime));
}

absl::Status DomainDeviceReceiver::TakeStates(stream::MessageChannel& channel,
                                              const v1::PeerMessage& message) {
  if (!message.has_devices())
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument, "expected states of devices");
  absl::Status taken;
  for (const v1::DeviceState& state : message.devices().devices()) {
    vhost::Mediator* mediator = devices_ ? devices_->Find(state.name()) : nullptr;
    if (mediator == nullptr) {
      taken = Error(v1::DESTINATION_BACKEND_FAILED, absl::StatusCode::kNotFound, "there is no device {} here",
                    state.name());
    } else {
      taken = mediator->ExpectState(state);
    }
    if (!taken.ok()) break;
  }
  PausePoint(options_.run_dir, "devices-taken");
  return SendVerdict(channel, taken);
}

absl::Status DomainDeviceReceiver::SendVerdict(stream::MessageChannel& channel, const absl::Status& status) {
  v1::PeerMessage out;
  out.mutable_verdict()->set_migration_id(options_.migration_id);
  out.mutable_verdict()->set_verdict(v1::IDLE);
  out.mutable_verdict()->set_reason(status.ok() ? v1::NONE
                                                : ReasonOf(status, v1::DESTINATION_BACKEND_FAILED));
  if (!status.ok()) out.mutable_verdict()->set_message(Message(status));
  return channel.Send(out, Deadline::After(kAnswerTime));
}

}  // namespace baton::shim
