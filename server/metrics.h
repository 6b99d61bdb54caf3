// batond's metrics: every family in one place. Labels are bounded: enum names, never VM, host or migration
// names.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <map>
#include <memory>
#include <string>

#include "baton/v1/fleet.pb.h"
#include "baton/v1/migrations.pb.h"

namespace baton::server {

// Thread-safe, as prometheus-cpp's metrics are.
class ServerMetrics {
 public:
  ServerMetrics();
  std::shared_ptr<prometheus::Registry> registry() const { return registry_; }

  // Everything that an ended migration tells.
  void MigrationEnded(const v1::Migration& migration);
  void MigrationStarted(const v1::Migration& migration);
  // How many records are in each phase that is not final.
  void SetActive(const std::map<v1::Phase, int>& by_phase);
  // Events of devices, and what was done about one (docs/batond.md lists the answers).
  void DeviceEvents(v1::DeviceEvent::Kind kind, uint64_t count);
  void DeviceEventAnswer(const std::string& answer);
  // A call of the API that failed, by canonical code.
  void ApiCall(const std::string& method, int code);

  // Children without labels; constant after construction.
  prometheus::Gauge* hosts_connected;
  prometheus::Gauge* hosts_known;
  prometheus::Gauge* vms_known;
  prometheus::Gauge* watches;
  prometheus::Gauge* stale_copies;
  prometheus::Counter* sessions;
  prometheus::Counter* sessions_lost;
  prometheus::Counter* stale_owners;
  prometheus::Counter* store_errors;
  prometheus::Histogram* store_commit_seconds;
  prometheus::Histogram* queue_wait_seconds;

 private:
  std::shared_ptr<prometheus::Registry> registry_;
  prometheus::Family<prometheus::Counter>& migrations_;
  prometheus::Family<prometheus::Gauge>& active_;
  prometheus::Family<prometheus::Histogram>& phases_;
  prometheus::Family<prometheus::Histogram>& downtime_;
  prometheus::Family<prometheus::Counter>& bytes_;
  prometheus::Family<prometheus::Counter>& api_calls_;
  prometheus::Family<prometheus::Counter>& device_events_;
  prometheus::Family<prometheus::Counter>& device_event_answers_;
  prometheus::Histogram* rounds_;
  prometheus::Histogram* duration_;
  prometheus::Histogram* drain_;
  prometheus::Counter* handed_off_;
};

}  // namespace baton::server
