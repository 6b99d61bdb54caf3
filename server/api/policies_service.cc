#include "server/api/policies_service.h"

#include "server/control/filter.h"
#include "server/names.h"

namespace baton::server {

grpc::ServerUnaryReactor* PoliciesService::CreatePolicy(grpc::CallbackServerContext* context,
                                                        const v1::CreatePolicyRequest* request,
                                                        v1::Policy* response) {
  return Unary(api_, context, "CreatePolicy", Role::kAdmin, "policies/" + request->policy_id(),
               [=, this](Done done) { done(Store1(policies_.Create(*request), response)); });
}

grpc::ServerUnaryReactor* PoliciesService::GetPolicy(grpc::CallbackServerContext* context,
                                                     const v1::GetPolicyRequest* request,
                                                     v1::Policy* response) {
  return Unary(api_, context, "GetPolicy", Role::kViewer, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "policies", "name");
    if (!id.ok()) return done(id.status());
    done(Store1(policies_.Get(*id), response));
  });
}

grpc::ServerUnaryReactor* PoliciesService::ListPolicies(grpc::CallbackServerContext* context,
                                                        const v1::ListPoliciesRequest* request,
                                                        v1::ListPoliciesResponse* response) {
  auto list = [=, this]() -> absl::Status {
    ASSIGN_OR_RETURN(size_t size, PageSize(request->page_size()));
    ASSIGN_OR_RETURN(std::string after, ParsePageToken(request->page_token(), "policies", ""));
    ASSIGN_OR_RETURN(auto policies, policies_.List(after, size + 1));
    bool more = policies.size() > size;
    if (more) policies.pop_back();
    for (v1::Policy& policy : policies) *response->add_policies() = policy;
    if (more) response->set_next_page_token(MakePageToken("policies", "", IdOf(policies.back().name())));
    return absl::OkStatus();
  };
  return Unary(api_, context, "ListPolicies", Role::kViewer, "", [list](Done done) { done(list()); });
}

grpc::ServerUnaryReactor* PoliciesService::UpdatePolicy(grpc::CallbackServerContext* context,
                                                        const v1::UpdatePolicyRequest* request,
                                                        v1::Policy* response) {
  return Unary(api_, context, "UpdatePolicy", Role::kAdmin, request->policy().name(),
               [=, this](Done done) { done(Store1(policies_.Update(*request), response)); });
}

grpc::ServerUnaryReactor* PoliciesService::DeletePolicy(grpc::CallbackServerContext* context,
                                                        const v1::DeletePolicyRequest* request,
                                                        google::protobuf::Empty*) {
  return Unary(api_, context, "DeletePolicy", Role::kAdmin, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "policies", "name");
    if (!id.ok()) return done(id.status());
    done(policies_.Delete(*id, request->etag()));
  });
}

}  // namespace baton::server
