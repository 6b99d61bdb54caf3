#include "agent/vmm/libvirt/job.h"

#include <google/protobuf/util/time_util.h>

#include <algorithm>
#include <cstring>

#include "agent/vmm/libvirt/connection.h"

namespace baton::vmm {
namespace {

// An unsigned figure of whichever integer type libvirt chose for it.
std::optional<uint64_t> NumberOf(const virTypedParameter& param) {
  switch (param.type) {
    case VIR_TYPED_PARAM_INT:
      return param.value.i < 0 ? std::nullopt : std::optional<uint64_t>(param.value.i);
    case VIR_TYPED_PARAM_UINT:
      return param.value.ui;
    case VIR_TYPED_PARAM_LLONG:
      return param.value.l < 0 ? std::nullopt : std::optional<uint64_t>(param.value.l);
    case VIR_TYPED_PARAM_ULLONG:
      return param.value.ul;
    default:
      return std::nullopt;
  }
}

}  // namespace

JobFigures ReadJobFigures(int type, const virTypedParameter* params, int count) {
  JobFigures out;
  out.type = type;
  uint64_t operation = 0, downtime = 0;
  bool has_downtime = false;
  const struct {
    const char* name;
    uint64_t* to;
  } fields[] = {
      {VIR_DOMAIN_JOB_OPERATION, &operation},
      {VIR_DOMAIN_JOB_TIME_ELAPSED, &out.elapsed_ms},
      {VIR_DOMAIN_JOB_SETUP_TIME, &out.setup_ms},
      {VIR_DOMAIN_JOB_DOWNTIME, &downtime},
      {VIR_DOMAIN_JOB_MEMORY_TOTAL, &out.memory_total},
      {VIR_DOMAIN_JOB_MEMORY_PROCESSED, &out.memory_processed},
      {VIR_DOMAIN_JOB_MEMORY_REMAINING, &out.memory_remaining},
      {VIR_DOMAIN_JOB_MEMORY_CONSTANT, &out.constant_pages},
      {VIR_DOMAIN_JOB_MEMORY_NORMAL_BYTES, &out.normal_bytes},
      {VIR_DOMAIN_JOB_MEMORY_BPS, &out.bytes_per_second},
      {VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE, &out.dirty_pages},
      {VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE, &out.page_size},
      {VIR_DOMAIN_JOB_MEMORY_ITERATION, &out.iteration},
      {VIR_DOMAIN_JOB_MEMORY_POSTCOPY_REQS, &out.postcopy_requests},
      {VIR_DOMAIN_JOB_DISK_TOTAL, &out.disk_total},
      {VIR_DOMAIN_JOB_DISK_PROCESSED, &out.disk_processed},
      {VIR_DOMAIN_JOB_DISK_REMAINING, &out.disk_remaining},
      {VIR_DOMAIN_JOB_DISK_BPS, &out.disk_bytes_per_second},
      {VIR_DOMAIN_JOB_AUTO_CONVERGE_THROTTLE, &out.throttle_percent},
  };
  for (int i = 0; i < count; ++i) {
    for (const auto& field : fields) {
      if (std::strcmp(params[i].field, field.name) != 0) continue;
      const auto number = NumberOf(params[i]);
      if (!number) continue;
      *field.to = *number;
      if (field.to == &downtime) has_downtime = true;
    }
  }
  out.operation = static_cast<int>(std::min<uint64_t>(operation, 1000));
  if (has_downtime) out.downtime_ms = downtime;
  // A page size of 0 would make every rate 0.
  if (out.page_size == 0) out.page_size = 4096;
  return out;
}

absl::StatusOr<JobFigures> AskJob(virDomainPtr domain, bool completed) {
  int type = 0, count = 0;
  virTypedParameterPtr params = nullptr;
  const unsigned flags =
      completed ? VIR_DOMAIN_JOB_STATS_COMPLETED | VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED : 0u;
  if (virDomainGetJobStats(domain, &type, &params, &count, flags) != 0) return LibvirtError("job");
  JobFigures out = ReadJobFigures(type, params, count);
  virTypedParamsFree(params, count);
  return out;
}

MigrationJob AskMigrationJob(virDomainPtr domain, JobFigures* figures) {
  auto job = AskJob(domain, false);
  if (!job.ok()) {
    // "migration statistics are available only on the source host" (libvirt 9.0 to 11.3). A domain without a
    // QEMU, which has no job, is VIR_ERR_OPERATION_INVALID.
    return virGetLastErrorCode() == VIR_ERR_OPERATION_UNSUPPORTED ? MigrationJob::kIncoming
                                                                  : MigrationJob::kNone;
  }
  if (figures != nullptr) *figures = *job;
  if (job->type == VIR_DOMAIN_JOB_NONE) return MigrationJob::kNone;
  if (job->operation == VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN) return MigrationJob::kIncoming;
  return job->outgoing() ? MigrationJob::kOutgoing : MigrationJob::kNone;
}

void FillProgress(const JobFigures& job, v1::Progress* progress) {
  v1::ByteCounts* bytes = progress->mutable_bytes();
  bytes->set_data(job.normal_bytes + job.disk_processed);
  bytes->set_zero(job.constant_pages * job.page_size);
  bytes->set_wire(job.memory_processed + job.disk_processed);
  // Whatever exceeds the guest's memory was sent before.
  const uint64_t seen = job.normal_bytes + bytes->zero();
  if (job.memory_total > 0 && seen > job.memory_total)
    bytes->set_resent(std::min(seen - job.memory_total, job.normal_bytes));
  if (job.memory_total > 0) progress->set_memory_total(job.memory_total);
  progress->set_remaining(job.memory_remaining + job.disk_remaining);
  if (job.bytes_per_second + job.disk_bytes_per_second > 0)
    progress->set_rate(job.bytes_per_second + job.disk_bytes_per_second);
  if (job.iteration > 0) {
    progress->set_round(static_cast<uint32_t>(std::min<uint64_t>(job.iteration, UINT32_MAX)));
    progress->set_dirty_rate(job.dirty_rate());
  }
  if (job.bytes_per_second > 0) {
    *progress->mutable_forecast_remaining() = google::protobuf::util::TimeUtil::MillisecondsToDuration(
        static_cast<int64_t>((job.memory_remaining + job.disk_remaining) * 1000 /
                             (job.bytes_per_second + job.disk_bytes_per_second)));
  }
}

}  // namespace baton::vmm
