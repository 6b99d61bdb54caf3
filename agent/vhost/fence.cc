// The fence: a command of the host's configuration that keeps what the source's back-end had in flight from
// having an effect later (docs/backends.md).
#include "agent/vhost/mediator_impl.h"
#include "common/log.h"
#include "common/process.h"

namespace baton::vhost {

absl::Status Mediator::Impl::RunFence(const std::string& action) {
  SpawnOptions spawn;
  spawn.argv = options_.fence.command;
  spawn.argv.push_back(action);
  spawn.env = options_.fence.env;
  spawn.env["BATON_ACTION"] = action;
  spawn.env["BATON_DEVICE"] = name();
  spawn.env["BATON_SOCKET"] = options_.backend.socket();
  auto ran = RunCommand(std::move(spawn), Deadline::After(options_.fence.timeout));
  if (!ran.ok()) return Annotate(ran.status(), fmt::format("the command for {}", action));
  if (ran->status.ok()) return absl::OkStatus();
  return Error(absl::StatusCode::kFailedPrecondition, "the command for {} {}{}{}", action,
               ran->status.ToString(), ran->err.empty() ? "" : ": ", ran->err.substr(0, ran->err.find('\n')));
}

absl::Status Mediator::Impl::FenceIfNeeded() {
  if (quirks_.confirms_cancel || stop_.requests() == 0) return absl::OkStatus();
  if (!HasFence()) return absl::FailedPreconditionError("nothing confirms that what was stopped has ended");
  // Also one that failed may have done its work.
  fenced_ = true;
  return RunFence("fence");
}

absl::Status Mediator::Impl::LiftFence() {
  if (!fenced_) return absl::OkStatus();
  absl::Status lifted = RunFence("unfence");
  if (!lifted.ok()) {
    return Error(v1::SOURCE_BACKEND_FAILED, absl::StatusCode::kFailedPrecondition,
                 "the storage stays fenced off: {}", Message(lifted));
  }
  fenced_ = false;
  return absl::OkStatus();
}

}  // namespace baton::vhost
