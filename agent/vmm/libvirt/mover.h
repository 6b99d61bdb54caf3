// Moving one domain by libvirt: the peer-to-peer call, what can be changed while it runs, and how it ends.
//
// The call (virDomainMigrateToURI3) runs in the source's libvirt daemon: it goes on when this process ends,
// and libvirt leaves what becomes of an interrupted one to "a third party" (settlement.h).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "agent/vmm/libvirt/connection.h"
#include "agent/vmm/libvirt/job.h"
#include "baton/v1/agent_session.pb.h"
#include "baton/v1/types.pb.h"

namespace baton::vmm {

// The arguments of virDomainMigrateToURI3, before libvirt's types.
struct MoveCall {
  using Value = std::variant<std::string, int, uint64_t>;
  std::string destination;  // URI of the destination's libvirt, by way of the tunnel
  unsigned flags = 0;
  // In order; a name may be there several times.
  std::vector<std::pair<std::string, Value>> params;
};

// What the domain is here, as far as the call depends on it.
struct MoveSource {
  bool persistent = false;
  // Its migratable XML here: the definition that outlives the process is rewritten only if the destination
  // wants another one.
  std::string xml;
  // See ShimConfig.DomainHost.disks_shared.
  bool disks_shared = false;
};

// What to ask libvirt for. Pure. InvalidArgument for a combination that QEMU cannot do.
absl::StatusOr<MoveCall> MakeMoveCall(const MoveSource& source, const v1::DomainTarget& target,
                                      const v1::MigrationParams& params);
// The same to connect the two halves of a domain again whose post-copy lost its connection. The source's QEMU
// is the one that was told the bandwidth, and keeps what it was told last, by `params` or since: nothing is
// said of it.
absl::StatusOr<MoveCall> MakeRecoverCall(const MoveSource& source, const v1::DomainTarget& target,
                                         v1::MigrationParams params);

// Paths of the sockets in a tunnel's directory; the names are fixed, since both hosts use them.
std::string TunnelUri(const v1::DomainTarget& target);

// Thread-safe; the connection must outlive the object. Everything that waits takes a deadline.
class DomainMover {
 public:
  DomainMover(LibvirtConnection& connection, std::string uuid)
      : connection_(connection), uuid_(std::move(uuid)) {}

  // Begins; `done` hears how the call ended, on a thread of its own, once, also after this object is gone.
  absl::Status Start(const MoveCall& call, std::function<void(absl::Status)> done);
  // virDomainAbortJob: the guest goes on at the source. FailedPrecondition without a job, or once post-copy
  // has begun.
  absl::Status Abort(Deadline deadline);
  // Bytes a second; 0 is unlimited. QEMU has a limit for pre-copy, and one for what follows it.
  absl::Status SetBandwidth(uint64_t bytes, bool postcopy, Deadline deadline);
  absl::Status SetMaxDowntime(Duration downtime, Deadline deadline);
  // What QEMU has now, which stays whoever migrates the domain next.
  absl::StatusOr<Duration> MaxDowntime(Deadline deadline);
  absl::Status StartPostCopy(Deadline deadline);
  absl::StatusOr<JobFigures> Job(bool completed, Deadline deadline);

 private:
  absl::Status With(const std::string& what, std::function<absl::Status(virDomainPtr)> call,
                    Deadline deadline);

  LibvirtConnection& connection_;
  const std::string uuid_;
};

}  // namespace baton::vmm
