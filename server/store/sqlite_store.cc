#include "server/store/sqlite_store.h"

#include <fcntl.h>
#include <sqlite3.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <system_error>

#include "common/log.h"

namespace baton::server {
namespace {

constexpr int kSchemaVersion = 1;
// "bato": marks the file as ours (SQLite's application_id).
constexpr int kApplicationId = 0x6261746f;

constexpr char kSchema[] = R"(
CREATE TABLE IF NOT EXISTS items(key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS changes(revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB, PRIMARY KEY(revision, key));
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, number INTEGER NOT NULL);
INSERT OR IGNORE INTO meta VALUES('revision', 0), ('compacted', 0);
)";

// The first key behind every key with this prefix; prefixes here end in '/', so no carry is needed.
std::string EndOf(std::string prefix) {
  ++prefix.back();
  return prefix;
}

}  // namespace

// A prepared statement; reset after each use.
class SqliteStore::Statement {
 public:
  Statement() = default;
  Statement(const Statement&) = delete;
  Statement& operator=(const Statement&) = delete;
  ~Statement() { sqlite3_finalize(statement_); }
  int Prepare(sqlite3* db, const char* sql) {
    return sqlite3_prepare_v3(db, sql, -1, SQLITE_PREPARE_PERSISTENT, &statement_, nullptr);
  }
  // Binds live until the statement is reset, so the caller's strings must.
  void Bind(int index, const std::string& text) {
    sqlite3_bind_text64(statement_, index, text.data(), text.size(), SQLITE_STATIC, SQLITE_UTF8);
  }
  void BindBlob(int index, const std::string& blob) {
    // A null pointer would bind NULL even with a length of 0.
    sqlite3_bind_blob64(statement_, index, blob.empty() ? "" : blob.data(), blob.size(), SQLITE_STATIC);
  }
  void Bind(int index, int64_t number) { sqlite3_bind_int64(statement_, index, number); }
  void BindNull(int index) { sqlite3_bind_null(statement_, index); }
  int Step() { return sqlite3_step(statement_); }
  std::string Text(int column) const {
    auto* data = static_cast<const char*>(sqlite3_column_blob(statement_, column));
    return data ? std::string(data, sqlite3_column_bytes(statement_, column)) : std::string();
  }
  bool IsNull(int column) const { return sqlite3_column_type(statement_, column) == SQLITE_NULL; }
  int64_t Number(int column) const { return sqlite3_column_int64(statement_, column); }
  void Reset() {
    sqlite3_reset(statement_);
    sqlite3_clear_bindings(statement_);
  }

 private:
  sqlite3_stmt* statement_ = nullptr;
};

// Resets a statement when a use of it ends, also on an error.
class SqliteStore::Use {
 public:
  explicit Use(Statement& statement) : statement_(statement) {}
  ~Use() { statement_.Reset(); }
  Statement* operator->() { return &statement_; }

 private:
  Statement& statement_;
};

struct SqliteStore::Statements {
  Statement put, erase, log, get, scan, scan_back, changes, set_meta, compact;
};

SqliteStore::SqliteStore() : sql_(std::make_unique<Statements>()) {}

SqliteStore::~SqliteStore() {
  sql_.reset();
  if (db_) sqlite3_close(db_);
}

absl::Status SqliteStore::Problem(int code, const char* what) const {
  std::string detail = db_ ? sqlite3_errmsg(db_) : sqlite3_errstr(code);
  switch (code & 0xff) {
    case SQLITE_FULL:
      return Error(v1::STATE_WRITE_FAILED, absl::StatusCode::kResourceExhausted,
                   "store {}: {}: the disk is full; free space, then try again", path_, what);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return Error(
          v1::STATE_WRITE_FAILED, absl::StatusCode::kDataLoss,
          "store {}: {}: {}; the file is damaged or not a store of batond: restore it from a backup, or "
          "move it away to start empty",
          path_, what, detail);
    case SQLITE_CANTOPEN:
    case SQLITE_READONLY:
    case SQLITE_PERM:
      return Error(v1::STATE_WRITE_FAILED, absl::StatusCode::kPermissionDenied,
                   "store {}: {}: {}; check owner and mode of the directory and its files", path_, what,
                   detail);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return Error(v1::STATE_WRITE_FAILED, absl::StatusCode::kUnavailable,
                   "store {}: {}: {}; another program has it open", path_, what, detail);
    case SQLITE_IOERR:
      return Error(v1::STATE_WRITE_FAILED, absl::StatusCode::kResourceExhausted, "store {}: {}: {} ({})",
                   path_, what, detail, sqlite3_errstr(code));
    default:
      return Error(v1::STATE_WRITE_FAILED, absl::StatusCode::kInternal, "store {}: {}: {}", path_, what,
                   detail);
  }
}

