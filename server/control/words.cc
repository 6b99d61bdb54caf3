#include "server/control/words.h"

#include <fmt/format.h>

namespace baton::server {

std::string WhereInWords(const v1::Migration& m) {
  switch (m.guest_location()) {
    case v1::SOURCE:
      return fmt::format("the guest runs at {}", m.source());
    case v1::DESTINATION:
      return fmt::format("the guest runs at {}", m.destination());
    case v1::PAUSED_SOURCE:
      return fmt::format("the guest stands still at {}, which owns it", m.source());
    case v1::PAUSED_DESTINATION:
      return fmt::format("the guest stands still at {}, which owns it", m.destination());
    case v1::LOST:
      return "the guest ended and runs nowhere";
    default:
      return fmt::format("where the guest is cannot be told now: {} or {} does not answer", m.source(),
                         m.destination());
  }
}

std::string Advice(v1::Reason reason, v1::GuestLocation location) {
  switch (location) {
    case v1::UNKNOWN:
      return "bring the silent host back; if it is gone for good and cannot run the guest any more, confirm "
             "that with "
             "`batonctl migration resolve --fenced`";
    case v1::LOST:
      return "start the VM again from its spec";
    case v1::PAUSED_SOURCE:
    case v1::PAUSED_DESTINATION:
      return "see the log of the VM's shim on that host";
    default:
      break;
  }
  switch (reason) {
    case v1::VALIDATION_FAILED:
      return "remedy the blockers in its findings, then migrate again";
    case v1::AGENT_UNREACHABLE:
      return "check baton-agent on that host, then migrate again";
    case v1::DESTINATION_START_FAILED:
    case v1::DESTINATION_VMM_FAILED:
    case v1::DESTINATION_SHIM_FAILED:
      return "see the VM's shim and VMM logs at the destination, then migrate again";
    case v1::DESTINATION_BACKEND_FAILED:
      return "check the device's back-end at the destination, then migrate again";
    case v1::SOURCE_BACKEND_FAILED:
      return "check the device's back-end at the source";
    case v1::DRAIN_TIMEOUT:
      return "wait for the storage to answer faster, or raise drain_timeout, then migrate again";
    case v1::INFLIGHT_UNKNOWN:
      return "migrate again when the device is idle, or use a back-end with an in-flight region";
    case v1::PEER_CONNECTION_FAILED:
      return "check the network between the hosts' peer ports, then migrate again";
    case v1::NOT_CONVERGING:
      return "raise max_downtime or bandwidth, or migrate when the guest writes less";
    case v1::PHASE_TIMEOUT:
      return "see the agents' logs, then migrate again";
    case v1::STATE_WRITE_FAILED:
      return "free space under the state directory, then migrate again";
    case v1::DIRTY_TRACKING_UNAVAILABLE:
      return "give the agent access to /dev/userfaultfd and ptrace, then migrate again";
    case v1::PEER_PROTOCOL_ERROR:
    case v1::STATE_MISMATCH:
    case v1::DESTINATION_REFUSED:
      return "see the logs of both shims, then migrate again";
    default:
      return "";
  }
}

std::string EndMessage(const v1::Migration& migration, v1::Reason reason, const std::string& what) {
  std::string message = fmt::format("{}; {}", what, WhereInWords(migration));
  if (std::string advice = Advice(reason, migration.guest_location()); !advice.empty())
    message += "; " + advice;
  return message;
}

}  // namespace baton::server
