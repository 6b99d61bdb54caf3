#include "server/api/fleet_service.h"

#include "common/grpc_status.h"
#include "common/unix_socket.h"
#include "common/vm_spec.h"
#include "server/api/console.h"
#include "server/control/filter.h"
#include "server/names.h"

namespace baton::server {

grpc::ServerUnaryReactor* FleetService::GetHost(grpc::CallbackServerContext* context,
                                                const v1::GetHostRequest* request, v1::Host* response) {
  return Unary(api_, context, "GetHost", Role::kViewer, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "hosts", "name");
    if (!id.ok()) return done(id.status());
    done(Store1(fleet_.GetHost(*id), response));
  });
}

grpc::ServerUnaryReactor* FleetService::ListHosts(grpc::CallbackServerContext* context,
                                                  const v1::ListHostsRequest* request,
                                                  v1::ListHostsResponse* response) {
  auto list = [=, this]() -> absl::Status {
    ASSIGN_OR_RETURN(size_t size, PageSize(request->page_size()));
    ASSIGN_OR_RETURN(std::string after, ParsePageToken(request->page_token(), "hosts", ""));
    auto hosts = fleet_.ListHosts(after, size + 1);
    bool more = hosts.size() > size;
    if (more) hosts.pop_back();
    for (v1::Host& host : hosts) *response->add_hosts() = host;
    if (more) response->set_next_page_token(MakePageToken("hosts", "", IdOf(hosts.back().name())));
    return absl::OkStatus();
  };
  return Unary(api_, context, "ListHosts", Role::kViewer, "", [list](Done done) { done(list()); });
}

grpc::ServerUnaryReactor* FleetService::SetHostCordon(grpc::CallbackServerContext* context,
                                                      const v1::SetHostCordonRequest* request,
                                                      v1::Host* response) {
  return Unary(api_, context, "SetHostCordon", Role::kOperator, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "hosts", "name");
    if (!id.ok()) return done(id.status());
    done(Store1(fleet_.SetCordon(*id, request->cordoned()), response));
  });
}

grpc::ServerUnaryReactor* FleetService::GetVm(grpc::CallbackServerContext* context,
                                              const v1::GetVmRequest* request, v1::Vm* response) {
  return Unary(api_, context, "GetVm", Role::kViewer, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "vms", "name");
    if (!id.ok()) return done(id.status());
    done(Store1(fleet_.GetVm(*id), response));
  });
}

grpc::ServerUnaryReactor* FleetService::ListVms(grpc::CallbackServerContext* context,
                                                const v1::ListVmsRequest* request,
                                                v1::ListVmsResponse* response) {
  auto list = [=, this]() -> absl::Status {
    ASSIGN_OR_RETURN(auto terms, ParseFilter(request->filter(), {"host"}));
    std::string host = IdOf(terms["host"]);
    ASSIGN_OR_RETURN(size_t size, PageSize(request->page_size()));
    ASSIGN_OR_RETURN(std::string after, ParsePageToken(request->page_token(), "vms", request->filter()));
    auto vms = fleet_.ListVms(host, after, size + 1);
    bool more = vms.size() > size;
    if (more) vms.pop_back();
    for (v1::Vm& vm : vms) *response->add_vms() = vm;
    if (more) response->set_next_page_token(MakePageToken("vms", request->filter(), IdOf(vms.back().name())));
    return absl::OkStatus();
  };
  return Unary(api_, context, "ListVms", Role::kViewer, "", [list](Done done) { done(list()); });
}

