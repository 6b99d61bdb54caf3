// The Policies and Drains services.
#pragma once

#include "baton/v1/drains.grpc.pb.h"
#include "baton/v1/policies.grpc.pb.h"
#include "server/api/unary.h"
#include "server/control/policies.h"

namespace baton::server {

// Thread-safe. `policies` outlives every call.
class PoliciesService : public v1::Policies::CallbackService {
 public:
  PoliciesService(ApiContext api, Policies& policies) : api_(api), policies_(policies) {}

  grpc::ServerUnaryReactor* CreatePolicy(grpc::CallbackServerContext* context,
                                         const v1::CreatePolicyRequest* request,
                                         v1::Policy* response) override;
  grpc::ServerUnaryReactor* GetPolicy(grpc::CallbackServerContext* context,
                                      const v1::GetPolicyRequest* request, v1::Policy* response) override;
  grpc::ServerUnaryReactor* ListPolicies(grpc::CallbackServerContext* context,
                                         const v1::ListPoliciesRequest* request,
                                         v1::ListPoliciesResponse* response) override;
  grpc::ServerUnaryReactor* UpdatePolicy(grpc::CallbackServerContext* context,
                                         const v1::UpdatePolicyRequest* request,
                                         v1::Policy* response) override;
  grpc::ServerUnaryReactor* DeletePolicy(grpc::CallbackServerContext* context,
                                         const v1::DeletePolicyRequest* request,
                                         google::protobuf::Empty* response) override;

 private:
  ApiContext api_;
  Policies& policies_;
};

// Every call answers UNIMPLEMENTED, as the generated base class does.
class DrainsService : public v1::Drains::CallbackService {};

}  // namespace baton::server
