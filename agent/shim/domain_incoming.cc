#include "agent/shim/domain_incoming.h"

#include <libvirt/libvirt.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "agent/stream/dial.h"
#include "agent/stream/message_channel.h"
#include "agent/stream/preamble.h"
#include "agent/vmm/libvirt/mover.h"
#include "common/config.h"
#include "common/durable_file.h"
#include "common/log.h"
#include "common/pause_point.h"

namespace baton::shim {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr Duration kIncomingLook = seconds(5);
// Between looks where an event should come: one may be lost with a connection to libvirt.
constexpr Duration kIncomingWait = seconds(5);
// The source lets go of the tunnel when it has seen the outcome; until then it may need to look here.
constexpr Duration kLinger = seconds(30);
// Its letting go is told; what else is awaited then is not.
constexpr Duration kLingerLook = milliseconds(250);
// For a source whose shim was started anew.
constexpr Duration kReturn = seconds(15);
// libvirt ends the domain of a migration whose connection is gone.
constexpr Duration kAbortWait = seconds(8);
constexpr Duration kAbortLook = milliseconds(50);
// Of a question for the verdict, and how many at a time.
constexpr Duration kAnswerTimeout = seconds(10);
constexpr int kMaxQueries = 4;

std::string AbsentFile(ConfigStore& config) { return config.Get().state_dir() + "/absent-before"; }

}  // namespace

DomainIncoming::DomainIncoming(DomainIncomingParts parts)
    : p_(std::move(parts)),
      id_(p_.config.Get().migration_id()),
      uuid_(p_.config.Get().domain_uuid()),
      epoch_(p_.config.Get().epoch()),
      reporter_(id_, p_.config.Get().domain_host().vm(), v1::ROLE_DESTINATION, epoch_, p_.on_report),
      device_link_(p_.devices, {.migration_id = id_, .run_dir = p_.config.Get().run_dir(), .epoch = epoch_}) {
  thread_ = std::thread([this] { Run(); });
}

DomainIncoming::~DomainIncoming() {
  mail_->Stop();
  thread_.join();
  {
    std::unique_lock lock(mutex_);
    answered_.wait(lock, [this] { return answering_ == 0; });
  }
  CloseExit();
  (void)RemoveTree(p_.config.Get().domain().tunnel_dir());
  Answer(absl::UnavailableError("the shim is exiting"));
}

bool DomainIncoming::ready() const {
  std::lock_guard lock(mutex_);
  return ready_;
}

bool DomainIncoming::ended() const {
  std::lock_guard lock(mutex_);
  return ended_;
}

absl::Status DomainIncoming::failure() const {
  std::lock_guard lock(mutex_);
  return failure_;
}

absl::Status DomainIncoming::AcceptChannel(const v1::AcceptChannelRequest& request, UniqueFd socket) {
  if (!socket) return absl::InvalidArgumentError("no descriptor came with the connection");
  if (request.preamble().size() != stream::kPreambleSize)
    return Error(absl::StatusCode::kInvalidArgument, "a preamble has {} bytes, not {}", stream::kPreambleSize,
                 request.preamble().size());
  stream::PreambleBytes bytes;
  std::memcpy(bytes.data(), request.preamble().data(), bytes.size());
  ASSIGN_OR_RETURN(stream::Preamble preamble, stream::DecodePreamble(bytes));
  const v1::ShimConfig config = p_.config.Get();
  ASSIGN_OR_RETURN(stream::Token expected, stream::MakeToken(config.token()));
  if (preamble.migration_id != id_ || !stream::TokensEqual(preamble.token, expected))
    return Error(absl::StatusCode::kPermissionDenied, "the connection is not of migration {}", id_);
  if (preamble.kind == stream::PreambleKind::kVerdictQuery) {
    AnswerQuery(std::move(socket));
    return absl::OkStatus();
  }
  const bool devices = preamble.kind == stream::PreambleKind::kChannel && preamble.channel == 0;
  if (!devices && preamble.kind != stream::PreambleKind::kTunnel)
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument,
                 "a domain's migration has channel 0 and tunnelled connections only");
  std::shared_ptr<stream::TunnelExit> exit;
  std::shared_ptr<const stream::TlsContext> tls;
  {
    std::lock_guard lock(mutex_);
    exit = exit_;
    tls = tls_;
  }
  if (!exit)
    return Error(v1::DESTINATION_REFUSED, absl::StatusCode::kFailedPrecondition,
                 "migration {} has ended at this host", id_);
  if (devices) return device_link_.Accept(std::move(socket), std::move(tls));
  exit->Accept(std::move(socket), preamble.channel, std::move(tls));
  return absl::OkStatus();
}

