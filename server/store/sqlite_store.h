// The default store: one SQLite file in WAL mode with synchronous=FULL, so that a commit that returned is on
// the disk.
#pragma once

#include <memory>
#include <string>

#include "common/fd.h"
#include "server/store/store.h"

struct sqlite3;

namespace baton::server {

struct SqliteOptions {
  // Created if absent (mode 0700). Holds baton.db and a lock file against a second batond.
  std::string directory;
  // Changes kept for watches; older ones are compacted away, a tenth at a time.
  int64_t log_length = 20'000;
};

class SqliteStore : public Store {
 public:
  // Each error names the path and what to do: PermissionDenied, AlreadyExists (another batond uses the
  // directory), DataLoss (the file is damaged or not ours), FailedPrecondition (written by a newer version),
  // ResourceExhausted.
  static absl::StatusOr<std::unique_ptr<SqliteStore>> Open(const SqliteOptions& options);
  ~SqliteStore() override;

  absl::StatusOr<int64_t> Commit(const Batch& batch) override;
  absl::StatusOr<Item> Get(const std::string& key) override;
  absl::StatusOr<std::vector<Item>> Scan(const std::string& prefix, const std::string& after, int limit,
                                         bool reverse) override;
  absl::StatusOr<std::vector<Change>> Changes(const std::string& prefix, int64_t after, int limit) override;
  int64_t Revision() override { return revision_; }

  // The file may not grow beyond its present size plus `pages`; SQLite then answers as it does on a full
  // disk.
  absl::Status TEST_LimitGrowth(int pages);

 private:
  class Statement;
  class Use;
  struct Statements;
  SqliteStore();
  absl::Status Prepare();
  absl::Status Execute(const char* sql, const char* what = "cannot be set up");
  absl::Status Problem(int code, const char* what) const;
  // compact_to 0: nothing to compact.
  absl::Status CommitOnce(const Batch& batch, int64_t revision, int64_t compact_to);
  absl::Status WriteBatch(const Batch& batch, int64_t revision);
  absl::Status Compact(int64_t upto);

  std::string path_;                 // constant after Open
  int64_t log_length_ = 0;           // constant after Open
  UniqueFd lock_;                    // held while open
  sqlite3* db_ = nullptr;            // owned
  std::unique_ptr<Statements> sql_;  // prepared statements of db_
  int64_t revision_ = 0;
  int64_t compacted_ = 0;  // changes up to here are gone
};

}  // namespace baton::server
