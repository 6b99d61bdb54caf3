#include "agent/shim/domain_outgoing.h"

#include <libvirt/libvirt.h>

#include <algorithm>
#include <chrono>

#include "agent/vmm/libvirt/qemu_view.h"
#include "common/log.h"
#include "common/pause_point.h"

namespace baton::shim {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Of a libvirt call that only asks or sets.
constexpr Duration kCallTimeout = seconds(2);
// For both libvirts to be connected before the start.
constexpr Duration kConnectTimeout = seconds(20);
// libvirt tells of iterations; within one, nothing tells how far it is.
constexpr Duration kLookInterval = seconds(1);
// Between attempts to end a job that libvirt has not yet begun or cannot end just now.
constexpr Duration kAbortInterval = milliseconds(200);
// A job that does not end although it was told to is ended by taking its connections away.
constexpr Duration kAbortPatience = seconds(10);
constexpr int kMaxRounds = 1000;
// An iteration that begins may be the last one: QEMU stops the guest right after it has told of it, and
// answers questions on the thread that has to switch over. One that goes on is asked about a little later.
constexpr Duration kIterationGrace = milliseconds(20);
// QEMU stops the guest as soon as what is left fits into its limit, in the middle of the first pass too, when
// a moment later much less would have been left. So it is told a part of the limit, and the whole of it once
// the policy has seen that further iterations gain nothing.
constexpr int kFirstPart = 10;
constexpr Duration kFirstLimit = milliseconds(10);

bool PostCopyOnStall(const v1::MigrationParams& params) {
  return params.on_stall() == v1::ON_STALL_POSTCOPY && params.post_copy();
}

// QEMU begins no migration with post-copy whose vhost-user devices cannot do without pages for a while (the
// protocol feature PAGEFAULT), and the mediator's cannot. The destination's findings say so.
v1::StartOutgoingCommand WithoutImpossible(v1::StartOutgoingCommand command, bool mediated) {
  if (mediated) command.mutable_params()->set_post_copy(false);
  return command;
}

migration::ConvergenceLimits LimitsOf(const v1::MigrationParams& params) {
  migration::ConvergenceLimits limits;
  limits.max_downtime =
      migration::DurationOr(params.has_max_downtime(), params.max_downtime(), milliseconds(300));
  if (params.max_stalled_rounds() > 0) limits.max_stalled_rounds = params.max_stalled_rounds();
  if (params.on_stall() != v1::ON_STALL_UNSPECIFIED) limits.on_stall = params.on_stall();
  // kAbort stands for "no further progress" then, and StartPostCopy() is the answer to it.
  if (PostCopyOnStall(params)) limits.on_stall = v1::ON_STALL_ABORT;
  return limits;
}

}  // namespace

DomainOutgoing::DomainOutgoing(DomainOutgoingParts parts, const v1::StartOutgoingCommand& command,
                               bool resume)
    : p_(std::move(parts)),
      command_(WithoutImpossible(command, p_.devices != nullptr)),
      resume_(resume),
      reporter_(command.migration_id(), command.vm(), v1::ROLE_SOURCE, command.epoch(), p_.on_report),
      uuid_(p_.config.Get().domain_uuid()),
      mover_(p_.local, uuid_),
      convergence_(LimitsOf(command_.params())) {
  thread_ = std::thread([this] { Run(); });
}

DomainOutgoing::~DomainOutgoing() {
  mail_->Stop();
  thread_.join();
  ReleaseDevices();
  CloseTunnel();
}

bool DomainOutgoing::ended() const {
  std::lock_guard lock(mutex_);
  return ended_;
}

absl::Status DomainOutgoing::Cancel() {
  {
    std::lock_guard lock(mutex_);
    if (yielded_ && !ended_)
      return Error(absl::StatusCode::kFailedPrecondition,
                   "the guest of migration {} was handed over; what became of it is being found out", id());
    if (!ended_ && !end_) end_ = Wish{v1::CANCELLED_BY_REQUEST, "cancelled on request"};
  }
  mail_->Wake();
  return absl::OkStatus();
}

