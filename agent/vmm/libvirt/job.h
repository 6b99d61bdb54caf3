// What libvirt tells of a domain's job (virDomainGetJobStats) and the figures that Baton makes of it.
#pragma once

#include <libvirt/libvirt.h>

#include <cstdint>
#include <optional>

#include "baton/v1/types.pb.h"
#include "common/status.h"

namespace baton::vmm {

// Fields that libvirt did not send are 0; `downtime_ms` is expected before the end and measured after it.
struct JobFigures {
  // virDomainJobType: VIR_DOMAIN_JOB_NONE without a job; _COMPLETED, _FAILED of one that has ended.
  int type = 0;
  // virDomainJobOperation.
  int operation = 0;
  uint64_t elapsed_ms = 0;
  uint64_t setup_ms = 0;
  std::optional<uint64_t> downtime_ms;
  uint64_t memory_total = 0;
  uint64_t memory_processed = 0;
  uint64_t memory_remaining = 0;
  // Pages of zeroes, and bytes of other pages.
  uint64_t constant_pages = 0;
  uint64_t normal_bytes = 0;
  uint64_t bytes_per_second = 0;
  // Pages a second, as of the last iteration.
  uint64_t dirty_pages = 0;
  uint64_t page_size = 4096;
  uint64_t iteration = 0;
  uint64_t postcopy_requests = 0;
  uint64_t disk_total = 0;
  uint64_t disk_processed = 0;
  uint64_t disk_remaining = 0;
  uint64_t disk_bytes_per_second = 0;
  uint64_t throttle_percent = 0;

  uint64_t dirty_rate() const { return dirty_pages * page_size; }
  bool outgoing() const { return operation == VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT; }
};

// Reads what virDomainGetJobStats gave. Pure.
JobFigures ReadJobFigures(int type, const virTypedParameter* params, int count);

// Asks for the job under way, or for the statistics of the last one that has ended. May hang with the
// domain's monitor: call it by way of LibvirtConnection::Call.
absl::StatusOr<JobFigures> AskJob(virDomainPtr domain, bool completed);

// What libvirt is doing with the domain, as far as it is a migration.
enum class MigrationJob { kNone, kOutgoing, kIncoming };
// Like AskJob(). An incoming one lasts from libvirt's prepare until its finish is over, whatever the state of
// the domain; it has no figures, so AskJob() does not tell it. `figures`, if wanted, are those of the job
// under way, whatever its kind; left alone where there are none.
MigrationJob AskMigrationJob(virDomainPtr domain, JobFigures* figures = nullptr);

// Writes the figures into `progress`: amounts, what remains, rates. Rounds and decisions are others'. Pure.
void FillProgress(const JobFigures& job, v1::Progress* progress);

}  // namespace baton::vmm
