// Guest memory of huge pages, which hugetlbfs gives: a file that can be mapped and read, and not written with
// write(2).
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "agent/vhost/memory_table.h"

namespace baton::vhost {
namespace {

constexpr char kPool[] = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
constexpr uint64_t kHugePage = 2 << 20;

// The host's pool with so many pages more, as long as it lives.
class MorePages {
 public:
  explicit MorePages(long count) : more_(Change(count)) {}
  ~MorePages() { Change(-more_); }
  long more() const { return more_; }

 private:
  // By how many it has changed.
  static long Change(long by) {
    UniqueFd lock(::open(kPool, O_RDONLY | O_CLOEXEC));
    // Another test may be at it.
    if (!lock || ::flock(lock.get(), LOCK_EX) != 0) return 0;
    const long before = Read();
    std::ofstream(kPool) << before + by;
    return Read() - before;
  }
  static long Read() {
    long pages = 0;
    std::ifstream(kPool) >> pages;
    return pages;
  }

  long more_;
};

TEST(HugePages, GuestMemoryIsReadAndWritten) {
  MorePages pages(2);
  ASSERT_EQ(pages.more(), 2) << "this host gives no huge pages (" << kPool << ")";
  // Of the default size, which is 2 MiB on x86.
  UniqueFd fd(::memfd_create("memory", MFD_CLOEXEC | MFD_HUGETLB));
  ASSERT_EQ(::ftruncate(fd.get(), 2 * kHugePage), 0);
  MemoryTable table;
  std::vector<UniqueFd> fds;
  fds.push_back(std::move(fd));
  // As QEMU cuts it: the region begins in the middle of a page of its file.
  ASSERT_TRUE(
      table.Replace({{0xc0000, 2 * kHugePage - 0xc0000, 0x7f0000000000, 0xc0000}}, std::move(fds)).ok());
  const uint64_t at = kHugePage - 3;
  EXPECT_EQ(table.Write(at, "hello", 5), absl::OkStatus());
  char text[6] = {};
  EXPECT_EQ(table.Read(at, text, 5), absl::OkStatus());
  EXPECT_STREQ(text, "hello");
}

}  // namespace
}  // namespace baton::vhost