absl::Status DomainOutgoing::Retune(const v1::RetuneCommand& command) {
  {
    std::lock_guard lock(mutex_);
    if (ended_) return absl::FailedPreconditionError("the migration has ended");
    if (command.has_bandwidth()) bandwidth_ = command.bandwidth();
    if (command.has_max_downtime()) max_downtime_ = migration::ToDuration(command.max_downtime());
  }
  mail_->Wake();
  return absl::OkStatus();
}

absl::Status DomainOutgoing::Resolve(const v1::ResolveCommand& command) {
  {
    std::lock_guard lock(mutex_);
    if (ended_) return absl::OkStatus();
    if (command.fenced()) {
      if (!yielded_)
        return absl::FailedPreconditionError("the guest was not given away; nothing is to be resolved");
      fenced_ = true;
    } else if (command.verdict() == v1::OWNER || command.verdict() == v1::REFUSED) {
      verdict_ = command.verdict();
    } else {
      return absl::InvalidArgumentError("a verdict is OWNER or REFUSED");
    }
  }
  mail_->Wake();
  return absl::OkStatus();
}

void DomainOutgoing::Run() {
  reporter_.Update([](v1::SideReport& r) { r.set_guest_running(true); });
  if (resume_) {
    auto now = p_.journal.Now();
    if (now.ok() && now->state == migration::Ownership::State::kYielded &&
        now->migration == command_.migration_id())
      Yielded();
    reporter_.EnterPhase(v1::PRECOPY);
    // Without a tunnel the destination is only heard of by way of batond; it is tried again while settling.
    if (absl::Status opened = OpenTunnel(); !opened.ok()) LOG_WARN("migration {}: {}", id(), Message(opened));
    if (entrance_) OpenRemote();
    return Settle();
  }
  reporter_.EnterPhase(v1::PRECOPY);
  absl::Status started = Prepare();
  if (mail_->stopped()) return;
  PausePoint(p_.config.Get().run_dir(), "source-prepared");
  if (started.ok()) started = BeginCall(/*recover=*/false);
  if (!started.ok()) return NotStarted(started);
  SetLimits();
  Follow();
  if (!mail_->stopped()) Settle();
}

absl::Status DomainOutgoing::Prepare() {
  const Deadline deadline = Deadline::After(kConnectTimeout);
  RETURN_IF_ERROR(OpenTunnel());
  RETURN_IF_ERROR(p_.journal.Own(command_.epoch()));
  RETURN_IF_ERROR(AwaitConnection(p_.local, deadline));
  ASSIGN_OR_RETURN(bool running, ReadSource(deadline));
  if (!running)
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, "the domain does not run");
  ArmDevices(deadline);
  return absl::OkStatus();
}

// libvirt starts a QEMU at the destination before this one sends anything: time enough also for a guest that
// writes nothing, and would be gone with the first pass.
void DomainOutgoing::SetLimits() {
  const Duration whole = convergence_.max_downtime();
  NoteLimit();
  LimitDowntime(ReadForgets() ? whole : std::min(whole, std::max(kFirstLimit, whole / kFirstPart)));
}

// What the call depends on here; whether the domain runs.
absl::StatusOr<bool> DomainOutgoing::ReadSource(Deadline deadline) {
  struct Here {
    bool persistent = false, running = false;
    std::string xml;
  };
  auto here = vmm::CallFor<Here>(
      p_.local, "reading the domain",
      [uuid = uuid_](virConnectPtr c) -> absl::StatusOr<Here> {
        vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
        if (!domain) return vmm::LibvirtError("domain");
        Here out;
        out.persistent = virDomainIsPersistent(domain.get()) == 1;
        int state = 0;
        if (virDomainGetState(domain.get(), &state, nullptr, 0) != 0) return vmm::LibvirtError("state");
        out.running = state == VIR_DOMAIN_RUNNING || state == VIR_DOMAIN_BLOCKED;
        std::unique_ptr<char, decltype(&std::free)> xml(
            virDomainGetXMLDesc(domain.get(), VIR_DOMAIN_XML_MIGRATABLE | VIR_DOMAIN_XML_SECURE), &std::free);
        if (!xml) return vmm::LibvirtError("XML");
        out.xml = xml.get();
        return out;
      },
      deadline);
  if (!here.ok()) return WithReason(here.status(), v1::VM_NOT_MIGRATABLE);
  source_.persistent = here->persistent;
  source_.xml = std::move(here->xml);
  source_.disks_shared = command_.disks_shared();
  return here->running;
}

