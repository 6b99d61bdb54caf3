// The source's half of checks.h.
#include <libvirt/libvirt.h>

#include <algorithm>
#include <cstdlib>
#include <future>
#include <memory>

#include "agent/vmm/libvirt/checks.h"
#include "agent/vmm/libvirt/domain_needs.h"
#include "agent/vmm/libvirt/inventory.h"
#include "agent/vmm/libvirt/job.h"
#include "agent/vmm/libvirt/qemu_view.h"
#include "common/finding.h"

namespace baton::vmm {
namespace {

using OwnedText = std::unique_ptr<char, decltype(&std::free)>;

std::string XmlOf(virDomainPtr domain, unsigned flags) {
  const OwnedText text(virDomainGetXMLDesc(domain, flags), &std::free);
  return text ? text.get() : "";
}

const char* OperationName(int operation) {
  switch (operation) {
    case VIR_DOMAIN_JOB_OPERATION_START:
      return "its start";
    case VIR_DOMAIN_JOB_OPERATION_SAVE:
      return "a save";
    case VIR_DOMAIN_JOB_OPERATION_RESTORE:
      return "a restore";
    case VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN:
    case VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT:
      return "a migration";
    case VIR_DOMAIN_JOB_OPERATION_SNAPSHOT:
    case VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT:
    case VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_DELETE:
      return "a snapshot";
    case VIR_DOMAIN_JOB_OPERATION_DUMP:
      return "a dump";
    case VIR_DOMAIN_JOB_OPERATION_BACKUP:
      return "a backup";
    default:
      return "a job";
  }
}

// Asks libvirt for what is in QEMU's view of the disks: their size as the guest sees it, and what happens to
// them.
void AddDisks(virDomainPtr domain, const DomainNeeds& needs, SourceFacts& facts) {
  for (const NeededDisk& needed : needs.disks) {
    v1::DomainDisk disk;
    disk.set_target(needed.target);
    disk.set_path(needed.path);
    disk.set_format(needed.format);
    disk.set_readonly(needed.readonly);
    virDomainBlockInfo info{};
    if (virDomainGetBlockInfo(domain, needed.target.c_str(), &info, 0) == 0) disk.set_capacity(info.capacity);
    facts.disks.push_back(std::move(disk));
    virDomainBlockJobInfo job{};
    if (virDomainGetBlockJobInfo(domain, needed.target.c_str(), &job, 0) == 1)
      facts.block_jobs.push_back(needed.target);
  }
}

using SharedDomain = std::shared_ptr<virDomain>;

// What decides what else can be asked.
absl::StatusOr<SourceFacts> AskState(virConnectPtr c, const std::string& uuid, SharedDomain& out) {
  DomainPtr found(virDomainLookupByUUIDString(c, uuid.c_str()));
  if (!found) return LibvirtError(fmt::format("domain {}", uuid));
  const SharedDomain domain(std::move(found));
  SourceFacts facts;
  // First: what stands still for a job must not be taken for what a job has left.
  JobFigures job;
  facts.incoming = AskMigrationJob(domain.get(), &job) == MigrationJob::kIncoming;
  // Whatever is asked of a domain that arrives would wait for that job's end.
  if (!facts.incoming && job.type != VIR_DOMAIN_JOB_NONE) facts.job = OperationName(job.operation);
  if (virDomainGetState(domain.get(), &facts.state, &facts.reason, 0) != 0) return LibvirtError("state");
  out = domain;
  return facts;
}

absl::StatusOr<SourceFacts> AskRest(virDomainPtr domain, SourceFacts facts) {
  facts.persistent = virDomainIsPersistent(domain) == 1;
  facts.xml = XmlOf(domain, 0);
  // As libvirt itself sends it: the guest's CPU in full, and the secrets that the destination needs.
  facts.migratable_xml =
      XmlOf(domain, VIR_DOMAIN_XML_MIGRATABLE | VIR_DOMAIN_XML_SECURE | VIR_DOMAIN_XML_UPDATE_CPU);
  if (facts.xml.empty() || facts.migratable_xml.empty()) return LibvirtError("XML");
  if (facts.incoming) return facts;
  facts.snapshots = std::max(0, virDomainSnapshotNum(domain, 0));
  if (facts.state != VIR_DOMAIN_SHUTOFF) {
    ASSIGN_OR_RETURN(const DomainNeeds needs, ReadDomainNeeds(facts.xml));
    AddDisks(domain, needs, facts);
  }
  return facts;
}

// Those that libvirt or QEMU moves all the same, or of which only QEMU can tell.
bool MayMove(const DomainDevice& device) {
  // A SCSI disk of the host is a disk like another, if both hosts reach it.
  return device.attachment != Attachment::kPassthrough ||
         (device.type == DeviceType::kDisk && device.source != "nvme");
}

}  // namespace

absl::StatusOr<SourceFacts> GatherSourceFacts(LibvirtConnection& connection, const std::string& uuid,
                                              Deadline deadline) {
  const std::string reading = fmt::format("reading domain {}", uuid);
  auto domain = std::make_shared<SharedDomain>();
  auto state = CallFor<SourceFacts>(
      connection, reading, [uuid, domain](virConnectPtr c) { return AskState(c, uuid, *domain); }, deadline);
  RETURN_IF_ERROR(state.status());
  // At the same time as libvirt, and apart: a monitor that hangs leaves the rest known. On the same
  // connection, where a question may have to wait for the answer to the other (LibvirtConnection::Begin):
  // both are short.
  auto view = std::make_shared<std::promise<absl::StatusOr<QemuView>>>();
  std::future<absl::StatusOr<QemuView>> viewed = view->get_future();
  const bool has_view = state->state != VIR_DOMAIN_SHUTOFF && !state->incoming;
  if (has_view) {
    auto answer = std::make_shared<absl::StatusOr<QemuView>>(absl::InternalError("no result"));
    absl::Status begun = connection.Begin(
        fmt::format("asking the QEMU of domain {}", uuid),
        [domain, answer](virConnectPtr) {
          *answer = AskQemuForMigration(domain->get());
          return answer->status();
        },
        [view, answer](const absl::Status& status) {
          view->set_value(status.ok() ? std::move(*answer) : status);
        });
    if (!begun.ok()) view->set_value(begun);
  }
  auto facts = CallFor<SourceFacts>(
      connection, reading,
      [domain, known = *std::move(state)](virConnectPtr) { return AskRest(domain->get(), known); }, deadline);
  RETURN_IF_ERROR(facts.status());
  if (!has_view) return facts;
  absl::StatusOr<QemuView> seen = absl::DeadlineExceededError("QEMU's monitor has not answered in time");
  if (viewed.wait_until(deadline.when()) == std::future_status::ready) seen = viewed.get();
  if (seen.ok()) {
    facts->blockers = seen->blockers;
    facts->vmm_version = seen->version;
  } else {
    facts->vmm_trouble = Message(seen.status());
  }
  return facts;
}

std::vector<v1::Finding> JudgeSource(const SourceFacts& facts, const DomainDescription& domain,
                                     const v1::MigrationParams& params) {
  std::vector<v1::Finding> out;
  const auto add = [&](v1::Severity severity, const std::string& code, const std::string& subject,
                       const std::string& message, const std::string& remedy) {
    out.push_back(MakeFinding(severity, code, subject, message, remedy));
  };
  const std::string subject = "domain " + domain.name;
  std::string words;
  const v1::Vm::State state = StateOf(facts.state, facts.reason, false, &words);
  if (facts.incoming) {
    // Before its state: this copy stands still until its turn comes, and nobody is to resume or destroy it.
    add(v1::BLOCKER, "VM_IN_MIGRATION", subject,
        "libvirt is moving it to this host; until that has ended it is not here to be moved on",
        "wait for the end of that migration, or cancel it at its source");
  } else if (state == v1::Vm::PAUSED && facts.state == VIR_DOMAIN_PAUSED &&
             facts.reason == VIR_DOMAIN_PAUSED_MIGRATION) {
    add(v1::BLOCKER, "MIGRATION_UNSETTLED", subject,
        "it stands still because of a migration that was not settled",
        "find out where the guest runs, then resume or destroy this copy");
  } else if (state == v1::Vm::PAUSED) {
    add(v1::INFO, "VM_PAUSED", subject, fmt::format("it is {}, and will be at the destination", words), "");
  } else if (state != v1::Vm::RUNNING) {
    add(v1::BLOCKER, "VM_NOT_RUNNING", subject, fmt::format("it is {}", words),
        "start it: virsh start " + domain.name);
  }
  if (!facts.job.empty())
    add(v1::BLOCKER, "JOB_UNDER_WAY", subject, fmt::format("libvirt is at work with it: {}", facts.job),
        "wait for its end, or virsh domjobabort " + domain.name);
  for (const std::string& target : facts.block_jobs)
    add(v1::BLOCKER, "BLOCK_JOB_UNDER_WAY", "disk " + target, "a copy, commit or backup of it is under way",
        fmt::format("wait for its end, or virsh blockjob {} {} --abort", domain.name, target));
  if (facts.snapshots > 0)
    add(v1::BLOCKER, "SNAPSHOTS_EXIST", subject,
        fmt::format("libvirt moves no domain that has snapshots; it has {}", facts.snapshots),
        "delete them, or only libvirt's record of them: virsh snapshot-delete --metadata");
  for (const std::string& reason : facts.blockers)
    add(v1::BLOCKER, "VMM_BLOCKS_MIGRATION", subject, reason,
        "remove the device or the setting that QEMU names");
  if (!facts.vmm_trouble.empty() && state != v1::Vm::STOPPED)
    add(v1::WARNING, "VMM_SILENT", subject,
        "QEMU could not be asked what keeps it from being moved: " + facts.vmm_trouble, "");
  for (const DomainDevice& device : domain.devices) {
    const std::string what = fmt::format("{} {}", NameOf(device.type), device.name);
    if (!MayMove(device)) {
      add(v1::BLOCKER, "DEVICE_NOT_MIGRATABLE", what,
          "it is a device of this host, and libvirt does not move it", "detach it first");
    } else if (device.attachment == Attachment::kVhostUser && !device.mediated &&
               device.type != DeviceType::kFilesystem) {
      add(v1::INFO, "NOT_MEDIATED", what,
          fmt::format("QEMU reaches its back-end {} directly and stops it by itself: its requests are "
                      "finished first, "
                      "however long they take",
                      device.source),
          "batonctl vm mediate");
    }
  }
  if (params.post_copy() && domain.memory.locked)
    add(v1::WARNING, "POSTCOPY_UNAVAILABLE", "memory",
        "its memory is locked, with which post-copy does not work",
        "remove <locked/>, or migrate without post-copy");
  std::stable_sort(out.begin(), out.end(),
                   [](const v1::Finding& a, const v1::Finding& b) { return a.severity() > b.severity(); });
  return out;
}

}  // namespace baton::vmm
