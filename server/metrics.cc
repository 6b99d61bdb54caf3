#include "server/metrics.h"

#include "common/metrics.h"
#include "common/reason.h"

namespace baton::server {
namespace {

double Seconds(const google::protobuf::Duration& duration) {
  return static_cast<double>(duration.seconds()) + duration.nanos() * 1e-9;
}

double Seconds(const google::protobuf::Timestamp& stamp) {
  return static_cast<double>(stamp.seconds()) + stamp.nanos() * 1e-9;
}

prometheus::Histogram& Histogram(prometheus::Registry& registry, const char* name, const char* help,
                                 double first, int count) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(
      {}, DoublingBuckets(first, count));
}
prometheus::Gauge& Gauge(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
}
prometheus::Counter& Counter(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add({});
}

}  // namespace

ServerMetrics::ServerMetrics()
    : registry_(std::make_shared<prometheus::Registry>()),
      migrations_(prometheus::BuildCounter()
                      .Name("baton_migrations_total")
                      .Help("Migrations that ended, by outcome and reason")
                      .Register(*registry_)),
      active_(prometheus::BuildGauge()
                  .Name("baton_migrations_active")
                  .Help("Migrations under way, by phase; many queued ones mean that limits are reached")
                  .Register(*registry_)),
      phases_(prometheus::BuildHistogram()
                  .Name("baton_migration_phase_seconds")
                  .Help("Time that ended migrations spent in each phase")
                  .Register(*registry_)),
      downtime_(prometheus::BuildHistogram()
                    .Name("baton_migration_downtime_seconds")
                    .Help("How long the guest stood still, by what stood still: vcpu, device, network")
                    .Register(*registry_)),
      bytes_(prometheus::BuildCounter()
                 .Name("baton_migration_bytes_total")
                 .Help("Guest memory by what was done with it (resent is a part of data); wire is what left "
                       "the hosts")
                 .Register(*registry_)),
      api_calls_(prometheus::BuildCounter()
                     .Name("baton_api_calls_total")
                     .Help("Calls of the API by method and canonical code")
                     .Register(*registry_)),
      device_events_(prometheus::BuildCounter()
                         .Name("baton_device_events_total")
                         .Help("Errors that back-ends told of their devices, by kind")
                         .Register(*registry_)),
      device_event_answers_(prometheus::BuildCounter()
                                .Name("baton_device_event_answers_total")
                                .Help("What was done about device events, by the policy or the lack of one")
                                .Register(*registry_)) {
  auto& r = *registry_;
  hosts_connected = &Gauge(r, "baton_hosts_connected", "Hosts whose agent has a session");
  hosts_known = &Gauge(r, "baton_hosts_known",
                       "Hosts that ever had a session; more than connected means agents are down");
  vms_known = &Gauge(r, "baton_vms_known", "VMs in the fleet");
  watches = &Gauge(r, "baton_watches_open", "Open WatchMigrations streams");
  sessions = &Counter(r, "baton_agent_sessions_total", "Agent sessions begun");
  sessions_lost = &Counter(r, "baton_agent_sessions_lost_total",
                           "Agent sessions that ended; many mean network trouble or restarting agents");
  stale_copies = &Gauge(r, "baton_stale_copies",
                        "VMs that a host runs although another one owns them; each one needs an operator");
  stale_owners = &Counter(r, "baton_stale_owner_claims_total",
                          "Reports of VMs that run although another host owns them");
  store_errors =
      &Counter(r, "baton_store_errors_total", "Writes that the store refused, usually for a full disk");
  store_commit_seconds =
      &Histogram(r, "baton_store_commit_seconds",
                 "Time of a durable write; high values mean a slow or overloaded disk", 0.0001, 18);
  queue_wait_seconds = &Histogram(r, "baton_queue_wait_seconds",
                                  "Time between creation and admission of migrations", 0.01, 20);
  rounds_ = &Histogram(r, "baton_migration_rounds", "Rounds of pre-copy, the last one included", 1, 10);
  duration_ = &Histogram(r, "baton_migration_seconds", "From creation to the end", 0.1, 18);
  drain_ = &Histogram(r, "baton_migration_drain_seconds",
                      "Time that devices took to stop; high values mean slow storage", 0.0005, 16);
  handed_off_ = &Counter(r, "baton_inflight_handed_off_total", "Requests handed over in flight");
}

