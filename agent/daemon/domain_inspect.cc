// DomainManager: a domain as a source looks at it before a migration.
#include <libvirt/libvirt.h>

#include <algorithm>
#include <thread>

#include "agent/daemon/domain_manager.h"
#include "agent/vmm/libvirt/checks.h"
#include "common/finding.h"
#include "common/log.h"

namespace baton::daemon {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// libvirt measures whole seconds; QEMU itself takes a moment more.
constexpr Duration kDirtyGrace = seconds(2);
constexpr Duration kDirtyLook = milliseconds(50);

struct DirtyRate {
  int status = 0;
  uint64_t mib_per_second = 0;
};

absl::StatusOr<DirtyRate> ReadDirtyRate(virConnectPtr c, const std::string& uuid) {
  vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
  if (!domain) return vmm::LibvirtError("domain");
  virDomainPtr list[] = {domain.get(), nullptr};
  virDomainStatsRecordPtr* stats = nullptr;
  if (virDomainListGetStats(list, VIR_DOMAIN_STATS_DIRTYRATE, &stats, 0) < 0)
    return vmm::LibvirtError("dirty rate");
  DirtyRate out;
  for (int i = 0; stats[i]; ++i) {
    int status = 0;
    long long rate = 0;
    if (virTypedParamsGetInt(stats[i]->params, stats[i]->nparams, "dirtyrate.calc_status", &status) == 1)
      out.status = status;
    if (virTypedParamsGetLLong(stats[i]->params, stats[i]->nparams, "dirtyrate.megabytes_per_second",
                               &rate) == 1 &&
        rate > 0)
      out.mib_per_second = static_cast<uint64_t>(rate);
  }
  virDomainStatsRecordListFree(stats);
  return out;
}

// Bytes a second that the guest writes, by QEMU's own measurement.
absl::StatusOr<uint64_t> MeasureDirtyRate(vmm::LibvirtConnection& libvirt, const std::string& uuid,
                                          Duration sample, Deadline deadline) {
  const int whole = static_cast<int>(std::clamp<int64_t>(std::chrono::ceil<seconds>(sample).count(), 1, 60));
  RETURN_IF_ERROR(libvirt.Call(
      "measuring the dirty rate",
      [uuid, whole](virConnectPtr c) {
        vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
        if (!domain || virDomainStartDirtyRateCalc(domain.get(), whole, 0) != 0)
          return vmm::LibvirtError("dirty rate");
        return absl::OkStatus();
      },
      deadline));
  const Deadline measured = deadline.Min(Deadline::After(seconds(whole) + kDirtyGrace));
  // Nothing tells of its end.
  std::this_thread::sleep_until(
      (Clock::now() + seconds(whole)) < measured.when() ? Clock::now() + seconds(whole) : measured.when());
  for (;;) {
    ASSIGN_OR_RETURN(DirtyRate rate,
                     vmm::CallFor<DirtyRate>(
                         libvirt, "reading the dirty rate",
                         [uuid](virConnectPtr c) { return ReadDirtyRate(c, uuid); }, deadline));
    if (rate.status == VIR_DOMAIN_DIRTYRATE_MEASURED) return rate.mib_per_second << 20;
    if (measured.Expired())
      return Error(absl::StatusCode::kDeadlineExceeded, "QEMU has not measured the dirty rate in time");
    std::this_thread::sleep_for(kDirtyLook);
  }
}

// What QEMU really holds of the guest's memory, or all of it where that is not known.
uint64_t MemoryUsed(vmm::LibvirtConnection& libvirt, const std::string& uuid, uint64_t total,
                    Deadline deadline) {
  auto resident = vmm::CallFor<uint64_t>(
      libvirt, "reading memory statistics",
      [uuid](virConnectPtr c) -> absl::StatusOr<uint64_t> {
        vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
        virDomainMemoryStatStruct stats[VIR_DOMAIN_MEMORY_STAT_NR];
        if (!domain) return vmm::LibvirtError("domain");
        const int count = virDomainMemoryStats(domain.get(), stats, VIR_DOMAIN_MEMORY_STAT_NR, 0);
        for (int i = 0; i < count; ++i) {
          if (stats[i].tag == VIR_DOMAIN_MEMORY_STAT_RSS) return stats[i].val << 10;
        }
        return uint64_t{0};
      },
      deadline);
  return resident.ok() && *resident > 0 ? std::min<uint64_t>(*resident, total) : total;
}

}  // namespace

absl::StatusOr<v1::Inspection> DomainManager::Inspect(const v1::InspectVmCommand& command,
                                                      Deadline deadline) {
  ASSIGN_OR_RETURN(vmm::LibvirtConnection * libvirt, Connection());
  ASSIGN_OR_RETURN(v1::Vm vm, Find(command.vm()));
  const std::string uuid = vm.domain().uuid();
  // It would be asked the same at the same time, and libvirt asks one thing after the other.
  if (vmm::LibvirtInventory* inventory = inventory_) inventory->LookLater(uuid);
  auto facts = vmm::GatherSourceFacts(*libvirt, uuid, deadline);
  if (!facts.ok())
    return WithReason(facts.status(),
                      absl::IsNotFound(facts.status()) ? v1::NOT_FOUND : v1::VM_NOT_MIGRATABLE);
  ASSIGN_OR_RETURN(vmm::DomainDescription domain, vmm::ParseDomain(facts->xml, config_.libvirt.socket_dir));
  v1::Inspection inspection;
  Complete(&vm);
  vm.set_name("vms/" + command.vm());
  vm.set_host("hosts/" + config_.name);
  *inspection.mutable_vm() = vm;
  for (v1::Finding& finding : vmm::JudgeSource(*facts, domain, v1::MigrationParams()))
    *inspection.add_findings() = std::move(finding);
  inspection.set_vmm_version(facts->vmm_version);
  inspection.set_epoch(vm.epoch());
  inspection.set_accelerator(domain.type == "kvm" ? v1::ACCELERATOR_KVM : v1::ACCELERATOR_TCG);
  inspection.set_domain_xml(facts->migratable_xml);
  for (const v1::DomainDisk& disk : facts->disks) *inspection.add_disks() = disk;
  v1::RamBlockInfo* ram = inspection.add_blocks();
  ram->set_id("ram");
  ram->set_size(domain.memory_bytes);
  inspection.set_memory_used(domain.memory_bytes);
  // For a forecast, and nothing else asks for a sample. Of a domain that arrives a finding tells, and libvirt
  // would not answer.
  if (facts->incoming) return inspection;
  if (!command.has_dirty_sample()) {
    if (!HasBlocker({inspection.findings().begin(), inspection.findings().end()}))
      parts_.tasks.Post([this, uuid, id = command.vm()] { GetReady(uuid, id); });
    return inspection;
  }
  inspection.set_memory_used(MemoryUsed(*libvirt, uuid, domain.memory_bytes, deadline));
  const Duration sample =
      seconds(command.dirty_sample().seconds()) + std::chrono::nanoseconds(command.dirty_sample().nanos());
  if (sample.count() > 0) {
    auto rate = MeasureDirtyRate(*libvirt, uuid, sample, deadline);
    if (rate.ok()) {
      inspection.set_dirty_rate(*rate);
    } else {
      *inspection.add_findings() =
          MakeFinding(v1::WARNING, "DIRTY_RATE_UNKNOWN", "memory", Message(rate.status()),
                      "the forecast takes it that the guest writes nothing");
    }
  }
  return inspection;
}

}  // namespace baton::daemon
