// DomainOutgoing: after the end of libvirt's call, until the guest is in exactly one place. What is so, and
// what may be done, is decided by vmm::Settle; here is the looking and the doing.
#include <libvirt/libvirt.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>

#include "agent/shim/domain_outgoing.h"
#include "common/config.h"
#include "common/durable_file.h"
#include "common/log.h"
#include "common/pause_point.h"

namespace baton::shim {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// For one side to say how the domain is there. Shorter than the caller's patience with a side that hangs.
constexpr Duration kSettleLook = seconds(5);
// For the destination's shim to say what it has seen.
constexpr Duration kAskTimeout = seconds(3);
// Resuming, suspending or ending a copy.
constexpr Duration kSettleAct = seconds(30);
// Between looks, where an event should come but may be lost with a connection.
constexpr Duration kSettleWait = milliseconds(20);
constexpr Duration kSettleWaitMax = seconds(5);
constexpr Duration kUnnoticedWait = milliseconds(500);

std::string LimitFile(ConfigStore& config) { return config.Get().state_dir() + "/downtime-before"; }

std::string SuspendedFile(ConfigStore& config) { return config.Get().state_dir() + "/suspended"; }

}  // namespace

bool DomainOutgoing::SuspendedHere() const {
  auto text = ReadFileLimited(SuspendedFile(p_.config), 1024);
  return text.ok() && *text == id();
}

// One that could not be given back yet is still the one from before.
void DomainOutgoing::NoteLimit() {
  if (ReadFileLimited(LimitFile(p_.config), 64).ok()) return;
  const Duration before =
      mover_.MaxDowntime(Deadline::After(kSettleLook)).value_or(convergence_.max_downtime());
  const auto ms = std::chrono::duration_cast<milliseconds>(before).count();
  // For a later shim: a crash of the host ends the QEMU that it is of.
  if (absl::Status written = WriteFileSoon(LimitFile(p_.config), std::to_string(ms)); !written.ok())
    LOG_WARN("migration {}: {}", id(), Message(written));
}

void DomainOutgoing::RestoreLimit(bool stays) {
  auto text = ReadFileLimited(LimitFile(p_.config), 64);
  if (!text.ok()) return;
  int64_t ms = 0;
  const auto parsed = std::from_chars(text->data(), text->data() + text->size(), ms);
  if (stays && parsed.ec == std::errc() && ms > 0) {
    absl::Status set = mover_.SetMaxDowntime(milliseconds(ms), Deadline::After(kSettleLook));
    if (!set.ok()) {
      LOG_WARN("migration {}: {}", id(), Message(set));
      return;
    }
  }
  // The end of a migration does not wait for the disk: a crash of the host ends the QEMU that it is of.
  if (!stays && ::unlink(LimitFile(p_.config).c_str()) == 0) return;
  if (absl::Status removed = RemoveFileDurable(LimitFile(p_.config)); !removed.ok())
    LOG_WARN("migration {}: {}", id(), Message(removed));
}

void DomainOutgoing::Settle() {
  Duration pause = kSettleWait;
  for (;;) {
    if (mail_->stopped()) return;
    const vmm::SettlementInput seen = Look();
    if (mail_->stopped()) return;
    const vmm::Settlement settlement = vmm::Settle(seen);
    if (settlement.why != said_) {
      said_ = settlement.why;
      LOG_INFO("migration {}: {}: {}", id(), vmm::NameOf(settlement.action), settlement.why);
      // Recover() writes down what it does by itself.
      if (seen.source.condition == vmm::DomainCondition::kPausedPostcopyFailed &&
          (!call_active_ || seen.recovery_lasts) &&
          settlement.action != vmm::SettlementAction::kRecoverPostcopy)
        Decided(vmm::NameOf(settlement.action), settlement.why);
    }
    if (Act(seen, settlement)) return;
    DomainMailbox::Mail mail = mail_->Wait(Deadline::After(pause));
    if (mail.stop) return;
    for (const vmm::DomainEvent& event : mail.events) OnDomainEvent(event);
    if (mail.call) {
      call_active_ = false;
      call_status_ = *mail.call;
      LOG_INFO("migration {}: libvirt's call has ended: {}", id(),
               call_status_.ok() ? "done" : Message(call_status_));
      if (std::exchange(recovering_, false)) RecoveryEnded(call_status_);
    }
    // A migration that goes on in libvirt under a new shim can still be steered.
    if (seen.source.job) ApplyWishes();
    const bool news = mail.call || !mail.events.empty();
    pause = news ? kSettleWait : std::min<Duration>(2 * pause, kSettleWaitMax);
    // What has to last for a while is seen when it has.
    if (unnoticed_since_) pause = std::min<Duration>(pause, kUnnoticedWait);
  }
}

