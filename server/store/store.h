// Where batond keeps its records: ordered keys with values, atomic batches, one revision a commit, and a log
// of changes that watches resume from. The shape is that of etcd, so that it can stand behind this interface
// beside SQLite.
//
// Keys: migrations/{id}, control/{id}, requests/{id}, vms/{id}, hosts/{id}, policies/{id},
// events/{vm}.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"

namespace baton::server {

// One key's present value.
struct Item {
  std::string key;
  std::string value;
  int64_t revision = 0;  // of the commit that last wrote it
};

// Writes that become durable together or not at all.
class Batch {
 public:
  struct Write {
    std::string key;
    std::optional<std::string> value;  // absent: delete
  };
  Batch& Put(std::string key, std::string value) {
    writes_.push_back({std::move(key), std::move(value)});
    return *this;
  }
  Batch& Delete(std::string key) {
    writes_.push_back({std::move(key), std::nullopt});
    return *this;
  }
  const std::vector<Write>& writes() const { return writes_; }
  bool empty() const { return writes_.empty(); }

 private:
  std::vector<Write> writes_;
};

// One entry of the change log.
struct Change {
  int64_t revision = 0;
  std::string key;
  std::optional<std::string> value;  // absent: deleted
};

// Used from one thread at a time. No call waits for anything but the disk (or the network, for etcd).
class Store {
 public:
  virtual ~Store() = default;

  // Durable when it returns OK; the value is the new revision, one above the last. ResourceExhausted when the
  // disk is full; nothing of the batch is then kept. An empty batch is InvalidArgument.
  virtual absl::StatusOr<int64_t> Commit(const Batch& batch) = 0;
  // NotFound if there is none.
  virtual absl::StatusOr<Item> Get(const std::string& key) = 0;
  // Up to `limit` items whose key starts with `prefix`, in ascending order (or descending, with `reverse`),
  // strictly behind `after` in that order (empty: from the beginning).
  virtual absl::StatusOr<std::vector<Item>> Scan(const std::string& prefix, const std::string& after,
                                                 int limit, bool reverse = false) = 0;
  // Every item whose key starts with `prefix`, in ascending order, until `take` fails. `take` must not write
  // what it is still to be given.
  absl::Status ForEach(const std::string& prefix, const std::function<absl::Status(const Item&)>& take);
  // Up to `limit` logged changes of keys under `prefix` with a revision above `after`, in order. Only keys
  // under migrations/ are logged. OutOfRange if changes above `after` were compacted away, or `after` lies in
  // the future.
  virtual absl::StatusOr<std::vector<Change>> Changes(const std::string& prefix, int64_t after,
                                                      int limit) = 0;
  // Of the last commit; 0 in a new store.
  virtual int64_t Revision() = 0;
};

inline constexpr char kLoggedPrefix[] = "migrations/";

}  // namespace baton::server
