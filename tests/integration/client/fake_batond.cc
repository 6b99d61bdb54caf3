#include "tests/integration/client/fake_batond.h"

#include <unistd.h>

#include <algorithm>

#include "common/grpc_status.h"

namespace baton::testing {
namespace {

absl::Status Missing(const std::string& name) {
  return WithResource(Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "{} does not exist", name),
                      name.substr(0, name.find('/')), name);
}

// One page of a map's values; the token is the name of the last one sent.
template <typename Map, typename List>
std::string Page(const Map& all, int page_size, const std::string& token, List* out) {
  auto at = token.empty() ? all.begin() : all.upper_bound(token);
  for (int i = 0; at != all.end() && i < page_size; ++at, ++i) *out->Add() = at->second;
  return at == all.end() || out->empty() ? "" : out->rbegin()->name();
}

}  // namespace

class FakeBatond::FleetService : public v1::Fleet::Service {
 public:
  explicit FleetService(FakeBatond* f) : f_(f) {}

  grpc::Status GetHost(grpc::ServerContext*, const v1::GetHostRequest* request, v1::Host* out) override {
    if (auto s = f_->Enter("GetHost", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    auto found = f_->hosts_.find(request->name());
    if (found == f_->hosts_.end()) return ToGrpc(Missing(request->name()));
    *out = found->second;
    return grpc::Status::OK;
  }
  grpc::Status ListHosts(grpc::ServerContext*, const v1::ListHostsRequest* request,
                         v1::ListHostsResponse* out) override {
    if (auto s = f_->Enter("ListHosts", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    // Small pages, so that the client has to ask for more.
    out->set_next_page_token(Page(f_->hosts_, 2, request->page_token(), out->mutable_hosts()));
    return grpc::Status::OK;
  }
  grpc::Status SetHostCordon(grpc::ServerContext*, const v1::SetHostCordonRequest* request,
                             v1::Host* out) override {
    if (auto s = f_->Enter("SetHostCordon", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    auto found = f_->hosts_.find(request->name());
    if (found == f_->hosts_.end()) return ToGrpc(Missing(request->name()));
    found->second.set_cordoned(request->cordoned());
    *out = found->second;
    return grpc::Status::OK;
  }
  grpc::Status GetVm(grpc::ServerContext*, const v1::GetVmRequest* request, v1::Vm* out) override {
    if (auto s = f_->Enter("GetVm", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    auto found = f_->vms_.find(request->name());
    if (found == f_->vms_.end()) return ToGrpc(Missing(request->name()));
    *out = found->second;
    return grpc::Status::OK;
  }
  grpc::Status ListVms(grpc::ServerContext*, const v1::ListVmsRequest* request,
                       v1::ListVmsResponse* out) override {
    if (auto s = f_->Enter("ListVms", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    std::map<std::string, v1::Vm> matching;
    for (const auto& [name, vm] : f_->vms_) {
      if (request->filter().empty() || request->filter() == "host=" + vm.host()) matching[name] = vm;
    }
    out->set_next_page_token(Page(matching, 2, request->page_token(), out->mutable_vms()));
    return grpc::Status::OK;
  }
  grpc::Status StartVm(grpc::ServerContext*, const v1::StartVmRequest* request, v1::Vm* out) override {
    if (auto s = f_->Enter("StartVm", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    out->set_name("vms/" + request->spec().name());
    out->set_host(request->host());
    out->set_state(v1::Vm::RUNNING);
    *out->mutable_spec() = request->spec();
    f_->vms_[out->name()] = *out;
    return grpc::Status::OK;
  }
  grpc::Status StopVm(grpc::ServerContext*, const v1::StopVmRequest* request, v1::StopVmResponse*) override {
    if (auto s = f_->Enter("StopVm", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    if (f_->vms_.erase(request->name()) == 0) return ToGrpc(Missing(request->name()));
    return grpc::Status::OK;
  }
  // Greets, then repeats what comes in capitals; "exit" closes.
  grpc::Status Console(grpc::ServerContext*,
                       grpc::ServerReaderWriter<v1::ConsoleResponse, v1::ConsoleRequest>* stream) override {
    v1::ConsoleRequest request;
    if (!stream->Read(&request)) return grpc::Status::OK;
    if (auto s = f_->Enter("Console", request); !s.ok()) return s;
    {
      std::lock_guard<std::mutex> lock(f_->mutex_);
      if (f_->vms_.count(request.vm()) == 0) return ToGrpc(Missing(request.vm()));
    }
    v1::ConsoleResponse response;
    response.set_output("login: ");
    stream->Write(response);
    std::string all;
    while (stream->Read(&request)) {
      all += request.input();
      response.set_output(request.input());
      for (char& c : *response.mutable_output()) c = static_cast<char>(toupper(c));
      stream->Write(response);
      if (all.find("exit") != std::string::npos) return grpc::Status::OK;
    }
    return grpc::Status::OK;
  }

 private:
  FakeBatond* const f_;
};

class FakeBatond::MigrationsService : public v1::Migrations::Service {
 public:
  explicit MigrationsService(FakeBatond* f) : f_(f) {}

  grpc::Status CreateMigration(grpc::ServerContext*, const v1::CreateMigrationRequest* request,
                               v1::Migration* out) override {
    if (auto s = f_->Enter("CreateMigration", *request); !s.ok()) return s;
    std::unique_lock<std::mutex> lock(f_->mutex_);
    auto known = f_->by_request_id_.find(request->request_id());
    if (known != f_->by_request_id_.end()) {
      *out = f_->migrations_[known->second];
      return grpc::Status::OK;
    }
    auto vm = f_->vms_.find(request->migration().vm());
    if (vm == f_->vms_.end()) return ToGrpc(Missing(request->migration().vm()));
    *out = f_->create_answer_ ? *f_->create_answer_ : v1::Migration();
    f_->create_answer_.reset();
    out->MergeFrom(request->migration());
    out->set_source(vm->second.host());
    if (out->phase() == v1::PHASE_UNSPECIFIED) out->set_phase(v1::QUEUED);
    if (request->validate_only()) return grpc::Status::OK;
    if (out->name().empty()) out->set_name("migrations/m" + std::to_string(++f_->created_));
    f_->by_request_id_[request->request_id()] = out->name();
    vm->second.set_migration(out->name());
    lock.unlock();
    out->set_revision(f_->PutMigration(*out));
    return grpc::Status::OK;
  }
  grpc::Status GetMigration(grpc::ServerContext*, const v1::GetMigrationRequest* request,
                            v1::Migration* out) override {
    if (auto s = f_->Enter("GetMigration", *request); !s.ok()) return s;
    return Find(request->name(), out);
  }
  grpc::Status ListMigrations(grpc::ServerContext*, const v1::ListMigrationsRequest* request,
                              v1::ListMigrationsResponse* out) override {
    if (auto s = f_->Enter("ListMigrations", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    out->set_next_page_token(Page(f_->migrations_, 2, request->page_token(), out->mutable_migrations()));
    out->set_revision(f_->revision_);
    return grpc::Status::OK;
  }
  grpc::Status WatchMigrations(grpc::ServerContext* context, const v1::WatchMigrationsRequest* request,
                               grpc::ServerWriter<v1::WatchMigrationsResponse>* writer) override {
    if (auto s = f_->Enter("WatchMigrations", *request); !s.ok()) return s;
    std::unique_lock<std::mutex> lock(f_->mutex_);
    int64_t start = request->start_revision();
    if (start != 0 && start < f_->compacted_) {
      return {grpc::StatusCode::OUT_OF_RANGE, "revision is compacted away"};
    }
    ++f_->watches_;
    f_->changed_.notify_all();
    writer->SendInitialMetadata();
    auto wanted = [&](const v1::Migration& m) {
      return request->name().empty() || m.name() == request->name();
    };
    if (start == 0) {
      for (const auto& [name, migration] : f_->migrations_) {
        if (!wanted(migration)) continue;
        v1::WatchMigrationsResponse response;
        *response.mutable_migration() = migration;
        response.set_revision(migration.revision());
        writer->Write(response);
      }
      start = f_->revision_;
    } else if (f_->repeat_on_resume_ && start > 1) {
      --start;
    }
    size_t next = 0;
    while (!f_->stopping_ && !context->IsCancelled()) {
      for (; next < f_->history_.size(); ++next) {
        const auto& response = f_->history_[next];
        if (response.revision() > start && wanted(response.migration())) writer->Write(response);
      }
      f_->changed_.wait_for(lock, std::chrono::milliseconds(100));
    }
    return {grpc::StatusCode::UNAVAILABLE, "server is going away"};
  }
  grpc::Status CancelMigration(grpc::ServerContext*, const v1::CancelMigrationRequest* request,
                               v1::Migration* out) override {
    if (auto s = f_->Enter("CancelMigration", *request); !s.ok()) return s;
    if (auto s = Find(request->name(), out); !s.ok()) return s;
    if (out->phase() >= v1::SUCCEEDED) {
      return ToGrpc(
          WithReason(absl::FailedPreconditionError(request->name() + " has ended"), v1::VM_NOT_MIGRATABLE));
    }
    out->set_cancel_requested(true);
    out->set_revision(f_->PutMigration(*out));
    return grpc::Status::OK;
  }
  grpc::Status RetuneMigration(grpc::ServerContext*, const v1::RetuneMigrationRequest* request,
                               v1::Migration* out) override {
    if (auto s = f_->Enter("RetuneMigration", *request); !s.ok()) return s;
    return Find(request->name(), out);
  }
  grpc::Status ResolveMigration(grpc::ServerContext*, const v1::ResolveMigrationRequest* request,
                                v1::Migration* out) override {
    if (auto s = f_->Enter("ResolveMigration", *request); !s.ok()) return s;
    if (auto s = Find(request->name(), out); !s.ok()) return s;
    out->set_guest_location(v1::SOURCE);
    return grpc::Status::OK;
  }

 private:
  grpc::Status Find(const std::string& name, v1::Migration* out) {
    std::lock_guard<std::mutex> lock(f_->mutex_);
    auto found = f_->migrations_.find(name);
    if (found == f_->migrations_.end()) return ToGrpc(Missing(name));
    *out = found->second;
    return grpc::Status::OK;
  }
  FakeBatond* const f_;
};

class FakeBatond::PoliciesService : public v1::Policies::Service {
 public:
  explicit PoliciesService(FakeBatond* f) : f_(f) {}

  grpc::Status CreatePolicy(grpc::ServerContext*, const v1::CreatePolicyRequest* request,
                            v1::Policy* out) override {
    if (auto s = f_->Enter("CreatePolicy", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    *out = request->policy();
    out->set_name("policies/" + request->policy_id());
    f_->policies_[out->name()] = *out;
    return grpc::Status::OK;
  }
  grpc::Status GetPolicy(grpc::ServerContext*, const v1::GetPolicyRequest* request,
                         v1::Policy* out) override {
    if (auto s = f_->Enter("GetPolicy", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    auto found = f_->policies_.find(request->name());
    if (found == f_->policies_.end()) return ToGrpc(Missing(request->name()));
    *out = found->second;
    return grpc::Status::OK;
  }
  grpc::Status ListPolicies(grpc::ServerContext*, const v1::ListPoliciesRequest* request,
                            v1::ListPoliciesResponse* out) override {
    if (auto s = f_->Enter("ListPolicies", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    out->set_next_page_token(Page(f_->policies_, 2, request->page_token(), out->mutable_policies()));
    return grpc::Status::OK;
  }
  grpc::Status UpdatePolicy(grpc::ServerContext*, const v1::UpdatePolicyRequest* request,
                            v1::Policy* out) override {
    if (auto s = f_->Enter("UpdatePolicy", *request); !s.ok()) return s;
    *out = request->policy();
    return grpc::Status::OK;
  }
  grpc::Status DeletePolicy(grpc::ServerContext*, const v1::DeletePolicyRequest* request,
                            google::protobuf::Empty*) override {
    if (auto s = f_->Enter("DeletePolicy", *request); !s.ok()) return s;
    std::lock_guard<std::mutex> lock(f_->mutex_);
    if (f_->policies_.erase(request->name()) == 0) return ToGrpc(Missing(request->name()));
    return grpc::Status::OK;
  }

 private:
  FakeBatond* const f_;
};

FakeBatond::FakeBatond(std::string address)
    : address_(std::move(address)),
      fleet_(std::make_unique<FleetService>(this)),
      migrations_service_(std::make_unique<MigrationsService>(this)),
      policies_service_(std::make_unique<PoliciesService>(this)) {}

FakeBatond::~FakeBatond() { Stop(); }

void FakeBatond::Start() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = false;
  }
  grpc::ServerBuilder builder;
  bool is_unix = address_.rfind("unix:", 0) == 0;
  // A restarted server listens where it did before.
  std::string address = is_unix || port_ == 0 ? address_ : "127.0.0.1:" + std::to_string(port_);
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port_);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.RegisterService(fleet_.get());
  builder.RegisterService(migrations_service_.get());
  builder.RegisterService(policies_service_.get());
  server_ = builder.BuildAndStart();
}

void FakeBatond::Stop() {
  if (!server_) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
  server_.reset();
}

std::string FakeBatond::target() const {
  return address_.rfind("unix:", 0) == 0 ? address_ : "127.0.0.1:" + std::to_string(port_);
}

void FakeBatond::PutHost(const v1::Host& host) {
  std::lock_guard<std::mutex> lock(mutex_);
  hosts_[host.name()] = host;
}
void FakeBatond::PutVm(const v1::Vm& vm) {
  std::lock_guard<std::mutex> lock(mutex_);
  vms_[vm.name()] = vm;
}
void FakeBatond::PutPolicy(const v1::Policy& policy) {
  std::lock_guard<std::mutex> lock(mutex_);
  policies_[policy.name()] = policy;
}

int64_t FakeBatond::PutMigration(v1::Migration migration) {
  std::lock_guard<std::mutex> lock(mutex_);
  migration.set_revision(++revision_);
  v1::WatchMigrationsResponse response;
  *response.mutable_migration() = migration;
  response.set_revision(revision_);
  history_.push_back(response);
  migrations_[migration.name()] = migration;
  changed_.notify_all();
  return revision_;
}

v1::Migration FakeBatond::GetMigration(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  return migrations_[name];
}

void FakeBatond::Compact(int64_t revision) {
  std::lock_guard<std::mutex> lock(mutex_);
  compacted_ = revision;
}

void FakeBatond::FailNext(const std::string& method, const absl::Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);
  errors_[method].push_back(status);
}

void FakeBatond::AnswerCreateWith(const v1::Migration& migration) {
  std::lock_guard<std::mutex> lock(mutex_);
  create_answer_ = std::make_unique<v1::Migration>(migration);
}

std::vector<std::string> FakeBatond::requests() {
  std::lock_guard<std::mutex> lock(mutex_);
  return requests_;
}

bool FakeBatond::WaitForWatches(int count) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(120), [&] { return watches_ >= count; });
}

int FakeBatond::watches() {
  std::lock_guard<std::mutex> lock(mutex_);
  return watches_;
}

grpc::Status FakeBatond::Enter(const std::string& method, const google::protobuf::Message& request) {
  std::lock_guard<std::mutex> lock(mutex_);
  requests_.push_back(method + " { " + request.ShortDebugString() + " }");
  auto errors = errors_.find(method);
  if (errors == errors_.end() || errors->second.empty()) return grpc::Status::OK;
  absl::Status status = errors->second.front();
  errors->second.pop_front();
  return ToGrpc(status);
}

}  // namespace baton::testing