vmm::SettlementInput DomainOutgoing::Look() {
  vmm::SettlementInput in;
  int reason = 0;
  in.source =
      LookAtDomain(p_.local, uuid_, vmm::MigrationRole::kSource, Deadline::After(kSettleLook), &reason);
  v1::HandoverState verdict;
  {
    std::lock_guard lock(mutex_);
    verdict = verdict_;
    in.fenced = fenced_;
  }
  if (in.source.condition == vmm::DomainCondition::kPausedPostcopyFailed) in.source_qemu = AskSourceQemu();
  // One that was not connected to yet, or whose tunnel could not be opened, or was cut to end the call.
  if (!remote_ && verdict == v1::HANDOVER_STATE_UNSPECIFIED && !call_active_) {
    absl::Status opened = entrance_ ? absl::OkStatus() : OpenTunnel();
    if (!opened.ok()) LOG_DEBUG("migration {}: {}", id(), Message(opened));
    const int before = losses_->load();
    if (opened.ok()) OpenRemote();
    // Until the first attempt has failed: a destination's side that has ended takes no connection any more.
    const Deadline connected = Deadline::After(kSettleLook);
    while (remote_ && !remote_->connected() && losses_->load() == before && !connected.Expired() &&
           !mail_->stopped())
      (void)mail_->Wait(connected.Min(Deadline::After(milliseconds(100))));
  }
  if (remote_) {
    in.destination =
        LookAtDomain(*remote_, uuid_, vmm::MigrationRole::kDestination, Deadline::After(kSettleLook));
  }
  using Condition = vmm::DomainCondition;
  // One that stands still, or is gone, may have been given away although no event told of it.
  const bool runs_here =
      in.source.condition == Condition::kRunning || in.source.condition == Condition::kUnreachable;
  if (!runs_here && !in.source.job && in.source.condition != Condition::kPaused) Yielded();
  // A shim that was started meanwhile, or whose libvirt was away, has not seen every event. libvirt says of a
  // domain that it let go on after it had stopped it for a migration that it did so; one that never stopped
  // runs for another reason.
  const bool never_stopped =
      in.source.condition == Condition::kRunning && reason != VIR_DOMAIN_RUNNING_MIGRATION_CANCELED;
  {
    std::lock_guard lock(mutex_);
    in.handed_over = suspended_ || yielded_ || ((resume_ || missed_events_) && !never_stopped);
  }
  // A guest that ended before this one could see it run there.
  const bool gone_in_postcopy =
      in.source.condition == Condition::kPausedPostcopyFailed && !destination_ran_ &&
      (in.destination.condition == Condition::kAbsent || in.destination.condition == Condition::kShutOff);
  // libvirt writes a persistent domain's definition down before it lets it run, and keeps it when it ends.
  const bool never_ran = command_.domain().absent() && source_.persistent && !in.destination.job &&
                         in.destination.condition == Condition::kAbsent;
  bool watched = WatchedRemote() || never_ran;
  if (in.handed_over && !call_active_ && verdict == v1::HANDOVER_STATE_UNSPECIFIED &&
      (!watched || gone_in_postcopy || in.destination.condition == Condition::kUnreachable)) {
    // Its shim has watched its libvirt when this one could not.
    auto answer = AskDestination();
    if (answer.ok()) {
      watched |= answer->verdict() == v1::IDLE && answer->reason() == v1::NONE;
      if (answer->verdict() == v1::OWNER || answer->verdict() == v1::REFUSED) {
        std::lock_guard lock(mutex_);
        verdict = verdict_ = answer->verdict();
      }
    } else {
      LOG_DEBUG("migration {}: {}", id(), Message(answer.status()));
    }
  }
  if (in.destination.condition == Condition::kUnreachable) {
    // Its agent's word, which its own libvirt and journal stand behind. In post-copy it has the guest before
    // it has all of it.
    const bool parted = in.source.condition == Condition::kPausedPostcopy ||
                        (in.source.condition == Condition::kPausedPostcopyFailed &&
                         vmm::SourceStreamOf(in.source_qemu) != vmm::SourceStream::kSent);
    if (verdict == v1::OWNER && !parted) in.destination.condition = Condition::kRunning;
    if (verdict == v1::REFUSED) in.destination.condition = Condition::kAbsent;
  }
  if (in.destination.condition == Condition::kRunning ||
      in.destination.condition == Condition::kRunningPostcopy || verdict == v1::OWNER)
    destination_ran_ = true;
  in.destination_ran = destination_ran_;
  in.call_active = call_active_;
  LookAtBreak(&in);
  in.was_paused = was_paused_;
  // A destination that has refused watched its own libvirt.
  in.destination_watched = watched || verdict == v1::REFUSED;
  in.source_suspended = SuspendedHere();
  return in;
}

