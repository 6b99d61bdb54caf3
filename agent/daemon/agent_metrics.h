// All metrics of baton-agent, in one list. Names and labels are part of the interface (docs/operations.md).
#pragma once

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <memory>
#include <string>

#include "baton/v1/types.pb.h"
#include "common/status.h"

namespace baton::daemon {

// Thread-safe. Labels are bounded: no names of VMs or migrations.
class AgentMetrics {
 public:
  AgentMetrics();
  std::shared_ptr<prometheus::Registry> registry() const { return registry_; }

  // Connections on the peer port: "handed_over", "verdict_answered", or why it was closed ("too_many",
  // "timeout", "closed", "bad_preamble", "unknown_migration", "bad_token", "shim_failed").
  void CountPeerConnection(const std::string& outcome);
  // A command of batond and the canonical code of its result ("OK", "NOT_FOUND" …).
  void CountCommand(const std::string& kind, const absl::Status& status, double seconds);
  void CountShimStart(const std::string& mode);
  // "adopt", "guest_lost", "refuse" …: what was done after a shim had died.
  void CountShimDeath(const std::string& action);
  void SetSessionUp(bool up);
  void SetVms(double running, double incoming, double other);
  // Figures of a final report.
  void CountMigration(const v1::SideReport& report);

 private:
  std::shared_ptr<prometheus::Registry> registry_;
  prometheus::Family<prometheus::Counter>& peer_connections_;
  prometheus::Family<prometheus::Counter>& commands_;
  prometheus::Family<prometheus::Histogram>& command_seconds_;
  prometheus::Family<prometheus::Counter>& shim_starts_;
  prometheus::Family<prometheus::Counter>& shim_deaths_;
  prometheus::Gauge& session_up_;
  prometheus::Counter& sessions_;
  prometheus::Family<prometheus::Gauge>& vms_;
  prometheus::Family<prometheus::Counter>& migrations_;
  prometheus::Family<prometheus::Counter>& migration_bytes_;
  prometheus::Family<prometheus::Histogram>& downtime_seconds_;
};

}  // namespace baton::daemon
