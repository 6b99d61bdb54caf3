// What the present state of a migration wants from its two sides.
#include "server/control/machine.h"
#include "server/names.h"

namespace baton::server {

void Machine::Issue(CommandKind kind, v1::Role to, v1::Command command, Duration timeout) {
  if (!Up(to) || in_flight_[kind]) return;
  if (auto found = not_before_.find(kind); found != not_before_.end() && now_.mono_ns < found->second) {
    return Wake(found->second);
  }
  in_flight_[kind] = true;
  command.mutable_timeout()->set_seconds(std::chrono::duration_cast<std::chrono::seconds>(timeout).count());
  actions_.commands.push_back({kind, to, std::move(command)});
}

void Machine::Want() {
  const std::string id = IdOf(pub_.name()), vm = IdOf(pub_.vm());
  const v1::SideReport& source = ctl_.source();
  const Duration usual = std::chrono::seconds(10);
  switch (ctl_.step()) {
    case MigrationControl::INSPECTING: {
      v1::Command command;
      command.mutable_inspect_vm()->set_vm(vm);
      Issue(CommandKind::kInspect, v1::ROLE_SOURCE, std::move(command), usual);
      break;
    }
    case MigrationControl::READYING: {
      v1::Command command;
      auto* prepare = command.mutable_prepare_incoming();
      prepare->set_migration_id(id);
      *prepare->mutable_source() = ctl_.inspection();
      *prepare->mutable_params() = pub_.params();
      Issue(CommandKind::kPrepare, v1::ROLE_DESTINATION, std::move(command), times_.preparing);
      break;
    }
    case MigrationControl::STARTING: {
      if (ctl_.cancel_wanted()) break;
      v1::Command command;
      auto* start = command.mutable_start_outgoing();
      start->set_migration_id(id);
      start->set_vm(vm);
      start->set_peer_address(ctl_.prepared().peer_address());
      start->set_token(ctl_.prepared().token());
      *start->mutable_params() = pub_.params();
      start->set_epoch(pub_.epoch());
      if (ctl_.prepared().has_domain()) *start->mutable_domain() = ctl_.prepared().domain();
      Issue(CommandKind::kStart, v1::ROLE_SOURCE, std::move(command), usual);
      break;
    }
    default:
      break;
  }
  bool source_over = ctl_.source_clean() || source.done();
  if (ctl_.cancel_wanted() && ctl_.outgoing_issued() && !source_over && !SourceYielded() && !cancel_told_ &&
      !in_flight_[CommandKind::kStart]) {
    v1::Command command;
    command.mutable_cancel_outgoing()->set_migration_id(id);
    command.mutable_cancel_outgoing()->set_vm(vm);
    Issue(CommandKind::kCancel, v1::ROLE_SOURCE, std::move(command), usual);
  }
  bool verdict_missing = source.handover() == v1::YIELDED && !DestinationRefused();
  if (ctl_.abort_wanted() && ctl_.prepare_issued() && !DestinationOwns() &&
      (!DestinationOver() || verdict_missing) && !in_flight_[CommandKind::kPrepare]) {
    v1::Command command;
    command.mutable_abort_incoming()->set_migration_id(id);
    command.mutable_abort_incoming()->set_vm(vm);
    Issue(CommandKind::kAbort, v1::ROLE_DESTINATION, std::move(command), usual);
  }
  bool verdict = DestinationOwns() || DestinationRefused() || ctl_.fenced();
  if (source.handover() == v1::YIELDED && !source.done() && verdict &&
      !(ctl_.fenced() && DestinationOwns())) {
    v1::Command command;
    auto* resolve = command.mutable_resolve();
    resolve->set_migration_id(id);
    resolve->set_vm(vm);
    resolve->set_verdict(DestinationOwns() ? v1::OWNER : v1::REFUSED);
    resolve->set_fenced(!DestinationOwns() && !DestinationRefused());
    Issue(CommandKind::kResolve, v1::ROLE_SOURCE, std::move(command), usual);
  }
  if (ctl_.has_retune() && ctl_.outgoing_accepted() && !source_over) {
    v1::Command command;
    *command.mutable_retune() = ctl_.retune();
    command.mutable_retune()->set_migration_id(id);
    command.mutable_retune()->set_vm(vm);
    Issue(CommandKind::kRetune, v1::ROLE_SOURCE, std::move(command), usual);
  }
}

}  // namespace baton::server