absl::Status SqliteStore::Execute(const char* sql, const char* what) {
  int code = sqlite3_exec(db_, sql, nullptr, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : Problem(sqlite3_extended_errcode(db_), what);
}

absl::StatusOr<std::unique_ptr<SqliteStore>> SqliteStore::Open(const SqliteOptions& options) {
  std::error_code error;
  const std::string& directory = options.directory;
  if (!std::filesystem::exists(directory, error)) {
    std::filesystem::create_directories(directory, error);
    if (error)
      return ErrnoError(error.value(), fmt::format("cannot create the data directory {}", directory));
    ::chmod(directory.c_str(), 0700);
  }
  auto store = std::unique_ptr<SqliteStore>(new SqliteStore());
  store->path_ = directory + "/baton.db";
  store->log_length_ = std::max<int64_t>(options.log_length, 10);

  std::string lock_path = directory + "/lock";
  store->lock_ = UniqueFd(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!store->lock_) {
    return ErrnoError(errno, fmt::format("the data directory {} is not writable: {}", directory, lock_path));
  }
  if (::flock(store->lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return ErrnoError(errno, "cannot lock " + lock_path);
    return Error(absl::StatusCode::kAlreadyExists, "the data directory {} is in use by another batond",
                 directory);
  }

  // The records hold tokens of migrations under way.
  mode_t old_mask = ::umask(0077);
  int code = sqlite3_open_v2(store->path_.c_str(), &store->db_,
                             SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, nullptr);
  absl::Status status = code == SQLITE_OK ? store->Prepare() : store->Problem(code, "cannot be opened");
  ::umask(old_mask);
  RETURN_IF_ERROR(status);
  return store;
}

absl::Status SqliteStore::Prepare() {
  sqlite3_extended_result_codes(db_, 1);
  auto number = [&](const char* sql) -> absl::StatusOr<int64_t> {
    Statement query;
    if (int code = query.Prepare(db_, sql); code != SQLITE_OK) return Problem(code, "cannot be read");
    int code = query.Step();
    if (code != SQLITE_ROW) return Problem(code, "cannot be read");
    return query.Number(0);
  };
  RETURN_IF_ERROR(Execute("PRAGMA locking_mode=EXCLUSIVE"));
  ASSIGN_OR_RETURN(int64_t version, number("PRAGMA user_version"));
  ASSIGN_OR_RETURN(int64_t application, number("PRAGMA application_id"));
  ASSIGN_OR_RETURN(int64_t pages, number("PRAGMA page_count"));
  if (pages > 0 && application != kApplicationId && !(application == 0 && version == 0)) {
    return Error(absl::StatusCode::kDataLoss, "store {}: this is a database of another program", path_);
  }
  if (version > kSchemaVersion) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "store {}: written by a newer batond (schema {}, this one knows {}); start that version",
                 path_, version, kSchemaVersion);
  }
  RETURN_IF_ERROR(Execute("PRAGMA journal_mode=WAL"));
  RETURN_IF_ERROR(Execute("PRAGMA synchronous=FULL"));
  if (pages > 0) {
    Statement check;
    if (int code = check.Prepare(db_, "PRAGMA quick_check(1)"); code != SQLITE_OK) {
      return Problem(code, "cannot be checked");
    }
    int code = check.Step();
    if (code != SQLITE_ROW) return Problem(code, "cannot be checked");
    if (check.Text(0) != "ok") {
      return Error(
          absl::StatusCode::kDataLoss,
          "store {}: the file is damaged ({}); restore it from a backup, or move it away to start empty",
          path_, check.Text(0));
    }
  }
  RETURN_IF_ERROR(Execute("BEGIN IMMEDIATE"));
  RETURN_IF_ERROR(Execute(kSchema));
  RETURN_IF_ERROR(Execute(fmt::format("PRAGMA application_id={}", kApplicationId).c_str()));
  RETURN_IF_ERROR(Execute(fmt::format("PRAGMA user_version={}", kSchemaVersion).c_str()));
  RETURN_IF_ERROR(Execute("COMMIT"));
  ASSIGN_OR_RETURN(revision_, number("SELECT number FROM meta WHERE name='revision'"));
  ASSIGN_OR_RETURN(compacted_, number("SELECT number FROM meta WHERE name='compacted'"));

  struct {
    Statement& statement;
    const char* sql;
  } const statements[] = {
      {sql_->put, "INSERT INTO items VALUES(?1,?2,?3) ON CONFLICT(key) DO UPDATE SET value=?2, revision=?3"},
      {sql_->erase, "DELETE FROM items WHERE key=?1"},
      {sql_->log, "INSERT OR REPLACE INTO changes VALUES(?1,?2,?3)"},
      {sql_->get, "SELECT key,value,revision FROM items WHERE key=?1"},
      {sql_->scan, "SELECT key,value,revision FROM items WHERE key>?1 AND key<?2 ORDER BY key LIMIT ?3"},
      {sql_->scan_back,
       "SELECT key,value,revision FROM items WHERE key>?1 AND key<?2 ORDER BY key DESC LIMIT ?3"},
      {sql_->changes,
       "SELECT revision,key,value FROM changes WHERE revision>?1 AND key>=?2 AND key<?3 ORDER BY "
       "revision,key LIMIT ?4"},
      {sql_->set_meta, "UPDATE meta SET number=?2 WHERE name=?1"},
      {sql_->compact, "DELETE FROM changes WHERE revision<=?1"},
  };
  for (const auto& [statement, sql] : statements) {
    if (int code = statement.Prepare(db_, sql); code != SQLITE_OK) return Problem(code, "cannot be used");
  }
  return absl::OkStatus();
}