void DomainIncoming::OnLibvirt(bool up) {
  if (!up) {
    std::lock_guard lock(mutex_);
    // What happens until it is back is not seen, and the source's connections to it end in good order.
    if (ready_) {
      watched_ = false;
      ++libvirt_lost_;
    }
  }
  mail_->Wake();
}

v1::Verdict DomainIncoming::Seen() const {
  v1::Verdict verdict;
  verdict.set_migration_id(id_);
  verdict.set_verdict(p_.journal.VerdictOf(id_));
  verdict.set_epoch(verdict.verdict() == v1::OWNER ? epoch_ + 1 : epoch_);
  std::lock_guard lock(mutex_);
  // IDLE: no copy has run here so far, if nothing could be missed.
  if (verdict.verdict() == v1::IDLE && watched_) verdict.set_reason(v1::NONE);
  return verdict;
}

void DomainIncoming::AnswerQuery(UniqueFd socket) {
  {
    std::lock_guard lock(mutex_);
    // A source asks once at a time; whoever asks more often waits for nothing.
    if (answering_ >= kMaxQueries) return;
    ++answering_;
  }
  auto shared = std::make_shared<UniqueFd>(std::move(socket));
  std::thread([this, shared] {
    auto answer = [&]() -> absl::Status {
      const Deadline deadline = Deadline::After(kAnswerTimeout);
      // Not the one of the connections: a question may come before Prepare() has it, or where it is never
      // needed, and in the clear both ends would wait for each other.
      const v1::ShimConfig config = p_.config.Get();
      ASSIGN_OR_RETURN(auto tls, LoadPeerTls(config, config.params().tls()));
      ASSIGN_OR_RETURN(auto channel, stream::AcceptChannel(std::move(*shared), tls, "", deadline));
      stream::MessageChannel messages(std::move(channel));
      ASSIGN_OR_RETURN(v1::PeerMessage query, messages.Receive(deadline));
      if (!query.has_verdict_query() || query.verdict_query().migration_id() != id_)
        return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kInvalidArgument, "expected a verdict query");
      v1::PeerMessage out;
      *out.mutable_verdict() = Seen();
      return messages.Send(out, deadline);
    };
    if (absl::Status answered = answer(); !answered.ok())
      LOG_WARN("migration {}: a question for the verdict: {}", id_, Message(answered));
    std::lock_guard lock(mutex_);
    --answering_;
    answered_.notify_all();
  }).detach();
}

void DomainIncoming::Abort(std::function<void(absl::Status)> done) {
  {
    std::lock_guard lock(mutex_);
    if (!ended_) {
      std::swap(abort_, done);
      if (!abort_since_) abort_since_ = Clock::now();
    }
  }
  // One that was superseded, or that came after the end.
  if (done) {
    done(p_.journal.VerdictOf(id_) == v1::OWNER
             ? Error(absl::StatusCode::kFailedPrecondition, "this host has the guest of migration {}", id_)
             : absl::OkStatus());
  }
  mail_->Wake();
}

void DomainIncoming::Answer(const absl::Status& status) {
  std::function<void(absl::Status)> answer;
  {
    std::lock_guard lock(mutex_);
    answer.swap(abort_);
    if (answer) abort_since_.reset();
  }
  if (answer) answer(status);
}

void DomainIncoming::Run() {
  if (p_.journal.VerdictOf(id_) == v1::REFUSED) {
    Refused("refused before");
    return;
  }
  const auto before = p_.journal.Now();
  const bool fresh = before.ok() && before->migration != id_;
  // The source's connections went with the shim before this one.
  recovered_ = !fresh;
  broken_at_ = Clock::now();
  if (absl::Status prepared = Prepare(fresh); !prepared.ok()) {
    LOG_ERROR("migration {}: {}", id_, Message(prepared));
    {
      std::lock_guard lock(mutex_);
      failure_ = prepared;
    }
    p_.on_ready();
    return;
  }
  PausePoint(p_.config.Get().run_dir(), "prepared");
  {
    std::lock_guard lock(mutex_);
    ready_ = true;
    watched_ = fresh;
  }
  p_.on_ready();
  // The source has yet to hear that it may begin.
  if (fresh && AbsentBefore()) {
    if (absl::Status synced = SyncFile(AbsentFile(p_.config)); !synced.ok())
      LOG_WARN("migration {}: {}", id_, Message(synced));
  }
  for (;;) {
    if (mail_->stopped() || Step()) return;
    Duration wait = kIncomingWait;
    {
      std::lock_guard lock(mutex_);
      if (abort_since_) wait = kAbortLook;
    }
    if (owner_since_ || gone_since_) wait = kLingerLook;
    DomainMailbox::Mail mail = mail_->Wait(Deadline::After(wait));
    if (mail.stop) return;
    for (const vmm::DomainEvent& event : mail.events) {
      if (event.kind != vmm::DomainEvent::Kind::kLifecycle) continue;
      // One that came and went between two looks.
      if (event.event == VIR_DOMAIN_EVENT_STARTED && event.detail == VIR_DOMAIN_EVENT_STARTED_MIGRATED) {
        seen_ = true;
        reporter_.EnterPhase(v1::PRECOPY);
      }
    }
  }
}

