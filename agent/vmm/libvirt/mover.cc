#include "agent/vmm/libvirt/mover.h"

#include <libvirt/virterror.h>

#include <algorithm>

namespace baton::vmm {
namespace {

constexpr uint64_t kMiB = 1 << 20;
// virDomainMigrateSetMaxSpeed takes MiB a second and refuses what does not fit into QEMU's bytes.
constexpr uint64_t kUnlimited = INT64_MAX / kMiB;

// QEMU's own bound, 2000 s.
constexpr unsigned long long kMaxDowntimeMs = 2'000'000;

uint64_t InMiB(uint64_t bytes) {
  return bytes == 0 ? kUnlimited : std::clamp<uint64_t>((bytes + kMiB - 1) / kMiB, 1, kUnlimited);
}

absl::StatusOr<DomainPtr> ByUuid(virConnectPtr c, const std::string& uuid) {
  DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
  if (!domain) return LibvirtError(fmt::format("domain {}", uuid));
  return domain;
}

// libvirt's typed parameters, freed at destruction.
class TypedParams {
 public:
  TypedParams() = default;
  ~TypedParams() { virTypedParamsFree(params_, count_); }
  TypedParams(const TypedParams&) = delete;
  TypedParams& operator=(const TypedParams&) = delete;
  absl::Status Add(const std::string& name, const MoveCall::Value& value) {
    int result = -1;
    if (const auto* text = std::get_if<std::string>(&value)) {
      result = virTypedParamsAddString(&params_, &count_, &max_, name.c_str(), text->c_str());
    } else if (const int* number = std::get_if<int>(&value)) {
      result = virTypedParamsAddInt(&params_, &count_, &max_, name.c_str(), *number);
    } else {
      result = virTypedParamsAddULLong(&params_, &count_, &max_, name.c_str(), std::get<uint64_t>(value));
    }
    return result == 0 ? absl::OkStatus() : LibvirtError(name);
  }
  virTypedParameterPtr get() const { return params_; }
  int size() const { return count_; }

