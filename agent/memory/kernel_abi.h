// Kernel interfaces newer than Debian 12's headers, as in Linux's include/uapi/linux/{fs,userfaultfd}.h.
// Names end in "Abi" or begin with k, so that they do not clash with headers that have them.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#include <cstddef>
#include <cstdint>

namespace baton::memory {

// struct page_region (linux/fs.h, Linux 6.7): addresses [start, end) that share categories.
struct PageRegionAbi {
  uint64_t start;
  uint64_t end;
  uint64_t categories;
};
static_assert(sizeof(PageRegionAbi) == 24);

// struct pm_scan_arg (linux/fs.h, Linux 6.7).
struct PagemapScanAbi {
  uint64_t size;
  uint64_t flags;
  uint64_t start;
  uint64_t end;
  uint64_t walk_end;  // set by the kernel: where the walk stopped
  uint64_t vec;       // PageRegionAbi*
  uint64_t vec_len;
  uint64_t max_pages;
  uint64_t category_inverted;
  uint64_t category_mask;
  uint64_t category_anyof_mask;
  uint64_t return_mask;
};
static_assert(sizeof(PagemapScanAbi) == 96 && offsetof(PagemapScanAbi, return_mask) == 88);

inline constexpr unsigned long kPagemapScan = _IOWR('f', 16, PagemapScanAbi);
static_assert(kPagemapScan == 0xc0606610);
// Write-protect the pages that match, in the same step in which they are reported.
inline constexpr uint64_t kScanWpMatching = 1u << 0;
// Fail with EPERM on memory that is not registered for asynchronous write protection.
inline constexpr uint64_t kScanCheckWpAsync = 1u << 1;
inline constexpr uint64_t kPageIsWritten = 1u << 1;

// linux/userfaultfd.h, Linux 5.19, 6.4 and 6.7.
inline constexpr uint64_t kUffdWpHugetlbfsShmem = 1u << 12;
inline constexpr uint64_t kUffdWpUnpopulated = 1u << 13;
inline constexpr uint64_t kUffdWpAsync = 1u << 15;
// ioctl of /dev/userfaultfd (Linux 6.1): a new userfaultfd for the caller's memory.
inline constexpr unsigned long kUserfaultfdIocNew = _IO(0xAA, 0x00);
// flag of userfaultfd(2) (Linux 5.11) that needs no privilege.
inline constexpr int kUffdUserModeOnly = 1;

static_assert(UFFDIO_API == 0xc018aa3f && UFFDIO_REGISTER == 0xc020aa00 && UFFDIO_UNREGISTER == 0x8010aa01 &&
              UFFDIO_WRITEPROTECT == 0xc018aa06);

// Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
inline constexpr uint64_t kPagemapSoftDirty = uint64_t{1} << 55;
inline constexpr uint64_t kPagemapSwapped = uint64_t{1} << 62;
inline constexpr uint64_t kPagemapPresent = uint64_t{1} << 63;

}  // namespace baton::memory