absl::Status DomainIncoming::Prepare(bool fresh) {
  const v1::ShimConfig config = p_.config.Get();
  ASSIGN_OR_RETURN(auto tls, LoadPeerTls(config, config.params().tls()));
  RETURN_IF_ERROR(p_.journal.Expect(id_, epoch_));
  RETURN_IF_ERROR(MakeTunnelDirectory(config.domain().tunnel_dir(), config.domain_host()));
  const Deadline deadline = Deadline::After(kIncomingLook * 2);
  while (!p_.local.connected()) {
    if (deadline.Expired())
      return Error(v1::DESTINATION_START_FAILED, absl::StatusCode::kUnavailable, "{}", p_.local.trouble());
    if (mail_->Wait(deadline).stop) return absl::CancelledError("stopped");
  }
  const vmm::SideView here = LookAtDomain(p_.local, uuid_, vmm::MigrationRole::kDestination, deadline);
  if (fresh && here.condition == vmm::DomainCondition::kAbsent)
    RETURN_IF_ERROR(WriteFileSoon(AbsentFile(p_.config), id_));
  {
    std::lock_guard lock(mutex_);
    tls_ = std::move(tls);
  }
  OpenExit();
  return absl::OkStatus();
}

void DomainIncoming::OpenExit() {
  const v1::ShimConfig config = p_.config.Get();
  stream::TunnelExitOptions options;
  const std::string& dir = config.domain().tunnel_dir();
  options.paths[stream::TunnelService::kLibvirt] = config.domain_host().socket();
  options.paths[stream::TunnelService::kVmm] = dir + "/vmm";
  if (config.domain().copied_disks_size() > 0) options.paths[stream::TunnelService::kNbd] = dir + "/nbd";
  options.callbacks.on_broken = [this](stream::TunnelService service, const absl::Status& why) {
    LOG_WARN("migration {}: the {} connection: {}", id_, stream::NameOf(service), Message(why));
    std::lock_guard lock(mutex_);
    broken_ = fmt::format("{}: {}", stream::NameOf(service), Message(why));
    mail_->Wake();
  };
  options.callbacks.on_idle = [this] { mail_->Wake(); };
  auto exit = std::make_shared<stream::TunnelExit>(std::move(options));
  std::lock_guard lock(mutex_);
  exit_ = std::move(exit);
}

void DomainIncoming::CloseExit() {
  std::shared_ptr<stream::TunnelExit> exit;
  {
    std::lock_guard lock(mutex_);
    exit.swap(exit_);
  }
  // Another thread may just be giving it a connection: stopped here, not only let go of.
  if (exit) exit->Stop();
}

uint32_t DomainIncoming::Connections() {
  std::shared_ptr<stream::TunnelExit> exit;
  {
    std::lock_guard lock(mutex_);
    exit = exit_;
  }
  uint32_t count = 0;
  if (!exit) return 0;
  for (stream::TunnelService service : stream::kTunnelServices) count += exit->counts(service).active;
  return count;
}

bool DomainIncoming::SourceMayReturn() {
  std::shared_ptr<stream::TunnelExit> exit;
  uint64_t broken = 0, opened = 0;
  {
    std::lock_guard lock(mutex_);
    exit = exit_;
    broken = libvirt_lost_;
  }
  if (!exit) return false;
  for (stream::TunnelService service : stream::kTunnelServices) {
    broken += exit->counts(service).broken;
    opened += exit->counts(service).opened;
  }
  if (broken != broken_count_) {
    broken_count_ = broken;
    opened_then_ = opened;
    broken_at_ = Clock::now();
  }
  return (broken > 0 || recovered_) && opened == opened_then_ && Clock::now() - broken_at_ < kReturn;
}