// A QEMU that loses some of what its guest writes while it copies cannot lose what it has not begun to copy
// when the guest stops: there the first stop is the best. One that does not answer is taken for one of those.
bool DomainOutgoing::ReadForgets() {
  auto forgets = vmm::CallFor<bool>(
      p_.local, "asking for QEMU's version",
      [uuid = uuid_, xml = source_.xml](virConnectPtr c) -> absl::StatusOr<bool> {
        vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
        if (!domain) return vmm::LibvirtError("domain");
        return vmm::AskForgetsWrites(domain.get(), xml);
      },
      Deadline::After(kCallTimeout));
  const bool result = forgets.ok()
                          ? *forgets
                          : vmm::ForgetsWrites(source_.xml, absl::StatusOr<std::string>(forgets.status()));
  if (result)
    LOG_INFO("migration {}: its QEMU may lose what is written while it copies, and stops early", id());
  return result;
}

absl::Status DomainOutgoing::BeginCall(bool recover) {
  {
    std::lock_guard lock(mutex_);
    if (end_ && !recover) return Error(end_->reason, absl::StatusCode::kAborted, "{}", end_->message);
  }
  // A shim that was started meanwhile knows nothing of it.
  if (recover && source_.xml.empty()) RETURN_IF_ERROR(ReadSource(Deadline::After(kCallTimeout)).status());
  ASSIGN_OR_RETURN(vmm::MoveCall call,
                   recover ? vmm::MakeRecoverCall(source_, command_.domain(), command_.params())
                           : vmm::MakeMoveCall(source_, command_.domain(), command_.params()));
  if (!recover) {
    deadline_ = Clock::now() + migration::DurationOr(command_.params().has_max_duration(),
                                                     command_.params().max_duration(), std::chrono::hours(1));
  }
  RETURN_IF_ERROR(AwaitConnection(p_.caller, Deadline::After(recover ? kCallTimeout : kConnectTimeout)));
  call_active_ = true;
  call_began_ = Clock::now();
  LOG_INFO("migration {}: {} to {} by libvirt", id(), recover ? "post-copy is recovered" : "the domain moves",
           command_.peer_address());
  absl::Status begun = vmm::DomainMover(p_.caller, uuid_).Start(call, [mail = mail_](absl::Status status) {
    mail->EndCall(std::move(status));
  });
  if (!begun.ok()) call_active_ = false;
  return begun;
}

void DomainOutgoing::LimitDowntime(Duration limit) {
  absl::Status set = mover_.SetMaxDowntime(limit, Deadline::After(kCallTimeout));
  if (!set.ok()) {
    LOG_WARN("migration {}: {}", id(), Message(set));
    return;
  }
  limit_told_ = limit;
}

void DomainOutgoing::Follow() {
  Clock::time_point look = Clock::now() + kLookInterval;
  while (call_active_) {
    Clock::time_point wake = look;
    if (abort_since_ && !suspended_) wake = std::min(wake, Clock::now() + kAbortInterval);
    if (iteration_begun_ > 0) wake = std::min(wake, iteration_due_);
    DomainMailbox::Mail mail = mail_->Wait(Deadline::At(wake));
    if (mail.stop) return;
    for (const vmm::DomainEvent& event : mail.events) OnDomainEvent(event);
    if (!mail.call) WatchRemote();
    if (mail.call) {
      call_active_ = false;
      call_status_ = *mail.call;
      LOG_INFO("migration {}: libvirt's call has ended: {}", id(),
               call_status_.ok() ? "done" : Message(call_status_));
      // One that was cut relays nothing more; it is opened again to look at the destination.
      if (cut_) CloseTunnel();
      return;
    }
    if (iteration_begun_ > 0 && Clock::now() >= iteration_due_)
      OnIteration(std::exchange(iteration_begun_, 0));
    if (Clock::now() >= look) {
      Tick();
      look = Clock::now() + kLookInterval;
    }
    if (Clock::now() >= deadline_ && !suspended_)
      EndEarly(v1::PHASE_TIMEOUT, "the migration took longer than max_duration");
    ApplyWishes();
  }
}