absl::Status SqliteStore::WriteBatch(const Batch& batch, int64_t revision) {
  auto run = [&](Use& use) {
    int code = use->Step();
    return code == SQLITE_DONE ? absl::OkStatus() : Problem(code, "cannot be written");
  };
  for (const Batch::Write& write : batch.writes()) {
    if (write.value) {
      Use put(sql_->put);
      put->Bind(1, write.key);
      put->BindBlob(2, *write.value);
      put->Bind(3, revision);
      RETURN_IF_ERROR(run(put));
    } else {
      Use erase(sql_->erase);
      erase->Bind(1, write.key);
      RETURN_IF_ERROR(run(erase));
    }
    if (write.key.rfind(kLoggedPrefix, 0) != 0) continue;
    Use log(sql_->log);
    log->Bind(1, revision);
    log->Bind(2, write.key);
    if (write.value) {
      log->BindBlob(3, *write.value);
    } else {
      log->BindNull(3);
    }
    RETURN_IF_ERROR(run(log));
  }
  Use meta(sql_->set_meta);
  const std::string name = "revision";
  meta->Bind(1, name);
  meta->Bind(2, revision);
  return run(meta);
}

absl::Status SqliteStore::Compact(int64_t upto) {
  {
    Use compact(sql_->compact);
    compact->Bind(1, upto);
    if (int code = compact->Step(); code != SQLITE_DONE) return Problem(code, "cannot be compacted");
  }
  Use meta(sql_->set_meta);
  const std::string name = "compacted";
  meta->Bind(1, name);
  meta->Bind(2, upto);
  int code = meta->Step();
  return code == SQLITE_DONE ? absl::OkStatus() : Problem(code, "cannot be compacted");
}

absl::Status SqliteStore::CommitOnce(const Batch& batch, int64_t revision, int64_t compact_to) {
  RETURN_IF_ERROR(Execute("BEGIN IMMEDIATE", "cannot be written"));
  absl::Status status = WriteBatch(batch, revision);
  if (status.ok() && compact_to > 0) status = Compact(compact_to);
  if (status.ok()) status = Execute("COMMIT", "cannot be written");
  // Some errors (a full disk among them) have rolled the transaction back already.
  if (!status.ok() && !sqlite3_get_autocommit(db_)) sqlite3_exec(db_, "ROLLBACK", nullptr, nullptr, nullptr);
  return status;
}

