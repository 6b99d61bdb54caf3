#include "client/lib/watch.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <utility>

#include "baton/v1/migrations.grpc.pb.h"

namespace baton::client {
namespace {

// Whether a stream that ended like this is worth resuming. An orderly end (OK) is batond shutting down.
bool WorthResuming(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kFailedPrecondition:
      return false;
    default:
      return true;
  }
}

}  // namespace

struct MigrationWatch::Call {
  grpc::ClientContext context;
};

MigrationWatch::MigrationWatch(Client* client, std::string name, int64_t start_revision)
    : client_(client), name_(std::move(name)), revision_(start_revision), thread_([this] { Run(); }) {}

MigrationWatch::~MigrationWatch() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    if (call_) call_->context.TryCancel();
  }
  wake_.notify_all();
  thread_.join();
}

bool MigrationWatch::Pause(Duration duration) {
  std::unique_lock<std::mutex> lock(mutex_);
  return !wake_.wait_for(lock, duration, [this] { return stopping_; });
}

absl::Status MigrationWatch::RunStream(bool* connected) {
  grpc::ClientContext* context = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) return absl::CancelledError("stopped");
    call_ = std::make_unique<Call>();
    context = &call_->context;
  }
  // No deadline: a watch lasts as long as its user wants. A dead server is noticed by keep-alive pings.
  v1::Migrations::Stub stub(client_->channel());
  v1::WatchMigrationsRequest request;
  request.set_name(name_);
  request.set_start_revision(revision_);
  auto reader = stub.WatchMigrations(context, request);
  auto announce = [&] {
    if (!*connected) events_.Push(WatchEvent{WatchEvent::Kind::kResumed, {}, 0, {}});
    *connected = true;
  };
  v1::WatchMigrationsResponse response;
  // Headers arrive when the server has accepted the call, which may be long before the next change.
  if (!*connected) {
    reader->WaitForInitialMetadata();
    if (client_->channel()->GetState(false) == GRPC_CHANNEL_READY) announce();
  }
  int64_t start = revision_;
  while (reader->Read(&response)) {
    announce();
    // A server that repeats what the start revision already covers must not make it appear twice. Present
    // states (after a start at 0) may share revisions or come unsorted.
    if (start != 0 && response.revision() <= revision_) continue;
    revision_ = std::max(revision_, response.revision());
    WatchEvent event;
    event.revision = response.revision();
    event.migration.Swap(response.mutable_migration());
    events_.Push(std::move(event));
  }
  absl::Status status = StatusOfCall(reader->Finish(), client_->options().server);
  std::lock_guard<std::mutex> lock(mutex_);
  call_.reset();
  return status;
}

void MigrationWatch::Run() {
  constexpr Duration kFirst = std::chrono::milliseconds(50);
  constexpr Duration kLongest = std::chrono::seconds(2);
  Duration backoff = kFirst;
  bool connected = true;
  while (true) {
    absl::Status status = RunStream(&connected);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
    }
    if (status.code() == absl::StatusCode::kOutOfRange && revision_ != 0) {
      revision_ = 0;
      events_.Push(WatchEvent{WatchEvent::Kind::kRestarted, {}, 0, status});
      continue;
    }
    if (!status.ok() && !WorthResuming(status)) {
      events_.Push(WatchEvent{WatchEvent::Kind::kEnded, {}, 0, status});
      return;
    }
    if (connected) {
      backoff = kFirst;
      events_.Push(WatchEvent{WatchEvent::Kind::kDisconnected, {}, 0, status});
    }
    connected = false;
    if (!Pause(backoff)) return;
    backoff = std::min(backoff * 2, kLongest);
  }
}

}  // namespace baton::client
