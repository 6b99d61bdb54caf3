#include "agent/migration/journal.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "tests/temp_dir.h"

namespace baton::migration {
namespace {

using K = JournalRecord::Kind;

class JournalTest : public testing::Test {
 protected:
  void WriteThree() {
    auto journal = Journal::Open(path_);
    ASSERT_TRUE(journal.ok()) << journal.status();
    for (const JournalRecord& record : kThree) ASSERT_TRUE((*journal)->Append(record).ok());
  }
  void Damage(uint64_t at, const std::string& bytes) {
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(at));
    file << bytes;
  }

  const std::vector<JournalRecord> kThree = {
      {K::kOwner, 1, ""}, {K::kYielded, 1, "m1"}, {K::kReleased, 1, "m1"}};
  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  const std::string path_ = dir_ + "/journal";
};

TEST_F(JournalTest, ReplaysWhatWasAppended) {
  WriteThree();
  auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok()) << journal.status();
  EXPECT_EQ((*journal)->Records(), kThree);
  EXPECT_EQ((*journal)->Latest(), kThree.back());
  EXPECT_EQ((*journal)->dropped_bytes(), 0u);
  const JournalRecord more{K::kIncoming, 2, std::string(Journal::kMaxMigrationId, 'x')};
  ASSERT_TRUE((*journal)->Append(more).ok());
  EXPECT_EQ(Journal::Read(path_)->back(), more);
}

TEST_F(JournalTest, SecondOpenerIsTurnedAway) {
  auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok());
  EXPECT_EQ(Journal::Open(path_).status().code(), absl::StatusCode::kFailedPrecondition);
  journal->reset();
  EXPECT_TRUE(Journal::Open(path_).ok());
}

TEST_F(JournalTest, OpenerWithTimeWaitsForTheHolder) {
  auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok());
  EXPECT_EQ(Journal::Open(path_, Deadline::After(std::chrono::milliseconds(50))).status().code(),
            absl::StatusCode::kFailedPrecondition);
  std::thread holder([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    journal->reset();
  });
  auto next = Journal::Open(path_, Deadline::After(std::chrono::seconds(60)));
  EXPECT_TRUE(next.ok()) << next.status();
  holder.join();
}

TEST_F(JournalTest, TornTailIsDroppedAtEveryLength) {
  for (uint64_t size = 3 * Journal::kSlotSize; size < 4 * Journal::kSlotSize; size += 37) {
    std::filesystem::remove(path_);
    WriteThree();
    std::filesystem::resize_file(path_, size);
    auto journal = Journal::Open(path_);
    ASSERT_TRUE(journal.ok()) << size << journal.status();
    EXPECT_EQ((*journal)->Records().size(), 2u);
    EXPECT_EQ((*journal)->dropped_bytes(), size - 3 * Journal::kSlotSize);
    ASSERT_TRUE((*journal)->Append(kThree[2]).ok());
    EXPECT_EQ(*Journal::Read(path_), kThree);
  }
}

TEST_F(JournalTest, ExtendedButUnwrittenTailIsDropped) {
  WriteThree();
  std::filesystem::resize_file(path_, 6 * Journal::kSlotSize + 11);
  auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok()) << journal.status();
  EXPECT_EQ((*journal)->Records(), kThree);
}

TEST_F(JournalTest, TornCreationStartsEmpty) {
  for (size_t size : {0, 1, 100, 511, 512, 700}) {
    std::ofstream(path_, std::ios::trunc) << std::string(size, '\0');
    auto journal = Journal::Open(path_);
    ASSERT_TRUE(journal.ok()) << size << journal.status();
    EXPECT_TRUE((*journal)->Records().empty());
  }
}

TEST_F(JournalTest, AnyFlippedBitOfAWholeRecordIsDataLossAndNothingIsTouched) {
  for (uint64_t at = 0; at < 4 * Journal::kSlotSize; at += 61) {
    std::filesystem::remove(path_);
    WriteThree();
    std::ifstream file(path_, std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(file)), {});
    Damage(at, std::string(1, static_cast<char>(bytes[at] ^ 0x10)));
    const bool in_unused_header = at >= 12 && at < 504;
    auto opened = Journal::Open(path_);
    EXPECT_EQ(opened.status().code(), absl::StatusCode::kDataLoss) << at << " " << in_unused_header;
    EXPECT_EQ(std::filesystem::file_size(path_), 4 * Journal::kSlotSize);
  }
}