// What the destination's shim, or its agent after that has gone, says of the migration.
absl::StatusOr<v1::Verdict> DomainOutgoing::AskDestination() {
  const Deadline deadline = Deadline::After(kAskTimeout);
  ASSIGN_OR_RETURN(std::unique_ptr<stream::MessageChannel> channel,
                   stream::DialVerdictQuery(dial_, deadline));
  v1::PeerMessage question;
  question.mutable_verdict_query()->set_migration_id(id());
  RETURN_IF_ERROR(channel->Send(question, deadline));
  ASSIGN_OR_RETURN(v1::PeerMessage answer, channel->Receive(deadline));
  if (!answer.has_verdict() || answer.verdict().migration_id() != id())
    return Error(v1::PEER_PROTOCOL_ERROR, absl::StatusCode::kDataLoss,
                 "the destination answers something else");
  return answer.verdict();
}

bool DomainOutgoing::Act(const vmm::SettlementInput& seen, const vmm::Settlement& settlement) {
  using Action = vmm::SettlementAction;
  auto done = [&](const absl::Status& status) {
    if (!status.ok()) LOG_WARN("migration {}: {}: {}", id(), vmm::NameOf(settlement.action), Message(status));
  };
  switch (settlement.action) {
    case Action::kNothing:
      switch (settlement.location) {
        case v1::SOURCE:
          return EndHere(true, settlement.why);
        case v1::PAUSED_SOURCE:
          return EndHere(false, settlement.why);
        case v1::DESTINATION:
        case v1::PAUSED_DESTINATION:
          return EndAway(settlement.why);
        case v1::LOST:
          LoseGuest(settlement.why);
          return true;
        default:
          break;
      }
      [[fallthrough]];
    case Action::kWait:
    case Action::kAskAgain:
    case Action::kOperator: {
      if (settlement.action != Action::kWait) reporter_.Tick([](v1::Progress&) {});
      // A reason before the end: a person has to do something about it.
      const v1::Reason reason =
          settlement.action == Action::kOperator ? v1::SOURCE_VMM_FAILED : v1::REASON_UNSPECIFIED;
      const std::string message = settlement.action == Action::kWait ? "" : settlement.why;
      if (reporter_.report().message() != message || reporter_.report().reason() != reason) {
        reporter_.Update([&](v1::SideReport& r) {
          r.set_reason(reason);
          r.set_message(message);
        });
      }
      return false;
    }
    case Action::kResumeSource: {
      // Rule 1: the word that allows it is durable first.
      absl::Status written =
          seen.fenced ? p_.journal.Fence(id(), command_.epoch()) : p_.journal.Keep(id(), command_.epoch());
      if (!written.ok()) {
        done(written);
        return false;
      }
      done(OnDomain(p_.local, "resuming the domain", &virDomainResume));
      return false;
    }
    case Action::kPauseSource:
      if (absl::Status written = WriteFileDurable(SuspendedFile(p_.config), id()); !written.ok()) {
        done(written);
        return false;
      }
      done(OnDomain(p_.local, "suspending the domain", &virDomainSuspend));
      return false;
    case Action::kDestroySource:
      done(OnDomain(p_.local, "ending the copy that was left here", &virDomainDestroy));
      return false;
    case Action::kDestroyDestination:
      if (remote_) done(OnDomain(*remote_, "ending the destination's copy", &virDomainDestroy));
      return false;
    case Action::kRecoverPostcopy:
      Recover(settlement.why);
      return false;
  }
  return false;
}

