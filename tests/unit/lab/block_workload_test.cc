// The judge of the lab guest: every kind of wrong a disk can do is found, and an honest disk is not accused.
#include "tests/lab/vm/block_workload.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <deque>
#include <map>
#include <random>

#include "tests/lab/vm/memory_workload.h"

namespace baton::lab {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kRam = 8 << 20;

Ram MakeRam() {
  UniqueFd fd(::memfd_create("ram", MFD_CLOEXEC));
  EXPECT_EQ(::ftruncate(fd.get(), kRam), 0);
  auto ram = Ram::Open(fmt::format("/proc/self/fd/{}", fd.get()), kRam);
  EXPECT_TRUE(ram.ok()) << ram.status();
  return *std::move(ram);
}

// A disk in memory, honest unless told otherwise.
class FakeDisk : public QueuePort {
 public:
  struct Request {
    uint32_t queue, tag;
    std::vector<Piece> pieces;
  };
  FakeDisk(const Ram& ram, uint64_t blocks) : ram_(ram), image_(blocks * kBlockSize) {}

  bool Submit(uint32_t queue, uint32_t tag, std::span<const Piece> pieces) override {
    if (flight.size() >= depth) return false;
    flight.push_back({queue, tag, {pieces.begin(), pieces.end()}});
    return true;
  }
  void Kick(uint32_t) override {}

  // Carries a request out; returns bytes written to the guest.
  uint32_t Execute(const Request& request) {
    struct Header {
      uint32_t type, reserved;
      uint64_t sector;
    };
    const Header header = *ram_.At<Header>(request.pieces[0].gpa);
    uint32_t written = 1;
    if (header.type == 0 || header.type == 1) {
      uint8_t* at = image_.data() + header.sector * 512;
      uint8_t* data = ram_.At<uint8_t>(request.pieces[1].gpa);
      if (header.type == 0) std::memcpy(data, at, kBlockSize);
      if (header.type == 1) std::memcpy(at, data, kBlockSize);
      if (header.type == 0) written += kBlockSize;
    }
    *ram_.At<uint8_t>(request.pieces.back().gpa) = 0;
    return written;
  }
  bool IsWrite(const Request& request) const { return *ram_.At<uint32_t>(request.pieces[0].gpa) == 1; }
  uint64_t BlockOfRequest(const Request& request) const {
    return *ram_.At<uint64_t>(request.pieces[0].gpa + 8) / (kBlockSize / 512);
  }
  uint8_t* block(uint64_t number) { return image_.data() + number * kBlockSize; }

  std::deque<Request> flight;
  size_t depth = 64;

 private:
  const Ram& ram_;
  std::vector<uint8_t> image_;
};

class BlockWorkloadTest : public ::testing::Test {
 protected:
  BlockWorkloadTest() { Make({}); }
  void Make(WorkloadOptions options) {
    options.blocks = 64;
    setup_.options = options;
    setup_.queues = 2;
    disk_ = std::make_unique<FakeDisk>(ram_, options.blocks);
    work_ = std::make_unique<BlockWorkload>(ram_, 0x10000, setup_, *disk_,
                                            [this](const std::string& what) { errors_ += what + "\n"; });
    work_->Boot(0x1234);
  }
  // Carries the oldest request out and completes it.
  FakeDisk::Request Step() {
    if (disk_->flight.empty()) work_->Issue(++now_);
    FakeDisk::Request request = disk_->flight.front();
    disk_->flight.pop_front();
    Complete(request, disk_->Execute(request));
    return request;
  }
  void Complete(const FakeDisk::Request& request, uint32_t written) {
    work_->Complete(request.queue, request.tag, written, ++now_);
    work_->Issue(now_);
  }
  // Steps until the next request is a write, and takes it out of the queue.
  FakeDisk::Request NextWrite() {
    for (work_->Issue(++now_); !disk_->IsWrite(disk_->flight.front());) Step();
    FakeDisk::Request request = disk_->flight.front();
    disk_->flight.pop_front();
    return request;
  }
  std::string Verify() {
    work_->BeginVerify();
    work_->Issue(++now_);
    for (int i = 0; i < 10000 && !work_->Verified() && !disk_->flight.empty(); ++i) Step();
    EXPECT_TRUE(work_->Verified());
    return errors_;
  }

