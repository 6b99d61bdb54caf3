#include "server/api/watch.h"

#include <deque>

#include "server/control/filter.h"
#include "server/names.h"

namespace baton::server {
namespace {

constexpr int kReadAhead = 64;

class Watch : public grpc::ServerWriteReactor<v1::WatchMigrationsResponse> {
 public:
  Watch(ApiContext api, Controller& controller, v1::WatchMigrationsRequest request, absl::Status allowed)
      : api_(api), controller_(controller), request_(std::move(request)), allowed_(std::move(allowed)) {}

  // gRPC's threads only pass the word on; everything below Begin() happens on the loop. `alive_` keeps the
  // reactor until the last task that refers to it has run, which OnDone alone would not.
  void Start(std::shared_ptr<Watch> self) {
    alive_ = std::move(self);
    api_.loop.Post([this, self = alive_] { Begin(); });
  }
  void OnSendInitialMetadataDone(bool ok) override { OnWriteDone(ok); }
  void OnWriteDone(bool ok) override {
    api_.loop.Post([this, ok, self = alive_] {
      writing_ = false;
      if (!ok) End(absl::CancelledError("the reader went away"));
      ended_ ? Leave() : Pump();
    });
  }
  void OnCancel() override {
    api_.loop.Post([this, self = alive_] { End(absl::CancelledError("cancelled")); });
  }
  void OnDone() override {
    // The last task on the loop lets go of the object.
    api_.loop.Post([self = std::move(alive_)] {});
  }

 private:
  void Begin() {
    if (ended_) return;
    if (!allowed_.ok()) return End(allowed_);
    if (!request_.name().empty()) {
      auto id = ParseName(request_.name(), "migrations", "name");
      if (!id.ok()) return End(id.status());
      id_ = *id;
    }
    if (request_.start_revision() < 0) return End(InvalidField("start_revision", "is negative"));
    if (absl::Status status = request_.start_revision() > 0 ? Resume() : Snapshot(); !status.ok())
      return End(status);
    subscription_ = controller_.Subscribe([this] { Pump(); });
    // At once, so that a client knows that it is connected before the next change comes.
    writing_ = true;
    StartSendInitialMetadata();
  }

  absl::Status Resume() {
    after_ = request_.start_revision();
    return controller_.Changes(id_, after_, 1).status();
  }

  absl::Status Snapshot() {
    after_ = controller_.revision();
    std::vector<v1::Migration> present;
    if (!id_.empty()) {
      ASSIGN_OR_RETURN(v1::Migration migration, controller_.Get(id_));
      present.push_back(std::move(migration));
    } else {
      std::string last;
      do {
        ASSIGN_OR_RETURN(Controller::Page page, controller_.List(MigrationFilter(), last, 1000));
        std::move(page.migrations.begin(), page.migrations.end(), std::back_inserter(present));
        last = page.last;
      } while (!last.empty());
    }
    // Oldest change first, so that revisions rise on the stream and any of them is a place to resume from.
    std::sort(present.begin(), present.end(),
              [](const auto& a, const auto& b) { return a.revision() < b.revision(); });
    for (v1::Migration& migration : present) {
      v1::WatchMigrationsResponse response;
      response.set_revision(migration.revision());
      *response.mutable_migration() = std::move(migration);
      queue_.push_back(std::move(response));
    }
    return absl::OkStatus();
  }

  void Pump() {
    if (ended_ || writing_) return;
    if (queue_.empty()) {
      auto changes = controller_.Changes(id_, after_, kReadAhead);
      if (!changes.ok()) return End(changes.status());
      for (auto& change : *changes) {
        after_ = change.revision();
        queue_.push_back(std::move(change));
      }
      // Nothing of ours up to here: a later compaction of others' changes must not cut this stream off.
      if (changes->empty()) after_ = controller_.revision();
    }
    if (queue_.empty()) return;
    current_ = std::move(queue_.front());
    queue_.pop_front();
    writing_ = true;
    StartWrite(&current_);
  }

  void End(const absl::Status& status) {
    if (ended_) return;
    ended_ = true;
    status_ = status;
    if (subscription_ != 0) controller_.Unsubscribe(subscription_);
    api_.metrics.ApiCall("WatchMigrations", static_cast<int>(status.code()));
    Leave();
  }
  // A write that is out comes back first.
  void Leave() {
    if (writing_ || finished_) return;
    finished_ = true;
    Finish(ToGrpc(status_));
  }

  ApiContext api_;
  Controller& controller_;
  const v1::WatchMigrationsRequest request_;
  const absl::Status allowed_;
  std::shared_ptr<Watch> alive_;  // until OnDone
  // The loop's.
  std::string id_;
  int64_t after_ = 0;  // changes up to here are queued or sent
  std::deque<v1::WatchMigrationsResponse> queue_;
  v1::WatchMigrationsResponse current_;
  bool writing_ = false;   // a message, or the headers
  bool ended_ = false;     // status_ says how
  bool finished_ = false;  // Finish was called
  absl::Status status_;
  uint64_t subscription_ = 0;
};

}  // namespace

grpc::ServerWriteReactor<v1::WatchMigrationsResponse>* StartWatch(ApiContext api, const Caller& caller,
                                                                  Controller& controller,
                                                                  const v1::WatchMigrationsRequest& request) {
  auto watch = std::make_shared<Watch>(api, controller, request, Require(caller, Role::kViewer));
  watch->Start(watch);
  return watch.get();
}

}  // namespace baton::server
