// Follows WatchMigrations across restarts of batond, resuming from the last revision it saw.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "tests/integration/server/batond_harness.h"

namespace baton::test {

// Thread-safe.
class Watcher {
 public:
  Watcher(std::shared_ptr<grpc::Channel> channel, std::string name)
      : stub_(v1::Migrations::NewStub(channel)),
        channel_(channel),
        name_(std::move(name)),
        thread_([this] { Run(); }) {}
  ~Watcher() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      if (context_) context_->TryCancel();
    }
    thread_.join();
  }
  // Waits for a change that satisfies the condition; the last one seen if none comes within 90 s.
  v1::Migration Await(const std::function<bool(const v1::Migration&)>& condition) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(90),
                      [&] { return !seen_.empty() && condition(seen_.back().migration()); });
    return seen_.empty() ? v1::Migration() : seen_.back().migration();
  }
  v1::Migration AwaitPhase(v1::Phase phase) {
    return Await([phase](const v1::Migration& m) { return m.phase() == phase; });
  }
  std::vector<v1::WatchMigrationsResponse> seen() const {
    std::lock_guard lock(mutex_);
    return seen_;
  }

 private:
  void Run() {
    while (true) {
      grpc::ClientContext context;
      context.set_wait_for_ready(true);
      v1::WatchMigrationsRequest request;
      {
        std::lock_guard lock(mutex_);
        if (stopping_) return;
        context_ = &context;
        request.set_name(name_);
        if (!seen_.empty()) request.set_start_revision(seen_.back().revision());
      }
      auto stream = stub_->WatchMigrations(&context, request);
      v1::WatchMigrationsResponse response;
      while (stream->Read(&response)) {
        std::lock_guard lock(mutex_);
        seen_.push_back(response);
        changed_.notify_all();
      }
      grpc::Status status = stream->Finish();
      std::lock_guard lock(mutex_);
      context_ = nullptr;
    }
  }

  std::unique_ptr<v1::Migrations::Stub> stub_;
  std::shared_ptr<grpc::Channel> channel_;
  const std::string name_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<v1::WatchMigrationsResponse> seen_;
  bool stopping_ = false;
  grpc::ClientContext* context_ = nullptr;
  std::thread thread_;
};

}  // namespace baton::test
