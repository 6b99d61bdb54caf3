#include "client/lib/client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <random>
#include <utility>

#include "baton/v1/fleet.grpc.pb.h"
#include "baton/v1/migrations.grpc.pb.h"
#include "baton/v1/policies.grpc.pb.h"
#include "common/grpc_credentials.h"
#include "common/grpc_status.h"

namespace baton::client {
namespace {

constexpr int kPageSize = 500;
// A server that hands out page tokens for ever must not hold the client for ever.
constexpr int kMaxPages = 10000;

// Cuts `prefix` (and what stands before it) off `text`.
void CutThrough(const std::string& prefix, std::string* text) {
  size_t at = text->rfind(prefix);
  if (at != std::string::npos) *text = text->substr(at + prefix.size());
}

std::chrono::system_clock::time_point GrpcDeadline(Duration left) {
  return std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::microseconds>(left);
}

}  // namespace

struct Client::Stubs {
  explicit Stubs(const std::shared_ptr<grpc::Channel>& channel)
      : fleet(channel), migrations(channel), policies(channel) {}
  v1::Fleet::Stub fleet;
  v1::Migrations::Stub migrations;
  v1::Policies::Stub policies;
};

std::string MakeRequestId() {
  std::random_device random;
  uint32_t words[4];
  for (uint32_t& word : words) word = random();
  words[1] = (words[1] & 0xffff0fff) | 0x4000;
  words[2] = (words[2] & 0x3fffffff) | 0x80000000;
  return fmt::format("{:08x}-{:04x}-{:04x}-{:04x}-{:04x}{:08x}", words[0], words[1] >> 16, words[1] & 0xffff,
                     words[2] >> 16, words[2] & 0xffff, words[3]);
}

absl::Status StatusOfCall(const grpc::Status& status, const std::string& server) {
  absl::Status out = FromGrpc(status);
  // Servers attach details to what they refuse; what has none and is UNAVAILABLE comes from the transport.
  if (out.code() != absl::StatusCode::kUnavailable || !status.error_details().empty()) return out;
  std::string why = status.error_message();
  for (const char* noise :
       {"last error: ", "UNKNOWN: ", "UNAVAILABLE: ", "INTERNAL: ", "Failed to connect to remote host: "}) {
    CutThrough(noise, &why);
  }
  if (why.rfind(server + ": ", 0) == 0) why.erase(0, server.size() + 2);
  if (why.find("Ssl handshake failed") != std::string::npos || why.find("SSL_ERROR") != std::string::npos) {
    return Error(absl::StatusCode::kUnavailable,
                 "cannot reach batond at {}: the TLS handshake failed ({}); check that --ca is the one that "
                 "signed the "
                 "server's certificate, and that the server speaks TLS",
                 server, why);
  }
  if (why.find("Socket closed") != std::string::npos || why.find("reset by peer") != std::string::npos ||
      why.find("EOF") != std::string::npos) {
    return Error(absl::StatusCode::kUnavailable, "the connection to batond at {} broke: {}", server, why);
  }
  return Error(absl::StatusCode::kUnavailable, "cannot reach batond at {}: {}", server, why);
}

bool IsTransient(const absl::Status& status) { return status.code() == absl::StatusCode::kUnavailable; }

absl::StatusOr<std::unique_ptr<Client>> Client::Make(const ConnectionOptions& options) {
  RETURN_IF_ERROR(CheckConnectionOptions(options));
  ASSIGN_OR_RETURN(Address address, ParseServer(options.server));
  TlsFiles files{options.ca, options.cert, options.key};
  ASSIGN_OR_RETURN(auto channel, MakeChannel(address, files, options.tls_name, LongStreamArguments()));
  return std::unique_ptr<Client>(new Client(options, std::move(channel)));
}

Client::Client(ConnectionOptions options, std::shared_ptr<grpc::Channel> channel)
    : options_(std::move(options)), channel_(std::move(channel)), stubs_(std::make_unique<Stubs>(channel_)) {}
Client::~Client() = default;

absl::Status Client::Call(Repeat repeat, Duration timeout,
                          const std::function<grpc::Status(grpc::ClientContext*)>& call) {
  Deadline deadline = Deadline::After(timeout);
  Deadline patience = Deadline::After(options_.connect_timeout).Min(deadline);
  // A server that is being restarted: wait for it before the first attempt. If it does not come, the attempt
  // itself fails at once and says why.
  channel_->WaitForConnected(GrpcDeadline(patience.Left()));
  Duration backoff = std::chrono::milliseconds(50);
  while (true) {
    grpc::ClientContext context;
    context.set_deadline(GrpcDeadline(deadline.Left()));
    absl::Status status = StatusOfCall(call(&context), options_.server);
    if (status.ok() || repeat == Repeat::kNo || !IsTransient(status) || patience.Expired()) return status;
    Duration pause = std::max(backoff, RetryDelayOf(status));
    backoff = std::min<Duration>(backoff * 2, std::chrono::milliseconds(500));
    auto until = GrpcDeadline(std::min(pause, patience.Left()));
    // Either the connection must come back, or it is there and the server asked for a pause: then any change
    // of the connection ends the pause early.
    if (channel_->GetState(true) == GRPC_CHANNEL_READY) {
      channel_->WaitForStateChange(GRPC_CHANNEL_READY, until);
    } else {
      channel_->WaitForConnected(GrpcDeadline(patience.Left()));
    }
  }
}

absl::StatusOr<v1::Host> Client::GetHost(const std::string& name) {
  v1::GetHostRequest request;
  request.set_name(name);
  v1::Host out;
  RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout,
                       [&](grpc::ClientContext* c) { return stubs_->fleet.GetHost(c, request, &out); }));
  return out;
}