absl::Status DomainOutgoing::OnDomain(vmm::LibvirtConnection& connection, const std::string& what,
                                      std::function<int(virDomainPtr)> call) {
  absl::Status status = connection.Call(
      what,
      [uuid = uuid_, what, call = std::move(call)](virConnectPtr c) {
        vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
        if (!domain || call(domain.get()) != 0) return vmm::LibvirtError(what);
        return absl::OkStatus();
      },
      Deadline::After(kSettleAct));
  if (status.ok()) LOG_INFO("migration {}: {}", id(), what);
  return status;
}

// The guest may run at the destination from now on.
void DomainOutgoing::Yielded() {
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(yielded_, true)) return;
  }
  absl::Status written = p_.journal.Yield(id(), command_.epoch());
  // libvirt goes on in any case; a later shim without the record looks at both ends just the same.
  if (!written.ok()) LOG_WARN("migration {}: {}", id(), Message(written));
  reporter_.Update([](v1::SideReport& r) {
    r.set_handover(v1::YIELDED);
    r.set_guest_running(false);
  });
}

// Why the migration did not come to its end, in the words of the contract.
DomainOutgoing::Wish DomainOutgoing::Cause() const {
  std::lock_guard lock(mutex_);
  if (end_) return *end_;
  if (fenced_)
    return {v1::RESOLVED_BY_OPERATOR,
            "the destination was confirmed as fenced; the guest goes on at the source"};
  if (resume_ && call_status_.ok())
    return {v1::SOURCE_SHIM_FAILED,
            "the source's shim ended during the migration; the guest goes on at the source"};
  const std::string why = call_status_.ok() ? said_ : Message(call_status_);
  const v1::Reason known = ReasonOf(call_status_, v1::REASON_UNSPECIFIED);
  if (known != v1::REASON_UNSPECIFIED) return {known, why};
  if (absl::IsAborted(call_status_))
    return {v1::CANCELLED_BY_REQUEST, "ended by another user of libvirt: " + why};
  if (!broken_.empty()) return {v1::PEER_CONNECTION_FAILED, fmt::format("{} ({})", why, broken_)};
  if (!suspended_ && iteration_ == 0) return {v1::DESTINATION_START_FAILED, why};
  return {v1::DESTINATION_VMM_FAILED, why};
}

bool DomainOutgoing::EndHere(bool running, const std::string& why) {
  bool fenced;
  {
    std::lock_guard lock(mutex_);
    fenced = fenced_ && yielded_;
  }
  absl::Status written =
      fenced ? p_.journal.Fence(id(), command_.epoch()) : p_.journal.Keep(id(), command_.epoch());
  if (!written.ok()) {
    reporter_.Update([&](v1::SideReport& r) {
      r.set_guest_running(running);
      r.set_reason(v1::STATE_WRITE_FAILED);
      r.set_message(Message(written));
    });
    return false;
  }
  const Wish cause = Cause();
  RestoreLimit(/*stays=*/true);
  ReleaseDevices();
  LOG_WARN("migration {}: {}; the guest {} here ({})", id(), cause.message,
           running ? "goes on" : "stands still", why);
  CloseTunnel();
  const v1::Phase phase = cause.reason == v1::CANCELLED_BY_REQUEST ? v1::CANCELLED : v1::FAILED;
  reporter_.EnterPhase(phase, [&](v1::SideReport& r) {
    r.set_handover(v1::REFUSED);
    r.set_epoch(command_.epoch() + (fenced ? 2 : 0));
    r.set_guest_running(running);
    r.set_done(true);
    r.set_reason(cause.reason);
    r.set_message(cause.message);
  });
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
  }
  p_.on_end();
  return true;
}