void DomainOutgoing::OnDomainEvent(const vmm::DomainEvent& event) {
  if (event.kind == vmm::DomainEvent::Kind::kMigrationIteration) {
    if (iteration_begun_ == 0) iteration_due_ = Clock::now() + kIterationGrace;
    iteration_begun_ = static_cast<uint64_t>(std::max(event.event, 0));
    return;
  }
  if (event.kind == vmm::DomainEvent::Kind::kJobCompleted && event.job) completed_ = *event.job;
  if (event.kind != vmm::DomainEvent::Kind::kLifecycle) return;
  if (event.event == VIR_DOMAIN_EVENT_RESUMED) was_paused_ = false;
  if (event.event != VIR_DOMAIN_EVENT_SUSPENDED) return;
  switch (event.detail) {
    case VIR_DOMAIN_EVENT_SUSPENDED_PAUSED:
      // A guest that is paused while libvirt's job runs has been stopped "for the migration" instead.
      was_paused_ |= call_active_ && !suspended_;
      break;
    case VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED:
      suspended_ = true;
      reporter_.EnterPhase(v1::SWITCHOVER);
      Yielded();
      PausePoint(p_.config.Get().run_dir(), "source-yielded");
      break;
    case VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY:
      suspended_ = postcopy_ = true;
      Yielded();
      reporter_.EnterPhase(v1::POSTCOPY);
      break;
    case VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY_FAILED:
      LOG_WARN("migration {}: post-copy lost its connection", id());
      break;
    default:
      break;
  }
}

void DomainOutgoing::Tick() {
  if (suspended_ && !postcopy_) return;
  auto job = mover_.Job(false, Deadline::After(kCallTimeout));
  // Without figures there is no policy, and QEMU decides by the whole limit.
  if ((!job.ok() || (job->memory_processed > 0 && job->iteration == 0)) && !suspended_ &&
      limit_told_ < convergence_.max_downtime())
    LimitDowntime(convergence_.max_downtime());
  if (!job.ok() || !job->outgoing()) return;
  reporter_.Tick([&](v1::Progress& progress) { vmm::FillProgress(*job, &progress); });
  // libvirt's event of an iteration may have come before its figures, or not at all.
  if (job->iteration > iteration_) OnIteration(job->iteration);
}

void DomainOutgoing::OnIteration(uint64_t iteration) {
  if (iteration <= iteration_ || suspended_) return;
  auto job = mover_.Job(false, Deadline::After(kCallTimeout));
  if (!job.ok() || !job->outgoing()) return;
  reporter_.Tick([&](v1::Progress& progress) { vmm::FillProgress(*job, &progress); });
  if (iteration_ > 0) Judge(*job, iteration);
  iteration_ = iteration;
  before_ = *job;
}

// Iteration n begins: what n - 1 sent, and how much is left for it, is known.
void DomainOutgoing::Judge(const vmm::JobFigures& job, uint64_t iteration) {
  migration::RoundSample sample;
  sample.round = static_cast<uint32_t>(std::min<uint64_t>(iteration - 2, UINT32_MAX));
  sample.bytes = job.memory_processed - std::min(job.memory_processed, before_.memory_processed);
  sample.duration =
      milliseconds(std::max<uint64_t>(1, job.elapsed_ms - std::min(job.elapsed_ms, before_.elapsed_ms)));
  sample.dirty_bytes = job.memory_remaining;
  const migration::ConvergenceDecision decision = convergence_.Judge(sample);
  reporter_.Tick([&](v1::Progress& progress) {
    *progress.mutable_forecast_downtime() = google::protobuf::Duration();
    migration::SetDuration(progress.mutable_forecast_downtime(), decision.forecast);
    if (progress.rounds_size() >= kMaxRounds) return;
    v1::RoundStats* round = progress.add_rounds();
    round->set_number(sample.round);
    migration::SetDuration(round->mutable_duration(), sample.duration);
    round->set_bytes(sample.bytes);
    round->set_pages(sample.bytes / job.page_size);
    round->set_rate(decision.rate);
    round->set_dirty_rate(job.dirty_pages);
    migration::SetDuration(round->mutable_forecast_downtime(), decision.forecast);
    v1::Decision* entry = progress.add_decisions();
    *entry->mutable_time() = migration::CurrentTime();
    entry->set_round(sample.round);
    entry->set_action(migration::ActionName(decision.action));
    entry->set_why(decision.why);
  });
  Carry(decision);
}

