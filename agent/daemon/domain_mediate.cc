// DomainManager: the devices of domains that go by way of Baton's mediators.
#include <algorithm>

#include "agent/daemon/domain_manager.h"
#include "agent/vhost/probe.h"
#include "agent/vmm/libvirt/rewrite.h"
#include "common/finding.h"
#include "common/log.h"
#include "common/vm_spec.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;

constexpr Duration kMediateProbe = seconds(3);

v1::DeviceSpec SpecOf(const vmm::DomainDevice& device) {
  v1::DeviceSpec spec;
  spec.set_name(vmm::MediatorName(device));
  spec.set_class_(device.type == vmm::DeviceType::kInterface ? v1::NET : v1::BLK);
  spec.set_num_queues(std::max<uint32_t>(device.queues, 1));
  if (device.queue_size > 0) spec.set_queue_size(device.queue_size);
  return spec;
}

}  // namespace

std::string DomainManager::DeviceDir(const std::string& uuid) const {
  return config_.libvirt.socket_dir + "/vm-" + uuid;
}

void DomainManager::ResolveMediated(const vmm::DomainDescription& domain, const std::string& vm,
                                    const v1::PrepareIncomingCommand& command, Mediated* out,
                                    std::vector<v1::Finding>* findings, Deadline deadline) const {
  for (const vmm::DomainDevice& device : domain.devices) {
    if (!device.mediated) continue;
    v1::DeviceSpec spec = SpecOf(device);
    const std::string subject = "device " + spec.name();
    v1::Device before;
    before.set_name(spec.name());
    before.set_class_(spec.class_());
    for (const v1::Device& known : command.source().vm().devices()) {
      if (known.name() == spec.name()) before = known;
    }
    *spec.mutable_backend() = before.backend();
    auto resolved = parts_.backends.Resolve(vm, spec, command.migration_id(), deadline);
    if (!resolved.ok()) {
      findings->push_back(MakeFinding(v1::BLOCKER, "BACKEND_UNKNOWN", subject, Message(resolved.status()),
                                      "add the device to `backends` in this host's configuration"));
      continue;
    }
    auto probed =
        vhost::ProbeBackend(spec, resolved->backend(), deadline.Min(Deadline::After(kMediateProbe)));
    if (!probed.ok()) {
      findings->push_back(MakeFinding(
          v1::BLOCKER, absl::IsDeadlineExceeded(probed.status()) ? "BACKEND_SILENT" : "BACKEND_UNREACHABLE",
          subject, Message(probed.status()),
          "start the back-end, or correct `backends` in this host's configuration"));
    } else {
      for (v1::Finding& finding : vhost::CompareForMigration(before, *probed, command.params()))
        findings->push_back(std::move(finding));
    }
    out->specs.push_back(std::move(spec));
    out->devices.push_back(*std::move(resolved));
  }
}

void DomainManager::AddMediated(const Mediated& mediated, v1::ShimConfig* conf) const {
  if (mediated.devices.empty()) return;
  conf->mutable_domain_host()->set_resident(true);
  conf->mutable_domain_host()->set_device_dir(DeviceDir(conf->domain_uuid()));
  for (const v1::DeviceSpec& spec : mediated.specs) *conf->mutable_spec()->add_devices() = spec;
  for (const v1::ResolvedDevice& device : mediated.devices) *conf->add_devices() = device;
}

