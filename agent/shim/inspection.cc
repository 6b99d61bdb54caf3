#include "agent/shim/inspection.h"

#include <poll.h>

#include <algorithm>

#include "agent/memory/dirty_source.h"
#include "common/finding.h"
#include "common/log.h"

namespace baton::shim {
namespace {

// Virtio feature bit 26 and vhost-user protocol feature bit 1: without either nobody can tell which pages the
// back-end wrote (vhost-user.rst, "Migration").
constexpr uint64_t kVhostLogAll = uint64_t{1} << 26;
constexpr uint64_t kProtocolLogShmfd = uint64_t{1} << 1;

// Sleeps on `cancel_fd`; true if it became readable before the time was over.
bool CancelledWithin(Duration duration, int cancel_fd) {
  Deadline end = Deadline::After(duration);
  while (!end.Expired()) {
    pollfd item{cancel_fd, POLLIN, 0};
    if (::poll(&item, 1, end.PollTimeoutMs()) > 0) return true;
  }
  return false;
}

// Bytes a second that the VMM and its vCPUs write; 0 without a measurement, but the tracking is tried all the
// same.
absl::StatusOr<uint64_t> MeasureDirtyRate(VirtualMachine& vm, Duration sample, int cancel_fd) {
  std::string mode = vm.config().Get().dirty_tracking();
  ASSIGN_OR_RETURN(auto source,
                   memory::MakeVmmDirtySource(vm.driver().pid(), vm.ram(), mode.empty() ? "auto" : mode));
  RETURN_IF_ERROR(source->Start());
  int64_t begin = MonotonicNs();
  if (sample > Duration(0) && CancelledWithin(sample, cancel_fd)) {
    source->Stop();
    return absl::CancelledError("the inspection was given up");
  }
  memory::PageSets dirty = vm.ram().MakeSets();
  RETURN_IF_ERROR(source->Harvest(dirty));
  int64_t elapsed = MonotonicNs() - begin;
  source->Stop();
  if (sample <= Duration(0)) return 0;
  uint64_t pages = 0;
  for (const memory::PageSet& set : dirty) pages += set.Count();
  double per_second = static_cast<double>(pages * memory::kPageSize) * 1e9 /
                      static_cast<double>(std::max<int64_t>(elapsed, 1));
  return static_cast<uint64_t>(per_second);
}

}  // namespace

std::vector<v1::Finding> FindingsOf(const v1::Vm& vm) {
  std::vector<v1::Finding> findings;
  if (vm.state() != v1::Vm::RUNNING) {
    findings.push_back(MakeFinding(
        v1::BLOCKER, "VM_NOT_RUNNING", "vm",
        "the VM is " + v1::Vm::State_Name(vm.state()) + (vm.message().empty() ? "" : ": " + vm.message()),
        "only a running VM can be migrated"));
  }
  if (!vm.migration().empty()) {
    findings.push_back(MakeFinding(v1::BLOCKER, "VM_IN_MIGRATION", "vm", "the VM is in " + vm.migration(),
                                   "wait for its end, or cancel it"));
  }
  for (const v1::Device& device : vm.devices()) {
    std::string subject = "device " + device.name();
    if (device.state() == v1::Device::BACKEND_LOST || device.state() == v1::Device::HELD) {
      findings.push_back(MakeFinding(
          v1::BLOCKER, device.state() == v1::Device::HELD ? "DEVICE_HELD" : "BACKEND_LOST", subject,
          device.message().empty() ? "its back-end at the source is gone" : device.message(),
          "bring the back-end " + device.backend().socket() + " back first"));
      continue;
    }
    if ((device.offered_features() & kVhostLogAll) == 0 ||
        (device.offered_protocol_features() & kProtocolLogShmfd) == 0) {
      findings.push_back(
          MakeFinding(v1::BLOCKER, "BACKEND_CANNOT_LOG", subject,
                      "its back-end does not offer dirty logging (VHOST_F_LOG_ALL and LOG_SHMFD), so "
                      "pages that it writes cannot be told",
                      "use a back-end that can log"));
    }
  }
  return findings;
}

absl::StatusOr<v1::Inspection> InspectVm(VirtualMachine& vm, Duration dirty_sample, int cancel_fd,
                                         Deadline deadline) {
  v1::Inspection inspection;
  *inspection.mutable_vm() = vm.Describe();
  inspection.set_epoch(inspection.vm().epoch());
  for (v1::Finding& finding : FindingsOf(inspection.vm())) *inspection.add_findings() = std::move(finding);
  if (!vm.has_vmm()) return inspection;
  inspection.set_vmm_version(vm.driver().version());
  for (const memory::RamBlock& block : vm.ram().blocks()) {
    v1::RamBlockInfo* info = inspection.add_blocks();
    info->set_id(block.id());
    info->set_size(block.size());
    auto populated = block.Populated();
    if (!populated.ok()) return populated.status();
    inspection.set_memory_used(inspection.memory_used() + populated->Count() * memory::kPageSize);
  }
  if (inspection.vm().state() != v1::Vm::RUNNING || !inspection.vm().migration().empty()) return inspection;
  ASSIGN_OR_RETURN(std::vector<vmm::Obstacle> obstacles, vm.driver().Obstacles(deadline));
  for (const vmm::Obstacle& o : obstacles)
    *inspection.add_findings() = MakeFinding(v1::BLOCKER, o.code, o.subject, o.message, o.remedy);
  auto rate = MeasureDirtyRate(vm, std::min(dirty_sample, deadline.Left()), cancel_fd);
  if (rate.ok()) {
    inspection.set_dirty_rate(*rate);
  } else if (rate.status().code() == absl::StatusCode::kCancelled) {
    return rate.status();
  } else {
    *inspection.add_findings() = MakeFinding(
        v1::BLOCKER, "DIRTY_TRACKING_UNAVAILABLE", "memory", Message(rate.status()),
        "see docs/operations.md for the kernel features and permissions that dirty tracking needs");
  }
  return inspection;
}

}  // namespace baton::shim
