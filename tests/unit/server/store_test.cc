// The SQLite store: durability, revisions, the log of changes, and what it says when it cannot be used.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "server/store/sqlite_store.h"
#include "tests/temp_dir.h"

namespace baton::server {
namespace {

class StoreTest : public ::testing::Test {
 protected:
  absl::Status Open(int64_t log_length = 1000) {
    store_.reset();
    auto store = SqliteStore::Open({dir_, log_length});
    if (!store.ok()) return store.status();
    store_ = *std::move(store);
    return absl::OkStatus();
  }
  int64_t Put(const std::string& key, const std::string& value) {
    auto revision = store_->Commit(Batch().Put(key, value));
    EXPECT_TRUE(revision.ok()) << revision.status();
    return revision.value_or(-1);
  }
  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  std::unique_ptr<SqliteStore> store_;
};

TEST_F(StoreTest, KeepsValuesAndRevisionsAcrossReopening) {
  ASSERT_TRUE(Open().ok());
  EXPECT_EQ(store_->Revision(), 0);
  EXPECT_EQ(Put("vms/a", "1"), 1);
  EXPECT_EQ(Put("vms/a", std::string("\0binary\xff", 8)), 2);
  ASSERT_TRUE(Open().ok());
  EXPECT_EQ(store_->Revision(), 2);
  auto item = store_->Get("vms/a");
  ASSERT_TRUE(item.ok());
  EXPECT_EQ(item->value, std::string("\0binary\xff", 8));
  EXPECT_EQ(item->revision, 2);
  EXPECT_EQ(store_->Get("vms/b").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(StoreTest, ABatchIsOneRevision) {
  ASSERT_TRUE(Open().ok());
  Put("vms/old", "x");
  auto revision = store_->Commit(Batch().Put("vms/a", "1").Put("hosts/b", "").Delete("vms/old"));
  ASSERT_TRUE(revision.ok());
  EXPECT_EQ(*revision, 2);
  EXPECT_EQ(store_->Get("vms/a")->revision, 2);
  EXPECT_EQ(store_->Get("hosts/b")->value, "");
  EXPECT_FALSE(store_->Get("vms/old").ok());
  EXPECT_EQ(store_->Commit(Batch()).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(StoreTest, ScansAPrefixBothWays) {
  ASSERT_TRUE(Open().ok());
  for (const char* key : {"vms/a", "vms/b", "vms/c", "vmsx/d", "vm/e", "hosts/f"}) Put(key, key);
  auto keys = [&](const std::string& after, int limit, bool reverse) {
    std::string text;
    auto items = store_->Scan("vms/", after, limit, reverse);
    EXPECT_TRUE(items.ok());
    for (const Item& item : *items) text += item.key.substr(4);
    return text;
  };
  EXPECT_EQ(keys("", 10, false), "abc");
  EXPECT_EQ(keys("vms/a", 10, false), "bc");
  EXPECT_EQ(keys("", 2, false), "ab");
  EXPECT_EQ(keys("", 10, true), "cba");
  EXPECT_EQ(keys("vms/c", 1, true), "b");
}

TEST_F(StoreTest, LogsChangesOfMigrationsInOrder) {
  ASSERT_TRUE(Open().ok());
  Put("migrations/a", "1");
  Put("vms/x", "not logged");
  Put("migrations/b", "2");
  Put("migrations/a", "3");
  ASSERT_TRUE(store_->Commit(Batch().Delete("migrations/b")).ok());
  ASSERT_TRUE(Open().ok());
  auto all = store_->Changes("migrations/", 0, 100);
  ASSERT_TRUE(all.ok());
  ASSERT_EQ(all->size(), 4u);
  EXPECT_EQ((*all)[0].revision, 1);
  EXPECT_EQ((*all)[1].revision, 3);
  EXPECT_EQ(*(*all)[2].value, "3");
  EXPECT_FALSE((*all)[3].value.has_value());
  EXPECT_EQ(store_->Changes("migrations/", 3, 100)->size(), 2u);
  EXPECT_EQ(store_->Changes("migrations/", 0, 2)->size(), 2u);
  EXPECT_EQ(store_->Changes("migrations/a", 0, 100)->size(), 2u);
  EXPECT_TRUE(store_->Changes("migrations/", 5, 100)->empty());
  EXPECT_EQ(store_->Changes("migrations/", 6, 100).status().code(), absl::StatusCode::kOutOfRange);
}

TEST_F(StoreTest, CompactionBoundsTheLogAndIsSaid) {
  ASSERT_TRUE(Open(20).ok());
  for (int i = 0; i < 100; ++i) Put("migrations/a", std::to_string(i));
  absl::Status status = store_->Changes("migrations/", 10, 100).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
  EXPECT_NE(Message(status).find("list, then watch"), std::string::npos);
  auto kept = store_->Changes("migrations/", 80, 100);
  ASSERT_TRUE(kept.ok()) << kept.status();
  EXPECT_EQ(kept->size(), 20u);
  ASSERT_TRUE(Open(20).ok());
  EXPECT_FALSE(store_->Changes("migrations/", 10, 100).ok());
}

TEST_F(StoreTest, AFullDiskIsSaidAndNothingOfTheBatchIsKept) {
  ASSERT_TRUE(Open().ok());
  Put("vms/a", "small");
  ASSERT_TRUE(store_->TEST_LimitGrowth(2).ok());
  absl::Status status =
      store_->Commit(Batch().Put("vms/a", "changed").Put("vms/big", std::string(1 << 20, 'x'))).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_NE(Message(status).find("disk is full"), std::string::npos);
  EXPECT_EQ(ReasonOf(status), v1::STATE_WRITE_FAILED);
  EXPECT_EQ(store_->Get("vms/a")->value, "small");
  EXPECT_EQ(store_->Revision(), 1);
  // Space is back: it goes on without a reopening.
  ASSERT_TRUE(store_->TEST_LimitGrowth(100'000).ok());
  EXPECT_EQ(Put("vms/a", "changed"), 2);
}

TEST_F(StoreTest, TwoBatondsDoNotShareADirectory) {
  ASSERT_TRUE(Open().ok());
  absl::Status status = SqliteStore::Open({dir_, 100}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_NE(Message(status).find("another batond"), std::string::npos);
}

TEST_F(StoreTest, ADamagedFileIsSaidWithItsPath) {
  ASSERT_TRUE(Open().ok());
  for (int i = 0; i < 200; ++i) Put("vms/" + std::to_string(i), std::string(200, 'x'));
  store_.reset();
  std::filesystem::remove(dir_ + "/baton.db-wal");
  {
    std::fstream file(dir_ + "/baton.db", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(4096);
    file << std::string(16384, '\x5a');
  }
  absl::Status status = Open();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_NE(Message(status).find("baton.db"), std::string::npos);
  EXPECT_NE(Message(status).find("backup"), std::string::npos);
}

TEST_F(StoreTest, AFileThatIsNoDatabaseIsSaid) {
  std::ofstream(dir_ + "/baton.db")
      << "this is not a database, whatever its name says, and long enough for a header "
         "that SQLite would look at";
  EXPECT_EQ(Open().code(), absl::StatusCode::kDataLoss);
}

TEST_F(StoreTest, AnUnwritableDirectoryIsSaid) {
  // A path below a file cannot be made by anyone, root included.
  std::ofstream(dir_ + "/file") << "x";
  absl::Status status = SqliteStore::Open({dir_ + "/file/data", 100}).status();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(Message(status).find(dir_ + "/file/data"), std::string::npos) << status;
  if (::geteuid() == 0) return;  // root may write everywhere
  ::chmod(dir_.c_str(), 0500);
  status = SqliteStore::Open({dir_, 100}).status();
  ::chmod(dir_.c_str(), 0700);
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_NE(Message(status).find("not writable"), std::string::npos);
}

TEST_F(StoreTest, AStoreOfANewerVersionIsLeftAlone) {
  ASSERT_TRUE(Open().ok());
  store_.reset();
  ASSERT_EQ(std::system(("sqlite3 " + dir_ + "/baton.db 'PRAGMA user_version=99' 2>/dev/null").c_str()), 0);
  absl::Status status = Open();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(Message(status).find("newer"), std::string::npos);
}

TEST_F(StoreTest, RecordsAreForTheirOwnerOnly) {
  ASSERT_TRUE(Open().ok());
  struct stat info {};
  ASSERT_EQ(::stat((dir_ + "/baton.db").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 077, 0u);
}

}  // namespace
}  // namespace baton::server
