// A batond without agents: the public services over a state that the test scripts. For tests of the client.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "baton/v1/fleet.grpc.pb.h"
#include "baton/v1/migrations.grpc.pb.h"
#include "baton/v1/policies.grpc.pb.h"
#include "common/status.h"

namespace baton::testing {

// Any thread. The state survives Stop and Start, as batond's store does.
class FakeBatond {
 public:
  // Listens on "unix:/path" or "127.0.0.1:0".
  explicit FakeBatond(std::string address);
  ~FakeBatond();

  void Start();
  // Breaks every stream, as a killed server would.
  void Stop();
  // What clients dial.
  std::string target() const;

  void PutHost(const v1::Host& host);
  void PutVm(const v1::Vm& vm);
  void PutPolicy(const v1::Policy& policy);
  // Records a change: gives it the next revision and tells the watchers. Answers the revision.
  int64_t PutMigration(v1::Migration migration);
  v1::Migration GetMigration(const std::string& name);
  // Revisions up to this one are compacted away.
  void Compact(int64_t revision);
  // Sends this change to the next watcher a second time when it resumes: a server that is not careful.
  void RepeatOnResume() { repeat_on_resume_ = true; }

  // The next call of `method` ("GetHost") fails with `status`; several are used up in order.
  void FailNext(const std::string& method, const absl::Status& status);
  // CreateMigration answers with this instead of a QUEUED record (name, revision and request are filled in).
  void AnswerCreateWith(const v1::Migration& migration);

  // Requests seen, in text form: "CreateMigration { … }".
  std::vector<std::string> requests();
  // Blocks until `count` watches were opened in all, or two minutes are over.
  bool WaitForWatches(int count);
  int watches();

 private:
  class FleetService;
  class MigrationsService;
  class PoliciesService;

  // Notes the request; an injected error, if there is one.
  grpc::Status Enter(const std::string& method, const google::protobuf::Message& request);

  const std::string address_;
  int port_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  // All guarded by mutex_.
  bool stopping_ = false;
  bool repeat_on_resume_ = false;
  int watches_ = 0;
  int64_t revision_ = 0;
  int64_t compacted_ = 0;
  int created_ = 0;
  std::map<std::string, v1::Host> hosts_;
  std::map<std::string, v1::Vm> vms_;
  std::map<std::string, v1::Policy> policies_;
  std::map<std::string, v1::Migration> migrations_;
  std::vector<v1::WatchMigrationsResponse> history_;
  std::map<std::string, std::string> by_request_id_;
  std::map<std::string, std::deque<absl::Status>> errors_;
  std::unique_ptr<v1::Migration> create_answer_;
  std::vector<std::string> requests_;

  std::unique_ptr<FleetService> fleet_;
  std::unique_ptr<MigrationsService> migrations_service_;
  std::unique_ptr<PoliciesService> policies_service_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace baton::testing