bool DomainIncoming::Step() {
  const vmm::SideView view =
      LookAtDomain(p_.local, uuid_, vmm::MigrationRole::kDestination, Deadline::After(kIncomingLook));
  bool aborting, late;
  {
    std::lock_guard lock(mutex_);
    aborting = abort_since_.has_value();
    late = aborting && Clock::now() - *abort_since_ > kAbortWait;
  }
  using Condition = vmm::DomainCondition;
  switch (view.condition) {
    case Condition::kUnreachable:
      if (late) Answer(absl::UnavailableError(p_.local.trouble() + ": what is here cannot be told"));
      return false;
    case Condition::kRunning:
    case Condition::kRunningPostcopy:
    case Condition::kRunningPostcopyFailed:
      return Owned(view);
    case Condition::kAbsent:
    case Condition::kShutOff:
    case Condition::kShutOffMigrated:
    case Condition::kShutOffFailed:
    case Condition::kCrashed:
      if (owner_since_) return Owned(view);
      if (!seen_ && !aborting && !GivenUpUnseen(view)) return false;
      // libvirt's error has yet to reach the source, and the source's shim to look here.
      if (!gone_since_) gone_since_ = Clock::now();
      if (!aborting && Connections() > 0 && Clock::now() - *gone_since_ < kLinger) return false;
      return Absent();
    case Condition::kPaused:
    case Condition::kPausedPostcopyFailed:
      // It came as it was, standing still; or post-copy waits for its connection.
      if (owner_since_) return Owned(view);
      // libvirt keeps the job of the latter.
      if ((!view.job || view.condition == Condition::kPausedPostcopyFailed) && seen_ && Connections() == 0)
        return Owned(view);
      break;
    default:
      break;
  }
  if (!std::exchange(seen_, true)) reporter_.EnterPhase(v1::PRECOPY);
  if (aborting) {
    CloseExit();
    if (late) {
      // libvirt keeps what it may not end by itself. The source settles it, and has to look here for that.
      OpenExit();
      Answer(Error(absl::StatusCode::kFailedPrecondition,
                   "libvirt still holds the domain of migration {} here, standing still", id_));
    }
  }
  return false;
}

// The domain came to this host and libvirt gave it up while no shim was there: a definition that was not here
// before the migration, of a domain that failed to get as far as running. Nothing brings it again: libvirt's
// call at the source was made once, and ends with the connections of the shim before this one.
bool DomainIncoming::GivenUpUnseen(const vmm::SideView& view) const {
  return recovered_ && view.condition == vmm::DomainCondition::kShutOffFailed && !view.job && AbsentBefore();
}

// Nothing of the domain is here. It may still come as long as somebody can bring it.
bool DomainIncoming::Absent() {
  CloseExit();
  const vmm::SideView again =
      LookAtDomain(p_.local, uuid_, vmm::MigrationRole::kDestination, Deadline::After(kIncomingLook));
  using Condition = vmm::DomainCondition;
  if (again.condition != Condition::kAbsent && again.condition != Condition::kShutOff &&
      again.condition != Condition::kShutOffMigrated && again.condition != Condition::kShutOffFailed &&
      again.condition != Condition::kCrashed) {
    OpenExit();
    return false;
  }
  const bool came = seen_ || GivenUpUnseen(again);
  return Refused(came ? "libvirt has ended the domain here" : "it was given up before anything came");
}

