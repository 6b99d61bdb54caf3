#include "agent/shim/device_swap.h"

#include <algorithm>

#include "agent/vhost/probe.h"
#include "common/finding.h"
#include "common/log.h"
#include "common/unix_socket.h"

namespace baton::shim {
namespace {

using std::chrono::seconds;

constexpr Duration kProbeTime = seconds(3);
// Until the mediator can begin: it may be waiting for the old back-end.
constexpr Duration kBeginTime = seconds(10);
constexpr Duration kDefaultDrain = seconds(5);
constexpr Duration kMaxDrain = seconds(60);

}  // namespace

absl::StatusOr<v1::DeviceSwapped> SwapDevice(VirtualMachine& vm, const v1::SwapDeviceCommand& command) {
  vhost::Mediator* mediator = vm.FindMediator(command.device());
  if (mediator == nullptr) {
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "the VM has no device {}", command.device());
  }
  if (command.backend().socket().empty() || command.backend().socket()[0] != '/') {
    return Error(absl::StatusCode::kInvalidArgument, "backend.socket: '{}' is no absolute path",
                 command.backend().socket());
  }
  RETURN_IF_ERROR(CheckUnixPath(command.backend().socket()));
  vhost::SwapOptions wanted;
  wanted.backend = command.backend();
  wanted.inflight = command.inflight() == v1::HANDOFF ? v1::HANDOFF : v1::DRAIN;
  wanted.drain_bound = command.has_drain_timeout()
                           ? Duration(seconds(command.drain_timeout().seconds())) +
                                 std::chrono::nanoseconds(command.drain_timeout().nanos())
                           : kDefaultDrain;
  if (wanted.drain_bound <= Duration(0) || wanted.drain_bound > kMaxDrain) {
    return Error(absl::StatusCode::kInvalidArgument, "drain_timeout: must be above 0 and at most 60 s");
  }

  v1::Device device = mediator->Describe();
  v1::DeviceSwapped out;
  if (wanted.backend.kind() == v1::BACKEND_KIND_UNSPECIFIED) wanted.backend.set_kind(device.backend().kind());
  if (wanted.backend.recovery() == v1::RECOVERY_DEFAULT)
    wanted.backend.set_recovery(device.backend().recovery());
  if (device.backend().socket() == wanted.backend.socket()) {
    *out.mutable_device() = std::move(device);
    return out;
  }
  v1::ShimConfig config = vm.config().Get();
  auto spec = std::find_if(config.spec().devices().begin(), config.spec().devices().end(),
                           [&](const v1::DeviceSpec& d) { return d.name() == command.device(); });
  if (spec == config.spec().devices().end()) {
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "the VM has no device {}", command.device());
  }

  auto candidate = vhost::ProbeBackend(*spec, wanted.backend, Deadline::After(kProbeTime));
  if (candidate.ok()) {
    for (v1::Finding& finding : vhost::CompareForSwap(device, *candidate))
      *out.add_findings() = std::move(finding);
  } else {
    const bool silent = absl::IsDeadlineExceeded(candidate.status());
    *out.add_findings() =
        MakeFinding(v1::BLOCKER, silent ? "BACKEND_SILENT" : "BACKEND_UNREACHABLE",
                    "device " + command.device(), Message(candidate.status()),
                    silent ? "see whether the new back-end hangs or serves another front-end"
                           : "start the new back-end, or correct the path of its socket");
  }
  auto blocker = std::find_if(out.findings().begin(), out.findings().end(),
                              [](const v1::Finding& f) { return f.severity() == v1::BLOCKER; });
  if (command.validate_only()) {
    *out.mutable_device() = std::move(device);
    return out;
  }
  if (blocker != out.findings().end()) {
    return Error(v1::DESTINATION_BACKEND_FAILED, absl::StatusCode::kFailedPrecondition,
                 "device {} stays at back-end {}: {}; {}", command.device(), device.backend().socket(),
                 blocker->message(), blocker->remedy());
  }

  auto set = [&](const v1::ResolvedDevice& wanted_device) {
    return vm.config().Update([&](v1::ShimConfig& c) {
      for (v1::ResolvedDevice& resolved : *c.mutable_devices()) {
        if (resolved.name() == command.device()) resolved = wanted_device;
      }
    });
  };
  auto record = [&] {
    v1::ResolvedDevice before, after;
    for (const v1::ResolvedDevice& resolved : config.devices()) {
      if (resolved.name() == command.device()) before = resolved;
    }
    after = before;
    *after.mutable_backend() = wanted.backend;
    // What the agent's hook made is the one before, which the agent takes away.
    after.set_from_hook(false);
    absl::Status recorded = set(after);
    // A change that could not be written is kept in memory; the next write must not make it true.
    if (!recorded.ok()) set(before).IgnoreError();
    return recorded;
  };
  ASSIGN_OR_RETURN(vhost::SwapResult swapped, mediator->Swap(wanted, record, Deadline::After(kBeginTime)));
  const int64_t ns = std::chrono::nanoseconds(swapped.pause).count();
  out.mutable_pause()->set_seconds(ns / 1'000'000'000);
  out.mutable_pause()->set_nanos(static_cast<int32_t>(ns % 1'000'000'000));
  out.set_handed_off(swapped.handed_off);
  *out.mutable_device() = mediator->Describe();
  LOG_INFO("device {}: back-end {} serves it now, after {} us", command.device(), wanted.backend.socket(),
           ns / 1000);
  return out;
}

}  // namespace baton::shim
