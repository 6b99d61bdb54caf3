#include "agent/daemon/agent_metrics.h"

#include <absl/strings/ascii.h>

#include "common/metrics.h"

namespace baton::daemon {
namespace {

double Seconds(const google::protobuf::Duration& d) {
  return static_cast<double>(d.seconds()) + static_cast<double>(d.nanos()) * 1e-9;
}

prometheus::Family<prometheus::Counter>& Counter(prometheus::Registry& registry, const char* name,
                                                 const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}
prometheus::Family<prometheus::Gauge>& Gauge(prometheus::Registry& registry, const char* name,
                                             const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
}
prometheus::Family<prometheus::Histogram>& Histogram(prometheus::Registry& registry, const char* name,
                                                     const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
}

}  // namespace

AgentMetrics::AgentMetrics()
    : registry_(std::make_shared<prometheus::Registry>()),
      peer_connections_(
          Counter(*registry_, "baton_agent_peer_connections_total",
                  "Connections on the peer port by outcome; refused ones come from scanners, or from a "
                  "source whose migration ended here")),
      commands_(Counter(*registry_, "baton_agent_commands_total", "Commands of batond by kind and result")),
      command_seconds_(
          Histogram(*registry_, "baton_agent_command_seconds",
                    "Time commands took; slow prepare_incoming points at slow back-ends or hooks")),
      shim_starts_(Counter(*registry_, "baton_agent_shim_starts_total", "Shims started, by mode")),
      shim_deaths_(Counter(*registry_, "baton_agent_shim_deaths_total",
                           "Shims that ended unasked, by what was done about it")),
      session_up_(
          Gauge(*registry_, "baton_agent_session_up", "1 while the session with batond is up").Add({})),
      sessions_(
          Counter(*registry_, "baton_agent_sessions_total",
                  "Sessions with batond since the start; grows fast when the network or batond is unstable")
              .Add({})),
      vms_(Gauge(*registry_, "baton_agent_vms", "VMs on this host by state")),
      migrations_(Counter(*registry_, "baton_agent_migrations_total",
                          "Migrations that ended at this host, by role and reason")),
      migration_bytes_(
          Counter(*registry_, "baton_agent_migration_bytes_total",
                  "Bytes of guest memory by what became of them, and bytes on the wire, as a source")),
      downtime_seconds_(Histogram(*registry_, "baton_agent_migration_downtime_seconds",
                                  "How long guests stood still, by kind (vcpu, device, network)")) {}

void AgentMetrics::CountPeerConnection(const std::string& outcome) {
  peer_connections_.Add({{"outcome", outcome}}).Increment();
}

void AgentMetrics::CountCommand(const std::string& kind, const absl::Status& status, double seconds) {
  commands_.Add({{"command", kind}, {"code", absl::StatusCodeToString(status.code())}}).Increment();
  command_seconds_.Add({{"command", kind}}, DoublingBuckets(0.001, 18)).Observe(seconds);
}

void AgentMetrics::CountShimStart(const std::string& mode) { shim_starts_.Add({{"mode", mode}}).Increment(); }
void AgentMetrics::CountShimDeath(const std::string& action) {
  shim_deaths_.Add({{"action", action}}).Increment();
}

void AgentMetrics::SetSessionUp(bool up) {
  session_up_.Set(up ? 1 : 0);
  if (up) sessions_.Increment();
}

void AgentMetrics::SetVms(double running, double incoming, double other) {
  vms_.Add({{"state", "running"}}).Set(running);
  vms_.Add({{"state", "incoming"}}).Set(incoming);
  vms_.Add({{"state", "other"}}).Set(other);
}

void AgentMetrics::CountMigration(const v1::SideReport& report) {
  std::string role = report.role() == v1::ROLE_SOURCE ? "source" : "destination";
  std::string reason = absl::AsciiStrToLower(v1::Reason_Name(report.reason()));
  migrations_.Add({{"role", role}, {"reason", reason}}).Increment();
  const v1::Downtimes& downtimes = report.progress().downtimes();
  auto observe = [&](const char* kind, const google::protobuf::Duration& duration) {
    downtime_seconds_.Add({{"kind", kind}}, DoublingBuckets(0.001, 16)).Observe(Seconds(duration));
  };
  if (downtimes.has_vcpu()) observe("vcpu", downtimes.vcpu());
  if (downtimes.has_device()) observe("device", downtimes.device());
  if (downtimes.has_network()) observe("network", downtimes.network());
  if (report.role() != v1::ROLE_SOURCE) return;
  const v1::ByteCounts& bytes = report.progress().bytes();
  for (auto [kind, amount] :
       {std::pair{"data", bytes.data()}, std::pair{"zero", bytes.zero()},
        std::pair{"hint_skipped", bytes.hint_skipped()}, std::pair{"hole_skipped", bytes.hole_skipped()},
        std::pair{"resent", bytes.resent()}, std::pair{"wire", bytes.wire()},
        std::pair{"state", bytes.state()}})
    migration_bytes_.Add({{"kind", kind}}).Increment(static_cast<double>(amount));
}

}  // namespace baton::daemon