TEST_F(JournalTest, RecordCopiedElsewhereIsDataLoss) {
  WriteThree();
  std::ifstream file(path_, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(file)), {});
  Damage(2 * 512, bytes.substr(3 * 512, 512));
  EXPECT_EQ(Journal::Open(path_).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(JournalTest, AFileThatIsNoJournalIsNotOverwritten) {
  std::ofstream(path_) << std::string(1024, 'x');
  EXPECT_EQ(Journal::Open(path_).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(JournalTest, MissingDirectoryNamesThePath) {
  auto journal = Journal::Open(dir_ + "/no/such/journal");
  EXPECT_EQ(journal.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(journal.status()), v1::STATE_WRITE_FAILED);
  EXPECT_NE(Message(journal.status()).find(dir_), std::string::npos);
  EXPECT_EQ(Journal::Read(path_).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(JournalTest, OverlongIdIsRefused) {
  auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok());
  EXPECT_EQ((*journal)->Append({K::kOwner, 1, std::string(Journal::kMaxMigrationId + 1, 'x')}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE((*journal)->Append({K::kOwner, 1, ""}).ok());
}

TEST_F(JournalTest, UndecidedMigrationIsRefusedBeforeTheAnswer) {
  auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok());
  ASSERT_TRUE((*journal)->Append({K::kIncoming, 4, "m1"}).ok());
  auto verdict = DecideVerdict(**journal, "m1");
  ASSERT_TRUE(verdict.ok()) << verdict.status();
  EXPECT_EQ(verdict->verdict, v1::REFUSED);
  EXPECT_EQ((*journal)->Latest(), (JournalRecord{K::kRefused, 4, "m1"}));
  EXPECT_EQ(DecideVerdict(**journal, "m1")->verdict, v1::REFUSED);
  EXPECT_EQ((*journal)->Records().size(), 2u) << "decided once";
}

TEST_F(JournalTest, DecidedMigrationIsAnsweredFromHistory) {
  auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok());
  for (const JournalRecord& record :
       std::vector<JournalRecord>{{K::kIncoming, 4, "m1"}, {K::kOwner, 5, "m1"}})
    ASSERT_TRUE((*journal)->Append(record).ok());
  EXPECT_EQ(DecideVerdict(**journal, "m1")->verdict, v1::OWNER);
  EXPECT_EQ(DecideVerdict(**journal, "m2").status().code(), absl::StatusCode::kFailedPrecondition);
}

// A file system of two pages, so that it is full soon.
class TinyDisk {
 public:
  explicit TinyDisk(const std::string& dir) : dir_(dir) {
    mounted_ = mount("tmpfs", dir.c_str(), "tmpfs", 0, "size=8k,mode=0700") == 0;
  }
  ~TinyDisk() {
    if (mounted_) umount2(dir_.c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }
  void ReadOnly() { ASSERT_EQ(mount(nullptr, dir_.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr), 0); }

 private:
  std::string dir_;
  bool mounted_;
};

TEST_F(JournalTest, FullDiskIsToldAndLeavesTheJournalUsable) {
  TinyDisk disk(dir_);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a tmpfs needs root";
  auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok()) << journal.status();
  std::ofstream(dir_ + "/filler") << std::string(4096, 'x');
  absl::Status status;
  size_t written = 0;
  while (written < 100 && (status = (*journal)->Append({K::kOwner, ++written, ""})).ok()) {
  }
  EXPECT_EQ(written, 8u) << "one page holds the header and seven records";
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(status), v1::STATE_WRITE_FAILED);
  EXPECT_NE(Message(status).find("disk under the state directory is full"), std::string::npos) << status;
  EXPECT_TRUE((*journal)->certainly_absent());
  EXPECT_TRUE((*journal)->Repair().ok());
  EXPECT_EQ((*journal)->Reserve(4).code(), absl::StatusCode::kResourceExhausted);
  std::filesystem::remove(dir_ + "/filler");
  EXPECT_TRUE((*journal)->Append({K::kOwner, 100, ""}).ok());
  journal->reset();
  EXPECT_EQ(Journal::Read(path_)->size(), 8u);
}

TEST_F(JournalTest, ReservedRoomOutlivesAFullDisk) {
  TinyDisk disk(dir_);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a tmpfs needs root";
  auto journal = Journal::Open(path_);
  ASSERT_TRUE(journal.ok()) << journal.status();
  ASSERT_TRUE((*journal)->Reserve(15).ok());
  std::ofstream(dir_ + "/filler") << std::string(4096, 'x');
  for (uint64_t i = 1; i <= 15; ++i) ASSERT_TRUE((*journal)->Append({K::kOwner, i, ""}).ok()) << i;
  EXPECT_EQ((*journal)->Append({K::kOwner, 16, ""}).code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(JournalTest, ReadOnlyFileSystemIsPermissionDenied) {
  TinyDisk disk(dir_);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a tmpfs needs root";
  disk.ReadOnly();
  auto journal = Journal::Open(path_);
  EXPECT_EQ(journal.status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(ReasonOf(journal.status()), v1::STATE_WRITE_FAILED);
}

TEST_F(JournalTest, UnwritableDirectoryIsPermissionDenied) {
  if (getuid() != 0) GTEST_SKIP() << "needs root to become somebody else";
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (setuid(65534) != 0) _exit(9);
    const absl::Status status = Journal::Open(path_).status();
    _exit(status.code() == absl::StatusCode::kPermissionDenied && ReasonOf(status) == v1::STATE_WRITE_FAILED
              ? 0
              : 1);
  }
  int result = 0;
  ASSERT_EQ(waitpid(child, &result, 0), child);
  EXPECT_TRUE(WIFEXITED(result) && WEXITSTATUS(result) == 0);
}

}  // namespace
}  // namespace baton::migration
