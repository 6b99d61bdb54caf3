// DomainManager: the destination side before the peer connects.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "agent/daemon/domain_host.h"
#include "agent/daemon/domain_manager.h"
#include "agent/daemon/token.h"
#include "agent/vhost/probe.h"
#include "agent/vmm/libvirt/checks.h"
#include "agent/vmm/libvirt/rewrite.h"
#include "common/finding.h"
#include "common/log.h"
#include "common/process.h"
#include "common/vm_spec.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;

constexpr Duration kDomainProbe = seconds(3);
constexpr Duration kAbortEnds = seconds(10);

// A back-end of this host for a device that QEMU reaches itself: it must be there and answer.
absl::StatusOr<std::vector<v1::Finding>> ProbeDomainDevice(const vmm::DomainDevice& device,
                                                           Deadline deadline) {
  // Ours, made when the domain is awaited; its back-end is looked at apart.
  if (device.mediated) return std::vector<v1::Finding>();
  v1::DeviceSpec spec;
  spec.set_name(device.name);
  spec.set_class_(device.type == vmm::DeviceType::kInterface ? v1::NET : v1::BLK);
  v1::Backend backend;
  backend.set_socket(device.source);
  auto probed = vhost::ProbeBackend(spec, backend, deadline.Min(Deadline::After(kDomainProbe)));
  if (!probed.ok()) return probed.status();
  return std::vector<v1::Finding>();
}

}  // namespace

// What the checks have found, and how the domain would come.
struct DomainManager::Plan {
  std::string uuid, vm;
  std::vector<v1::Finding> findings;
  v1::DomainTarget target;
  Mediated mediated;
  // Disks to be made here: path as here, format and size as at the source.
  std::vector<v1::DomainDisk> images;
};

absl::StatusOr<DomainManager::Plan> DomainManager::MakePlan(const v1::PrepareIncomingCommand& command,
                                                            Deadline deadline) const {
  const v1::Inspection& source = command.source();
  ASSIGN_OR_RETURN(vmm::LibvirtConnection * libvirt, Connection());
  Plan plan;
  plan.uuid = source.vm().domain().uuid();
  plan.vm = source.vm().name().substr(source.vm().name().find('/') + 1);
  auto rewritten = vmm::RewriteForDestination(source.domain_xml(), config_.libvirt.rules);
  if (!rewritten.ok()) return Annotate(rewritten.status(), "the source's XML");
  vmm::DestinationRequest request;
  request.xml = rewritten->xml;
  auto described = vmm::ParseDomain(rewritten->xml, config_.libvirt.socket_dir);
  if (!described.ok()) return Annotate(described.status(), "the source's XML");
  request.domain = *std::move(described);
  // The UUID becomes the name of a directory.
  if (request.domain.uuid != plan.uuid || !IsValidName(plan.uuid))
    return Error(absl::StatusCode::kInvalidArgument, "the source speaks of domain '{}', its XML of '{}'",
                 plan.uuid, request.domain.uuid);
  request.params = command.params();
  request.source_vmm_version = source.vmm_version();
  request.disks.assign(source.disks().begin(), source.disks().end());
  request.probe = &ProbeDomainDevice;
  request.tunnel_dir = config_.libvirt.socket_dir + "/" + command.migration_id();
  vmm::DestinationFacts facts = vmm::GatherDestinationFacts(*libvirt, request, deadline);
  // The operator knows better than the kind of the file system.
  for (const vmm::DomainDevice& device : request.domain.devices) {
    auto disk = facts.disks.find(device.name);
    if (device.type == vmm::DeviceType::kDisk && disk != facts.disks.end() &&
        DeclaredShared(device.source, config_.libvirt.shared))
      disk->second.sharing = vmm::Sharing::kShared;
  }
  plan.findings = vmm::JudgeDestination(request, facts);
  ResolveMediated(request.domain, plan.vm, command, &plan.mediated, &plan.findings, deadline);
  const std::string host = "host " + config_.name;
  for (const vmm::XmlChange& change : rewritten->changes)
    plan.findings.push_back(MakeFinding(v1::INFO, "REWRITTEN", change.subject,
                                        fmt::format("{} is {} on this host", change.from, change.to), ""));
  if (command.params().tls() && !config_.peer.tls.any())
    plan.findings.push_back(MakeFinding(v1::BLOCKER, "TLS_NOT_CONFIGURED", host,
                                        "the migration is to use TLS, this host has no peer certificates",
                                        "set peer.ca, peer.cert and peer.key"));
  if (config_.peer.require_tls && !command.params().tls())
    plan.findings.push_back(MakeFinding(v1::BLOCKER, "TLS_REQUIRED", host,
                                        "this host migrates with TLS only (peer.tls: on)",
                                        "migrate with TLS, or allow plaintext on this host"));
  if (auto described_host = DescribeDomainHost(config_.libvirt); !described_host.ok())
    plan.findings.push_back(
        MakeFinding(v1::BLOCKER, "QEMU_USER_UNKNOWN", host, Message(described_host.status()),
                    "set libvirt.qemu_user and libvirt.qemu_group in this host's configuration"));
  std::stable_sort(plan.findings.begin(), plan.findings.end(),
                   [](const v1::Finding& a, const v1::Finding& b) { return a.severity() > b.severity(); });
  plan.target.set_xml(rewritten->xml);
  plan.target.set_uri(config_.libvirt.uri);
  plan.target.set_tunnel_dir(config_.libvirt.socket_dir + "/" + command.migration_id());
  plan.target.set_absent(facts.same_uuid_absent);
  for (const std::string& disk : vmm::DisksToCopy(request, facts)) {
    plan.target.add_copied_disks(disk);
    for (const vmm::DomainDevice& device : request.domain.devices) {
      if (device.type != vmm::DeviceType::kDisk || device.name != disk) continue;
      for (const v1::DomainDisk& known : source.disks()) {
        if (known.target() != disk) continue;
        v1::DomainDisk image = known;
        image.set_path(device.source);
        plan.images.push_back(std::move(image));
      }
    }
  }
  return plan;
}

