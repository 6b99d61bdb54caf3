// Policies: named parameters of migrations. Belongs to the event loop.
#pragma once

#include <string>
#include <vector>

#include "baton/v1/policies.pb.h"
#include "common/status.h"
#include "server/store/store.h"

namespace baton::server {

// Ids are without "policies/".
class Policies {
 public:
  // `store` outlives this. `peer_tls`: what policies/default says of TLS when it is first made.
  Policies(Store& store, bool peer_tls) : store_(store), peer_tls_(peer_tls) {}
  // Makes policies/default if it does not exist.
  absl::Status Load();

  absl::StatusOr<v1::Policy> Create(const v1::CreatePolicyRequest& request);
  absl::StatusOr<v1::Policy> Get(const std::string& id);
  absl::StatusOr<std::vector<v1::Policy>> List(const std::string& after, size_t limit);
  absl::StatusOr<v1::Policy> Update(const v1::UpdatePolicyRequest& request);
  absl::Status Delete(const std::string& id, const std::string& etag);

 private:
  absl::StatusOr<v1::Policy> Put(v1::Policy policy, const Batch* more = nullptr);

  Store& store_;
  bool peer_tls_;
};

// What a policy must satisfy; InvalidArgument with a field violation for each problem. `prefix` is put before
// the field names ("policy.").
absl::Status ValidateParams(const v1::MigrationParams& params, const std::string& prefix);
// `own` on top of the policy's: fields that are set in `own` win.
v1::MigrationParams MergeParams(const v1::MigrationParams& policy, const v1::MigrationParams& own);
// Documented defaults.
v1::MigrationParams DefaultParams();

// The policy that counts for device events of `vm` (an id): see v1::OnDeviceError. Null if none covers it.
// Pure; `policies` in any order.
const v1::Policy* PolicyForDeviceEvents(const std::vector<v1::Policy>& policies, const std::string& vm);

// Bytes that are equal for equal requests (maps in order).
std::string Canonical(const google::protobuf::Message& message);

}  // namespace baton::server
