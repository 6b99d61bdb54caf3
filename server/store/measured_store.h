// A store that times its commits and counts its failures.
#pragma once

#include <memory>
#include <utility>

#include "common/clock.h"
#include "server/metrics.h"
#include "server/store/store.h"

namespace baton::server {

class MeasuredStore : public Store {
 public:
  MeasuredStore(std::unique_ptr<Store> store, ServerMetrics& metrics)
      : store_(std::move(store)), metrics_(metrics) {}

  absl::StatusOr<int64_t> Commit(const Batch& batch) override {
    int64_t start = MonotonicNs();
    auto result = store_->Commit(batch);
    metrics_.store_commit_seconds->Observe(static_cast<double>(MonotonicNs() - start) * 1e-9);
    if (!result.ok()) metrics_.store_errors->Increment();
    return result;
  }
  absl::StatusOr<Item> Get(const std::string& key) override { return store_->Get(key); }
  absl::StatusOr<std::vector<Item>> Scan(const std::string& prefix, const std::string& after, int limit,
                                         bool reverse) override {
    return store_->Scan(prefix, after, limit, reverse);
  }
  absl::StatusOr<std::vector<Change>> Changes(const std::string& prefix, int64_t after, int limit) override {
    return store_->Changes(prefix, after, limit);
  }
  int64_t Revision() override { return store_->Revision(); }

 private:
  std::unique_ptr<Store> store_;
  ServerMetrics& metrics_;
};

}  // namespace baton::server