  const Ram ram_ = MakeRam();
  BlockWorkload::Setup setup_;
  std::unique_ptr<FakeDisk> disk_;
  std::unique_ptr<BlockWorkload> work_;
  std::string errors_;
  int64_t now_ = 0;
};

TEST_F(BlockWorkloadTest, AnHonestDiskIsNotAccused) {
  for (int i = 0; i < 2000; ++i) Step();
  EXPECT_GT(work_->counters().writes, 300u);
  EXPECT_GT(work_->counters().flushes, 2u);
  EXPECT_THAT(Verify(), IsEmpty());
  work_->GoOn();
  for (int i = 0; i < 100; ++i) Step();
  EXPECT_THAT(Verify(), IsEmpty());
}

TEST_F(BlockWorkloadTest, OutOfOrderCompletionsAndAFullQueueAreInOrder) {
  WorkloadOptions options;
  options.writers = 6;
  Make(options);
  disk_->depth = 4;
  std::mt19937 random(7);
  for (int i = 0; i < 3000; ++i) {
    if (disk_->flight.empty()) work_->Issue(++now_);
    std::swap(disk_->flight.front(), disk_->flight[random() % disk_->flight.size()]);
    Step();
  }
  EXPECT_THAT(Verify(), IsEmpty());
}

TEST_F(BlockWorkloadTest, ALostWriteIsFound) {
  for (int i = 0; i < 300; ++i) Step();
  FakeDisk::Request request = NextWrite();
  *ram_.At<uint8_t>(request.pieces.back().gpa) = 0;  // "done", and nothing was
  Complete(request, 1);
  EXPECT_THAT(Verify(), HasSubstr("lost"));
}

TEST_F(BlockWorkloadTest, AnOldWriteThatIsCarriedOutAgainIsFound) {
  for (int i = 0; i < 300; ++i) Step();
  FakeDisk::Request request = NextWrite();
  const uint64_t number = disk_->BlockOfRequest(request);
  Complete(request, disk_->Execute(request));
  std::vector<uint8_t> old(disk_->block(number), disk_->block(number) + kBlockSize);
  const uint64_t newest = reinterpret_cast<Block*>(disk_->block(number))->sequence;
  for (int i = 0; i < 300; ++i) Step();
  ASSERT_NE(reinterpret_cast<Block*>(disk_->block(number))->sequence, newest)
      << "a hot block is written often";
  std::copy(old.begin(), old.end(), disk_->block(number));
  EXPECT_THAT(Verify(), HasSubstr("repeated"));
}

TEST_F(BlockWorkloadTest, ATornWriteIsFound) {
  for (int i = 0; i < 300; ++i) Step();
  FakeDisk::Request request = NextWrite();
  const uint64_t number = disk_->BlockOfRequest(request);
  std::vector<uint8_t> old(disk_->block(number), disk_->block(number) + kBlockSize);
  const uint32_t written = disk_->Execute(request);
  std::copy(old.begin() + 2048, old.end(), disk_->block(number) + 2048);
  Complete(request, written);
  EXPECT_THAT(Verify(), HasSubstr("torn"));
}

TEST_F(BlockWorkloadTest, SwappedWritesAreFound) {
  for (int i = 0; i < 300; ++i) Step();
  std::vector<uint8_t> first(disk_->block(0), disk_->block(0) + kBlockSize);
  std::copy_n(disk_->block(1), kBlockSize, disk_->block(0));
  std::copy(first.begin(), first.end(), disk_->block(1));
  EXPECT_THAT(Verify(), HasSubstr("another block"));
}

TEST_F(BlockWorkloadTest, ASecondCompletionIsFound) {
  for (int i = 0; i < 20; ++i) Step();
  work_->Issue(++now_);
  FakeDisk::Request request = disk_->flight.front();
  disk_->flight.pop_front();
  const uint32_t written = disk_->Execute(request);
  work_->Complete(request.queue, request.tag, written, ++now_);
  // The writer's next request was made with the same tag; that one is completed, and then nothing is under
  // way.
  work_->Complete(request.queue, request.tag ^ 1, 1, ++now_);
  EXPECT_THAT(errors_, HasSubstr("not under way"));
  work_->Complete(request.queue ^ 1, request.tag, 1, ++now_);
  work_->Complete(0, 4711, 1, ++now_);
  EXPECT_EQ(work_->counters().errors, 3u);
}

TEST_F(BlockWorkloadTest, ACompletionWithoutItsEffectIsFound) {
  FakeDisk::Request request = NextWrite();
  // The status byte was not written.
  Complete(request, 1);
  EXPECT_THAT(errors_, HasSubstr("status 0xee"));
  EXPECT_EQ(work_->counters().writes, 0u) << "it is not acknowledged, and written again";
}

TEST_F(BlockWorkloadTest, ALateWriteToAReadBufferIsFound) {
  for (int i = 0; i < 300; ++i) Step();
  // A read is carried out, completed, and carried out once more by somebody who was thought to be gone.
  for (work_->Issue(++now_);
       disk_->flight.front().pieces.size() != 3 || disk_->IsWrite(disk_->flight.front());)
    Step();
  FakeDisk::Request request = disk_->flight.front();
  disk_->flight.pop_front();
  const uint32_t written = disk_->Execute(request);
  std::vector<FakeDisk::Request> others(disk_->flight.begin(), disk_->flight.end());
  work_->Complete(request.queue, request.tag, written, ++now_);
  std::memcpy(ram_.At<uint8_t>(request.pieces[1].gpa), disk_->block(0), kBlockSize);
  for (int i = 0; i < 50; ++i) Step();
  // What the next read of this writer finds in its buffer is either its own data or the late write.
  std::memcpy(ram_.At<uint8_t>(request.pieces[1].gpa), disk_->block(0), kBlockSize);
  for (int i = 0; i < 50; ++i) Step();
  EXPECT_THAT(errors_, HasSubstr("when no read was under way"));
}

TEST_F(BlockWorkloadTest, ARequestThatIsNeverCompletedIsFound) {
  for (int i = 0; i < 20; ++i) Step();
  work_->Issue(now_);
  disk_->flight.pop_front();
  work_->FindLost(now_ + 1000000, 2000000);
  EXPECT_THAT(errors_, IsEmpty());
  work_->FindLost(now_ + 3000000, 2000000);
  EXPECT_THAT(errors_, HasSubstr("was not completed"));
  // Said once.
  const std::string before = errors_;
  work_->FindLost(now_ + 4000000, 2000000);
  EXPECT_EQ(std::count(errors_.begin(), errors_.end(), '\n'), std::count(before.begin(), before.end(), '\n'));
}

TEST_F(BlockWorkloadTest, OverlappingWritesInTheWrongOrderAreFound) {
  WorkloadOptions options;
  options.overlap = 2;
  Make(options);
  for (int i = 0; i < 500; ++i) Step();
  EXPECT_THAT(errors_, IsEmpty()) << "in order they are in order";
  // The same with each pair of requests for one block swapped.
  for (int i = 0; i < 50; ++i) {
    work_->Issue(++now_);
    if (disk_->flight.size() >= 2 && disk_->flight[0].tag / 2 == disk_->flight[1].tag / 2)
      std::swap(disk_->flight[0], disk_->flight[1]);
    Step();
  }
  EXPECT_THAT(errors_, HasSubstr("overlapping writes in the wrong order"));
}

TEST_F(BlockWorkloadTest, AnotherObjectGoesOnFromGuestMemory) {
  for (int i = 0; i < 123; ++i) Step();
  const uint64_t digest = work_->Digest(), writes = work_->counters().writes;
  auto next = std::make_unique<BlockWorkload>(ram_, 0x10000, setup_, *disk_,
                                              [this](const std::string& what) { errors_ += what + "\n"; });
  ASSERT_TRUE(next->Check().ok());
  EXPECT_EQ(next->Digest(), digest);
  work_ = std::move(next);
  work_->Resumed(now_);
  for (int i = 0; i < 200; ++i) Step();
  EXPECT_GT(work_->counters().writes, writes);
  EXPECT_THAT(Verify(), IsEmpty());
  setup_.options.writers = 3;
  BlockWorkload other(ram_, 0x10000, setup_, *disk_, nullptr);
  EXPECT_FALSE(other.Check().ok());
}

TEST(MemoryWorkloadTest, APageOfAnOlderGenerationIsFound) {
  const Ram ram = MakeRam();
  WorkloadOptions options;
  options.pages = 16;
  options.dirty = 100000;
  options.live = 64 << 10;
  options.freed = 64 << 10;
  std::string errors;
  MemoryWorkload memory(ram, 0x10000, options, [&](const std::string& what) { errors += what + "\n"; });
  memory.Boot();
  memory.Issue(1);
  for (int64_t now = 1000; now < 20000; now += 1000) memory.Issue(now);
  EXPECT_GT(memory.writes(), 500u);
  memory.Verify();
  EXPECT_THAT(errors, IsEmpty());
  // A page that stayed behind: the table says generation n, the page shows n - 1.
  uint64_t* page = ram.At<uint64_t>(0x10000 + 4096);
  std::vector<uint64_t> old(page, page + 512);
  for (int64_t now = 20000; now < 40000; now += 1000) memory.Issue(now);
  std::copy(old.begin(), old.end(), page);
  memory.Verify();
  EXPECT_THAT(errors, HasSubstr("memory page 0"));
  errors.clear();
  *ram.At<uint64_t>(memory.freed_gpa()) = 0;  // of no interest
  ram.At<uint64_t>(memory.freed_gpa() - 4096)[7] ^= 1;
  memory.Verify();
  EXPECT_THAT(errors, HasSubstr("live memory"));
}

}  // namespace
}  // namespace baton::lab