bool DomainOutgoing::EndAway(const std::string& why) {
  Yielded();
  if (absl::Status written = p_.journal.Release(id(), command_.epoch()); !written.ok()) {
    // No danger: a later shim looks again and sees the same.
    LOG_WARN("migration {}: {}", id(), Message(written));
  }
  PausePoint(p_.config.Get().run_dir(), "source-released");
  ReleaseDevices();
  RestoreLimit(/*stays=*/false);
  UndefineLeftover();
  AddDowntime();
  LOG_INFO("migration {}: moved away ({})", id(), why);
  CloseTunnel();
  reporter_.EnterPhase(v1::SUCCEEDED, [&](v1::SideReport& r) {
    r.set_handover(v1::RELEASED);
    r.set_guest_running(false);
    r.set_done(true);
    r.set_reason(v1::NONE);
    r.clear_message();
    r.mutable_progress()->set_remaining(0);
  });
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
  }
  p_.on_end();
  return true;
}

// A definition that libvirt's own end of the migration would have removed: it goes once the destination has
// one.
void DomainOutgoing::UndefineLeftover() {
  if (!remote_) return;
  auto persistent = [this](vmm::LibvirtConnection& connection) {
    return vmm::CallFor<bool>(
        connection, "asking for the definition",
        [uuid = uuid_](virConnectPtr c) -> absl::StatusOr<bool> {
          vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
          if (!domain) return vmm::LibvirtError("domain");
          return virDomainIsPersistent(domain.get()) == 1;
        },
        Deadline::After(kSettleLook));
  };
  auto here = persistent(p_.local);
  if (!here.ok() || !*here) return;
  auto there = persistent(*remote_);
  if (!there.ok() || !*there) return;
  absl::Status undefined =
      OnDomain(p_.local, "removing the definition that was left here",
               [](virDomainPtr d) { return virDomainUndefineFlags(d, VIR_DOMAIN_UNDEFINE_KEEP_NVRAM); });
  if (!undefined.ok()) LOG_WARN("migration {}: {}", id(), Message(undefined));
}

// What libvirt measured. The destination's keeps it, if it was not heard of here.
void DomainOutgoing::AddDowntime() {
  std::optional<vmm::JobFigures> job = completed_;
  if (!job && remote_) {
    auto kept = vmm::DomainMover(*remote_, uuid_).Job(true, Deadline::After(kSettleLook));
    if (kept.ok()) job = *kept;
  }
  if (!job) return;
  reporter_.Update([&](v1::SideReport& r) {
    if (job->memory_total > 0) vmm::FillProgress(*job, r.mutable_progress());
    if (job->downtime_ms)
      migration::SetDuration(r.mutable_progress()->mutable_downtimes()->mutable_vcpu(),
                             milliseconds(*job->downtime_ms));
  });
}

void DomainOutgoing::LoseGuest(const std::string& why) {
  LOG_ERROR("migration {}: the guest is lost: {}", id(), why);
  bool yielded;
  {
    std::lock_guard lock(mutex_);
    yielded = yielded_;
  }
  // Its outcome is known, and in nobody's way who starts the guest anew here.
  if (yielded) {
    if (absl::Status written = p_.journal.Release(id(), command_.epoch()); !written.ok())
      LOG_WARN("migration {}: {}", id(), Message(written));
  }
  RestoreLimit(/*stays=*/false);
  ReleaseDevices();
  CloseTunnel();
  const std::string message = call_status_.ok() ? why : fmt::format("{}: {}", why, Cause().message);
  reporter_.EnterPhase(v1::FAILED, [&](v1::SideReport& r) {
    r.set_guest_running(false);
    r.set_guest_lost(true);
    r.set_done(true);
    r.set_reason(v1::SOURCE_VMM_FAILED);
    r.set_message(message);
  });
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
  }
  p_.on_end();
}

// Before libvirt was asked for anything.
void DomainOutgoing::NotStarted(const absl::Status& why) {
  if (mail_->stopped()) return;
  call_status_ = why;
  said_ = Message(why);
  const vmm::SideView here =
      LookAtDomain(p_.local, uuid_, vmm::MigrationRole::kSource, Deadline::After(kSettleLook));
  if (here.condition == vmm::DomainCondition::kAbsent || here.condition == vmm::DomainCondition::kShutOff)
    return LoseGuest("the domain has ended here");
  // Nobody has touched it: what it does here is its own matter.
  (void)EndHere(here.condition == vmm::DomainCondition::kRunning ||
                    here.condition == vmm::DomainCondition::kUnreachable,
                "nothing was begun");
}

}  // namespace baton::shim