absl::StatusOr<std::vector<v1::Host>> Client::ListHosts() {
  std::vector<v1::Host> out;
  v1::ListHostsRequest request;
  request.set_page_size(kPageSize);
  for (int page = 0; page < kMaxPages; ++page) {
    v1::ListHostsResponse response;
    RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout, [&](grpc::ClientContext* c) {
      return stubs_->fleet.ListHosts(c, request, &response);
    }));
    for (auto& host : *response.mutable_hosts()) out.push_back(std::move(host));
    if (response.next_page_token().empty()) break;
    request.set_page_token(response.next_page_token());
  }
  return out;
}

absl::StatusOr<v1::Host> Client::SetHostCordon(const std::string& name, bool cordoned) {
  v1::SetHostCordonRequest request;
  request.set_name(name);
  request.set_cordoned(cordoned);
  v1::Host out;
  RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout, [&](grpc::ClientContext* c) {
    return stubs_->fleet.SetHostCordon(c, request, &out);
  }));
  return out;
}

absl::StatusOr<v1::Vm> Client::GetVm(const std::string& name) {
  v1::GetVmRequest request;
  request.set_name(name);
  v1::Vm out;
  RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout,
                       [&](grpc::ClientContext* c) { return stubs_->fleet.GetVm(c, request, &out); }));
  return out;
}

absl::StatusOr<std::vector<v1::Vm>> Client::ListVms(const std::string& filter) {
  std::vector<v1::Vm> out;
  v1::ListVmsRequest request;
  request.set_page_size(kPageSize);
  request.set_filter(filter);
  for (int page = 0; page < kMaxPages; ++page) {
    v1::ListVmsResponse response;
    RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout, [&](grpc::ClientContext* c) {
      return stubs_->fleet.ListVms(c, request, &response);
    }));
    for (auto& vm : *response.mutable_vms()) out.push_back(std::move(vm));
    if (response.next_page_token().empty()) break;
    request.set_page_token(response.next_page_token());
  }
  return out;
}

absl::StatusOr<v1::Vm> Client::StartVm(v1::StartVmRequest request, Duration timeout) {
  if (request.request_id().empty()) request.set_request_id(MakeRequestId());
  v1::Vm out;
  RETURN_IF_ERROR(Call(Repeat::kYes, timeout,
                       [&](grpc::ClientContext* c) { return stubs_->fleet.StartVm(c, request, &out); }));
  return out;
}

absl::Status Client::StopVm(const std::string& name, bool force, Duration timeout) {
  v1::StopVmRequest request;
  request.set_name(name);
  request.set_force(force);
  v1::StopVmResponse out;
  return Call(Repeat::kNo, timeout,
              [&](grpc::ClientContext* c) { return stubs_->fleet.StopVm(c, request, &out); });
}

absl::StatusOr<v1::MediateDomainResponse> Client::MediateDomain(const v1::MediateDomainRequest& request,
                                                                Duration timeout) {
  v1::MediateDomainResponse out;
  // Doing it twice is doing it once.
  RETURN_IF_ERROR(Call(Repeat::kYes, timeout, [&](grpc::ClientContext* c) {
    return stubs_->fleet.MediateDomain(c, request, &out);
  }));
  return out;
}

absl::StatusOr<v1::SwapDeviceResponse> Client::SwapDevice(v1::SwapDeviceRequest request, Duration timeout) {
  if (request.request_id().empty()) request.set_request_id(MakeRequestId());
  v1::SwapDeviceResponse out;
  RETURN_IF_ERROR(Call(Repeat::kYes, timeout,
                       [&](grpc::ClientContext* c) { return stubs_->fleet.SwapDevice(c, request, &out); }));
  return out;
}