absl::StatusOr<int64_t> SqliteStore::Commit(const Batch& batch) {
  if (batch.empty()) return absl::InvalidArgumentError("an empty batch");
  int64_t revision = revision_ + 1;
  // Revisions count commits, so this bounds the log by commits; hosts and VMs change seldom.
  int64_t compact_to = revision - log_length_;
  if (compact_to - compacted_ < std::max<int64_t>(log_length_ / 10, 1)) compact_to = 0;
  absl::Status status = CommitOnce(batch, revision, compact_to);
  if (status.code() == absl::StatusCode::kResourceExhausted) {
    // The write-ahead log may be what fills the disk; merged into the database it starts from nothing.
    sqlite3_exec(db_, "PRAGMA wal_checkpoint(TRUNCATE)", nullptr, nullptr, nullptr);
    status = CommitOnce(batch, revision, compact_to);
  }
  RETURN_IF_ERROR(status);
  revision_ = revision;
  if (compact_to > 0) compacted_ = compact_to;
  return revision;
}

absl::StatusOr<Item> SqliteStore::Get(const std::string& key) {
  Use get(sql_->get);
  get->Bind(1, key);
  int code = get->Step();
  if (code == SQLITE_DONE) return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "{} does not exist", key);
  if (code != SQLITE_ROW) return Problem(code, "cannot be read");
  return Item{get->Text(0), get->Text(1), get->Number(2)};
}

absl::StatusOr<std::vector<Item>> SqliteStore::Scan(const std::string& prefix, const std::string& after,
                                                    int limit, bool reverse) {
  std::string low = prefix, high = EndOf(prefix);
  if (!after.empty()) {
    if (reverse) {
      high = std::min(high, after);
    } else {
      low = std::max(low, after);
    }
  }
  Use scan(reverse ? sql_->scan_back : sql_->scan);
  scan->Bind(1, low);
  scan->Bind(2, high);
  scan->Bind(3, static_cast<int64_t>(limit));
  std::vector<Item> items;
  int code;
  while ((code = scan->Step()) == SQLITE_ROW)
    items.push_back({scan->Text(0), scan->Text(1), scan->Number(2)});
  if (code != SQLITE_DONE) return Problem(code, "cannot be read");
  return items;
}

absl::StatusOr<std::vector<Change>> SqliteStore::Changes(const std::string& prefix, int64_t after,
                                                         int limit) {
  if (after < compacted_) {
    return Error(
        absl::StatusCode::kOutOfRange,
        "changes after revision {} were compacted away (the log begins after {}); list, then watch from the "
        "list's revision",
        after, compacted_);
  }
  if (after > revision_) {
    return Error(
        absl::StatusCode::kOutOfRange,
        "revision {} lies in the future (the store is at {}); list, then watch from the list's revision",
        after, revision_);
  }
  // A full key as prefix means exactly that key.
  bool exact = !prefix.empty() && prefix.back() != '/';
  std::string high = exact ? prefix + '\0' : EndOf(prefix);
  Use query(sql_->changes);
  query->Bind(1, after);
  query->Bind(2, prefix);
  query->Bind(3, high);
  query->Bind(4, static_cast<int64_t>(limit));
  std::vector<Change> changes;
  int code;
  while ((code = query->Step()) == SQLITE_ROW) {
    Change change{query->Number(0), query->Text(1), std::nullopt};
    if (!query->IsNull(2)) change.value = query->Text(2);
    changes.push_back(std::move(change));
  }
  if (code != SQLITE_DONE) return Problem(code, "cannot be read");
  return changes;
}

absl::Status SqliteStore::TEST_LimitGrowth(int pages) {
  Statement count;
  if (count.Prepare(db_, "PRAGMA page_count") != SQLITE_OK || count.Step() != SQLITE_ROW) {
    return absl::InternalError("page_count");
  }
  return Execute(fmt::format("PRAGMA max_page_count={}", count.Number(0) + pages).c_str());
}

}  // namespace baton::server