// QEMU switches over by itself once its own forecast meets the limit; the policy only has to change the
// limit, the mode, or its mind.
void DomainOutgoing::Carry(const migration::ConvergenceDecision& decision) {
  using Action = migration::ConvergenceDecision::Action;
  if (postcopy_asked_) return;
  switch (decision.action) {
    case Action::kContinue:
      return;
    case Action::kRaiseDowntime:
    case Action::kSwitchover: {
      // Some room above the forecast, since QEMU's own is another.
      const Duration limit =
          std::max(convergence_.max_downtime(),
                   decision.action == Action::kSwitchover ? 2 * decision.forecast : Duration(0));
      LimitDowntime(limit);
      return;
    }
    case Action::kAbort:
      if (PostCopyOnStall(command_.params())) return StartPostCopy(decision.why);
      return EndEarly(v1::NOT_CONVERGING, decision.why);
  }
}

void DomainOutgoing::StartPostCopy(const std::string& why) {
  absl::Status asked = mover_.StartPostCopy(Deadline::After(kCallTimeout));
  if (!asked.ok()) {
    LOG_WARN("migration {}: {}", id(), Message(asked));
    return;
  }
  postcopy_asked_ = true;
  LOG_INFO("migration {}: post-copy: {}", id(), why);
  Decided("postcopy", why);
}

void DomainOutgoing::Decided(const std::string& action, const std::string& why) {
  reporter_.Update([&](v1::SideReport& r) {
    // Rounds are limited, and what follows the last of them is rare; but a link may break again and again.
    if (r.progress().decisions_size() >= 2 * kMaxRounds) return;
    v1::Decision* entry = r.mutable_progress()->add_decisions();
    *entry->mutable_time() = migration::CurrentTime();
    entry->set_round(r.progress().round());
    entry->set_action(action);
    entry->set_why(why);
  });
}

void DomainOutgoing::EndEarly(const v1::Reason reason, const std::string& message) {
  std::lock_guard lock(mutex_);
  if (!end_) end_ = Wish{reason, message};
}

// What was asked for from outside since the last look.
void DomainOutgoing::ApplyWishes() {
  std::optional<uint64_t> bandwidth;
  std::optional<Duration> max_downtime;
  bool end = false;
  {
    std::lock_guard lock(mutex_);
    bandwidth = std::exchange(bandwidth_, std::nullopt);
    max_downtime = std::exchange(max_downtime_, std::nullopt);
    end = end_.has_value();
  }
  auto again = [&](const absl::Status& status, auto& place, auto value) {
    LOG_WARN("migration {}: {}", id(), Message(status));
    // libvirt may not have begun the job yet.
    std::lock_guard lock(mutex_);
    if (!place && !suspended_) place = value;
  };
  if (bandwidth) {
    absl::Status set = mover_.SetBandwidth(*bandwidth, /*postcopy=*/false, Deadline::After(kCallTimeout));
    if (command_.params().post_copy()) {
      absl::Status after = mover_.SetBandwidth(*bandwidth, /*postcopy=*/true, Deadline::After(kCallTimeout));
      if (postcopy_ || set.ok()) set = after;
    }
    if (!set.ok()) again(set, bandwidth_, *bandwidth);
  }
  if (max_downtime) {
    convergence_.SetMaxDowntime(*max_downtime);
    absl::Status set = mover_.SetMaxDowntime(*max_downtime, Deadline::After(kCallTimeout));
    if (!set.ok()) again(set, max_downtime_, *max_downtime);
  }
  if (!end || suspended_) return;
  if (!abort_since_) abort_since_ = Clock::now();
  absl::Status aborted = mover_.Abort(Deadline::After(kCallTimeout));
  if (!aborted.ok()) LOG_DEBUG("migration {}: {}", id(), Message(aborted));
  if (Clock::now() - *abort_since_ > kAbortPatience && entrance_) {
    // It hangs at the destination, in libvirt or in QEMU: without its connections the call fails, and the
    // guest goes on here.
    LOG_WARN("migration {}: libvirt does not end it; its connections are cut", id());
    entrance_->Stop();
    CloseTunnel();
  }
}

}  // namespace baton::shim
