// Fleet: the devices of VMs and their back-ends.
#include <algorithm>

#include "common/grpc_status.h"
#include "common/log.h"
#include "server/fleet/fleet.h"
#include "server/names.h"

namespace baton::server {
namespace {

// A shim probes, connects and stops, each within seconds, besides the drain itself.
constexpr int64_t kSwapSeconds = 30;

constexpr char kSwapRequests[] = "requests/swaps.";

// An agent probes the back-ends and starts a shim.
constexpr int64_t kMediateSeconds = 30;

std::string SwapRequestKey(const std::string& request_id) { return kSwapRequests + request_id; }

// Equal for equal requests: there is no map in it.
std::string BodyOf(v1::SwapDeviceRequest request) {
  request.clear_request_id();
  return request.SerializeAsString();
}

v1::Device* FindDevice(v1::Vm* vm, const std::string& name) {
  for (v1::Device& device : *vm->mutable_devices()) {
    if (device.name() == name) return &device;
  }
  return nullptr;
}

}  // namespace

absl::Status Fleet::CheckNotSwapping(const std::string& id) const {
  auto found = vms_.find(id);
  if (found == vms_.end() || found->second.swapping == 0) return absl::OkStatus();
  return WithResource(
      Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
            "vms/{}: one of its devices is being given another back-end; try again after that", id),
      "vms", "vms/" + id);
}

void Fleet::SwapDevice(const v1::SwapDeviceRequest& request, SwapCallback callback) {
  const std::string id = IdOf(request.vm());
  const bool keyed = !request.request_id().empty() && !request.validate_only();
  auto found = vms_.find(id);
  if (found == vms_.end()) return callback(NoSuch("vms", id));
  VmEntry& entry = found->second;
  if (keyed) {
    auto before = store_.Get(SwapRequestKey(request.request_id()));
    if (before.ok()) {
      RequestRecord record;
      record.ParseFromString(before->value);
      if (record.body() != BodyOf(request)) {
        return callback(WithResource(Error(absl::StatusCode::kAlreadyExists,
                                           "request_id {} was used for another swap", request.request_id()),
                                     "vms", record.name()));
      }
      v1::SwapDeviceResponse response;
      v1::Vm view = View(id, entry);
      if (const v1::Device* device = FindDevice(&view, request.device()))
        *response.mutable_device() = *device;
      return callback(std::move(response));
    }
    if (before.status().code() != absl::StatusCode::kNotFound) return callback(before.status());
  }
  if (absl::Status stale = CheckNoStaleCopy(id); !stale.ok()) return callback(stale);
  const v1::Vm view = View(id, entry);
  if (!view.migration().empty()) {
    return callback(WithResource(
        Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
              "vms/{} is in {}; swap its devices after that, or cancel it", id, view.migration()),
        "migrations", view.migration()));
  }
  const auto& devices = view.spec().devices();
  if (std::none_of(devices.begin(), devices.end(),
                   [&](const v1::DeviceSpec& d) { return d.name() == request.device(); })) {
    return callback(InvalidField("device", fmt::format("vms/{} has no device \"{}\"", id, request.device())));
  }
  v1::Command command;
  v1::SwapDeviceCommand& swap = *command.mutable_swap_device();
  swap.set_vm(id);
  swap.set_device(request.device());
  *swap.mutable_backend() = request.backend();
  swap.set_inflight(request.inflight());
  if (request.has_drain_timeout()) *swap.mutable_drain_timeout() = request.drain_timeout();
  swap.set_validate_only(request.validate_only());
  command.mutable_timeout()->set_seconds(kSwapSeconds + request.drain_timeout().seconds());
  if (!request.validate_only()) ++entry.swapping;
  Send(IdOf(view.host()), std::move(command),
       [this, id, request, callback = std::move(callback)](CommandReply reply) {
         if (auto found = vms_.find(id); found != vms_.end() && !request.validate_only())
           --found->second.swapping;
         if (!reply.status.ok()) return callback(Annotate(reply.status, fmt::format("vms/{}", id)));
         callback(TakeSwapped(request, reply.result.swapped()));
       });
}

absl::Status Fleet::ForgetSwaps() {
  Batch forget;
  RETURN_IF_ERROR(store_.ForEach(kSwapRequests, [&](const Item& item) {
    RequestRecord record;
    if (!record.ParseFromString(item.value) || !vms_.count(IdOf(record.name()))) forget.Delete(item.key);
    return absl::OkStatus();
  }));
  return forget.empty() ? absl::OkStatus() : store_.Commit(forget).status();
}

void Fleet::MediateDomain(const std::string& host, const v1::MediateDomainRequest& request,
                          MediateCallback callback) {
  if (!hosts_.count(host)) return callback(NoSuch("hosts", host));
  v1::Command command;
  command.mutable_mediate_domain()->set_xml(request.xml());
  command.mutable_mediate_domain()->set_validate_only(request.validate_only());
  command.mutable_timeout()->set_seconds(kMediateSeconds);
  Send(host, std::move(command), [host, callback = std::move(callback)](CommandReply reply) {
    if (!reply.status.ok()) return callback(Annotate(reply.status, fmt::format("hosts/{}", host)));
    callback(reply.result.mediated());
  });
}

absl::StatusOr<v1::SwapDeviceResponse> Fleet::TakeSwapped(const v1::SwapDeviceRequest& request,
                                                          const v1::DeviceSwapped& swapped) {
  const std::string id = IdOf(request.vm());
  v1::SwapDeviceResponse response;
  *response.mutable_device() = swapped.device();
  *response.mutable_pause() = swapped.pause();
  *response.mutable_findings() = swapped.findings();
  response.set_handed_off(swapped.handed_off());
  if (request.validate_only()) return response;
  LOG_INFO("vms/{}: device {} is at back-end {} now", id, request.device(),
           swapped.device().backend().socket());
  auto found = vms_.find(id);
  if (found == vms_.end()) return response;
  // The agent tells the VM anew by itself; a caller that reads at once shall see it, too.
  VmRecord record = found->second.record;
  if (v1::Device* device = FindDevice(record.mutable_vm(), request.device())) *device = swapped.device();
  if (auto host = hosts_.find(IdOf(record.owner())); host != hosts_.end() && host->second.vms.count(id)) {
    if (v1::Device* device = FindDevice(&host->second.vms[id], request.device())) *device = swapped.device();
  }
  Batch batch;
  batch.Put("vms/" + id, record.SerializeAsString());
  if (!request.request_id().empty()) {
    RequestRecord done;
    done.set_name("vms/" + id);
    done.set_body(BodyOf(request));
    batch.Put(SwapRequestKey(request.request_id()), done.SerializeAsString());
  }
  // The swap itself has happened whatever the store says; a repetition finds it done.
  if (absl::Status saved = store_.Commit(batch).status(); saved.ok()) {
    found->second.record = std::move(record);
  } else {
    LOG_ERROR("vms/{}: {}", id, Message(saved));
  }
  return response;
}

}  // namespace baton::server
