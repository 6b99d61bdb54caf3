// Every migration of the fleet: creates records, runs a Machine for each, commits what it says before doing
// what it says, admits queued ones under the limits, and answers the API. Belongs to the event loop.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "baton/v1/migrations.pb.h"
#include "server/control/filter.h"
#include "server/control/machine.h"
#include "server/control/policies.h"
#include "server/event_loop.h"
#include "server/fleet/fleet.h"
#include "server/metrics.h"
#include "server/schedule/limits.h"
#include "server/store/store.h"

namespace baton::server {

struct ControllerOptions {
  ScheduleLimits limits;
  MachineTimes times;
  // Ended migrations kept; the oldest go first.
  size_t history = 10'000;
  // Changes of figures alone are committed at most this often for each migration.
  Duration progress_interval = std::chrono::milliseconds(250);
  // How long a dry run samples the dirty rate.
  Duration dirty_sample = std::chrono::seconds(1);
};

class Controller : public FleetObserver {
 public:
  // All outlive the controller.
  Controller(EventLoop& loop, Store& store, Fleet& fleet, Policies& policies, ServerMetrics& metrics,
             const ControllerOptions& options);
  ~Controller() override;
  // Takes up every migration that has not settled.
  absl::Status Load();

  using Callback = std::function<void(absl::StatusOr<v1::Migration>)>;
  // Answers at once, except for a dry run.
  void Create(const v1::CreateMigrationRequest& request, Callback callback);
  absl::StatusOr<v1::Migration> Get(const std::string& id);
  struct Page {
    std::vector<v1::Migration> migrations;
    std::string last;  // id to go on behind; empty at the end
    int64_t revision = 0;
  };
  // Newest first, behind id `after`.
  absl::StatusOr<Page> List(const MigrationFilter& filter, const std::string& after, size_t limit);
  absl::StatusOr<v1::Migration> Cancel(const std::string& id);
  absl::StatusOr<v1::Migration> Retune(const std::string& id, const v1::RetuneCommand& retune);
  absl::StatusOr<v1::Migration> Resolve(const std::string& id, bool fenced);

  // For watches. Changes above `after` in order; of one migration if `id` is not empty.
  absl::StatusOr<std::vector<v1::WatchMigrationsResponse>> Changes(const std::string& id, int64_t after,
                                                                   int limit);
  int64_t revision() { return store_.Revision(); }
  // `wake` is called on the loop after each change; the number ends it.
  uint64_t Subscribe(std::function<void()> wake);
  void Unsubscribe(uint64_t number);

  // FleetObserver
  void OnHostUp(const std::string& host, const v1::Hello& hello) override;
  void OnHostDown(const std::string& host) override;
  void OnVmEnded(const std::string& host, const std::string& vm, const std::string& how) override;
  void OnReport(const std::string& host, const v1::SideReport& report) override;
  void OnVm(const std::string& vm) override;
  std::string MigrationOf(const std::string& vm) const override;
  // Told of every VM that the fleet hears of, on the loop; set once.
  void SetVmListener(std::function<void(const std::string& vm)> listener) {
    vm_listener_ = std::move(listener);
  }

 private:
  struct Entry {
    std::string id, vm, source, destination;  // ids
    Machine machine;
    bool unsaved = false;  // the machine is ahead of the store
    Actions held;          // to do once it is saved
    Clock::time_point last_commit;
    std::optional<EventLoop::TimerId> tick, flush;
    bool public_dirty = false, control_dirty = false;
    bool refused = false;  // by the store, which is asked again at the flush
  };
  struct DryRun;

  static absl::StatusOr<v1::Migration> FromValue(const std::string& value, int64_t revision);
  Now Time() const;
  // Applies an event; what follows from it is done once it is stored. A store that fails is tried again.
  void Apply(Entry& entry, const Event& event, bool may_wait = false);
  // For callers that want to know: a store that fails leaves everything as it was.
  absl::Status TryApply(Entry& entry, const Event& event);
  absl::Status Save(Entry& entry, const Machine& machine, bool public_changed, bool control_changed,
                    const Batch* more = nullptr);
  void Flush(Entry& entry);
  void Perform(Entry& entry, Actions actions);
  void AfterSave(Entry& entry, v1::Phase before);
  void ArmTick(Entry& entry);
  void Schedule();
  void Prune();
  Entry& Add(const std::string& id, Machine machine);
  void Connect(Entry& entry);
  absl::StatusOr<v1::Migration> Plan(const v1::Migration& wanted);
  void RunDry(v1::Migration migration, Callback callback);
  Entry* Find(const std::string& id);
  absl::StatusOr<Entry*> FindActive(const std::string& id);

  EventLoop& loop_;
  Store& store_;
  Fleet& fleet_;
  Policies& policies_;
  ServerMetrics& metrics_;
  ControllerOptions options_;
  std::map<std::string, std::unique_ptr<Entry>> entries_;  // not settled, by id: oldest first
  std::map<std::string, std::string> busy_;                // VM id → id of its migration that has not ended
  std::deque<std::string> ended_;                          // ids, oldest first
  std::map<uint64_t, std::function<void()>> subscribers_;
  uint64_t next_subscriber_ = 1;
  std::function<void(const std::string& vm)> vm_listener_;
  int64_t last_id_ms_ = 0;
  double last_rate_ = 0;  // bytes a second of the last migration that told one; for forecasts
  bool scheduling_ = false;
};

}  // namespace baton::server