bool DomainIncoming::Owned(const vmm::SideView& view) {
  using Condition = vmm::DomainCondition;
  const bool running = view.condition == Condition::kRunning ||
                       view.condition == Condition::kRunningPostcopy ||
                       view.condition == Condition::kRunningPostcopyFailed;
  const bool gone = view.condition == Condition::kAbsent || view.condition == Condition::kShutOff ||
                    view.condition == Condition::kShutOffFailed || view.condition == Condition::kCrashed;
  if (!owner_since_) {
    absl::Status written = p_.journal.TakeOver(id_, epoch_);
    if (!written.ok()) {
      LOG_ERROR("migration {}: {}", id_, Message(written));
      reporter_.Update([&](v1::SideReport& r) {
        r.set_guest_running(running);
        r.set_reason(v1::STATE_WRITE_FAILED);
        r.set_message(Message(written));
      });
      return false;
    }
    owner_since_ = Clock::now();
    LOG_INFO("migration {}: the domain is here", id_);
    const v1::Phase phase = view.condition == Condition::kRunning ? v1::FINISHING : v1::POSTCOPY;
    reporter_.EnterPhase(phase, [&](v1::SideReport& r) {
      r.set_handover(v1::OWNER);
      r.set_epoch(epoch_ + 1);
      r.set_guest_running(running);
      r.clear_reason();
      r.clear_message();
    });
    PausePoint(p_.config.Get().run_dir(), "destination-owner");
  } else if (reporter_.report().guest_running() != running) {
    reporter_.Update([&](v1::SideReport& r) { r.set_guest_running(running); });
  }
  Answer(Error(absl::StatusCode::kFailedPrecondition, "this host has the guest of migration {}", id_));
  const bool whole = running && view.condition == Condition::kRunning && !view.job;
  const bool over = whole || gone || view.condition == Condition::kPaused;
  if (whole) reporter_.EnterPhase(v1::FINISHING);
  // libvirt has them from the end of its job here, and waits at the source for another while yet.
  if (whole && !downtime_ms_) AskDowntime();
  const bool awaited = SourceMayReturn() || (Connections() > 0 && Clock::now() - *owner_since_ < kLinger);
  if (!over || awaited) return false;
  CloseExit();
  if (running) {
    reporter_.EnterPhase(v1::SUCCEEDED, [&](v1::SideReport& r) {
      if (downtime_ms_)
        migration::SetDuration(r.mutable_progress()->mutable_downtimes()->mutable_vcpu(),
                               milliseconds(*downtime_ms_));
      r.set_done(true);
      r.set_reason(v1::NONE);
    });
  } else {
    reporter_.EnterPhase(gone ? v1::FAILED : v1::SUCCEEDED, [&](v1::SideReport& r) {
      r.set_done(true);
      r.set_guest_lost(gone);
      r.set_reason(gone ? v1::DESTINATION_VMM_FAILED : v1::NONE);
      r.set_message(gone ? "the domain has ended since it came here" : "the domain stands still");
    });
  }
  return End();
}

// What libvirt measured of the stop.
void DomainIncoming::AskDowntime() {
  vmm::DomainMover mover(p_.local, uuid_);
  auto job = mover.Job(true, Deadline::After(kIncomingLook));
  if (job.ok() && job->downtime_ms) downtime_ms_ = *job->downtime_ms;
}

bool DomainIncoming::AbsentBefore() const {
  auto text = ReadFileLimited(AbsentFile(p_.config), 1024);
  return text.ok() && *text == id_;
}

// A finish that libvirt begins and gives up leaves the definition that it had made.
void DomainIncoming::UndefineLeftover() {
  if (!AbsentBefore()) return;
  absl::Status undefined = p_.local.Call(
      "removing the definition that was left here",
      [uuid = uuid_](virConnectPtr c) -> absl::Status {
        vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
        if (!domain || virDomainIsActive(domain.get()) != 0) return absl::OkStatus();
        return virDomainUndefineFlags(domain.get(), VIR_DOMAIN_UNDEFINE_KEEP_NVRAM) == 0
                   ? absl::OkStatus()
                   : vmm::LibvirtError("removing the definition that was left here");
      },
      Deadline::After(kIncomingLook));
  if (!undefined.ok()) LOG_WARN("migration {}: {}", id_, Message(undefined));
}

bool DomainIncoming::Refused(const std::string& why) {
  if (absl::Status written = p_.journal.Refuse(id_, epoch_); !written.ok()) {
    LOG_ERROR("migration {}: {}", id_, Message(written));
    reporter_.Update([&](v1::SideReport& r) {
      r.set_reason(v1::STATE_WRITE_FAILED);
      r.set_message(Message(written));
    });
    return false;
  }
  bool asked;
  std::string broken;
  {
    std::lock_guard lock(mutex_);
    asked = abort_since_.has_value();
    broken = broken_;
  }
  LOG_INFO("migration {}: refused: {}", id_, why);
  UndefineLeftover();
  reporter_.EnterPhase(asked ? v1::CANCELLED : v1::FAILED, [&](v1::SideReport& r) {
    r.set_handover(v1::REFUSED);
    r.set_done(true);
    // A source that ended the migration knows why; one whose connection broke is told by it.
    r.set_reason(asked ? v1::CANCELLED_BY_REQUEST : v1::PEER_CONNECTION_FAILED);
    r.set_message(broken.empty() ? why : fmt::format("{} ({})", why, broken));
  });
  return End();
}

bool DomainIncoming::End() {
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
  }
  Answer(p_.journal.VerdictOf(id_) == v1::OWNER
             ? Error(absl::StatusCode::kFailedPrecondition, "this host has the guest of migration {}", id_)
             : absl::OkStatus());
  p_.on_end();
  return true;
}

}  // namespace baton::shim
