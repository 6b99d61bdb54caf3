// A batond of its own process on a unix socket in a directory of its own, that can be killed and started
// again.
#pragma once

#include <grpcpp/grpcpp.h>
#include <signal.h>

#include <memory>
#include <string>
#include <vector>

#include "baton/v1/fleet.grpc.pb.h"
#include "baton/v1/migrations.grpc.pb.h"
#include "baton/v1/policies.grpc.pb.h"
#include "common/grpc_credentials.h"
#include "common/grpc_status.h"
#include "common/process.h"
#include "tests/temp_dir.h"

namespace baton::test {

class BatondHarness {
 public:
  explicit BatondHarness(std::vector<std::string> extra = {}) : extra_(std::move(extra)) {}

  const std::string& dir() const { return dir_.path(); }
  std::string socket() const { return dir_ / "batond.sock"; }
  std::string data() const { return dir_ / "data"; }

  // Words put before batond's own command line, for a shell or namespace around it.
  void set_wrapper(std::vector<std::string> wrapper) { wrapper_ = std::move(wrapper); }
  // A session is lost after three times this.
  void set_heartbeat(std::string heartbeat) { heartbeat_ = std::move(heartbeat); }
  // For the harness's own channels.
  void set_tls(TlsFiles files, std::string server_name) {
    tls_ = std::move(files);
    server_name_ = std::move(server_name);
  }
  pid_t pid() const { return process_ ? process_->pid() : -1; }

  // Starts and waits until it serves.
  absl::Status Start() {
    SpawnOptions options;
    options.argv = {BATOND_PATH,  "--listen", "unix:" + socket(), "--metrics", "off",
                    "--data-dir", data(),     "--heartbeat",      heartbeat_};
    options.argv.insert(options.argv.begin(), wrapper_.begin(), wrapper_.end());
    options.argv.insert(options.argv.end(), extra_.begin(), extra_.end());
    options.stderr_fd = 2;
    // A test that dies leaves nothing behind.
    options.die_with_parent = true;
    ASSIGN_OR_RETURN(Process process, Process::Spawn(options));
    process_ = std::make_unique<Process>(std::move(process));
    channel();
    if (!channel_->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(60))) {
      return absl::DeadlineExceededError("batond does not serve");
    }
    return absl::OkStatus();
  }
  // SIGKILL, and waits for the end.
  void Kill() {
    process_->Signal(SIGKILL);
    (void)process_->Wait(Deadline::After(std::chrono::seconds(60)));
    process_.reset();
    // The channel notices in its own time; a call made before that would fail.
    channel_->WaitForStateChange(GRPC_CHANNEL_READY,
                                 std::chrono::system_clock::now() + std::chrono::seconds(60));
  }
  ExitStatus Terminate() { return process_->Terminate(Deadline::After(std::chrono::seconds(60))); }
  void Restart() {
    Kill();
    absl::Status status = Start();
    if (!status.ok()) throw std::runtime_error(Message(status));
  }
  // One that dials again quickly.
  std::shared_ptr<grpc::Channel> NewChannel() const {
    grpc::ChannelArguments arguments = LongStreamArguments();
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 20);
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 20);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 50);
    // Channels of one process to one address would share a connection.
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    Address address;
    address.unix_path = socket();
    return *MakeChannel(address, tls_, server_name_, arguments);
  }
  std::shared_ptr<grpc::Channel> channel() {
    if (!channel_) channel_ = NewChannel();
    return channel_;
  }

 private:
  const TempDir dir_;
  std::vector<std::string> extra_;
  std::vector<std::string> wrapper_;
  std::string heartbeat_ = "60s";
  TlsFiles tls_;
  std::string server_name_;
  std::unique_ptr<Process> process_;
  std::shared_ptr<grpc::Channel> channel_;
};

// Calls with a deadline of 60 s that wait for batond to be there; answers as absl::Status with details.
class Api {
 public:
  explicit Api(std::shared_ptr<grpc::Channel> channel)
      : migrations_(v1::Migrations::NewStub(channel)),
        fleet_(v1::Fleet::NewStub(channel)),
        policies_(v1::Policies::NewStub(channel)) {}

  template <typename Stub, typename Request, typename Response>
  absl::StatusOr<Response> Call(Stub& stub,
                                grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                                const Request& request) {
    grpc::ClientContext context;
    context.set_wait_for_ready(true);
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    Response response;
    grpc::Status status = (stub.*method)(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
    return response;
  }
  absl::StatusOr<v1::Migration> Create(const std::string& vm, const std::string& to,
                                       const std::string& request_id = "", bool validate_only = false) {
    v1::CreateMigrationRequest request;
    request.mutable_migration()->set_vm("vms/" + vm);
    request.mutable_migration()->set_destination("hosts/" + to);
    request.set_request_id(request_id);
    request.set_validate_only(validate_only);
    return Call(*migrations_, &v1::Migrations::Stub::CreateMigration, request);
  }
  absl::StatusOr<v1::Migration> Get(const std::string& name) {
    v1::GetMigrationRequest request;
    request.set_name(name);
    return Call(*migrations_, &v1::Migrations::Stub::GetMigration, request);
  }
  absl::StatusOr<v1::Migration> Cancel(const std::string& name) {
    v1::CancelMigrationRequest request;
    request.set_name(name);
    return Call(*migrations_, &v1::Migrations::Stub::CancelMigration, request);
  }
  absl::StatusOr<v1::Vm> GetVm(const std::string& id) {
    v1::GetVmRequest request;
    request.set_name("vms/" + id);
    return Call(*fleet_, &v1::Fleet::Stub::GetVm, request);
  }
  absl::StatusOr<v1::Host> GetHost(const std::string& id) {
    v1::GetHostRequest request;
    request.set_name("hosts/" + id);
    return Call(*fleet_, &v1::Fleet::Stub::GetHost, request);
  }
  v1::Migrations::Stub& migrations() { return *migrations_; }
  v1::Fleet::Stub& fleet() { return *fleet_; }
  v1::Policies::Stub& policies() { return *policies_; }

 private:
  std::unique_ptr<v1::Migrations::Stub> migrations_;
  std::unique_ptr<v1::Fleet::Stub> fleet_;
  std::unique_ptr<v1::Policies::Stub> policies_;
};

}  // namespace baton::test