 private:
  virTypedParameterPtr params_ = nullptr;
  int count_ = 0, max_ = 0;
};

}  // namespace

std::string TunnelUri(const v1::DomainTarget& target) {
  // The driver and path of the destination's own URI ("qemu:///system"), reached through our socket.
  std::string driver = target.uri().substr(0, target.uri().find(':'));
  driver = driver.substr(0, driver.find('+'));
  std::string path = "/system";
  if (const size_t at = target.uri().find("://"); at != std::string::npos) {
    const size_t slash = target.uri().find('/', at + 3);
    if (slash != std::string::npos) path = target.uri().substr(slash, target.uri().find('?') - slash);
  }
  return fmt::format("{}+unix://{}?socket={}/libvirt", driver, path, target.tunnel_dir());
}

absl::StatusOr<MoveCall> MakeMoveCall(const MoveSource& source, const v1::DomainTarget& target,
                                      const v1::MigrationParams& params) {
  MoveCall call;
  call.destination = TunnelUri(target);
  call.flags = VIR_MIGRATE_LIVE | VIR_MIGRATE_PEER2PEER;
  auto add = [&](const char* name, MoveCall::Value value) {
    call.params.emplace_back(name, std::move(value));
  };
  add(VIR_MIGRATE_PARAM_URI, "unix://" + target.tunnel_dir() + "/vmm");
  if (!target.xml().empty()) add(VIR_MIGRATE_PARAM_DEST_XML, target.xml());
  if (source.persistent) {
    call.flags |= VIR_MIGRATE_PERSIST_DEST | VIR_MIGRATE_UNDEFINE_SOURCE;
    if (!target.xml().empty() && target.xml() != source.xml) add(VIR_MIGRATE_PARAM_PERSIST_XML, target.xml());
  }
  if (target.copied_disks_size() > 0) {
    call.flags |= VIR_MIGRATE_NON_SHARED_DISK;
    for (const std::string& disk : target.copied_disks()) add(VIR_MIGRATE_PARAM_MIGRATE_DISKS, disk);
    add(VIR_MIGRATE_PARAM_DISKS_URI, "unix://" + target.tunnel_dir() + "/nbd");
  }
  if (source.disks_shared) call.flags |= VIR_MIGRATE_UNSAFE;
  if (params.bandwidth() > 0) add(VIR_MIGRATE_PARAM_BANDWIDTH, InMiB(params.bandwidth()));
  const std::string& compression = params.compression();
  const bool parallel = params.channels() > 1 || compression == "zlib" || compression == "zstd";
  if (parallel) {
    call.flags |= VIR_MIGRATE_PARALLEL;
    add(VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS, std::max<int>(1, static_cast<int>(params.channels())));
  }
  if (!compression.empty()) {
    if (compression == "xbzrle" && parallel)
      return absl::InvalidArgumentError(
          "compression xbzrle needs a single channel: QEMU cannot do it with several (--channels 1)");
    call.flags |= VIR_MIGRATE_COMPRESSED;
    add(VIR_MIGRATE_PARAM_COMPRESSION, compression);
  }
  if (params.auto_converge()) call.flags |= VIR_MIGRATE_AUTO_CONVERGE;
  if (params.post_copy()) {
    // multifd's pages are not those that a guest waits for (QEMU before 10.1).
    if (parallel)
      return absl::InvalidArgumentError(
          "post-copy needs a single channel: QEMU cannot do it with several (--channels 1, no zlib or zstd)");
    call.flags |= VIR_MIGRATE_POSTCOPY;
    // QEMU knows two limits. Pages that the guest waits for are sent at once whatever they are.
    if (params.bandwidth() > 0) add(VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY, InMiB(params.bandwidth()));
  }
  // zero_copy is left out: the tunnel's sockets are unix sockets, for which Linux knows no zero-copy sending,
  // and QEMU refuses to begin without it. The destination's findings say so (ZERO_COPY_LEFT_OUT).
  return call;
}

absl::StatusOr<MoveCall> MakeRecoverCall(const MoveSource& source, const v1::DomainTarget& target,
                                         v1::MigrationParams params) {
  params.clear_bandwidth();
  ASSIGN_OR_RETURN(MoveCall call, MakeMoveCall(source, target, params));
  call.flags |= VIR_MIGRATE_POSTCOPY | VIR_MIGRATE_POSTCOPY_RESUME;
  return call;
}

absl::Status DomainMover::Start(const MoveCall& call, std::function<void(absl::Status)> done) {
  return connection_.Begin(
      "migrating",
      [call, uuid = uuid_](virConnectPtr c) -> absl::Status {
        ASSIGN_OR_RETURN(DomainPtr domain, ByUuid(c, uuid));
        TypedParams params;
        for (const auto& [name, value] : call.params) RETURN_IF_ERROR(params.Add(name, value));
        if (virDomainMigrateToURI3(domain.get(), call.destination.c_str(), params.get(),
                                   static_cast<unsigned>(params.size()), call.flags) != 0)
          return LibvirtError("");
        return absl::OkStatus();
      },
      std::move(done));
}

absl::Status DomainMover::With(const std::string& what, std::function<absl::Status(virDomainPtr)> call,
                               Deadline deadline) {
  return connection_.Call(
      what,
      [uuid = uuid_, call = std::move(call)](virConnectPtr c) -> absl::Status {
        ASSIGN_OR_RETURN(DomainPtr domain, ByUuid(c, uuid));
        return call(domain.get());
      },
      deadline);
}

absl::Status DomainMover::Abort(Deadline deadline) {
  return With(
      "ending the migration",
      [](virDomainPtr domain) {
        return virDomainAbortJob(domain) == 0 ? absl::OkStatus() : LibvirtError("ending the migration");
      },
      deadline);
}

absl::Status DomainMover::SetBandwidth(uint64_t bytes, bool postcopy, Deadline deadline) {
  unsigned flags = 0;
  if (postcopy) flags |= VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY;
  return With(
      "setting the bandwidth",
      [mib = InMiB(bytes), flags](virDomainPtr domain) {
        return virDomainMigrateSetMaxSpeed(domain, mib, flags) == 0 ? absl::OkStatus()
                                                                    : LibvirtError("setting the bandwidth");
      },
      deadline);
}

absl::Status DomainMover::SetMaxDowntime(Duration downtime, Deadline deadline) {
  const auto ms = std::max<int64_t>(1, std::chrono::ceil<std::chrono::milliseconds>(downtime).count());
  return With(
      "setting the downtime",
      [ms](virDomainPtr domain) {
        return virDomainMigrateSetMaxDowntime(domain, static_cast<unsigned long long>(ms), 0) == 0
                   ? absl::OkStatus()
                   : LibvirtError("setting the downtime");
      },
      deadline);
}

absl::StatusOr<Duration> DomainMover::MaxDowntime(Deadline deadline) {
  return CallFor<Duration>(
      connection_, "asking for the downtime",
      [uuid = uuid_](virConnectPtr c) -> absl::StatusOr<Duration> {
        ASSIGN_OR_RETURN(const DomainPtr domain, ByUuid(c, uuid));
        unsigned long long ms = 0;
        if (virDomainMigrateGetMaxDowntime(domain.get(), &ms, 0) != 0)
          return LibvirtError("asking for the downtime");
        return std::chrono::milliseconds(std::min<unsigned long long>(ms, kMaxDowntimeMs));
      },
      deadline);
}

absl::Status DomainMover::StartPostCopy(Deadline deadline) {
  return With(
      "switching to post-copy",
      [](virDomainPtr domain) {
        return virDomainMigrateStartPostCopy(domain, 0) == 0 ? absl::OkStatus()
                                                             : LibvirtError("switching to post-copy");
      },
      deadline);
}

absl::StatusOr<JobFigures> DomainMover::Job(bool completed, Deadline deadline) {
  return CallFor<JobFigures>(
      connection_, "asking for the job",
      [uuid = uuid_, completed](virConnectPtr c) -> absl::StatusOr<JobFigures> {
        ASSIGN_OR_RETURN(DomainPtr domain, ByUuid(c, uuid));
        return AskJob(domain.get(), completed);
      },
      deadline);
}

}  // namespace baton::vmm
