#include "server/control/dry_run.h"

#include <google/protobuf/util/time_util.h>

#include <algorithm>
#include <memory>

#include "common/units.h"
#include "server/names.h"

namespace baton::server {
namespace {

using google::protobuf::util::TimeUtil;

// What a 10 Gbit/s link brings, where nothing was measured yet.
constexpr double kAssumedRate = 1.1e9;
// Blackout beside the last pages: stop and start of vCPUs and devices, state, one fsync at each side.
constexpr double kFixedBlackout = 0.02;

google::protobuf::Duration FromSeconds(double seconds) {
  return TimeUtil::MicrosecondsToDuration(static_cast<int64_t>(std::min(seconds, 1e9) * 1e6));
}

}  // namespace

void Forecast(uint64_t memory, uint64_t dirty_rate, double rate, v1::Migration* migration) {
  bool assumed = rate <= 0;
  if (assumed) rate = kAssumedRate;
  if (uint64_t limit = migration->params().bandwidth(); limit > 0) {
    rate = std::min(rate, static_cast<double>(limit));
    assumed = false;
  }
  double goal =
      static_cast<double>(TimeUtil::DurationToMicroseconds(migration->params().max_downtime())) / 1e6;
  // Each round takes as long as what the one before left behind: a geometric series with the ratio dirty rate
  // / rate.
  double ratio = static_cast<double>(dirty_rate) / rate;
  double round = static_cast<double>(memory) / rate, total = 0;
  int rounds = 0;
  while (rounds < 50 && round > std::max(goal - kFixedBlackout, 0.001)) {
    total += round;
    ++rounds;
    if (ratio >= 1) break;
    round *= ratio;
  }
  bool converges = round <= std::max(goal - kFixedBlackout, 0.001);
  auto* progress = migration->mutable_progress();
  progress->set_memory_total(std::max(progress->memory_total(), memory));
  progress->set_remaining(memory);
  progress->set_rate(static_cast<uint64_t>(rate));
  progress->set_dirty_rate(dirty_rate);
  *progress->mutable_forecast_remaining() = FromSeconds(total + round + kFixedBlackout);
  *progress->mutable_forecast_downtime() = FromSeconds(round + kFixedBlackout);
  auto* finding = migration->add_findings();
  finding->set_code("FORECAST");
  finding->set_subject("memory");
  finding->set_severity(converges ? v1::INFO : v1::WARNING);
  finding->set_message(fmt::format(
      "{:.1f} MiB to send at {:.0f} MiB/s{}, {:.1f} MiB/s written by the guest: about {:.1f} s, blackout "
      "about {:.0f} ms{}",
      static_cast<double>(memory) / (1 << 20), rate / (1 << 20),
      assumed ? " (assumed, nothing measured yet)" : "", static_cast<double>(dirty_rate) / (1 << 20),
      total + round + kFixedBlackout, (round + kFixedBlackout) * 1000,
      converges ? "" : ", which is more than max_downtime allows"));
  if (!converges)
    finding->set_remedy("raise max_downtime or bandwidth, or migrate when the guest writes less");
}

void StartDryRun(Fleet& fleet, v1::Migration migration, Duration dirty_sample, double rate,
                 std::function<void(absl::StatusOr<v1::Migration>)> callback) {
  v1::Command inspect;
  inspect.mutable_inspect_vm()->set_vm(IdOf(migration.vm()));
  auto sample = std::chrono::duration_cast<std::chrono::microseconds>(dirty_sample).count();
  *inspect.mutable_inspect_vm()->mutable_dirty_sample() = TimeUtil::MicrosecondsToDuration(sample);
  inspect.mutable_timeout()->set_seconds(20);
  std::string source = IdOf(migration.source()), destination = IdOf(migration.destination());
  migration.set_phase(v1::PREPARING);
  migration.set_guest_location(v1::SOURCE);
  fleet.Send(source, std::move(inspect),
             [&fleet, migration, rate, destination,
              callback = std::move(callback)](Fleet::CommandReply reply) mutable {
               if (!reply.status.ok()) return callback(Annotate(reply.status, migration.source()));
               v1::Inspection inspection = reply.result.inspection();
               *migration.mutable_findings() = inspection.findings();
               uint64_t total = 0;
               for (const auto& block : inspection.blocks()) total += block.size();
               migration.mutable_progress()->set_memory_total(total);
               v1::Command prepare;
               auto* body = prepare.mutable_prepare_incoming();
               body->set_migration_id("dry-" + RandomHex(6));
               *body->mutable_source() = inspection;
               *body->mutable_params() = migration.params();
               body->set_validate_only(true);
               prepare.mutable_timeout()->set_seconds(30);
               fleet.Send(destination, std::move(prepare),
                          [migration, inspection, rate,
                           callback = std::move(callback)](Fleet::CommandReply reply) mutable {
                            if (!reply.status.ok())
                              return callback(Annotate(reply.status, migration.destination()));
                            for (const v1::Finding& finding : reply.result.prepared().findings())
                              *migration.add_findings() = finding;
                            Forecast(inspection.memory_used(), inspection.dirty_rate(), rate, &migration);
                            callback(std::move(migration));
                          });
             });
}

}  // namespace baton::server
