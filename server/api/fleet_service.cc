#include "server/api/fleet_service.h"

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

grpc::ServerBidiReactor<v1::ConsoleRequest, v1::ConsoleResponse>* FleetService::Console(
    grpc::CallbackServerContext* context) {
  return StartConsole(api_, CallerOf(*context), fleet_);
}

}  // namespace baton::server