grpc::ServerUnaryReactor* FleetService::StartVm(grpc::CallbackServerContext* context,
                                                const v1::StartVmRequest* request, v1::Vm* response) {
  return Unary(api_, context, "StartVm", Role::kOperator, "vms/" + request->spec().name(),
               [=, this](Done done) {
                 auto host = ParseName(request->host(), "hosts", "host");
                 if (!host.ok()) return done(host.status());
                 v1::VmSpec spec = request->spec();
                 FillVmSpecDefaults(&spec);
                 if (absl::Status status = ValidateVmSpec(spec); !status.ok()) {
                   return done(WithField(Annotate(status, "spec"), "spec", Message(status)));
                 }
                 fleet_.StartVm(*host, spec, [done, response](absl::StatusOr<v1::Vm> vm) {
                   done(Store1(std::move(vm), response));
                 });
               });
}

grpc::ServerUnaryReactor* FleetService::StopVm(grpc::CallbackServerContext* context,
                                               const v1::StopVmRequest* request, v1::StopVmResponse*) {
  return Unary(api_, context, "StopVm", Role::kOperator, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "vms", "name");
    if (!id.ok()) return done(id.status());
    fleet_.StopVm(*id, request->force(), done);
  });
}

namespace {

absl::Status CheckSwap(const v1::SwapDeviceRequest& request) {
  RETURN_IF_ERROR(ParseName(request.vm(), "vms", "vm").status());
  if (request.device().empty()) return InvalidField("device", "is missing");
  const std::string& socket = request.backend().socket();
  if (socket.empty() || socket[0] != '/') return InvalidField("backend.socket", "must be an absolute path");
  if (absl::Status path = CheckUnixPath(socket); !path.ok())
    return InvalidField("backend.socket", Message(path));
  if (!v1::BackendKind_IsValid(request.backend().kind()))
    return InvalidField("backend.kind", "is not known to this version");
  if (!v1::Recovery_IsValid(request.backend().recovery()))
    return InvalidField("backend.recovery", "is not known to this version");
  if (!v1::InflightAnswer_IsValid(request.inflight()))
    return InvalidField("inflight", "is not known to this version");
  if (request.request_id().size() > 128) return InvalidField("request_id", "has more than 128 bytes");
  if (request.has_drain_timeout()) {
    const auto& bound = request.drain_timeout();
    if (bound.seconds() < 0 || bound.nanos() < 0 || bound.nanos() > 999'999'999 ||
        (bound.seconds() == 0 && bound.nanos() == 0) || bound.seconds() >= 60) {
      return InvalidField("drain_timeout", "must be above 0 and below 60 s");
    }
  }
  return absl::OkStatus();
}

}  // namespace

grpc::ServerUnaryReactor* FleetService::SwapDevice(grpc::CallbackServerContext* context,
                                                   const v1::SwapDeviceRequest* request,
                                                   v1::SwapDeviceResponse* response) {
  return Unary(api_, context, "SwapDevice", Role::kOperator, request->vm(), [=, this](Done done) {
    if (absl::Status status = CheckSwap(*request); !status.ok()) return done(status);
    fleet_.SwapDevice(*request, [done, response](absl::StatusOr<v1::SwapDeviceResponse> answer) {
      done(Store1(std::move(answer), response));
    });
  });
}

grpc::ServerUnaryReactor* FleetService::MediateDomain(grpc::CallbackServerContext* context,
                                                      const v1::MediateDomainRequest* request,
                                                      v1::MediateDomainResponse* response) {
  return Unary(api_, context, "MediateDomain", Role::kOperator, request->host(), [=, this](Done done) {
    auto host = ParseName(request->host(), "hosts", "host");
    if (!host.ok()) return done(host.status());
    if (request->xml().empty() || request->xml().size() > (4u << 20))
      return done(InvalidField("xml", "is a domain's XML of at most 4 MiB"));
    fleet_.MediateDomain(*host, *request, [done, response](absl::StatusOr<v1::MediateDomainResponse> answer) {
      done(Store1(std::move(answer), response));
    });
  });
}

grpc::ServerBidiReactor<v1::ConsoleRequest, v1::ConsoleResponse>* FleetService::Console(
    grpc::CallbackServerContext* context) {
  return StartConsole(api_, CallerOf(*context), fleet_);
}

}  // namespace baton::server