absl::StatusOr<v1::Migration> Client::CreateMigration(v1::CreateMigrationRequest* request, Duration timeout) {
  if (request->request_id().empty()) request->set_request_id(MakeRequestId());
  v1::Migration out;
  RETURN_IF_ERROR(Call(Repeat::kYes, timeout, [&](grpc::ClientContext* c) {
    return stubs_->migrations.CreateMigration(c, *request, &out);
  }));
  return out;
}

absl::StatusOr<v1::Migration> Client::GetMigration(const std::string& name) {
  v1::GetMigrationRequest request;
  request.set_name(name);
  v1::Migration out;
  RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout, [&](grpc::ClientContext* c) {
    return stubs_->migrations.GetMigration(c, request, &out);
  }));
  return out;
}

absl::StatusOr<Client::MigrationList> Client::ListMigrations(const std::string& filter, size_t limit) {
  MigrationList out;
  v1::ListMigrationsRequest request;
  request.set_page_size(limit == 0 ? kPageSize : static_cast<int>(std::min<size_t>(limit, kPageSize)));
  request.set_filter(filter);
  for (int page = 0; page < kMaxPages; ++page) {
    v1::ListMigrationsResponse response;
    RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout, [&](grpc::ClientContext* c) {
      return stubs_->migrations.ListMigrations(c, request, &response);
    }));
    if (page == 0) out.revision = response.revision();
    for (auto& migration : *response.mutable_migrations()) {
      if (limit != 0 && out.migrations.size() == limit) return out;
      out.migrations.push_back(std::move(migration));
    }
    if (response.next_page_token().empty()) break;
    request.set_page_token(response.next_page_token());
  }
  return out;
}

absl::StatusOr<v1::Migration> Client::CancelMigration(const std::string& name) {
  v1::CancelMigrationRequest request;
  request.set_name(name);
  v1::Migration out;
  RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout, [&](grpc::ClientContext* c) {
    return stubs_->migrations.CancelMigration(c, request, &out);
  }));
  return out;
}

absl::StatusOr<v1::Migration> Client::RetuneMigration(const v1::RetuneMigrationRequest& request) {
  v1::Migration out;
  RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout, [&](grpc::ClientContext* c) {
    return stubs_->migrations.RetuneMigration(c, request, &out);
  }));
  return out;
}

absl::StatusOr<v1::Migration> Client::ResolveMigration(const std::string& name, bool fenced) {
  v1::ResolveMigrationRequest request;
  request.set_name(name);
  request.set_fenced(fenced);
  v1::Migration out;
  RETURN_IF_ERROR(Call(Repeat::kNo, options_.request_timeout, [&](grpc::ClientContext* c) {
    return stubs_->migrations.ResolveMigration(c, request, &out);
  }));
  return out;
}

absl::StatusOr<v1::Policy> Client::GetPolicy(const std::string& name) {
  v1::GetPolicyRequest request;
  request.set_name(name);
  v1::Policy out;
  RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout,
                       [&](grpc::ClientContext* c) { return stubs_->policies.GetPolicy(c, request, &out); }));
  return out;
}

absl::StatusOr<std::vector<v1::Policy>> Client::ListPolicies() {
  std::vector<v1::Policy> out;
  v1::ListPoliciesRequest request;
  request.set_page_size(kPageSize);
  for (int page = 0; page < kMaxPages; ++page) {
    v1::ListPoliciesResponse response;
    RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout, [&](grpc::ClientContext* c) {
      return stubs_->policies.ListPolicies(c, request, &response);
    }));
    for (auto& policy : *response.mutable_policies()) out.push_back(std::move(policy));
    if (response.next_page_token().empty()) break;
    request.set_page_token(response.next_page_token());
  }
  return out;
}

absl::StatusOr<v1::Policy> Client::CreatePolicy(v1::CreatePolicyRequest request) {
  if (request.request_id().empty()) request.set_request_id(MakeRequestId());
  v1::Policy out;
  RETURN_IF_ERROR(Call(Repeat::kYes, options_.request_timeout, [&](grpc::ClientContext* c) {
    return stubs_->policies.CreatePolicy(c, request, &out);
  }));
  return out;
}

absl::StatusOr<v1::Policy> Client::UpdatePolicy(const v1::UpdatePolicyRequest& request) {
  v1::Policy out;
  RETURN_IF_ERROR(Call(Repeat::kNo, options_.request_timeout, [&](grpc::ClientContext* c) {
    return stubs_->policies.UpdatePolicy(c, request, &out);
  }));
  return out;
}

absl::Status Client::DeletePolicy(const std::string& name, const std::string& etag) {
  v1::DeletePolicyRequest request;
  request.set_name(name);
  request.set_etag(etag);
  google::protobuf::Empty out;
  return Call(Repeat::kNo, options_.request_timeout,
              [&](grpc::ClientContext* c) { return stubs_->policies.DeletePolicy(c, request, &out); });
}

}  // namespace baton::client