absl::Status DomainManager::MakeImages(const Plan& plan, const v1::DomainHost& host,
                                       Deadline deadline) const {
  std::vector<std::string> made;
  for (const v1::DomainDisk& image : plan.images) {
    std::error_code error;
    if (!std::filesystem::exists(image.path(), error)) made.push_back(image.path());
  }
  if (made.empty()) return absl::OkStatus();
  // Before they are made, so that none is forgotten.
  RETURN_IF_ERROR(store_.NoteImages(plan.uuid, made));
  for (const v1::DomainDisk& image : plan.images) {
    if (std::find(made.begin(), made.end(), image.path()) == made.end()) continue;
    SpawnOptions options;
    options.argv = {"qemu-img",
                    "create",
                    "-q",
                    "-f",
                    image.format().empty() ? "raw" : image.format(),
                    image.path(),
                    std::to_string(image.capacity())};
    auto created = RunCommand(std::move(options), deadline);
    if (!created.ok()) return Annotate(created.status(), "qemu-img");
    if (!created->status.ok())
      return Error(absl::StatusCode::kFailedPrecondition, "{} cannot be made for disk {}: {}", image.path(),
                   image.target(), created->err);
    if (::geteuid() == 0 && ::chown(image.path().c_str(), host.qemu_uid(), host.qemu_gid()) != 0)
      return ErrnoError(errno, image.path());
    LOG_INFO("domain {}: {} was made for disk {}", plan.uuid, image.path(), image.target());
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::Prepared> DomainManager::PrepareIncoming(const v1::PrepareIncomingCommand& command,
                                                            Deadline deadline) {
  if (command.migration_id().empty() || command.migration_id().size() > stream::kMaxMigrationId ||
      command.migration_id().find('/') != std::string::npos || command.migration_id()[0] == '.')
    return Error(absl::StatusCode::kInvalidArgument, "'{}' is no migration id", command.migration_id());
  if (!command.validate_only()) {
    // What has been refused stays refused, also when batond repeats itself.
    if (auto ended = parts_.ended.FindEnded(command.migration_id()))
      return Error(v1::DESTINATION_REFUSED, absl::StatusCode::kFailedPrecondition,
                   "migration {} has ended at host {} ({})", command.migration_id(), config_.name,
                   ended->verdict() == v1::OWNER ? "this host has the guest" : "refused");
  }
  const std::string uuid = command.source().vm().domain().uuid();
  if (!IsValidName(uuid)) return Error(absl::StatusCode::kInvalidArgument, "'{}' is no UUID", uuid);
  if (EntryPtr entry = FindEntry(uuid); entry && !command.validate_only()) {
    std::unique_lock operation(entry->operation(), deadline.when());
    if (!operation.owns_lock())
      return Error(absl::StatusCode::kDeadlineExceeded, "another operation on domain {} has not ended", uuid);
    const v1::ShimConfig conf = entry->conf();
    // Repeated by a batond that restarted.
    if (!entry->removed() && conf.migration_id() == command.migration_id()) {
      RETURN_IF_ERROR(
          entry->AwaitStatus([](const v1::ShimStatus& status) { return status.incoming_ready(); }, deadline));
      v1::Prepared prepared;
      prepared.set_peer_address(config_.peer.advertise);
      prepared.set_token(conf.token());
      *prepared.mutable_domain() = conf.domain();
      return prepared;
    }
  }
  ASSIGN_OR_RETURN(Plan plan, MakePlan(command, deadline));
  v1::Prepared prepared;
  prepared.set_peer_address(config_.peer.advertise);
  prepared.mutable_findings()->Add(plan.findings.begin(), plan.findings.end());
  *prepared.mutable_domain() = plan.target;
  if (command.validate_only() || HasBlocker(plan.findings)) return prepared;
  ASSIGN_OR_RETURN(Locked locked, Lock(plan.uuid, deadline));
  return PrepareLocked(std::move(locked), plan, command, deadline);
}

absl::StatusOr<v1::Prepared> DomainManager::PrepareLocked(Locked locked, const Plan& plan,
                                                          const v1::PrepareIncomingCommand& command,
                                                          Deadline deadline) {
  const EntryPtr& entry = locked.entry;
  // For a move from here that did not come about.
  if (entry->connected() && IsIdle(entry->conf())) Remove(entry);
  if (entry->removed()) {
    locked.lock.unlock();
    ASSIGN_OR_RETURN(locked, Lock(plan.uuid, deadline));
    return PrepareLocked(std::move(locked), plan, command, deadline);
  }
  if (entry->connected()) {
    const v1::ShimConfig conf = entry->conf();
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "domain {} is in migration {} on host {}", plan.uuid,
                 conf.migration_id().empty() ? conf.outgoing().migration_id() : conf.migration_id(),
                 config_.name);
  }
  auto start = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(migration::Ownership ownership, store_.OwnershipOf(plan.uuid));
    if (ownership.state == migration::Ownership::State::kYielded)
      return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                   "domain {} was given away by this host in migration {}, whose outcome is not known",
                   plan.uuid, ownership.migration);
    // The domain is not here (that was checked): what the journal says of earlier stays is over.
    RETURN_IF_ERROR(store_.Forget(plan.uuid));
    ASSIGN_OR_RETURN(v1::ShimConfig conf, MakeConfig(plan.uuid, plan.vm));
    conf.set_epoch(command.source().epoch());
    conf.set_migration_id(command.migration_id());
    ASSIGN_OR_RETURN(*conf.mutable_token(), NewToken());
    *conf.mutable_params() = command.params();
    *conf.mutable_domain() = plan.target;
    conf.mutable_domain_host()->set_name(command.source().vm().domain().name());
    AddMediated(plan.mediated, &conf);
    RETURN_IF_ERROR(MakeImages(plan, conf.domain_host(), deadline));
    RETURN_IF_ERROR(LaunchWith(entry, conf, deadline));
    return entry->AwaitStatus(
        [](const v1::ShimStatus& status) {
          return status.incoming_ready() || status.vm().state() == v1::Vm::STOPPED;
        },
        deadline);
  };
  absl::Status started = start();
  const v1::ShimStatus status = entry->status();
  if (started.ok() && !status.incoming_ready())
    started = WithReason(absl::FailedPreconditionError(status.vm().message()), status.reason());
  if (!started.ok()) {
    store_.DropImages(plan.uuid);
    Remove(entry);
    return WithReason(
        Annotate(started, fmt::format("domain {} cannot be awaited on host {}", plan.vm, config_.name)),
        ReasonOf(started, v1::DESTINATION_START_FAILED));
  }
  v1::Prepared prepared;
  prepared.set_peer_address(config_.peer.advertise);
  prepared.mutable_findings()->Add(plan.findings.begin(), plan.findings.end());
  prepared.set_token(entry->conf().token());
  *prepared.mutable_domain() = plan.target;
  LOG_INFO("domain {} is awaited, migration {}", plan.vm, command.migration_id());
  return prepared;
}

bool DomainManager::Expects(const std::string& migration_id) const {
  std::lock_guard lock(mutex_);
  return std::any_of(entries_.begin(), entries_.end(),
                     [&](const auto& entry) { return entry.second->conf().migration_id() == migration_id; });
}

absl::Status DomainManager::AbortIncoming(const v1::AbortIncomingCommand& command, Deadline deadline) {
  EntryPtr entry;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [uuid, candidate] : entries_) {
      if (candidate->conf().migration_id() == command.migration_id()) entry = candidate;
    }
  }
  if (!entry)
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "migration {} does not come here",
                 command.migration_id());
  v1::ShimRequest request;
  *request.mutable_abort_incoming() = command;
  // The shim decides; its last report then takes everything away. One that has just ended is started again,
  // and asked again.
  return entry->Call(request, deadline.Min(Deadline::After(kAbortEnds))).status();
}

absl::StatusOr<std::shared_ptr<VmEntry>> DomainManager::FindIncoming(const std::string& migration_id,
                                                                     const stream::Token& token) const {
  std::lock_guard lock(mutex_);
  return EntryOfIncoming(entries_, migration_id, token);
}

}  // namespace baton::daemon
