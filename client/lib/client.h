// The client library: every call of the public API as a plain function with a deadline, a retry rule and an
// absl::Status that keeps what the server said (see errors.h). No gRPC type is visible here.
//
//   ASSIGN_OR_RETURN(auto client, Client::Make({.server = "unix:/run/baton/batond.sock"}));
//   ASSIGN_OR_RETURN(v1::Host host, client->GetHost("hosts/a"));
//
// Thread-safe. Calls block up to their deadline. Retries: calls that may be repeated (reads, creates with a
// request_id, cancel, cordon, retune) are repeated while the server is unavailable and `connect_timeout` has
// not passed; the others wait as long for the connection and are then sent once.
#pragma once

#include <absl/status/status.h>
#include <absl/status/statusor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "baton/v1/fleet.pb.h"
#include "baton/v1/migrations.pb.h"
#include "baton/v1/policies.pb.h"
#include "client/lib/connection.h"

namespace grpc {
class Channel;
class ClientContext;
class Status;
}  // namespace grpc

namespace baton::client {

class Client {
 public:
  // Checks the options and reads the TLS files; does not connect yet. InvalidArgument, NotFound or
  // PermissionDenied name the option or the file.
  static absl::StatusOr<std::unique_ptr<Client>> Make(const ConnectionOptions& options);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  const ConnectionOptions& options() const { return options_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }

  // Names are full ones ("hosts/a"). Lists fetch all pages, up to `limit` items (0: all).
  absl::StatusOr<v1::Host> GetHost(const std::string& name);
  absl::StatusOr<std::vector<v1::Host>> ListHosts();
  absl::StatusOr<v1::Host> SetHostCordon(const std::string& name, bool cordoned);

  absl::StatusOr<v1::Vm> GetVm(const std::string& name);
  absl::StatusOr<std::vector<v1::Vm>> ListVms(const std::string& filter = "");
  // Waits until the VM runs. A request_id is made up if there is none.
  absl::StatusOr<v1::Vm> StartVm(v1::StartVmRequest request, Duration timeout);
  absl::Status StopVm(const std::string& name, bool force, Duration timeout);

  // Waits until the new back-end serves the device. A request_id is made up if there is none.
  absl::StatusOr<v1::MediateDomainResponse> MediateDomain(const v1::MediateDomainRequest& request,
                                                          Duration timeout);
  absl::StatusOr<v1::SwapDeviceResponse> SwapDevice(v1::SwapDeviceRequest request, Duration timeout);

  // `request` gets a request_id if it has none. validate_only calls may take `timeout`, which must leave room
  // for the dirty-rate sample and for connecting to every back-end.
  absl::StatusOr<v1::Migration> CreateMigration(v1::CreateMigrationRequest* request, Duration timeout);
  absl::StatusOr<v1::Migration> GetMigration(const std::string& name);
  struct MigrationList {
    std::vector<v1::Migration> migrations;
    int64_t revision = 0;  // of the first page: a watch from here misses nothing
  };
  absl::StatusOr<MigrationList> ListMigrations(const std::string& filter = "", size_t limit = 0);
  absl::StatusOr<v1::Migration> CancelMigration(const std::string& name);
  absl::StatusOr<v1::Migration> RetuneMigration(const v1::RetuneMigrationRequest& request);
  absl::StatusOr<v1::Migration> ResolveMigration(const std::string& name, bool fenced);

  absl::StatusOr<v1::Policy> GetPolicy(const std::string& name);
  absl::StatusOr<std::vector<v1::Policy>> ListPolicies();
  absl::StatusOr<v1::Policy> CreatePolicy(v1::CreatePolicyRequest request);
  absl::StatusOr<v1::Policy> UpdatePolicy(const v1::UpdatePolicyRequest& request);
  absl::Status DeletePolicy(const std::string& name, const std::string& etag = "");

 private:
  struct Stubs;
  enum class Repeat { kYes, kNo };
  Client(ConnectionOptions options, std::shared_ptr<grpc::Channel> channel);
  absl::Status Call(Repeat repeat, Duration timeout,
                    const std::function<grpc::Status(grpc::ClientContext*)>& call);

  const ConnectionOptions options_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<Stubs> stubs_;
};

// A random UUID (version 4), for request ids.
std::string MakeRequestId();

// The outcome of a call on a connection to `server`: FromGrpc, with messages about the connection itself put
// into words ("cannot reach batond at …: connection refused").
absl::Status StatusOfCall(const grpc::Status& status, const std::string& server);

// Whether repeating the same call may help: the connection broke, or the server says that it is not ready.
bool IsTransient(const absl::Status& status);

}  // namespace baton::client
