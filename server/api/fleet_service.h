// The Fleet service.
#pragma once

#include "baton/v1/fleet.grpc.pb.h"
#include "server/api/unary.h"
#include "server/fleet/fleet.h"

namespace baton::server {

// Thread-safe. The fleet outlives every call.
class FleetService : public v1::Fleet::CallbackService {
 public:
  FleetService(ApiContext api, Fleet& fleet) : api_(api), fleet_(fleet) {}

  grpc::ServerUnaryReactor* GetHost(grpc::CallbackServerContext* context, const v1::GetHostRequest* request,
                                    v1::Host* response) override;
  grpc::ServerUnaryReactor* ListHosts(grpc::CallbackServerContext* context,
                                      const v1::ListHostsRequest* request,
                                      v1::ListHostsResponse* response) override;
  grpc::ServerUnaryReactor* SetHostCordon(grpc::CallbackServerContext* context,
                                          const v1::SetHostCordonRequest* request,
                                          v1::Host* response) override;
  grpc::ServerUnaryReactor* GetVm(grpc::CallbackServerContext* context, const v1::GetVmRequest* request,
                                  v1::Vm* response) override;
  grpc::ServerUnaryReactor* ListVms(grpc::CallbackServerContext* context, const v1::ListVmsRequest* request,
                                    v1::ListVmsResponse* response) override;
  grpc::ServerUnaryReactor* StartVm(grpc::CallbackServerContext* context, const v1::StartVmRequest* request,
                                    v1::Vm* response) override;
  grpc::ServerUnaryReactor* SwapDevice(grpc::CallbackServerContext* context,
                                       const v1::SwapDeviceRequest* request,
                                       v1::SwapDeviceResponse* response) override;
  grpc::ServerUnaryReactor* MediateDomain(grpc::CallbackServerContext* context,
                                          const v1::MediateDomainRequest* request,
                                          v1::MediateDomainResponse* response) override;
  grpc::ServerUnaryReactor* StopVm(grpc::CallbackServerContext* context, const v1::StopVmRequest* request,
                                   v1::StopVmResponse* response) override;
  grpc::ServerBidiReactor<v1::ConsoleRequest, v1::ConsoleResponse>* Console(
      grpc::CallbackServerContext* context) override;

 private:
  ApiContext api_;
  Fleet& fleet_;
};

}  // namespace baton::server