absl::StatusOr<v1::MediateDomainResponse> DomainManager::Mediate(const v1::MediateDomainCommand& command,
                                                                 Deadline deadline) {
  auto domain = vmm::ParseDomain(command.xml(), config_.libvirt.socket_dir);
  if (!domain.ok()) return domain.status();
  if (!IsValidName(domain->uuid))
    return absl::InvalidArgumentError(
        "the domain has no UUID, by which its devices will be known: add <uuid> (`virsh dumpxml` has it)");
  const std::string uuid = domain->uuid;
  const std::string vm = vmm::VmIdOf(domain->name, uuid);
  ASSIGN_OR_RETURN(vmm::MediatedXml mediated, vmm::MediateXml(command.xml(), DeviceDir(uuid)));
  v1::MediateDomainResponse response;
  response.set_xml(mediated.xml);
  for (v1::Finding& finding : mediated.findings) *response.add_findings() = std::move(finding);
  EntryPtr known = FindEntry(uuid);
  Mediated wanted;
  for (const vmm::MediatedDevice& device : mediated.devices) {
    v1::DeviceSpec spec = SpecOf(device.device);
    spec.mutable_backend()->set_socket(device.backend);
    if (device.backend.empty() && known) {
      // The XML names the mediator already.
      const v1::ShimConfig conf = known->conf();
      for (const v1::ResolvedDevice& before : conf.devices()) {
        if (before.name() == spec.name()) *spec.mutable_backend() = before.backend();
      }
    }
    auto resolved = parts_.backends.Resolve(vm, spec, "", deadline);
    if (!resolved.ok()) {
      *response.add_findings() =
          MakeFinding(v1::BLOCKER, "BACKEND_UNKNOWN", "device " + spec.name(), Message(resolved.status()),
                      "add the device to `backends` in this host's configuration");
      continue;
    }
    auto probed =
        vhost::ProbeBackend(spec, resolved->backend(), deadline.Min(Deadline::After(kMediateProbe)));
    if (!probed.ok())
      *response.add_findings() =
          MakeFinding(v1::WARNING, "BACKEND_UNREACHABLE", "device " + spec.name(), Message(probed.status()),
                      "start the back-end before the domain: its mediator listens once it has seen it");
    wanted.specs.push_back(std::move(spec));
    wanted.devices.push_back(*std::move(resolved));
  }
  if (command.validate_only()) return response;
  for (const v1::Finding& finding : response.findings()) {
    // Whoever got the XML would start a domain whose devices nobody serves.
    if (finding.severity() == v1::BLOCKER)
      return Error(v1::VALIDATION_FAILED, absl::StatusCode::kFailedPrecondition,
                   "{}: {}; nothing was changed; {}", finding.subject(), finding.message(), finding.remedy());
  }
  if (wanted.devices.empty()) return response;
  RETURN_IF_ERROR(Serve(uuid, vm, domain->name, wanted, deadline));
  if (EntryPtr entry = FindEntry(uuid)) {
    const v1::ShimStatus status = entry->status();
    *response.mutable_devices() = status.vm().devices();
  }
  return response;
}

// A resident shim with these devices.
absl::Status DomainManager::Serve(const std::string& uuid, const std::string& vm, const std::string& name,
                                  const Mediated& wanted, Deadline deadline) {
  ASSIGN_OR_RETURN(v1::ShimConfig conf, MakeConfig(uuid, vm));
  conf.mutable_domain_host()->set_name(name);
  AddMediated(wanted, &conf);
  ASSIGN_OR_RETURN(Locked locked, Lock(uuid, deadline));
  const EntryPtr& entry = locked.entry;
  if (entry->connected()) {
    const v1::ShimConfig before = entry->conf();
    const bool same =
        std::equal(conf.devices().begin(), conf.devices().end(), before.devices().begin(),
                   before.devices().end(), [](const v1::ResolvedDevice& a, const v1::ResolvedDevice& b) {
                     return a.name() == b.name() && a.backend().socket() == b.backend().socket();
                   });
    if (same && before.domain_host().resident()) return absl::OkStatus();
    if (!before.migration_id().empty() || !before.outgoing().migration_id().empty())
      return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, "vms/{} is in a migration",
                   vm);
    auto here = Find(uuid);
    if (before.domain_host().resident() && here.ok() && here->state() != v1::Vm::STOPPED)
      return Error(absl::StatusCode::kFailedPrecondition,
                   "vms/{} runs with other mediated devices: shut it down first", vm);
    Remove(entry);
    locked.lock.unlock();
    return Serve(uuid, vm, name, wanted, deadline);
  }
  absl::Status started = LaunchWith(entry, conf, deadline);
  if (started.ok()) {
    started = entry->AwaitStatus(
        [&](const v1::ShimStatus& status) {
          return status.vm().devices_size() == conf.devices_size() || status.vm().state() == v1::Vm::STOPPED;
        },
        deadline);
  }
  if (started.ok() && entry->status().vm().state() == v1::Vm::STOPPED)
    started = absl::FailedPreconditionError(entry->status().vm().message());
  if (!started.ok()) Remove(entry);
  return started;
}

}  // namespace baton::daemon