void ServerMetrics::MigrationStarted(const v1::Migration& migration) {
  for (const v1::PhaseTime& time : migration.phase_times()) {
    if (time.phase() == v1::PREPARING) {
      queue_wait_seconds->Observe(Seconds(time.time()) - Seconds(migration.create_time()));
    }
  }
}

void ServerMetrics::MigrationEnded(const v1::Migration& m) {
  migrations_.Add({{"outcome", LabelOf(m.phase())}, {"reason", LabelOf(m.reason())}}).Increment();
  duration_->Observe(Seconds(m.end_time()) - Seconds(m.create_time()));
  for (int i = 0; i + 1 < m.phase_times_size(); ++i) {
    double spent = Seconds(m.phase_times(i + 1).time()) - Seconds(m.phase_times(i).time());
    // Clocks of two hosts may disagree by more than a short phase.
    phases_.Add({{"phase", LabelOf(m.phase_times(i).phase())}}, DoublingBuckets(0.001, 22))
        .Observe(std::max(spent, 0.0));
  }
  const v1::Progress& progress = m.progress();
  const v1::Downtimes& downtimes = progress.downtimes();
  auto downtime = [&](const char* kind, const google::protobuf::Duration& value) {
    downtime_.Add({{"kind", kind}}, DoublingBuckets(0.0005, 18)).Observe(Seconds(value));
  };
  if (downtimes.has_vcpu()) downtime("vcpu", downtimes.vcpu());
  if (downtimes.has_device()) downtime("device", downtimes.device());
  if (downtimes.has_network()) downtime("network", downtimes.network());
  const v1::ByteCounts& bytes = progress.bytes();
  const std::pair<const char*, uint64_t> kinds[] = {{"data", bytes.data()},
                                                    {"zero", bytes.zero()},
                                                    {"hint_skipped", bytes.hint_skipped()},
                                                    {"hole_skipped", bytes.hole_skipped()},
                                                    {"resent", bytes.resent()},
                                                    {"wire", bytes.wire()},
                                                    {"state", bytes.state()}};
  for (const auto& [kind, count] : kinds) bytes_.Add({{"kind", kind}}).Increment(static_cast<double>(count));
  if (progress.rounds_size() > 0) rounds_->Observe(progress.rounds_size());
  if (progress.has_drain()) drain_->Observe(Seconds(progress.drain()));
  handed_off_->Increment(progress.inflight_handed_off());
}

void ServerMetrics::SetActive(const std::map<v1::Phase, int>& by_phase) {
  for (v1::Phase phase :
       {v1::QUEUED, v1::PREPARING, v1::PRECOPY, v1::SWITCHOVER, v1::POSTCOPY, v1::FINISHING}) {
    auto found = by_phase.find(phase);
    active_.Add({{"phase", LabelOf(phase)}}).Set(found == by_phase.end() ? 0 : found->second);
  }
}

void ServerMetrics::DeviceEvents(v1::DeviceEvent::Kind kind, uint64_t count) {
  device_events_.Add({{"kind", kind == v1::DeviceEvent::QUEUE_ERROR ? "queue_error" : "unknown"}})
      .Increment(static_cast<double>(count));
}

void ServerMetrics::DeviceEventAnswer(const std::string& answer) {
  device_event_answers_.Add({{"answer", answer}}).Increment();
}

void ServerMetrics::ApiCall(const std::string& method, int code) {
  api_calls_.Add({{"method", method}, {"code", std::to_string(code)}}).Increment();
}

}  // namespace baton::server
