#include "agent/vhost/dirty_log.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <atomic>
#include <thread>

namespace baton::vhost {
namespace {

class Writer {
 public:
  explicit Writer(const DirtyLog& log) : size_(log.size()) {
    map_ = static_cast<uint8_t*>(::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, log.fd(), 0));
  }
  ~Writer() { ::munmap(map_, size_); }
  // As libvhost-user and DPDK do: the page's byte is ORed.
  void Mark(uint64_t gpa) {
    uint64_t page = gpa / 4096;
    __atomic_or_fetch(&map_[page / 8], static_cast<uint8_t>(1u << page % 8), __ATOMIC_RELEASE);
  }
  uint8_t At(uint64_t byte) const { return map_[byte]; }

 private:
  uint64_t size_;
  uint8_t* map_;
};

TEST(DirtyLog, SizeForFourGibibytesIs128KibiBytes) {
  EXPECT_EQ(DirtyLog::WordsFor(0xffffffff) * 8, 131072u);
  auto log = DirtyLog::Create(0xffffffff);
  ASSERT_TRUE(log.ok()) << log.status();
  EXPECT_EQ((*log)->size(), 131072u);
  EXPECT_EQ((*log)->size() % 8, 0u);
  EXPECT_TRUE((*log)->Covers(0xffffffff));
  EXPECT_FALSE((*log)->Covers(0x100000000));
}

TEST(DirtyLog, PageIsTheBitThatTheSpecificationNames) {
  auto log = DirtyLog::Create(0x1fffffff);
  Writer writer(**log);
  writer.Mark(0x12345000);
  EXPECT_EQ(writer.At(0x2468), 0x20);
  std::vector<uint64_t> words;
  (*log)->Take(words);
  EXPECT_EQ(words[0x12345 / 64], uint64_t{1} << (0x12345 % 64));
  EXPECT_EQ(writer.At(0x2468), 0);
}

TEST(DirtyLog, CannotBeShrunkByTheBackend) {
  auto log = DirtyLog::Create(0xfffff);
  EXPECT_NE(::ftruncate((*log)->fd(), 0), 0);
}

TEST(DirtyLog, MarksWholePagesAcrossWordsAndNothingBeyondItsEnd) {
  auto log = DirtyLog::Create(0xfffff);  // 256 pages
  (*log)->Mark(62 * 4096 + 4095, 4096 * 68);
  (*log)->Mark(255 * 4096, ~uint64_t{0});
  (*log)->Mark(uint64_t{1} << 40, 4096);
  (*log)->Mark(0, 0);
  std::vector<uint64_t> words;
  (*log)->Take(words);
  ASSERT_EQ(words.size(), 4u);
  EXPECT_EQ(words[0], uint64_t{3} << 62);
  EXPECT_EQ(words[1], ~uint64_t{0});
  EXPECT_EQ(words[2], 7u);
  EXPECT_EQ(words[3], uint64_t{1} << 63);
}

TEST(DirtyLog, AbsurdSizeIsRefused) { EXPECT_FALSE(DirtyLog::Create(~uint64_t{0}).ok()); }

TEST(DirtyLog, EveryMarkIsTakenOnceWhileWritersRun) {
  auto log = DirtyLog::Create(0xfffffff);
  constexpr uint64_t kPages = 0x10000;
  std::atomic<bool> done{false};
  std::thread writer([&] {
    Writer w(**log);
    for (uint64_t page = 0; page < kPages; ++page) w.Mark(page * 4096);
    done = true;
  });
  std::vector<uint64_t> all;
  uint64_t taken = 0;
  for (bool last = false; !last;) {
    last = done;
    std::vector<uint64_t> words;
    (*log)->Take(words);
    for (uint64_t word : words) taken += static_cast<uint64_t>(__builtin_popcountll(word));
  }
  writer.join();
  EXPECT_EQ(taken, kPages);
}

}  // namespace
}  // namespace baton::vhost
